// What is chosen: a step's formula and numbers, folding, and the paths of a gradient one by one.

const $ = id => document.getElementById(id)
const DATA = JSON.parse($("data").textContent)
const folded = new Set(Object.keys(DATA.boxes).filter(s => !DATA.boxes[s].open))
let chosen = null, way = -1, lit = { nodes: new Set(), edges: new Set() }

const el = (tag, properties = {}, ...children) => { const x = Object.assign(document.createElement(tag), properties); x.append(...children); return x }
const short = v => typeof v !== "number" || (Number.isInteger(v) && Math.abs(v) < 1e6) ? String(v) : (v && Math.abs(v) < 1e-3) || Math.abs(v) >= 1e6 ? v.toExponential(2) : Math.abs(v) < 1 ? v.toFixed(4) : v.toPrecision(5)

function numbers(t, name, top = t && largest(t)) {
  if (!t) return el("p", { textContent: "none reaches it" })
  const tint = v => isFinite(+v) ? `color-mix(in srgb, var(--${v < 0 ? "low" : "high"}) ${40 * Math.abs(+v) / top}%, transparent)` : "color-mix(in srgb, var(--bad) 30%, transparent)"
  const rows = t.rows.map(r => el("tr", {}, ...r.map(v => el("td", { textContent: short(v), title: String(v), style: `background: ${tint(v)}` }))))
  const columns = t.rows[0]?.length ?? 0, cut = t.of[0] > t.rows.length || t.of[1] > columns
  return el("div", { className: "scroll" + (columns > 3 ? " cut" : ""), tabIndex: 0, role: "group", ariaLabel: `${name}, scrolls` }, el("table", { className: "numbers", ariaLabel: name }, el("tbody", {}, ...rows)), ...(cut ? [el("p", { textContent: `the first ${t.rows.length} × ${columns} of ${t.of.join(" × ")}` })] : []))
}

function choose(key) {
  if (key.startsWith("box:")) { unfold(key.slice(4)); return }
  chosen = key
  const n = DATA.nodes[key], users = Object.keys(DATA.nodes).filter(u => DATA.nodes[u].from.includes(key))
  const links = keys => keys.length ? keys.map(k => el("button", { textContent: k, onclick: () => { show(k); choose(k) } })) : [el("span", { textContent: "none" })]
  const place = [n.shape.join("×") || "number", n.dtype, n.line].filter(Boolean).join(" · ")
  $("panel").replaceChildren(
    el("div", { className: "head" }, el("div", {}, el("h2", { textContent: key }), el("span", { textContent: place })), el("button", { textContent: "Close", onclick: shut })),
    el("h3", { textContent: "How it is computed, and the rule of its gradient" }),
    ...(n.ops.length ? n.ops.map(o => el("div", { className: "op" }, el("code", { textContent: o.call }), el("code", { className: "rule", textContent: o.rule }))) : [el("div", { textContent: "It is given." })]),
    el("div", { className: "columns" }, el("div", {}, el("h3", { textContent: "Value" }), numbers(n.value, "value")), el("div", {}, el("h3", { textContent: "Gradient" }), numbers(n.grad, "gradient"))),
    el("div", { className: "bar" }, el("span", { textContent: "computed from" }), ...links(n.from)),
    el("div", { className: "bar" }, el("span", { textContent: "used by" }), ...links(users)))
  $("panel").hidden = false
  draw()
  const box = element(shownAs(key))?.getBoundingClientRect(), low = innerHeight * .45  // not behind the sheet of a phone
  if (box && isPhone() && (box.bottom > low || box.top < 0)) scrollBy(0, box.bottom - low + 12)
}

function shut() { const key = chosen; chosen = null; $("panel").hidden = true; draw(); element(key)?.focus() }
function show(path) { for (const s of around(DATA.nodes[path].scope)) folded.delete(s) }
function fold(scope) { folded.add(scope); draw(); element("box:" + scope)?.focus() }
function unfold(scope) { folded.delete(scope); draw(); element("title:" + scope)?.focus() }

// The shortest way from a to b that meets no other step of a path.
function route(a, b, blocked) {
  const next = new Map([[b, null]]), todo = [b]
  for (const k of todo) { if (k === a) break; for (const f of DATA.nodes[k].from) if (!next.has(f) && (f === a || !blocked.has(f))) { next.set(f, k); todo.push(f) } }
  const out = []
  for (let k = a; next.has(k) && k !== null; k = next.get(k)) out.push(k)
  return out
}

function light(i) {
  const of = $("of").value, all = DATA.paths[of]
  way = i
  lit = { nodes: new Set(), edges: new Set() }
  $("done").hidden = $("way").hidden = i < 0
  $("next").textContent = i < 0 ? "Show the first path" : i < all.length - 1 ? "Add the next path" : "Start again"
  if (i >= 0) {
    const path = all[i], blocked = new Set(all.flatMap(p => p.steps)), stops = [...path.steps, DATA.result]
    path.steps.forEach(show)
    for (let j = 1; j < stops.length; j++) {
      const keys = route(stops[j - 1], stops[j], blocked).map(shownAs)
      keys.forEach((k, m) => { lit.nodes.add(k); if (m) lit.edges.add(keys[m - 1] + "|" + k) })
    }
    const add = (a, b) => ({ of: a.of, rows: a.rows.map((r, y) => r.map((v, x) => +v + +b.rows[y][x])) })
    lit.of = of
    lit.sum = all.slice(0, i + 1).map(p => p.share).reduce(add)  // what has flowed into the gradient, which the graph shows
    const top = Math.max(...[path.share, lit.sum, DATA.nodes[of].grad].map(largest))  // of all three, so that colours compare
    const last = i === all.length - 1, parts = [["This path", "Share of this path", path.share], ["Sum so far", "Sum of the paths so far", lit.sum], [(last ? "= " : "") + `∂${of}`, `Gradient of ${of}`, DATA.nodes[of].grad]]
    $("way").replaceChildren(el("h2", { textContent: `Path ${i + 1} of ${all.length}` }), el("code", { textContent: path.label }),
      el("div", { className: "columns" }, ...parts.map(([title, name, t], j) => el("div", { className: j === 1 || last && j ? "sum" : "" }, el("h3", { textContent: title, title: name }), numbers(t, name, top)))))
  }
  draw()
  if (i >= 0) center(shownAs(of))
}

// Bring a step into the part of the graph that is seen.
function center(key) {
  const graph = $("graph"), a = graph.getBoundingClientRect(), b = element(key)?.getBoundingClientRect()
  if (b && (b.left < a.left || b.right > a.right - a.width / 2)) graph.scrollLeft += b.left - a.left - 60
}

function start() {
  for (const k in DATA.paths) $("of").append(el("option", { textContent: k }))
  $("ways").hidden = !Object.keys(DATA.paths).length
  $("boxes").hidden = !Object.keys(DATA.boxes).length
  $("of").onchange = $("done").onclick = () => light(-1)
  $("next").onclick = () => light(way + 1 < DATA.paths[$("of").value].length ? way + 1 : 0)
  $("open-all").onclick = () => { folded.clear(); draw() }
  $("fold-all").onclick = () => { for (const s in DATA.boxes) folded.add(s); draw() }
  const [head, ...rows] = DATA.memory
  $("memory").append(el("table", {}, el("thead", {}, el("tr", {}, ...head.map(t => el("th", { textContent: t, scope: "col" })))), el("tbody", {}, ...rows.map(r => el("tr", {}, ...r.map(t => el("td", { textContent: t })))))))
  $("help").open = !isPhone()
  addEventListener("keydown", event => { if (event.key === "Escape" && chosen) shut() })
  let width = innerWidth
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; draw() } })
  draw()
}
start()
