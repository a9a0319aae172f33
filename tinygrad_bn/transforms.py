"""Functions of functions: derivatives in every combination and of every order.

They take ordinary functions of tensors and give functions of tensors, as in JAX and `torch.func`. Each differentiates
by its own arguments alone: a tensor that the function reads from elsewhere is a constant, but keeps its graph for a
gradient around this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import numpy as np

from tinygrad_bn import autograd, backend
from tinygrad_bn.arguments import expect_integer, full_name, is_floating, shown
from tinygrad_bn.batching import behind, gradients, leaf, spread
from tinygrad_bn.batching import vmap as vmap
from tinygrad_bn.captured.nests import mapped
from tinygrad_bn.functional import concatenate, stack
from tinygrad_bn.modes import recording
from tinygrad_bn.nn.module import Buffer, Module
from tinygrad_bn.ops import mul, reshape, sum
from tinygrad_bn.recompute import checkpoint as checkpoint
from tinygrad_bn.tensor import Tensor

__all__ = [
    "checkpoint", "functional_call", "grad", "hessian", "hvp", "jacobian", "jvp", "value_and_grad", "vjp", "vmap",
]  # fmt: skip

Function = Callable[..., Any]

ROWS = 64  # of a Jacobian in one pass back: more take more memory, and are not faster


def value_and_grad(function: Function, argnums: int | Sequence[int] = 0) -> Function:
    """A function that gives the value of `function` and its gradient.

    Args:
        function: it returns a tensor of one element, the value; or a tuple (value, anything): then only the value is
            differentiated.
        argnums: the position of the argument to differentiate by, or several of them: then the gradient is a tuple. An
            argument is a floating-point tensor, array or number, or a nest of such in tuples, lists and dictionaries;
            its gradient has the same form.

    Raises, when called:
        TypeError: an argument to differentiate by is not floating-point, or the result is no tensor.
        ValueError: the result has several elements, or there is no argument at a position.

    >>> value, dx = value_and_grad(lambda x, y: (x * x * y).sum())(np.array([1.0, 2.0]), 3.0)
    >>> value.item(), dx.numpy().tolist()
    (15.0, [6.0, 12.0])
    """

    @wraps(function)
    def differentiated(*args: Any, **options: Any) -> tuple[Any, Any]:
        with recording(True):
            opened, chosen = _open(args, argnums)
            result = function(*opened, **options)
            y = _value(result[0] if isinstance(result, tuple) and result else result)
            if y.size != 1:
                raise ValueError(f"a gradient is that of one number; the function gave shape {y.shape}: see jacobian")
            g = Tensor._of(backend.full(y._data, 1))
            pulled = _closed(chosen, _pull([y], chosen, [g]))
        value = _kept(y, chosen)
        if not isinstance(result, tuple):
            return value, pulled
        others = mapped(lambda v: _kept(v, chosen) if isinstance(v, Tensor) else v, result[1:])
        return (value, *others), pulled

    return differentiated


def grad(function: Function, argnums: int | Sequence[int] = 0) -> Function:
    """A function that gives the gradient of `function`; arguments and errors as of `value_and_grad`.

    >>> third = grad(grad(grad(lambda x: x**4)))
    >>> third(2.0).item()
    48.0
    """
    both = value_and_grad(function, argnums)

    @wraps(function)
    def differentiated(*args: Any, **options: Any) -> Any:
        return both(*args, **options)[1]

    return differentiated


def vjp(function: Function, *primals: Any) -> tuple[Any, Function]:
    """The result of `function(*primals)`, and a function from its cotangent to those of the primals, a tuple.

    Args:
        function: it returns a tensor, or a nest of tensors. The cotangent has the same form and shapes.
        primals: as the arguments of `value_and_grad`.

    >>> y, pull = vjp(lambda x: x * x, np.array([1.0, 2.0]))
    >>> pull(np.array([1.0, 10.0]))[0].numpy().tolist()
    [2.0, 40.0]
    """
    with recording(True):
        opened, chosen = _open(primals, range(len(primals)))
        result = function(*opened)
    outputs = [_value(y) for y in _leaves(result)]

    def pull(cotangent: Any) -> tuple[Any, ...]:
        """Cotangents of the primals."""
        with recording(True):
            return tuple(_closed(chosen, _pull(outputs, chosen, _matching(cotangent, result, outputs))))

    return mapped(lambda y: _kept(y, chosen), result), pull


def jvp(function: Function, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """The result of `function(*primals)`, and its derivative in the direction `tangents`.

    Forward mode by two passes back (Townsend 2017): the vjp is linear in its cotangent u, and the gradient by u of
    ⟨vjp(u), tangents⟩ is the jvp. So no op needs a second rule, and it is right at every order. It costs about three
    times a gradient.

    Args:
        function, primals: as of `vjp`. The derivative of an integer result is 0, of its dtype.
        tangents: of the form and the shapes of the primals.

    Raises:
        TypeError: primals or tangents are no tuple.

    >>> y, dy = jvp(lambda x: x**3, (2.0,), (1.0,))
    >>> y.item(), dy.item()
    (8.0, 12.0)
    """
    for name, given in (("primals", primals), ("tangents", tangents)):
        if not isinstance(given, tuple | list):
            raise TypeError(f"{name} holds one entry for each argument, in a tuple; got {full_name(given)}")
    with recording(True):
        opened, chosen = _open(primals, range(len(primals)))
        result = function(*opened)
        outputs = [y for y in map(_value, _leaves(result)) if is_floating(y)]
        handles = [h for _, hs in chosen for h in hs]
        directions = _matching(tuple(tangents), tuple(primals), handles)
        cotangents = [_handle(Tensor(np.zeros(y.shape, y.dtype)).to(y.device)) for y in outputs]
        pulled = _gradients_of(outputs, handles, cotangents, create_graph=True)
        create = _reaches_beyond([*pulled, *directions], [*handles, *cotangents])
        moved = _gradients_of(pulled, cotangents, directions, create)
    at = iter([m if create else m.detach() for m in moved])

    def derivative(y: Tensor) -> Tensor:
        return next(at) if is_floating(y) else Tensor._of(backend.full(y._data, 0))

    return mapped(lambda y: _kept(y, chosen), result), mapped(derivative, result)


def hvp(function: Function, primal: Any, tangent: Any) -> Any:
    """The Hessian of `function` at `primal` times `tangent`: the gradient of ⟨gradient, tangent⟩, in the form of both.

    >>> hvp(lambda x: (x**3).sum(), np.array([1.0, 2.0]), np.array([1.0, 1.0])).numpy().tolist()
    [6.0, 12.0]
    """
    first = grad(function)

    def along(x: Any) -> Tensor:
        slopes = _leaves(first(x))
        if not slopes:
            raise ValueError("there is nothing to differentiate by: the primal holds no tensors")
        directions = _matching(tangent, x, slopes)
        products = [sum(mul(slope, v)) for slope, v in zip(slopes, directions, strict=True)]
        total = products[0]
        for product in products[1:]:
            total = total + product
        return total

    return grad(along)(primal)


def jacobian(function: Function, argnums: int = 0) -> Function:
    """A function that gives the derivative of each element of the result of `function`, a tensor.

    For a result of shape R and an argument of shape S its shape is (*R, *S). It takes a pass back
    for every 64 elements of the result. Arguments and errors as of `value_and_grad`; the argument is no nest.

    >>> jacobian(lambda x: x * x)(np.array([1.0, 2.0])).numpy().tolist()
    [[2.0, 0.0], [0.0, 4.0]]
    """

    @wraps(function)
    def differentiated(*args: Any, **options: Any) -> Tensor:
        position = expect_integer("argnums", argnums, 0)
        with recording(True):
            opened, chosen = _open(args, position)
            y = _value(function(*opened, **options))
            [(_, handles)] = chosen
            if len(handles) != 1 or not isinstance(opened[position], Tensor):
                raise TypeError(f"a jacobian is that by one tensor; argument {position} is {shown(args[position])}")
            every = np.eye(y.size, dtype=y.dtype).reshape(y.size, *y.shape)
            parts = [_rows(y, chosen, Tensor(every[i : i + ROWS]).to(y.device)) for i in range(0, y.size, ROWS)]
            shape = (*y.shape, *handles[0].shape)
            return reshape(concatenate(parts), shape=shape) if parts else Tensor(np.zeros(shape, y.dtype))

    return differentiated


def _rows(y: Tensor, chosen: Chosen, cotangents: Tensor) -> Tensor:
    """Rows of a Jacobian: all at once, or one by one if an op on the way has no rule for batches."""

    def pull(g: Tensor) -> Tensor:
        return _pull([y], chosen, [g])[0]

    try:
        rows: Tensor = vmap(pull)(cotangents)
    except NotImplementedError:
        return stack([pull(g) for g in cotangents])
    return rows


def hessian(function: Function, argnums: int = 0) -> Function:
    """A function that gives all second derivatives of `function`, whose value is one number: (*S, *S) for shape S.

    >>> hessian(lambda x: (x**3).sum())(np.array([1.0, 2.0])).numpy().tolist()
    [[6.0, 0.0], [0.0, 12.0]]
    """
    return jacobian(grad(function, argnums), argnums)


# ---- modules --------------------------------------------------------------------------------------------


def functional_call(model: Module, state: Mapping[str, Any], *args: Any, **options: Any) -> Any:
    """`model(*args, **options)` with other parameters and buffers: the function of them that a module is.

    Args:
        model: it is left as it was, with its running statistics. No other thread may use it at the same time.
        state: tensors or arrays under the keys of `state_dict`; the model's own stand in for those that are missing.
            A buffer among them is not updated either. A shared tensor may be given under any of its keys.

    Raises:
        KeyError: there is no parameter or buffer of a name.
        ValueError: one has another shape than the model's; or a shared tensor is given two values.

    >>> from tinygrad_bn import nn
    >>> layer = nn.Linear(2, 1, bias=False)
    >>> loss = lambda weight: functional_call(layer, {"weight": weight}, np.ones((1, 2))).sum()
    >>> grad(loss)(np.array([[3.0, 4.0]])).numpy().tolist()
    [[1.0, 1.0]]
    """
    with _holding(model, state):
        return model(*args, **options)


@contextmanager
def _holding(model: Module, state: Mapping[str, Any]) -> Iterator[None]:
    """The tensors of `state` in the place of the model's, and copies of its other buffers."""
    own = dict(model.named_tensors())
    if unknown := [name for name in state if name not in own]:
        raise KeyError(f"{type(model).__name__} has no {', '.join(unknown)}; it has {', '.join(own)}")
    given: dict[Tensor, Any] = {}
    for name, value in state.items():
        first = given.setdefault(own[name], value)
        if first is not value and not _equal_constants(first, value):
            names = [other for other, t in own.items() if t is own[name]]
            raise ValueError(f"{' and '.join(names)} are one parameter or buffer; give one value for it")
    held = {t: _stand_in(name, t, given.get(t, t)) for name, t in own.items()}
    places = [
        (module, attribute, t)
        for module in model.modules()
        for attribute, t in vars(module).items()
        if isinstance(t, Tensor) and t in held
    ]
    try:
        for module, attribute, t in places:
            vars(module)[attribute] = held[t]
        yield
    finally:
        for module, attribute, t in places:
            vars(module)[attribute] = t


def _equal_constants(a: Any, b: Any) -> bool:
    """Whether both hold the same numbers and get no gradient, as the two entries of a shared tensor in `state_dict`."""
    if any(isinstance(v, Tensor) and v.requires_grad for v in (a, b)):
        return False
    first, second = (backend.to_numpy(v._data if isinstance(v, Tensor) else v) for v in (a, b))
    return np.array_equal(first, second, equal_nan=True)


def _stand_in(name: str, t: Tensor, value: Any) -> Tensor:
    """The value that a module uses in the place of its tensor; a new one for a buffer, as the module may change it."""
    value = value if isinstance(value, Tensor) else Tensor(value)
    if value.shape != t.shape:
        raise ValueError(f"{name} has the shape {t.shape}; got {value.shape}")
    if not isinstance(t, Buffer):
        return value
    return reshape(value, shape=value.shape) if value.requires_grad else value.detach()


# ---- arguments and results ------------------------------------------------------------------------------

Chosen = list[tuple[Any, list[Tensor]]]  # of each chosen argument, its form with handles, and these in order


def _open(args: Sequence[Any], argnums: int | Sequence[int]) -> tuple[list[Any], Chosen]:
    """The arguments with handles in place of what to differentiate by."""
    single = isinstance(argnums, int | np.integer)
    positions: list[Any] = [argnums] if single else list(argnums)  # type: ignore[arg-type]
    opened, chosen = list(args), _One() if single else []
    if len(set(positions)) < len(positions):
        raise ValueError(f"argnums names an argument twice: {shown(argnums)}")
    for i in positions:
        i = expect_integer("argnums", i, 0)
        if i >= len(args):
            raise ValueError(f"there is no argument {i} to differentiate by; the function was given {len(args)}")
        handles: list[Tensor] = []

        def handle(x: Any, i: int = i, handles: list[Tensor] = handles) -> Tensor:
            handles.append(_handle(x, f"argument {i}"))
            return handles[-1]

        opened[i] = mapped(handle, args[i])
        chosen.append((opened[i], handles))
    return opened, chosen


class _One(list[tuple[Any, list[Tensor]]]):
    """What was chosen by one number, so that its gradient is no tuple."""


def _handle(x: Any, what: str = "an argument") -> Tensor:
    """A tensor of the values of x to differentiate by. Behind it lies the graph of x, if there is one."""
    if not isinstance(x, Tensor):
        x = Tensor(x)
    if not is_floating(x):
        raise TypeError(f"{what} has to be floating-point to be differentiated by; got {x.dtype}")
    x = spread(x)
    return reshape(x, shape=x.shape) if x.requires_grad else leaf(x)


def _value(y: Any) -> Tensor:
    if not isinstance(y, Tensor):
        raise TypeError(f"a function to differentiate has to return tensors; it returned {full_name(y)}")
    return y


def _leaves(nest: Any) -> list[Any]:
    out: list[Any] = []
    mapped(out.append, nest)
    return out


def _matching(given: Any, form: Any, like: list[Tensor]) -> list[Tensor]:
    """The tensors of a nest that has the form of another, and the shapes of `like`."""
    if _form(given) != _form(form):
        raise ValueError(f"expected the form {_form(form)}; got {_form(given)}")
    out = [
        v if isinstance(v, Tensor) else Tensor(v, dtype=t.dtype).to(t.device)
        for v, t in zip(_leaves(given), like, strict=True)
    ]
    for v, t in zip(out, like, strict=True):
        if v.shape != t.shape:
            raise ValueError(f"a direction or cotangent of shape {t.shape} is needed; got {v.shape}")
    return out


def _form(nest: Any) -> str:
    return repr(mapped(lambda leaf: None, nest)).replace("None", "tensor")


def _pull(outputs: list[Tensor], chosen: Chosen, cotangents: list[Tensor]) -> list[Tensor]:
    """The gradients of all handles; with a graph if there is anything else to differentiate by."""
    handles = [h for _, hs in chosen for h in hs]
    create = _reaches_beyond([*outputs, *cotangents], handles)
    pulled = _gradients_of(outputs, handles, cotangents, create)
    return pulled if create else [g.detach() for g in pulled]


def _gradients_of(
    outputs: list[Tensor], xs: list[Tensor], cotangents: list[Tensor], create_graph: bool
) -> list[Tensor]:
    """Σ cotangent · ∂output/∂x for each x."""
    totals: list[Tensor | None] = [None] * len(xs)
    for y, g in zip(outputs, cotangents, strict=True):
        if y.requires_grad:
            for i, part in enumerate(gradients(y, xs, g, create_graph) if xs else ()):
                before = totals[i]
                totals[i] = part if before is None else before + part
    return [Tensor._of(backend.full(x._data, 0)) if t is None else t for t, x in zip(totals, xs, strict=True)]


def _closed(chosen: Chosen, pulled: list[Tensor]) -> Any:
    """The gradients in the form of the arguments."""
    at = iter(pulled)
    out = tuple([mapped(lambda _: next(at), form) for form, _ in chosen])
    return out[0] if isinstance(chosen, _One) else out


def _reaches_beyond(results: list[Tensor], handles: list[Tensor]) -> bool:
    """Whether the graph of the results has a leaf that requires a gradient and is no handle."""
    inside = set(map(behind, handles))
    leaves = (t for y in results for t in autograd._topological(behind(y)) if t.node is None)
    return any(t.requires_grad and t not in inside for t in leaves)


def _kept(y: Tensor, chosen: Chosen) -> Tensor:
    """A result, without its graph if nothing outside of the transformation needs it."""
    return y if _reaches_beyond([y], [h for _, hs in chosen for h in hs]) else y.detach()
