"use strict"
// Places for the steps, as in layout.py: layers by the longest way, a dummy in each layer that an edge passes, order by
// the mean of the neighbours, and the longest way of all as a straight line. `nodes` is a Map of keys to {from, given, scope}.

function place(nodes, size, gap) {
  const layer = layers(nodes), chains = bend(nodes, layer), rows = [], before = new Map(), after = new Map(), at = new Map()
  for (const [k, l] of layer) { (rows[l] ||= []).push(k); before.set(k, []); after.set(k, []) }
  for (const c of chains) for (let i = 1; i < c.length; i++) { after.get(c[i - 1]).push(c[i]); before.get(c[i]).push(c[i - 1]) }
  const spine = longest(nodes, layer)
  const side = k => spine.has(k) ? 0 : nodes.get(k)?.given ? -1 : 1
  const room = k => nodes.has(k) ? size(k) : 14
  const mean = keys => keys.reduce((t, k) => t + at.get(k), 0) / keys.length
  for (const row of rows) row.sort((a, b) => side(a) - side(b)).forEach((k, i) => at.set(k, i))
  for (let sweep = 0; sweep < 12; sweep++) {
    const near = sweep % 2 ? after : before
    for (const row of sweep % 2 ? rows.toReversed() : rows) {
      const wanted = new Map(row.map(k => [k, near.get(k).length ? mean(near.get(k)) : at.get(k)]))
      row.sort((a, b) => side(a) - side(b) || wanted.get(a) - wanted.get(b))
      const on = row.findIndex(k => spine.has(k)), zero = Math.max(0, on), d = row.map(() => 0)
      for (let i = zero + 1; i < row.length; i++) d[i] = d[i - 1] + (room(row[i]) + room(row[i - 1])) / 2 + gap
      for (let i = zero - 1; i >= 0; i--) d[i] = d[i + 1] - (room(row[i]) + room(row[i + 1])) / 2 - gap
      const shift = on >= 0 ? 0 : (d[0] + d.at(-1)) / 2
      row.forEach((k, i) => at.set(k, d[i] - shift))
    }
  }
  for (const c of chains) {  // a far edge keeps one distance all its length, where it is the outermost
    const inner = c.slice(1, -1), far = Math.max(...inner.map(k => at.get(k)))
    for (const k of inner) if (rows[layer.get(k)].at(-1) === k) at.set(k, far)
  }
  return { layer, at, chains, rows }
}

function layers(nodes) {
  const layer = new Map(), users = new Map()
  for (const [k, n] of nodes) layer.set(k, Math.max(-1, ...n.from.map(f => layer.get(f) ?? 0)) + 1)  // in an order of computation
  for (const [k, n] of nodes) for (const f of n.from) if (!users.has(f) || layer.get(k) < layer.get(users.get(f))) users.set(f, k)
  for (const [k, n] of nodes) if (!n.from.length && users.has(k)) {  // beside its first use, but outside a box that it is not in
    const user = nodes.get(users.get(k)), outside = user.scope !== n.scope && user.from.some(f => nodes.get(f).given && nodes.get(f).scope === user.scope)
    layer.set(k, layer.get(users.get(k)) - (outside ? 2 : 1))
  }
  const least = Math.min(0, ...layer.values())
  for (const [k, l] of layer) layer.set(k, l - least)
  return layer
}

const dummy = (f, k, l) => `${f} to ${k}, layer ${l}`

function bend(nodes, layer) {
  const chains = []
  for (const [k, n] of nodes) for (const f of n.from) {
    const chain = [f]
    for (let l = layer.get(f) + 1; l < layer.get(k); l++) { layer.set(dummy(f, k, l), l); chain.push(dummy(f, k, l)) }
    chains.push([...chain, k])
  }
  return chains
}

function longest(nodes, layer) {
  const last = keys => keys.reduce((a, k) => a === undefined || layer.get(k) > layer.get(a) ? k : a, undefined), spine = new Set()
  for (let k = last([...nodes.keys()]); k !== undefined && !spine.has(k);) {  // a box that is used twice may come after itself
    spine.add(k)
    const from = nodes.get(k).from, computed = from.filter(f => !nodes.get(f).given)
    const f = last(computed.length ? computed : from.slice(0, 1))
    if (f !== undefined) for (let l = layer.get(f) + 1; l < layer.get(k); l++) spine.add(dummy(f, k, l))
    k = f
  }
  return spine
}
