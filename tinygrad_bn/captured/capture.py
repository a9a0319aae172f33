"""When a step is recorded, when its program runs, and when the step runs as always."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any

import numpy as np

from tinygrad_bn import backend, hooks
from tinygrad_bn.arguments import shown, warn_caller
from tinygrad_bn.captured.nests import SCALARS, mapped
from tinygrad_bn.captured.program import Program, array_of
from tinygrad_bn.captured.reads import Reads
from tinygrad_bn.captured.recorder import Recorder
from tinygrad_bn.captured.watched import is_array, plain
from tinygrad_bn.gradient_hooks import HOOKS
from tinygrad_bn.modes import COMPOSED, DEBUGGING, RECORDING
from tinygrad_bn.nn.module import OBSERVER
from tinygrad_bn.tensor import Tensor

PROOFS = {0, 3, 15, 63, 255}  # a program that has run so many steps is proven once more, and after each EVERY steps
EVERY = 1024
CASES = 64  # kinds of arguments that have a program each
CHANGES = 4  # records in a row that did not fit the step after them, until a step is no longer recorded


class capture:
    """A function, such as a training step, that runs as a straight line of array operations: the same bits, faster.

    For each combination of shapes, dtypes and devices of the arguments, the first call runs as always and is recorded.
    So is the second: the two records must differ in data only, and the recorded operations, run again, must give each
    array of the second bit for bit. From the third call on the program runs. It is proven again after 4, 16, 64, 256
    and each 1024 steps. If a proof fails, a warning says where, and all later steps run as always.
    `print(step)` lists the operations of each program, or says why there is none.

    Taken up at once: new values of parameters, buffers and optimizer options, changed attributes of modules, and
    changes of anything else that Python code of the step reads by name.

    That code runs only while a step is recorded. A step is not captured, and a warning says why, if it reads numbers of
    its tensors, as `loss.item()` does; if it assigns attributes, elements or global variables, changes a mode or
    catches an error; if it calls functions written in C that may do something that lasts, such as `print` or those of
    `random`; or if it reads objects whose changes cannot be seen, such as iterators, or nests of more than a thousand
    elements. Not seen are changes by private attributes, and arrays of two modules that share their memory.

    Under `composed`, `debug`, `nn.observe`, `explain`, `detect_anomaly` and a profiler, and in a second thread at the
    same time, steps run as always.

    Args:
        function: it takes arrays, numbers, and tensors that require no gradient; and returns tensors, arrays, None, or
            tuples, lists or dictionaries of them. Tensors that a step returns have no graph. Each new number is a new
            kind of argument, recorded by itself: pass one that changes in each step as an array.
        quiet: do not warn of a step that cannot be captured; `reasons` holds what the warning would say.

    Raises:
        TypeError: `function` cannot be called; or it was decorated as a method.

    >>> import numpy as np
    >>> from tinygrad_bn import capture, functional as F, nn, optim
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
    >>> print(step)  # doctest: +ELLIPSIS
    zero_grad()
    %2:float32[3,2] = new_array(%0, None)
    %5:float32[3,3] = linear(%2, 0.weight, 0.bias)                                              # 0, 96 bytes
    ...
    step()
    22 operations, 1.2 kB read and written by ops
    """

    def __init__(self, function: Callable[..., Any], *, quiet: bool = False) -> None:
        if not callable(function):
            raise TypeError(f"capture takes a function; got {shown(function)}")
        self.function, self.quiet, self._cases = function, quiet, dict[Any, _Case]()
        self.__doc__, self.__name__ = function.__doc__, getattr(function, "__qualname__", "a function")

    def __reduce__(self) -> Any:
        return partial(capture, quiet=self.quiet), (self.function,)  # a copy records programs of its own

    def __get__(self, instance: object, owner: type) -> Any:
        raise TypeError(f"{self.__name__} is a method; capture one of an object: step = capture(trainer.step)")

    @property
    def programs(self) -> list[Program]:
        """The proven programs, one for each kind of arguments."""
        return [case.program for case in self._cases.values() if case.program is not None and case.steps > 0]

    @property
    def reasons(self) -> list[str]:
        """Why steps are not captured, one for each kind of arguments whose steps are not."""
        return [case.refusal for case in self._cases.values() if case.refusal]

    def __str__(self) -> str:
        texts = [*map(str, self.programs), *(f"not captured: {reason}" for reason in self.reasons)]
        without = "no program while there are hooks" if HOOKS else "no program yet: it is there after the second step"
        return "\n\n".join(texts) or without

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Take a step."""
        modes = any(v.get() for v in (COMPOSED, DEBUGGING, OBSERVER))
        watched = modes or HOOKS or hooks.has_listeners() or sys.getprofile()
        case = None if watched else self._case
        if case is None or not (found := case([*args, *options.values()], tuple(options))).lock.acquire(blocking=False):
            return _detached(self.function(*args, **options))
        try:
            return found.step(args, options)
        finally:
            found.lock.release()

    def _case(self, values: list[Any], names: tuple[str, ...]) -> _Case:
        """The case of these arguments; that of None for all that cannot be captured."""
        key: Any = None
        reason = next((f"an argument is {shown(v)}" for v in values if not _may_be_argument(v)), "")
        if not reason:
            without_kernels = backend.find_kernel("batch_norm_training", "cpu") is None
            places = [_place(value) for value in values]
            twice = tuple([places.index(place) for place in places])  # which arguments are one array
            key = RECORDING.get(), without_kernels, names, twice, *map(_kind_of, values)
            if key not in self._cases and len(self._cases) >= CASES:
                key, reason = None, f"its arguments are of more than {CASES} kinds; pass numbers that change as arrays"
        case = self._cases.get(key) or self._cases.setdefault(key, _Case(self.function, self.__name__, self.quiet))
        if reason and not case.refusal:
            case.refuse(reason)
        return case


class _Case:
    """The steps of one kind of arguments."""

    def __init__(self, function: Callable[..., Any], name: str, quiet: bool) -> None:
        self.function, self.name, self.quiet, self.lock = function, name, quiet, Lock()
        self.program: Program | None = None
        self.refusal = ""
        self.steps = 0  # since the program was recorded
        self.changes = 0
        self.reads: Reads | None = None
        self.changed = ""  # what its Python code reads and was last found changed

    def step(self, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        if self.refusal:
            return _detached(self.function(*args, **options))
        if self.reads is not None and (changed := self.reads.change() or self.reads.gradient()):
            self.program, self.reads, self.changes, self.changed = None, None, self.changes + 1, changed
        given = [*args, *options.values()]
        inputs = [array_of(a) if isinstance(a, Tensor) else a for a in given if is_array(a) or isinstance(a, Tensor)]
        if self.program is not None and self.steps not in PROOFS and self.steps % EVERY:
            self.steps, self.changes = self.steps + 1, 0
            return self.program.run(inputs)
        record = Recorder(inputs)
        with hooks.listening(record):
            named = {name: record.argument(value) for name, value in options.items()}
            result = record.effects.run(partial(self.function, **named), *map(record.argument, args))
        record.expect_unassigned()
        form = mapped(record.place_of, result)
        record.release()
        self._take_up(record, form, given)
        return mapped(plain, _detached(result))

    def _take_up(self, record: Recorder, form: Any, given: list[Any]) -> None:
        """Use the record as the proof of the program; or as the program, to be proven by the next step."""
        reads = Reads(self.function, record.effects.ran, record.modules, record.fresh)
        reason, change, fault = reads.refusal or record.refusal, "", ""
        if any(value is other for value in given for other in reads.arrays):
            reason = reason or "an argument is also an array or a tensor that its Python code reads by name"
        if self.program is not None and self.reads is not None and not reason:
            change = self._change(reads) or self.program.change(record, form)
            reason = fault = "" if change else self.program.fault(record)
            self.changes += bool(change)
        if self.changes >= CHANGES:
            reason = change or f"its Python code reads what is different in every step: {self.changed}"
        if reason:
            self.refuse(reason, fault != "")
        elif self.program is not None and not change:
            self.steps += 1
        else:
            self.program, self.reads, self.steps = Program(record, form), reads, 0

    def refuse(self, reason: str, fault: bool = False) -> None:
        """Steps run as always from now on. A fault of this package is always said."""
        self.refusal, self.program, self.reads = reason, None, None
        if fault or not self.quiet:
            warn_caller(f"{self.name} is not captured, and runs as always: {reason}")

    def _change(self, reads: Reads) -> str:
        """What a step did to its own Python code; "" if nothing."""
        assert self.reads is not None
        if changed := self.reads.change():
            return f"the step changes what its Python code reads: {changed}"
        return "" if reads.ran.keys() == self.reads.ran.keys() else "it runs other Python code from step to step"


def _may_be_argument(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.node is None and not value._requires_grad
    return isinstance(value, SCALARS) or is_array(value)


def _place(value: Any) -> Any:
    """Where an argument lies in memory."""
    array = array_of(value) if isinstance(value, Tensor) else value
    return array.ctypes.data if isinstance(array, np.ndarray) and array.size else id(array)


def _kind_of(value: Any) -> Any:
    if not (is_array(value) or isinstance(value, Tensor)):
        return type(value), repr(value)
    array = array_of(value) if isinstance(value, Tensor) else value
    return type(value), backend.device_of(array), array.dtype, array.shape


def _detached(result: Any) -> Any:
    return mapped(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, result)
