"""Recording: the Tensor, the declaration of an op, and the Node that each call of an op leaves on its result.

No number is computed here (`backend` does that) and no gradient (`autograd` does). An op has a forward on arrays. Its
gradients come from one rule per operand (`primitive`), or from the composition that defines it (`fused`).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from inspect import Parameter, signature
from typing import Any, ParamSpec, Protocol, TypeAlias

import numpy as np
from numpy.typing import DTypeLike

from tinygrad_bn import arguments, backend, errors
from tinygrad_bn.arguments import bind, checked, expect_declaration, expect_leaf, fast, flag, holds_numbers, is_floating
from tinygrad_bn.backend import Array as Array
from tinygrad_bn.gradient_hooks import TensorWithHooks
from tinygrad_bn.modes import COMPOSED, DEBUGGING, RECORDING, calling_lines, is_recording
from tinygrad_bn.notebook import TensorInNotebook
from tinygrad_bn.sample import Sample, completed

P = ParamSpec("P")
Axis: TypeAlias = int | tuple[int, ...] | None
Operand: TypeAlias = Any  # a Tensor, an array, a number or None; the result is a Tensor if one of the operands is
Rule: TypeAlias = Callable[..., Any]

OPS: dict[str, Op] = {}  # every op by name. The operators of Tensor look here, so this file imports no op.


# ---- ops, and the nodes that they record ----------------------------------------------------------------


@dataclass(eq=False)
class Op:
    """An operation, as `primitive` or `fused` declares it."""

    name: str
    forward: Callable[..., Any]  # arrays to array, in NumPy: the reference. Of a fused op: the composition
    rules: tuple[Rule | None, ...]  # one per operand: (g, y, *operands, **params) to its gradient
    each: Rule | None  # for any number of operands, one rule that gets the operand's position: (i, g, y, *operands)
    fused: bool  # the gradients are those of the composition; gradients with a graph, of the rules, if there are any
    saves: tuple[str, ...]  # by-products: `forward` then returns (y, *by-products)
    updates: tuple[str, ...]  # operands that the op overwrites; such an op has no gradient
    formula: str
    sample: Sample
    exact: bool = False  # half precision loses nothing on the way to the result and to the gradients

    def __post_init__(self) -> None:
        self.vjp = f"{self.name}.vjp"  # the name of the kernel that may compute the gradients
        self.function: Callable[..., Any] = lambda *xs, **params: apply(self, xs, params)[0]  # until it is declared
        self.differentiable = bool(self.each or self.fused or any(self.rules))

    def split(self, result: Any) -> tuple[Any, Sequence[Any]]:
        """The result of `forward` as y and its by-products. Raises TypeError if these are not all there."""
        y, saved = (result[0], result[1:]) if self.saves and type(result) is tuple else (result, ())
        if len(saved) != len(self.saves) or y is None or isinstance(y, tuple | list):
            wanted = f"({', '.join(('y', *self.saves))})" if self.saves else "one array (saves= names by-products)"
            raise TypeError(f"{self.name} has to return {wanted}; it returned a {type(result).__name__}")
        return y, saved

    def pull(self, g: Any, y: Any, xs: Sequence[Any], needs: Sequence[bool], params: dict[str, Any]) -> list[Any]:
        """The gradient of each operand by its rule, None where `needs` is False: arrays, or tensors if `g` is one."""
        if self.each:
            return [self.each(i, g, y, *xs, **params) if need else None for i, need in enumerate(needs)]
        each = zip(self.rules, needs, strict=True)
        return [rule(g, y, *xs, **params) if rule and need else None for rule, need in each]


@dataclass(eq=False, slots=True)
class Node:
    """How a tensor was computed: the op, its operands, and the arrays that the forward pass used."""

    op: Op
    inputs: Sequence[Any]  # Tensors, Python numbers and None
    needs: Sequence[bool]  # whether each required a gradient at the time of the call
    arrays: Sequence[Any]
    output: Array
    saved: Sequence[Any]
    params: dict[str, Any]
    caller: str | None  # where the op was called, in debug mode

    def free(self) -> None:
        self.inputs = self.needs = self.arrays = self.saved = ()
        self.params = {}


def apply(op: Op, operands: Sequence[Any], params: dict[str, Any]) -> tuple[Any, Sequence[Any]]:
    """Run `op`: its result and its by-products. The result is a Tensor if an operand is one, else an array.

    If an operand requires a gradient, the result gets a Node. By-products are arrays: constants to every gradient.
    """
    if op.fused and COMPOSED.get():
        inputs = [_constant(o) if isinstance(o, CONVERTED) else o for o in operands]
        y, saved = op.split(backend.composition(op, inputs, params))
        return y, [s._data if isinstance(s, Tensor) else s for s in saved]
    for o in operands:
        if type(o) is not np.ndarray and isinstance(o, CONVERTED):  # `type` first: it takes a tenth of the time
            break
    else:
        return backend.forward(op, operands, params)
    if op.updates:
        raise TypeError(f"{op.name}() overwrites {op.updates}, which a graph may need: pass arrays, not tensors")
    inputs = [o if isinstance(o, Tensor) else _constant(o) for o in operands]
    arrays = [o._data if isinstance(o, Tensor) else o for o in inputs]
    result, saved = backend.forward(op, arrays, params)
    y = Tensor._of(result)
    if RECORDING.get() and op.differentiable and result.dtype.kind == "f":
        needs = [isinstance(o, Tensor) and o._requires_grad for o in inputs]
        if True in needs:
            caller = calling_lines() if DEBUGGING.get() else None
            y._requires_grad, y.node = True, Node(op, inputs, needs, arrays, result, saved, params, caller)
    return y, saved


def _constant(operand: Any) -> Any:
    """A Python number, which takes the dtype of the other operand, or None; a copy of anything else as a Tensor."""
    operand = backend.python_scalar(operand)
    return operand if operand is None or isinstance(operand, bool | int | float | Tensor) else Tensor(operand)


# ---- declaring an op ------------------------------------------------------------------------------------


class Function(Protocol[P]):
    """A function that runs an op: the result of `primitive` and `fused`."""

    op: Op
    run: Callable[..., tuple[Any, Sequence[Any]]]  # as the function itself, with the by-products: (y, by-products)
    composition: Callable[..., Any]  # of a fused op: the definition, to read and to step into

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any: ...


def primitive(
    *rules: Rule | None,
    formula: str,
    sample: Sample,
    each: Rule | None = None,
    saves: tuple[str, ...] = (),
    updates: tuple[str, ...] = (),
    exact: bool = False,
) -> Callable[[Callable[P, Any]], Function[P]]:
    """Declare an op by its forward on arrays, the decorated function, and its gradient rules.

    Args:
        rules: the gradient of each operand, `(g, y, *operands, **params) -> gradient`, in arithmetic of tensors. None
            where it is 0, as for a condition; `held_constant` for a target. The engine undoes broadcasting and casts.
        formula: the op in symbols, for people.
        sample: operands and options for the tests; see `tinygrad_bn.sample`.
        each: instead of `rules`, for any number of operands: `(i, g, y, *operands, **params)`.
        saves: names of by-products; the forward then returns `(y, *by-products)`, and `NAME.run(…)` gives them.
        updates: names of operands that the forward overwrites, as an optimiser does with its state.
        exact: elements are moved, negated or added only; others are computed in float32 where they are float16.

    Raises:
        ValueError: the name is another op's or no identifier; or the rules are not one for each operand.
    """
    if bool(rules) == bool(each):
        raise ValueError(f"an op needs a rule for each operand, or `each`; got {'both' if each else 'neither'}")

    def declare(forward: Callable[P, Any]) -> Function[P]:
        return _declare(forward, forward, rules, each, False, saves, updates, formula, sample, exact)

    return declare


def held_constant(*_: Any, **__: Any) -> None:
    """The rule of an operand that gets no gradient although the result varies with it, such as a target."""


def fused(
    *, formula: str, sample: Sample, saves: tuple[str, ...] = (), widens: bool = True
) -> Callable[[Callable[P, Any]], Function[P]]:
    """Declare an op by its composition, the decorated function: its forward, and its gradients of every order.

    Kernels of the op's name may compute the forward and the first gradient faster. The function is kept as
    `NAME.composition`.

    Args:
        formula, sample: as of `primitive`.
        saves: names of by-products; the composition then returns `(y, *by-products)`. They are constants to every
            gradient. `NAME.run(…)` gives them, and the kernel `NAME.vjp` gets them by name.
        widens: compute in float64 whatever the operands' precision, and give the result in that of the first
            floating-point operand.

    The composition has to be a function of its operands and options alone: a backward pass may run it again. So random
    numbers come from an option, as in `dropout_by_key`, and a tensor is passed as an operand.
    """

    def declare(composition: Callable[P, Any]) -> Function[P]:
        forward = _in_float64(composition) if widens else composition
        call = _declare(composition, forward, (), None, True, saves, (), formula, sample)
        call.composition = composition
        return call

    return declare


def _declare(function: Callable[P, Any], forward: Callable[..., Any], rules: Any, *fields: Any) -> Function[P]:
    parameters = signature(function).parameters.values()
    names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]  # empty for any number of operands
    options = {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY}
    known, (unchecked, last) = frozenset(options), fast(function, options)
    given = {p.name: p.default for p in parameters if p.default is not Parameter.empty}
    defaults = {option: value for option, value in given.items() if option in options}
    name, count = function.__name__, len(names)
    expect_declaration(function, count, len(rules), OPS[name].forward if name in OPS else None)
    op = OPS[name] = Op(name, forward, rules, *fields)
    backend.note_declaration(name, function)

    def bound(operands: Any, params: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        every = {**defaults, **params}
        if len(operands) != count != 0 or len(every) != len(options) or not known.issuperset(params):
            operands, params = bind(name, names, given, options, operands, params)
            every = {**defaults, **params}
        for option, value in params.items():
            if type(value) not in unchecked[option] and value is not last.get(option, last):
                every[option] = checked(name, options[option], value, last, operands)
        return operands, every

    @wraps(function)
    def call(*operands: Any, **params: Any) -> Any:
        y = apply(op, *bound(operands, params))[0]
        return y[()] if type(y) is np.ndarray and not y.ndim else y  # NumPy's scalar, as its own functions give

    call.__doc__ = f"{function.__doc__ or ''}\n\n{op.formula}".lstrip()
    declared: Any = call
    declared.op, op.function, op.sample = op, call, completed(op.sample, defaults)
    declared.run = lambda *operands, **params: apply(op, *bound(operands, params))
    return declared


def _in_float64(composition: Callable[..., Any]) -> Callable[..., Any]:
    """The composition on operands in float64, its result in the dtype of the first floating-point operand."""

    @wraps(composition)
    def compute(*operands: Any, **params: Any) -> Any:
        result = composition(*map(widened, operands), **params)
        y, *saved = result if isinstance(result, tuple) else (result,)
        dtype = next((o.dtype.newbyteorder("=") for o in operands if is_floating(o)), np.dtype(np.float32))
        if dtype.itemsize < 8 and is_floating(y):
            y = apply(OPS["astype"], (y,), {"dtype": dtype})[0]
        return (y, *saved) if isinstance(result, tuple) else y

    return compute


def widened(x: Operand) -> Operand:
    """`x` in float64 if it is floating-point of less precision, else as it is."""
    return apply(OPS["astype"], (x,), {"dtype": np.float64})[0] if is_floating(x) and x.dtype.itemsize < 8 else x


# ---- the tensor -----------------------------------------------------------------------------------------


def _operators(name: str) -> tuple[Callable[[Any, object], Tensor], Callable[[Any, object], Tensor]]:
    """An operator as a method, and its reflection: x + other, and other + x."""

    def operate(self: Any, other: object) -> Tensor:
        return apply(OPS[name], (self, other), {})[0]

    def reflected(self: Any, other: object) -> Tensor:
        return apply(OPS[name], (other, self), {})[0]

    return operate, reflected


def _equality(name: str) -> Callable[[Any, object], Any]:
    """== or !=. Anything that holds no numbers, such as a string, is left to Python: it is not equal."""
    operate, _ = _operators(name)
    return lambda self, other: operate(self, other) if holds_numbers(other) else NotImplemented


def _method(name: str) -> Callable[[Any], Tensor]:
    """A function of one tensor as a method."""
    return lambda self: OPS[name].function(self)


def _in_place(symbol: str, compute: Callable[[Any, Any], Any]) -> Callable[[Any, object], Tensor]:
    """`x += y` makes a new tensor while recording, as a graph may need the old x; under no_grad it changes x."""

    def update(self: Tensor, other: object) -> Tensor:
        result = compute(self, other)
        if not is_recording():
            self.data = result._data
            return self
        if self.is_leaf and (self.requires_grad or type(self) is not Tensor):  # such as a buffer of a module
            kind, plain = type(self).__name__, symbol[:-1]
            raise RuntimeError(f"x {symbol} y on a {kind} while recording: use x {plain} y; update x under no_grad()")
        return result

    return update


class Tensor(TensorWithHooks, TensorInNotebook):
    """A multi-dimensional array that records the operations on it.

    The data are copied in and never change under a recorded graph: the array that `data`, `numpy()` and
    `np.asarray` give is a read-only view. To change a tensor, assign to `data`, or use `+=` and its like under
    `no_grad()`; a backward pass that still needed the old values then raises instead of using the new ones.

    Args:
        data: a number, a (nested) list of numbers, or an array. An array keeps its dtype; Python floats
            become float32, Python integers int64.
        requires_grad: whether `backward` leaves this tensor's gradient in `grad`.
        dtype: converts the data, if given.

    Raises:
        TypeError: the data are not real numbers; or `requires_grad` with an integer or boolean dtype.

    >>> x = Tensor([1.0, 2.0, 3.0], requires_grad=True)
    >>> (x * x).sum().backward()
    >>> x.grad
    Tensor([2., 4., 6.], shape=(3,), dtype=float32, leaf)
    """

    __slots__ = ("__weakref__", "_data", "_grad", "_requires_grad", "_retains_grad", "node")

    _data: Array
    _requires_grad: bool

    # NumPy then leaves `ndarray * Tensor` to Tensor.__rmul__, instead of making an array of objects.
    __array_ufunc__ = None

    def __init__(self, data: object, requires_grad: bool = False, dtype: DTypeLike | None = None) -> None:
        if isinstance(data, list | tuple) and _tensors_in(data):
            raise TypeError("a tensor made from a list of tensors would lose their graph; use functional.stack")
        self._data = backend.new_array(data._data if isinstance(data, Tensor) else data, dtype)
        self._grad: Tensor | None = None
        self.node: Node | None = None
        self._retains_grad = False
        self.requires_grad = requires_grad

    @classmethod
    def _of(cls, array: Array) -> Tensor:
        """A tensor around `array` itself, without a copy: for results of ops."""
        self = object.__new__(Tensor)
        self._data, self._grad, self.node = array, None, None
        self._requires_grad = self._retains_grad = False
        return self

    # ---- properties -------------------------------------------------------------------------------------

    @property
    def data(self) -> Array:
        """The values, as a read-only view. Assigning copies new ones in; the shape has to fit, and the dtype too."""
        return backend.read_only(self._data)

    @data.setter
    def data(self, value: object) -> None:
        if isinstance(value, Tensor):
            backend.expect_one_place((self._data, value := value._data))
        self._data = backend.new_values(arguments.fitting("the data", value, self.dtype), self._data)

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is computed for it. Not for integers (TypeError); for results always (RuntimeError)."""
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value or self.node is not None:
            errors.expect_requirable(self, value)
        self._requires_grad = value if type(value) is bool else flag("requires_grad", value)

    @property
    def grad(self) -> Tensor | None:
        """The gradient, or None. Assigning another type raises TypeError, and another shape ValueError."""
        return self._grad

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None:
            errors.expect_gradient(self, value)
        self._grad = value

    @property
    def shape(self) -> tuple[int, ...]:
        return self._data.shape

    @property
    def ndim(self) -> int:
        return self._data.ndim

    @property
    def size(self) -> int:
        """Number of elements."""
        return self._data.size

    @property
    def dtype(self) -> np.dtype[Any]:
        return self._data.dtype

    @property
    def device(self) -> str:
        """Name of the device that holds the data."""
        return backend.device_of(self._data)

    @property
    def is_leaf(self) -> bool:
        """True unless an op computed this tensor and recorded how."""
        return self.node is None

    # ---- gradients --------------------------------------------------------------------------------------

    def backward(self, g: object = None, *, retain_graph: bool | None = None, create_graph: bool = False) -> None:
        """Add the gradient of this tensor to `grad` of every leaf it was computed from.

        Args:
            g: the cotangent, of this tensor's shape; by default 1, for a tensor of one element.
            retain_graph: keep the graph for a further `backward`; by default only with `create_graph`.
            create_graph: make the gradients differentiable themselves.

        Raises:
            RuntimeError: nothing here requires a gradient; the graph was freed by an earlier `backward`;
                or an operand was changed since the forward pass.
            ValueError: `g` is missing or has the wrong shape.
        """
        autograd.backward(self, g, retain_graph=retain_graph, create_graph=create_graph)

    def retain_grad(self) -> Tensor:
        """Ask `backward` to leave the gradient in `grad` although this is no leaf; returns the tensor."""
        if not self.requires_grad:
            raise RuntimeError(errors.NO_GRAPH.format(self.shape))
        self._retains_grad = True
        return self

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self.grad = None

    def detach(self) -> Tensor:
        """The same values without their history: a constant to every gradient."""
        return Tensor._of(self._data)

    def to(self, device: str) -> Tensor:
        """This tensor if it lives on `device`, else a copy there; the gradient comes back. See `cuda.to`."""
        return self if isinstance(device, str) and device == self.device else OPS["to"].function(self, device=device)

    # ---- to NumPy and Python ----------------------------------------------------------------------------

    def numpy(self) -> Array:
        """The values as a NumPy array: a read-only view if possible, else a copy. `np.array(t)` is always a copy."""
        return backend.numpy_view(self._data)

    def item(self) -> float | int | bool:
        """The one element, as a Python number. Raises ValueError if there are several."""
        if self.size != 1:
            raise ValueError(f"item() needs exactly one element; the shape is {self.shape}: reduce it, or use numpy()")
        return self._data.item()

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Array:
        return backend.converted(self._data, dtype, copy)

    def __getstate__(self) -> object:
        """For `copy` and `pickle`. Raises RuntimeError for a result with a graph: detach() it first."""
        expect_leaf(self)
        return super().__getstate__()

    def __float__(self) -> float:
        return float(self.item())

    def __int__(self) -> int:
        return int(self.item())

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError(f"the truth of a tensor of shape {self.shape} is ambiguous; reduce it to one value")
        return bool(self.item())

    def __len__(self) -> int:
        if not self.ndim:
            raise TypeError("a 0-d tensor has no length")
        return len(self._data)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        values = np.array2string(self.numpy(), separator=", ", prefix="Tensor(", threshold=100)
        origin = f"from {self.node.op.name}" if self.node else "leaf"
        grad = ", requires_grad=True" if self.requires_grad and self.is_leaf else ""
        place = f", {place}" if (place := backend.place(self._data)) else ""
        return f"Tensor({values}, shape={self.shape}, dtype={self.dtype}, {origin}{place}{grad})"

    __hash__ = object.__hash__  # by identity, as __eq__ compares elementwise

    # ---- operators and methods: each is an op, found by name --------------------------------------------

    __add__, __radd__ = _operators("add")
    __sub__, __rsub__ = _operators("sub")
    __mul__, __rmul__ = _operators("mul")
    __truediv__, __rtruediv__ = _operators("div")
    __pow__, __rpow__ = _operators("pow")
    __matmul__, __rmatmul__ = _operators("matmul")

    __iadd__ = _in_place("+=", operator.add)
    __isub__ = _in_place("-=", operator.sub)
    __imul__ = _in_place("*=", operator.mul)
    __itruediv__ = _in_place("/=", operator.truediv)
    __ipow__ = _in_place("**=", operator.pow)
    __imatmul__ = _in_place("@=", operator.matmul)

    __eq__, __ne__ = _equality("equal"), _equality("not_equal")
    __lt__, __le__ = _operators("less")[0], _operators("less_equal")[0]
    __gt__, __ge__ = _operators("greater")[0], _operators("greater_equal")[0]

    __neg__, __abs__ = _method("neg"), _method("abs")

    def __getitem__(self, index: object) -> Tensor:
        """Basic and advanced indexing as in NumPy; repeated indices add up in the gradient."""
        parts = tuple(map(self._index, index)) if isinstance(index, tuple) else self._index(index)
        return OPS["getitem"].function(self, index=parts)

    def _index(self, part: Any) -> Any:
        """Part of an index, without tensors, and without arrays that may change before the backward pass."""
        backend.expect_one_place((self._data, *(t._data for t in _tensors_in(part))))
        return backend.index_copy(part._data if isinstance(part, Tensor) else part, self._data)

    def __setitem__(self, index: object, value: object) -> None:
        raise TypeError(errors.ASSIGNED)

    def sum(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return OPS["sum"].function(self, axis=axis, keepdims=keepdims)

    def max(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return OPS["max"].function(self, axis=axis, keepdims=keepdims)

    def min(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return OPS["min"].function(self, axis=axis, keepdims=keepdims)

    def argmax(self, axis: int | None = None, keepdims: bool = False) -> Tensor:
        return OPS["argmax"].function(self, axis=axis, keepdims=keepdims)

    def mean(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return OPS["mean"].function(self, axis=axis, keepdims=keepdims)

    def var(self, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Tensor:
        return OPS["var"].function(self, axis=axis, keepdims=keepdims, correction=correction)

    def std(self, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Tensor:
        return OPS["std"].function(self, axis=axis, keepdims=keepdims, correction=correction)

    exp, log, sqrt, tanh, sigmoid, relu = map(_method, ("exp", "log", "sqrt", "tanh", "sigmoid", "relu"))

    def clip(self, min: float | None = None, max: float | None = None) -> Tensor:
        return OPS["clip"].function(self, min=min, max=max)

    def reshape(self, *shape: Any) -> Tensor:
        """`t.reshape(2, 3)` or `t.reshape((2, 3))`; one -1 stands for the remaining elements."""
        return OPS["reshape"].function(self, shape=shape[0] if len(shape) == 1 else shape)

    def transpose(self, *axes: Any) -> Tensor:
        """`t.transpose(1, 0)` or `t.transpose((1, 0))`: permute the axes; without any, reverse them."""
        given = tuple(axes[0]) if len(axes) == 1 and isinstance(axes[0], list | tuple) else axes
        return OPS["transpose"].function(self, axes=given or None)

    def astype(self, dtype: DTypeLike) -> Tensor:
        return OPS["astype"].function(self, dtype=dtype)

    T = property(transpose)


def _tensors_in(data: object) -> list[Tensor]:
    """The tensor, or those in a nested list."""
    if isinstance(data, Tensor):
        return [data]
    return [t for part in data for t in _tensors_in(part)] if isinstance(data, list | tuple) else []


# Types that an op converts to tensors: the arithmetic of np.matrix, for example, is not that of arrays.
CONVERTED = Tensor, list, tuple, np.matrix, np.ma.MaskedArray

# The one import circle of the framework: a tensor is differentiated by the engine that is built on it.
from tinygrad_bn import autograd  # noqa: E402
