"""Differentiating: the chain rule over the nodes that `tensor` recorded.

`backward` and `grad` walk from a result back to its leaves. In a plain backward pass gradients are arrays, and rules
compute with arrays. With `create_graph` they are tensors, so each gradient has a graph and can be differentiated again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, overload

from tinygrad_bn import backend, errors, gradient_hooks
from tinygrad_bn.arguments import flag, full_name
from tinygrad_bn.modes import call_recording, recording
from tinygrad_bn.tensor import OPS, Node, Tensor, apply


def backward(y: Tensor, g: object, *, retain_graph: bool | None, create_graph: bool) -> None:
    """See `Tensor.backward`."""
    keep = create_graph if retain_graph is None else flag("retain_graph", retain_graph)
    call_recording(create_graph, _accumulate, y, _cotangent(y, g), create_graph, not keep)


def _accumulate(y: Tensor, g: Tensor, create_graph: bool, free: bool) -> None:
    order = _topological(y)
    wanted = [t for t in order if (t.node is None and t._requires_grad) or t._retains_grad]
    grads = _backprop(y, g, order, wanted, create_graph, free)
    for t, gt in _separate({t: grads[t] for t in wanted if t in grads}, g).items():
        with backend.updating:
            t._grad = gt if t._grad is None else t._grad + gt


@overload
def grad(y: Tensor, xs: Tensor, g: object = None, create_graph: bool = False) -> Tensor: ...
@overload
def grad(y: Tensor, xs: Sequence[Tensor], g: object = None, create_graph: bool = False) -> list[Tensor]: ...
def grad(y: Tensor, xs: Any, g: object = None, create_graph: bool = False) -> Tensor | list[Tensor]:
    """The vector-Jacobian product g · ∂y/∂x for each x of `xs`; no tensor's `grad` is touched.

    The graph stays as long as `y` does. Only the part between `y` and `xs` is computed.

    Args:
        y: the tensor to differentiate.
        xs: the tensors to differentiate by, anywhere in the graph; for one tensor, one gradient is returned.
        g: the cotangent, of `y`'s shape; by default 1, for a tensor of one element.
        create_graph: make the gradients differentiable themselves, for derivatives of higher order.

    Returns:
        The gradient of each x, in its shape and dtype; zeros for an x that `y` does not depend on.

    Raises:
        RuntimeError: `y`, or one of `xs`, does not require a gradient; or see `Tensor.backward`.
        TypeError: `y` or one of `xs` is not a tensor.
        ValueError: `xs` is empty; or `g` is missing or has the wrong shape.

    >>> x = Tensor(3.0, requires_grad=True)
    >>> dx = grad(x**4, x, create_graph=True)
    >>> dx.item(), grad(dx, x).item()
    (108.0, 108.0)
    """
    wanted = list(xs) if isinstance(xs, Iterable) and not isinstance(xs, Tensor) else [xs]
    if wrong := [t for t in (y, *wanted) if not isinstance(t, Tensor)]:
        raise TypeError(f"grad() differentiates a tensor by tensors; got {full_name(wrong[0])}")
    if not wanted:
        raise ValueError("grad() got no tensor to differentiate by: xs is empty")
    for i, x in enumerate(wanted):
        if not x.requires_grad:
            raise RuntimeError(f"xs[{i}], of shape {x.shape}, does not require a gradient: set its requires_grad")
    cotangent = _cotangent(y, g)
    walk = y, cotangent, _topological(y), wanted, create_graph
    grads = call_recording(create_graph, lambda: _separate(_backprop(*walk), cotangent))
    out = [grads[x] if x in grads else Tensor._of(backend.full(x._data, 0)) for x in wanted]
    return out[0] if isinstance(xs, Tensor) else out


def _cotangent(y: Tensor, g: object) -> Tensor:
    """`g` as a tensor of the shape and dtype of `y`; 1 if it is None and `y` has one element."""
    if not y.requires_grad:
        raise RuntimeError(errors.NO_GRAPH.format(y.shape))
    if g is None:
        if y.size != 1:
            raise ValueError(errors.COTANGENT.format(y.shape))
        return Tensor._of(backend.full(y._data, 1))
    g = g if isinstance(g, Tensor) else Tensor(g)
    if g.shape != y.shape:
        raise ValueError(f"the cotangent has shape {g.shape}, the tensor {y.shape}; they must be equal")
    backend.expect_one_place((y._data, g._data))
    return g if g.dtype == y.dtype else g.astype(y.dtype)


def _topological(y: Tensor, stop: Iterable[Tensor] = ()) -> list[Tensor]:
    """The tensors that `y` was computed from, operands first, `y` last; nothing behind those of `stop`.

    Iterative, since a graph may be far deeper than Python's stack. A tensor must come after everything that uses
    it: if `b = a + a; c = b + b` were walked in any other order, `b` would pass on only half of its gradient.
    """
    order: list[Tensor] = []
    seen = set(stop)
    todo = [(y, False)]
    while todo:
        t, finished = todo.pop()
        if finished:
            order.append(t)
        elif t not in seen:
            seen.add(t)
            if t.node is None:
                order.append(t)
                continue
            if not t.node.inputs:
                raise RuntimeError(errors.FREED.format(t.node.op.name))
            todo.append((t, True))
            for x, need in zip(t.node.inputs, t.node.needs, strict=True):
                if need and x not in seen:
                    todo.append((x, False))
    return order


def _backprop(
    y: Tensor, g: Tensor, order: list[Tensor], wanted: Iterable[Tensor], create_graph: bool, free: bool = False
) -> dict[Tensor, Any]:
    """The gradient of every wanted tensor: arrays, or tensors with `create_graph`. Empties `order`.

    To be called by `call_recording(create_graph, …)`.
    """
    run = apply if create_graph else backend.forward  # on tensors, or on arrays
    wanted = set(wanted)
    leads = set(wanted)  # the tensors on a way from y to a wanted one
    for t in order:
        if (node := t.node) is not None:
            for x, need in zip(node.inputs, node.needs, strict=True):
                if need and x in leads:
                    leads.add(t)
                    _expect_unchanged(t, node)  # before anything is computed, or freed
                    break
    grads: dict[Tensor, Any] = {y: g if create_graph else g._data}
    while order:
        t = order.pop()
        if gradient_hooks.HOOKS:
            gradient_hooks.call(t, grads, Tensor._of)
        if (node := t.node) is None or t not in leads or t not in grads:
            continue
        gt = grads[t] if t in wanted else grads.pop(t)
        needs = [need and x._requires_grad and x in leads for x, need in zip(node.inputs, node.needs, strict=True)]
        if True in needs:
            try:
                pulled = zip(node.inputs, _pull(t, node, gt, needs, create_graph), strict=True)
                gxs = [(x, _fit(gx, x, run)) for x, gx in pulled if gx is not None]
            except Exception as error:
                _add_notes(error, node)
                raise
            for x, gx in gxs:
                grads[x] = run(OPS["add"], (grads[x], gx), {})[0] if x in grads else gx
        leads.discard(t)  # frees t and its array as soon as its gradient has been passed on
        if free:
            node.free()
    return {t: grads[t] for t in wanted if t in grads}


def _pull(t: Tensor, node: Node, g: Any, needs: list[bool], create_graph: bool) -> Sequence[Any]:
    """One step back from `t`: the gradient of each operand of its op, or None where `needs` is False."""
    op = node.op
    if not create_graph:
        gxs = backend.vjp(op, g, t._data, node.arrays, node.params, needs, node.saved)
        if gxs is not NotImplemented:
            return gxs
    elif op.rules or op.each:
        return backend.pull(op, g, t, node.inputs, needs, node.params)
    return _pull_composition(node, g, needs, create_graph)


def _pull_composition(node: Node, g: Any, needs: list[bool], create_graph: bool) -> list[Any]:
    """Differentiate a fused op as its composition, with respect to handles of its operands.

    Each operand gets a handle of its own, and the walk ends there. Otherwise a tensor passed twice, or a weight
    computed from x, would be counted twice.
    """
    op, reshape = node.op, OPS["reshape"]
    with recording(True):
        handles = [apply(reshape, (x,), {"shape": x.shape})[0] if isinstance(x, Tensor) else x for x in node.inputs]
        y, _ = op.split(op.forward(*handles, **node.params))
    if isinstance(y, int | float):  # a constant
        return [None] * len(needs)
    if not isinstance(y, Tensor):
        raise TypeError(f"{op.name} made a {type(y).__name__} of tensors, which loses their gradients: use ops instead")
    inside = [h for h, need in zip(handles, needs, strict=True) if need]
    order = _topological(y, stop=(h for h in handles if isinstance(h, Tensor)))
    grads = _backprop(y, g if isinstance(g, Tensor) else Tensor._of(g), order, inside, create_graph)
    return [grads.get(h) if need else None for h, need in zip(handles, needs, strict=True)]


def _fit(gx: Any, x: Tensor, run: Any) -> Any:
    """Undo broadcasting and promotion of the operand `x`: its gradient gets its shape and dtype."""
    gx = gx if isinstance(gx, Tensor) else backend.as_array(gx)
    if gx.shape != x._data.shape:
        backend.expect_broadcast(x.shape, gx.shape)
        gx = run(OPS["sum_to"], (gx,), {"shape": x.shape})[0]
    return gx if gx.dtype == x._data.dtype else run(OPS["astype"], (gx,), {"dtype": x.dtype})[0]


def _separate(grads: dict[Tensor, Any], cotangent: Tensor) -> dict[Tensor, Tensor]:
    """The gradients as tensors that share no memory with each other or with the cotangent."""
    out: dict[Tensor, Tensor] = {}
    taken = {id(cotangent._data)}
    for t, g in grads.items():
        gt = g if isinstance(g, Tensor) else Tensor._of(g)
        if not backend.owns_memory(gt._data) or id(gt._data) in taken:
            gt = gt + 0 if gt._requires_grad else Tensor(gt)
        taken.add(id(gt._data))
        out[t] = gt
    return out


def _expect_unchanged(t: Tensor, node: Node) -> None:
    """Raise unless the operands and the result are the arrays of the forward pass."""
    for x, seen in ((t, node.output), *zip(node.inputs, node.arrays, strict=True)):
        if x is not seen and x._data is not seen:  # a number is its own array
            error = RuntimeError(errors.CHANGED.format(node.op.name, x.shape))
            _add_notes(error, node)
            raise error


def _add_notes(error: Exception, node: Node) -> None:
    """Name the op and, in debug mode, the place of its call."""
    error.add_note(f"in the backward pass of {backend.describe(node.op, node.arrays, node.params)}")
    if node.caller:
        error.add_note(f"whose forward pass was called here:\n{node.caller}")
