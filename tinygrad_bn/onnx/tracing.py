"""Tracing: a module runs once, and every op on what comes from its input is noted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np

from tinygrad_bn.hooks import listening
from tinygrad_bn.modes import no_grad
from tinygrad_bn.nn.module import Module, evaluating
from tinygrad_bn.onnx.errors import OnnxError
from tinygrad_bn.onnx.translations import TRANSLATIONS, Call
from tinygrad_bn.standin import StandIn
from tinygrad_bn.tensor import Array, Op, Tensor


class Traced(StandIn):
    """What comes from the input of a traced module, with its name in the file."""

    __slots__ = ("name",)
    unreadable: ClassVar = (
        OnnxError,
        "the model reads the values of a tensor that comes from its input, so what it computes may depend on them; "
        "use functional.where(condition, a, b)",
    )

    def __init__(self, value: Tensor, name: str) -> None:
        self.value, self.name = value, name
        self._grad, self.node, self._retains_grad, self._requires_grad = None, None, False, False

    @property
    def _data(self) -> Any:  # type: ignore[override]
        """Compositions read values as constants: the tensor stands for its array, so that their ops are noted too."""
        return self

    def detach(self) -> Tensor:
        return self

    def __repr__(self) -> str:
        return f"Tensor(shape={self.shape}, dtype={self.dtype}, traced)"


def _noted(model: Module, x: Traced) -> Any:
    try:
        return model(x)
    except TypeError as error:  # where a tensor from the input is used as an index or an option
        raise OnnxError(f"the model reads values that come from its input: {error}") from error


class Trace:
    """What a module computes from an input: a listener of `hooks`."""

    def __init__(self, model: Module, x: Array) -> None:
        self.constants: dict[str, Array] = {}
        self.calls: list[Call] = []
        self._names = {id(t._data): name for name, t in reversed(list(model.named_tensors()))}
        self.owned = set(self._names.values())  # names of parameters and buffers
        self._named: dict[int, tuple[Any, str]] = {}  # constants by identity, which the array keeps alive
        self.input = Traced(Tensor(x), self._free("input"))
        with evaluating(model), no_grad(), listening(self):
            y = _noted(model, self.input)
        if not isinstance(y, Tensor):
            raise OnnxError(f"a model with one output, a tensor, can be exported; it gave a {type(y).__name__}")
        if not isinstance(y, Traced) or not self.calls:
            raise OnnxError("the output of the model does not come from its input by any op")
        self.output = y

    def apply(self, run: Callable[..., Any], op: Op, operands: Sequence[Any], params: dict[str, Any]) -> Any:
        """Note an op on what comes from the input, a parameter or a buffer; or the ops of its composition."""
        if not any(isinstance(o, Traced) or (isinstance(o, Tensor) and id(o._data) in self._names) for o in operands):
            return run(op, operands, params)
        translated = op.name in TRANSLATIONS
        if not translated and op.fused:
            return op.split(op.forward(*operands, **params))
        if not translated:
            raise OnnxError(f"ONNX has no operator for the op {op.name!r} of this model")
        y, saved = run(op, [o.value if isinstance(o, Traced) else o for o in operands], params)
        inputs = [o if o is None or isinstance(o, bool | int | float) else self._name(o) for o in operands]
        tensors = [(o.shape, o.dtype) if hasattr(o, "dtype") else ((), None) for o in operands]
        shapes, dtypes = zip(*tensors, strict=True)
        name = self._free(f"{op.name}_{len(self.calls)}")
        self.calls.append(Call(op.name, inputs, name, shapes, dtypes, y.shape, y.dtype, params))
        return Traced(y, name), saved

    def copy(self, run: Callable[..., Any], first: Any, *others: Any) -> Any:
        """An array that the engine makes or copies: of an index, it may not come from the input."""
        if isinstance(first, Traced):
            raise OnnxError("an index or another array of the model comes from its input; that cannot be written down")
        return run(first, *others)

    def _free(self, name: str) -> str:
        """A name that no parameter or buffer has, and that none begins with, as translations add to it."""
        while any(own.startswith(name) for own in self.owned):
            name += "_"
        return name

    def _name(self, value: Any) -> str:
        """The name of an operand: of a parameter or buffer its own."""
        if isinstance(value, Traced):
            return value.name
        array = value._data if isinstance(value, Tensor) else np.asarray(value)
        if id(array) not in self._named:
            name = self._names.get(id(array)) or self._free(f"constant_{len(self._named)}")
            self._named[id(array)] = array, name
            self.constants[name] = Tensor(array).numpy()
        return self._named[id(array)][1]
