"""When a step is recorded, when its program runs, and when the step runs as always."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import is_
from pathlib import Path
from threading import Lock
from types import FunctionType
from typing import Any

from tinygrad_bn import backend, hooks
from tinygrad_bn.arguments import warn_caller
from tinygrad_bn.captured.nests import SCALARS, mapped, same
from tinygrad_bn.captured.program import Program, array_of
from tinygrad_bn.captured.recorder import Recorder, is_array, plain
from tinygrad_bn.modes import COMPOSED, DEBUGGING, RECORDING
from tinygrad_bn.nn.module import OBSERVER, Module
from tinygrad_bn.tensor import Tensor

PROOFS = {0, 3, 15, 63, 255}  # a program that has run so many steps is proven once more, and after each EVERY steps
EVERY = 1024
CHANGES = 4  # records in a row that did not fit the step after them, until a step is no longer recorded
PACKAGE = str(Path(backend.__file__).parent)


class capture:
    """A function, such as a training step, that runs as a straight line of array operations: the same bits, faster.

    For each combination of shapes, dtypes and devices of the arguments, the first call runs as always and is recorded.
    So is the second: the two records must differ in data only, and the recorded operations, run again, must give each
    array of the second bit for bit. From the third call on the program runs. It is proven again after 4, 16, 64, 256
    and each 1024 steps. If a proof fails, a warning says where, and all later steps run as always.

    Taken up at once: new values of parameters, buffers and optimizer options; changed attributes of modules; and
    changed variables that `function`, functions that it names, and `forward` of its modules use by name. Other Python
    code of the step runs only while it is recorded. So the step may not read numbers of its tensors, as `loss.item()`
    does, nor set a mode, a gradient or an option, print or count: that would stand still.

    Under `composed`, `debug`, `nn.observe`, `explain` and `detect_anomaly`, and in a second thread at the same time,
    steps run as always.

    Args:
        function: it takes arrays, numbers, and tensors that require no gradient; and returns tensors, arrays, None, or
            tuples, lists or dictionaries of them. Tensors that a step returns have no graph.
        quiet: do not warn of a step that cannot be captured.

    >>> import numpy as np
    >>> from tinygrad_bn import functional as F, nn, optim
    >>> from tinygrad_bn.captured import capture
    >>> model = nn.Sequential(nn.Linear(2, 3, rng=np.random.default_rng(0)), nn.BatchNorm1d(3))
    >>> optimizer = optim.SGD(model.parameters(), lr=0.1)
    >>> @capture
    ... def step(x, y):
    ...     optimizer.zero_grad()
    ...     loss = F.mse_loss(model(x), y)
    ...     loss.backward()
    ...     optimizer.step()
    ...     return loss
    >>> x, y = np.float32([[1, 2], [3, 5], [4, 0]]), np.zeros((3, 3), np.float32)
    >>> [round(step(x, y).item(), 3) for _ in range(4)]
    [1.0, 0.871, 0.759, 0.661]
    >>> len(step.programs)
    1
    """

    def __init__(self, function: Callable[..., Any], *, quiet: bool = False) -> None:
        self.function, self.quiet, self._cases = function, quiet, dict[Any, _Case]()
        self.__doc__ = function.__doc__

    @property
    def programs(self) -> list[Program]:
        """The proven programs, one for each kind of arguments."""
        return [case.program for case in self._cases.values() if case.program is not None and case.steps > 0]

    def __call__(self, *args: Any) -> Any:
        """Take a step."""
        if (
            any(v.get() for v in (COMPOSED, DEBUGGING, OBSERVER))
            or hooks.has_listeners()
            or not all(map(_may_be_argument, args))
        ):
            return _detached(self.function(*args))
        without_kernels = backend.find_kernel("batch_norm_training", "cpu") is None
        key = RECORDING.get(), without_kernels, *map(_kind_of, args)
        case = self._cases.get(key) or self._cases.setdefault(key, _Case(self.function, self.quiet))
        if not case.lock.acquire(blocking=False):
            return _detached(self.function(*args))
        try:
            return case.step(args)
        finally:
            case.lock.release()


class _Case:
    """The steps of one kind of arguments."""

    def __init__(self, function: Callable[..., Any], quiet: bool) -> None:
        self.function, self.quiet, self.lock = function, quiet, Lock()
        self.program: Program | None = None
        self.refusal = ""
        self.steps = 0  # since the program was recorded
        self.changes = 0
        self.modules: list[Module] = []
        self.functions: list[FunctionType] = []
        self.seen: tuple[list[Any], list[Any]] = [], []

    def step(self, args: tuple[Any, ...]) -> Any:
        if self.refusal:
            return _detached(self.function(*args))
        if self.program is not None and not self._is_as_seen():
            self.program, self.changes = None, self.changes + 1
        inputs = [array_of(a) if isinstance(a, Tensor) else a for a in args if is_array(a) or isinstance(a, Tensor)]
        if self.program is not None and self.steps not in PROOFS and self.steps % EVERY:
            self.steps, self.changes = self.steps + 1, 0
            return self.program.run(inputs)
        record = Recorder(inputs)
        with hooks.listening(record):
            result = self.function(*map(record.argument, args))
        form = mapped(record.place_of, result)
        self._take_up(record, form)
        return mapped(plain, _detached(result))

    def _take_up(self, record: Recorder, form: Any) -> None:
        """Use the record as the proof of the program; or as the program, to be proven by the next step."""
        reason, change, fault = record.refusal, "", ""
        if self.program is not None and not reason:
            change = self.program.change(record, form)
            reason = fault = "" if change else self.program.fault(record)
            self.changes += bool(change)
        if self.changes >= CHANGES:
            reason = change or "an attribute or a variable that it uses changes in every step"
        if reason:
            self.refusal, self.program = reason, None
            if fault or not self.quiet:
                name = getattr(self.function, "__qualname__", "a function")
                warn_caller(f"{name} is not captured, and runs as always: {reason}")
        elif self.program is not None and not change:
            self.steps += 1
        else:
            self.program, self.modules, self.steps = Program(record, form), record.modules, 0
            self.functions = _functions([self.function, *(module.forward for module in record.modules)])
            self.seen = self._look()

    def _look(self) -> tuple[list[Any], list[Any]]:
        """What Python code of the step may read: attributes of its modules, variables that its functions name.

        These are objects; and of tensors among them, what else a program relies on.
        """
        found: list[Any] = []
        for module in self.modules:
            found += vars(module).values()
        forms = [(t._requires_grad, t._data.dtype, t._data.shape) for t in found if isinstance(t, Tensor)]
        for function in self.functions:
            found += _variables(function)
        return found, forms

    def _is_as_seen(self) -> bool:
        objects, forms = self._look()
        before, forms_before = self.seen
        if forms != forms_before or len(objects) != len(before):
            return False
        return all(map(is_, objects, before)) or same(objects, before)


def _variables(function: FunctionType) -> list[Any]:
    """The values of its closure, and of the globals that it names."""
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return cells + [function.__globals__.get(name) for name in function.__code__.co_names]


def _functions(first: Sequence[Any]) -> list[FunctionType]:
    """Functions and methods, with those that they name; only what is written in Python outside of this package."""
    found: list[FunctionType] = []
    todo = list(first)
    while todo:
        value = todo.pop()
        function: Any = getattr(value, "__func__", value)
        own = isinstance(function, FunctionType) and not function.__code__.co_filename.startswith(PACKAGE)
        if (own or value is first[0]) and function not in found:
            found.append(function)
            todo += _variables(function)
    return found


def _may_be_argument(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.node is None and not value._requires_grad
    return isinstance(value, SCALARS) or is_array(value)


def _kind_of(value: Any) -> Any:
    if not (is_array(value) or isinstance(value, Tensor)):
        return type(value), repr(value)
    array = array_of(value) if isinstance(value, Tensor) else value
    return type(value), backend.device_of(array), array.dtype, array.shape


def _detached(result: Any) -> Any:
    return mapped(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, result)
