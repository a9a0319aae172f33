// The picture: which steps are visible, and their SVG. It reads DATA, folded, chosen and lit, and calls choose and fold.

const svg = (tag, attributes = {}, text = "") => {
  const x = document.createElementNS("http://www.w3.org/2000/svg", tag)
  for (const k in attributes) x.setAttribute(k, attributes[k])
  if (text) x.textContent = text
  return x
}
const isPhone = () => innerWidth <= 640
const H = 62  // height of a step

// The boxes around a scope, innermost first.
function around(scope) {
  const out = []
  for (let s = scope; s in DATA.boxes; s = DATA.boxes[s].around) out.push(s)
  return out
}

// The key under which a step is visible: its own, or that of the outermost folded box around it.
function shownAs(path) {
  const closed = around(DATA.nodes[path].scope).filter(s => folded.has(s)).at(-1)
  return closed === undefined ? path : "box:" + closed
}

function visible() {
  const nodes = new Map()
  for (const path in DATA.nodes) {
    const key = shownAs(path), n = DATA.nodes[path]
    if (!nodes.has(key)) {
      const box = key === path ? undefined : key.slice(4)
      nodes.set(key, box === undefined ? { ...n, key, from: [] } : { key, box, name: DATA.boxes[box].label, scope: DATA.boxes[box].around, from: [] })
    }
    const from = nodes.get(key).from
    for (const f of n.from.map(shownAs)) if (f !== key && !from.includes(f)) from.push(f)
  }
  return sorted(nodes)
}

// In an order of computation: a box stands where its last source allows it.
function sorted(nodes) {
  const out = new Map(), put = k => { if (out.has(k) || put.open.has(k)) return; put.open.add(k); nodes.get(k).from.forEach(put); out.set(k, nodes.get(k)) }
  put.open = new Set()
  for (const k of nodes.keys()) put(k)
  const place = new Map([...out.keys()].map((k, i) => [k, i]))
  for (const [k, n] of out) n.from = n.from.filter(f => place.get(f) < place.get(k))
  return out
}

const lines = name => name.length > 12 && name.includes(" ") ? [name.slice(0, name.indexOf(" ")), name.slice(name.indexOf(" ") + 1)] : [name]
const nameOf = n => n.scope && !(n.scope in DATA.boxes) ? n.key : n.name
const widthOf = n => n.box === undefined ? Math.max(isPhone() ? 78 : 70, 16 + Math.max(7 * n.shape.join("×").length, 8.1 * nameOf(n).length)) : Math.max(80, 22 + 7.3 * Math.max(...lines(n.name).map(t => t.length)))

function draw() {
  const focus = document.activeElement?.dataset?.key, phone = isPhone(), nodes = visible(), width = k => widthOf(nodes.get(k))
  const L = place(nodes, k => phone ? width(k) : H, phone ? 12 : 16)
  const across = [...L.at].map(([k, a]) => [a, nodes.has(k) ? (phone ? width(k) : H) / 2 : 8])
  const least = Math.min(...across.map(([a, r]) => a - r)), most = Math.max(...across.map(([a, r]) => a + r))
  const depth = Math.max(0, ...[...nodes.values()].map(n => around(n.scope).length)), pad = 22 + 24 * depth, between = (phone ? 40 + 24 * Math.max(0, depth - 1) : 21) + 9 * Math.max(0, depth - 1), starts = []
  const spans = L.rows.map(row => phone ? H : Math.max(70, ...row.filter(k => nodes.has(k)).map(width)))
  const end = spans.reduce((t, v, i) => (starts[i] = t + v / 2, t + v + between), pad)
  const at = k => { const main = starts[L.layer.get(k)], cross = pad + 6 + L.at.get(k) - least; return phone ? [cross, main] : [main, cross] }
  const long = end - between + pad, wide = most - least + 2 * pad + 12, [w, h] = phone ? [wide, long] : [long, wide]
  const fit = ($("graph").clientWidth - 2) / w, scale = Math.max(.92, Math.min(1.15, fit))  // what does not fit scrolls, and stays readable
  const picture = svg("svg", { viewBox: `0 0 ${w} ${h}`, width: w * scale, height: h * scale, class: lit.nodes.size ? "dim" : "" })
  const titles = Object.keys(DATA.boxes).filter(scope => around(scope).every(s => !folded.has(s))).map(scope => drawBox(picture, scope, nodes, L, at, phone))
  for (const chain of L.chains) picture.append(svg("path", { d: curve(chain, nodes, at, k => spans[L.layer.get(k)] / 2, phone), class: "edge" + (lit.edges.has(chain[0] + "|" + chain.at(-1)) ? " lit" : ""), "data-edge": chain[0] + "|" + chain.at(-1) }))
  picture.append(...titles.filter(Boolean))  // over the edges
  for (const n of nodes.values()) picture.append(drawNode(n, nodes, ...at(n.key)))
  $("graph").replaceChildren(picture)
  if (focus) element(focus)?.focus()
}

function drawBox(picture, scope, nodes, L, at, phone) {
  const inside = k => nodes.has(k) && around(nodes.get(k).scope).includes(scope)
  const members = [...nodes.keys()].filter(inside)
  if (!members.length) return
  const deep = Math.max(...members.map(k => around(nodes.get(k).scope).length)) - around(scope).length  // boxes inside it
  const ends = members.map(k => [...at(k), widthOf(nodes.get(k)) / 2, H / 2])
  for (const c of L.chains) if (inside(c[0]) && inside(c.at(-1))) for (const k of c.slice(1, -1)) ends.push([...at(k), phone ? 4 : 0, phone ? 0 : 4])
  const grow = 7 + 6 * deep, top = 26 + 24 * deep
  const x = Math.min(...ends.map(e => e[0] - e[2])) - grow, y = Math.min(...ends.map(e => e[1] - e[3])) - top
  const right = Math.max(...ends.map(e => e[0] + e[2])) + grow, bottom = Math.max(...ends.map(e => e[1] + e[3])) + grow
  picture.append(svg("rect", { class: "module", "data-scope": scope, x, y, width: right - x, height: bottom - y, rx: 10 }))
  const { label } = DATA.boxes[scope], title = svg("g", { class: "title", tabindex: 0, role: "button", "data-key": "title:" + scope, "aria-label": `${label}, open; fold the box` })
  title.append(svg("rect", { x: x + 2, y: y + 1, width: Math.min(right - x - 4, 16 + 6.5 * label.length), height: 24, rx: 6 }), svg("text", { x: x + 8, y: y + 17 }, label))
  press(title, () => fold(scope))
  return title
}

// A curve that bends between the layers only, so that it crosses no step.
function curve(chain, nodes, at, half, phone) {
  const points = chain.flatMap(k => { const [x, y] = at(k), r = half(k); return nodes.has(k) ? [[x, y]] : phone ? [[x, y - r], [x, y + r]] : [[x - r, y], [x + r, y]] })
  if (phone) { points[0][1] += H / 2; points.at(-1)[1] -= H / 2 }
  else { points[0][0] += widthOf(nodes.get(chain[0])) / 2; points.at(-1)[0] -= widthOf(nodes.get(chain.at(-1))) / 2 }
  let d = `M${points[0]}`
  for (let i = 1; i < points.length; i++) {
    const [x, y] = points[i - 1], [u, v] = points[i]
    d += phone ? `C${x},${(y + v) / 2} ${u},${(y + v) / 2} ${u},${v}` : `C${(x + u) / 2},${y} ${(x + u) / 2},${v} ${u},${v}`
  }
  return d
}

function drawNode(n, nodes, x, y) {
  const box = n.box !== undefined, shape = box ? "" : n.shape.join("×") || "number", w = widthOf(n)
  const kind = ["node", n.given && "given", box && "folded", chosen === n.key && "open", lit.nodes.has(n.key) && "lit"].filter(Boolean).join(" ")
  const g = svg("g", { class: kind, transform: `translate(${x},${y})`, tabindex: 0, role: "button", "data-key": n.key, "aria-label": box ? `${n.name}, folded; open the box` : `${n.key}, ${shape}` })
  g.append(svg("rect", { x: -w / 2, y: -H / 2, width: w, height: H, rx: 8 }))
  if (box) {
    lines(n.name).forEach((t, i) => g.append(svg("text", { y: -10 + i * 15 }, t)))
    g.append(svg("text", { y: 24, class: "small" }, "open the box"))
  } else {
    g.append(svg("text", { y: -16 }, nameOf(n)), svg("text", { y: -3, class: "small" }, shape))
    if (n.value) g.append(heat(n.value, n.grad ? -29 : -13, 3))
    if (n.grad) g.append(heat(lit.of === n.key ? lit.sum : n.grad, 3, 3, largest(n.grad)))
  }
  press(g, () => choose(n.key))
  g.addEventListener("keydown", event => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key]
    const next = step > 0 ? [...nodes.values()].find(m => m.from.includes(n.key))?.key : step < 0 ? n.from[0] : undefined
    if (next) { event.preventDefault(); element(next)?.focus() }
  })
  return g
}

const largest = table => Math.max(...table.rows.flat().map(v => Math.abs(+v)).filter(isFinite), 1e-300)

function heat(table, x, y, top = largest(table), w = 26, h = 24) {
  const g = svg("g")
  const dy = h / table.rows.length, dx = w / (table.rows[0]?.length || 1)
  table.rows.forEach((row, i) => row.forEach((v, j) => {
    const known = isFinite(+v), fill = !known ? "var(--bad)" : v < 0 ? "var(--low)" : "var(--high)"
    g.append(svg("rect", { x: x + j * dx, y: y + i * dy, width: Math.max(dx - .4, .5), height: Math.max(dy - .4, .5), fill, "fill-opacity": known ? .07 + .93 * Math.min(1, Math.abs(+v) / top) : 1 }))
  }))
  return g
}

const element = key => $("graph").querySelector(`[data-key="${CSS.escape(key)}"]`)

function press(x, action) {
  x.addEventListener("click", action)
  x.addEventListener("keydown", event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); action() } })
}
