"""Tensor: an array, whether it wants a gradient, and how it came to be.

The arithmetic is not here: an operator names the primitive of `tinygrad_bn.ops` that computes it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

if TYPE_CHECKING:
    from tinygrad_bn.autograd import Node

Array: TypeAlias = NDArray[Any]
Axis: TypeAlias = int | tuple[int, ...] | None


class Tensor:
    """A multi-dimensional array that records what is computed from it.

    The data are copied in and never change under a recorded graph: the array that `data`, `numpy()` and
    `np.asarray` give is a read-only view. To change a tensor, assign to `data`, or use `+=` and its like under
    `no_grad()`; a backward pass that still needed the old values then raises instead of using the new ones.

    Args:
        data: a number, a (nested) list of numbers, or an array. An array keeps its dtype; Python floats
            become float32, Python integers int64.
        requires_grad: whether `backward` shall leave this tensor's gradient in `grad`.
        dtype: converts the data, if given.

    Raises:
        TypeError: the data are not real numbers; or `requires_grad` with an integer or boolean dtype.

    >>> x = Tensor([1.0, 2.0, 3.0], requires_grad=True)
    >>> (x * x).sum().backward()
    >>> x.grad
    Tensor([2., 4., 6.], shape=(3,), dtype=float32, leaf)
    """

    __slots__ = ("__weakref__", "_data", "_requires_grad", "_retains_grad", "grad", "node")

    # NumPy then leaves `ndarray * Tensor` to Tensor.__rmul__, instead of making an array of objects.
    __array_ufunc__ = None

    def __init__(self, data: object, requires_grad: bool = False, dtype: DTypeLike | None = None) -> None:
        self._data = _to_array(data, dtype)
        self.grad: Tensor | None = None
        self.node: Node | None = None
        self._retains_grad = False
        self.requires_grad = requires_grad

    @classmethod
    def _of(cls, array: Array) -> Tensor:
        """A tensor around `array` itself: for the engine, which gives its results away to nobody else."""
        self = object.__new__(Tensor)
        self._data, self.grad, self.node = array, None, None
        self._requires_grad = self._retains_grad = False
        return self

    # ---- what it is -------------------------------------------------------------------------------------

    @property
    def data(self) -> Array:
        """The values, as a read-only view. Assigning replaces them: the shape must fit, the dtype is kept.

        On cuda this is the device's array itself. A NumPy array that is assigned is copied there, as it is at home on
        no device; a tensor of another device is a TypeError.
        """
        if device_of(self._data) != "cpu":
            return self._data
        view = self._data.view()
        view.flags.writeable = False
        return view

    @data.setter
    def data(self, value: object) -> None:
        given = as_array(value._data if isinstance(value, Tensor) else value)
        if isinstance(value, Tensor) or device_of(given) != "cpu":
            expect_one_device((self._data, given))
        if not np.can_cast(given.dtype, self.dtype, "same_kind"):
            raise TypeError(f"{given.dtype} data do not fit a tensor of dtype {self.dtype}")
        new = move(given, self.device).astype(self.dtype)  # a copy in any case
        if new.shape != self.shape:
            raise ValueError(f"data of shape {new.shape} do not fit a tensor of shape {self.shape}")
        self._data = new

    @property
    def requires_grad(self) -> bool:
        """Whether a gradient is wanted here. Raises TypeError when set on integers or booleans."""
        return self._requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        if value and self._data.dtype.kind != "f":
            raise TypeError(f"only floating-point tensors can require a gradient; this one is {self.dtype}")
        self._requires_grad = bool(value)

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
        return device_of(self._data)

    @property
    def is_leaf(self) -> bool:
        """True unless an op computed this tensor and remembers how."""
        return self.node is None

    # ---- gradients --------------------------------------------------------------------------------------

    def backward(self, g: object = None, *, retain_graph: bool | None = None, create_graph: bool = False) -> None:
        """Add the gradient of this tensor to `grad` of every leaf it was computed from.

        Args:
            g: the cotangent, of this tensor's shape; may be left out (one) for a tensor of one element.
            retain_graph: keep the graph for a further `backward`; by default only with `create_graph`.
            create_graph: make the gradients differentiable themselves.

        Raises:
            RuntimeError: nothing here requires a gradient; the graph was freed by an earlier `backward`;
                or an operand was changed since the forward pass.
            ValueError: `g` is missing or has the wrong shape.
        """
        autograd.backward(self, g, retain_graph=retain_graph, create_graph=create_graph)

    def retain_grad(self) -> Tensor:
        """Ask `backward` to leave the gradient in `grad` although this is no leaf; gives the tensor back."""
        if not self.requires_grad:
            raise RuntimeError(f"this tensor of shape {self.shape} gets no gradient that could be retained")
        self._retains_grad = True
        return self

    def zero_grad(self) -> None:
        """Forget the gradient."""
        self.grad = None

    def detach(self) -> Tensor:
        """The same values without their history: a constant to every gradient."""
        return Tensor._of(self._data)

    def to(self, device: str) -> Tensor:
        """This tensor if it lives on `device` ("cpu" or "cuda"), else a copy there; the gradient comes back.

        Raises:
            RuntimeError: there is no such device here; the message says what is missing.
            TypeError: a dtype that the device does not take, such as float16 on cuda.
        """
        return self if device == self.device else ops.to(self, device=device)

    # ---- to NumPy and Python ----------------------------------------------------------------------------

    def numpy(self) -> Array:
        """The values as a read-only NumPy view; `np.array(t)` makes a copy of your own. From cuda, a copy."""
        return self.data if self.device == "cpu" else to_numpy(self._data)

    def item(self) -> float | int | bool:
        """The one element, as a Python number. Raises ValueError if there are several."""
        if self.size != 1:
            raise ValueError(f"item() needs exactly one element; the shape is {self.shape}")
        return self._data.item()

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Array:
        if self.device != "cpu":
            raise TypeError(f"this tensor lives on {self.device}: copy it with .numpy(), or move it with .to('cpu')")
        converts = dtype is not None and np.dtype(dtype) != self.dtype
        if converts and copy is False:
            raise ValueError(f"{self.dtype} cannot be given as {np.dtype(dtype)} without a copy")
        return np.array(self._data, dtype=dtype) if copy or converts else self.data

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
        origin = origin if self.device == "cpu" else f"{origin}, {self.device}"
        return f"Tensor({values}, shape={self.shape}, dtype={self.dtype}, {origin}{grad})"

    __hash__ = object.__hash__  # identity, as __eq__ compares elementwise

    # ---- operators --------------------------------------------------------------------------------------

    def __add__(self, other: object) -> Tensor:
        return ops.add(self, other)

    def __sub__(self, other: object) -> Tensor:
        return ops.sub(self, other)

    def __mul__(self, other: object) -> Tensor:
        return ops.mul(self, other)

    def __truediv__(self, other: object) -> Tensor:
        return ops.div(self, other)

    def __pow__(self, other: object) -> Tensor:
        return ops.pow(self, other)

    def __matmul__(self, other: object) -> Tensor:
        return ops.matmul(self, other)

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other: object) -> Tensor:
        return ops.sub(other, self)

    def __rtruediv__(self, other: object) -> Tensor:
        return ops.div(other, self)

    def __rpow__(self, other: object) -> Tensor:
        return ops.pow(other, self)

    def __rmatmul__(self, other: object) -> Tensor:
        return ops.matmul(other, self)

    def __neg__(self) -> Tensor:
        return ops.neg(self)

    def __abs__(self) -> Tensor:
        return ops.abs(self)

    def __iadd__(self, other: object) -> Tensor:
        return self._updated("+=", self + other)

    def __isub__(self, other: object) -> Tensor:
        return self._updated("-=", self - other)

    def __imul__(self, other: object) -> Tensor:
        return self._updated("*=", self * other)

    def __itruediv__(self, other: object) -> Tensor:
        return self._updated("/=", self / other)

    def __ipow__(self, other: object) -> Tensor:
        return self._updated("**=", self**other)

    def __imatmul__(self, other: object) -> Tensor:
        return self._updated("@=", self @ other)

    def _updated(self, operator: str, result: Tensor) -> Tensor:
        """`x += y` makes a new tensor while recording, as a graph may need the old x; under no_grad it changes x."""
        if not autograd.is_recording():
            self.data = result._data
            return self
        if self.is_leaf and (self.requires_grad or type(self) is not Tensor):  # such as a buffer of a module
            raise RuntimeError(
                f"x {operator} y on a {type(self).__name__} while recording: write x = x {operator[:-1]} y to compute "
                "with it, or put the update under `with no_grad():`"
            )
        return result

    # Comparisons are not differentiable: they give boolean tensors without history.

    def __eq__(self, other: object) -> Tensor:  # type: ignore[override]
        return self._compare(operator.eq, other)

    def __ne__(self, other: object) -> Tensor:  # type: ignore[override]
        return self._compare(operator.ne, other)

    def __lt__(self, other: object) -> Tensor:
        return self._compare(operator.lt, other)

    def __le__(self, other: object) -> Tensor:
        return self._compare(operator.le, other)

    def __gt__(self, other: object) -> Tensor:
        return self._compare(operator.gt, other)

    def __ge__(self, other: object) -> Tensor:
        return self._compare(operator.ge, other)

    def _compare(self, compare: Callable[..., Any], other: object) -> Tensor:
        values = other._data if isinstance(other, Tensor) else other
        expect_one_device((self._data, values))
        return Tensor._of(as_array(compare(self._data, values)))

    def __getitem__(self, index: object) -> Tensor:
        """Basic and advanced indexing as in NumPy; repeated indices add up in the gradient.

        Numbers, lists and NumPy arrays index a tensor of any device; a tensor indexes one of its own device.
        """
        return ops.getitem(self, index=_plain_index(index, self.device))

    def __setitem__(self, index: object, value: object) -> None:
        raise TypeError(
            "item assignment would change a tensor that a backward pass may need; write "
            "functional.where(mask, value, t) for a new tensor, or assign a whole array to t.data"
        )

    # ---- the closed set of methods; everything else is a function of tinygrad_bn.functional -------------

    def sum(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return ops.sum(self, axis=axis, keepdims=keepdims)

    def max(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return ops.max(self, axis=axis, keepdims=keepdims)

    def min(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return ops.min(self, axis=axis, keepdims=keepdims)

    def argmax(self, axis: int | None = None, keepdims: bool = False) -> Tensor:
        return ops.argmax(self, axis=axis, keepdims=keepdims)

    def mean(self, axis: Axis = None, keepdims: bool = False) -> Tensor:
        return functional.mean(self, axis, keepdims)

    def var(self, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Tensor:
        return functional.var(self, axis, keepdims, correction)

    def std(self, axis: Axis = None, keepdims: bool = False, correction: float = 0) -> Tensor:
        return functional.std(self, axis, keepdims, correction)

    def exp(self) -> Tensor:
        return ops.exp(self)

    def log(self) -> Tensor:
        return ops.log(self)

    def sqrt(self) -> Tensor:
        return ops.sqrt(self)

    def tanh(self) -> Tensor:
        return ops.tanh(self)

    def sigmoid(self) -> Tensor:
        return ops.sigmoid(self)

    def relu(self) -> Tensor:
        return ops.relu(self)

    def clip(self, min: float | None = None, max: float | None = None) -> Tensor:
        return ops.clip(self, min=min, max=max)

    def reshape(self, *shape: Any) -> Tensor:
        """`t.reshape(2, 3)` or `t.reshape((2, 3))`; one -1 stands for what is left."""
        return ops.reshape(self, shape=shape[0] if len(shape) == 1 else shape)

    def transpose(self, *axes: Any) -> Tensor:
        """`t.transpose(1, 0)` or `t.transpose((1, 0))`: permute the axes, in reverse order if none are given."""
        return ops.transpose(
            self, axes=(tuple(axes[0]) if len(axes) == 1 and isinstance(axes[0], list | tuple) else axes) or None
        )

    def astype(self, dtype: DTypeLike) -> Tensor:
        return ops.astype(self, dtype=dtype)

    @property
    def T(self) -> Tensor:
        return ops.transpose(self, axes=None)


def _plain_index(index: Any, device: str) -> Any:
    """An index without tensors, and without arrays that somebody may change before the backward pass.

    Raises TypeError for tensors that do not live on `device`.
    """
    if isinstance(index, tuple):
        return tuple(_plain_part(i, device) for i in index)
    return _plain_part(index, device)


def _plain_part(part: Any, device: str) -> Any:
    own = device_of(part)
    if own != device and (own != "cpu" or isinstance(part, Tensor) or _holds_a_tensor(part)):
        raise TypeError(f"an index on {own} for a tensor on {device}; move one with .to()")
    if own != "cpu":
        return part._data if isinstance(part, Tensor) else part  # no op writes into an array there
    if not isinstance(part, Tensor | np.ndarray | list | tuple):
        return part
    array = np.array(part)
    return array if array.size or isinstance(part, Tensor | np.ndarray) else array.astype(np.intp)  # [] is no float


def _holds_a_tensor(data: object) -> bool:
    return isinstance(data, list | tuple) and any(isinstance(d, Tensor) or _holds_a_tensor(d) for d in data)


def _to_array(data: object, dtype: DTypeLike | None) -> Array:
    if isinstance(data, Tensor):
        data = data._data
    if device_of(data) != "cpu":
        return data.astype(dtype or data.dtype)  # type: ignore[attr-defined]
    if isinstance(data, np.ma.MaskedArray):
        raise TypeError("a tensor has no mask; give masked.filled(value)")
    if _holds_a_tensor(data):
        raise TypeError("a tensor made from a list of tensors would lose their graph; use functional.stack")
    typed = isinstance(data, np.ndarray | np.generic) or hasattr(data, "__array__")
    array = np.array(data, dtype=dtype)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"a Tensor holds real numbers; these data have dtype {array.dtype}")
    if not typed and dtype is None and array.dtype == np.float64:
        return array.astype(np.float32)
    return array


# The one cycle of the package: an operator is spelt here and computed there.
from tinygrad_bn import autograd, functional, ops  # noqa: E402
from tinygrad_bn.device import as_array, device_of, expect_one_device, move, to_numpy  # noqa: E402
