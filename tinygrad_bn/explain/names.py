"""Names: those that local variables give to steps, and looking a step up by its name."""

from __future__ import annotations

import contextlib
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from inspect import Parameter, signature
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from tinygrad_bn import autograd, backend, tensor
from tinygrad_bn.explain.steps import Step
from tinygrad_bn.nn import module
from tinygrad_bn.tensor import Tensor

HERE = str(Path(__file__).parent)
PACKAGE = str(Path(tensor.__file__).parent)
ENGINE = {str(m.__file__) for m in (tensor, autograd, backend, module)}  # their variables name no step
LIBRARIES = tuple(sysconfig.get_path(p) for p in ("stdlib", "purelib", "platlib"))


class Locals:
    """Names steps after the local variables of the functions that computed them, when these return.

    `mu`, `xmu` and `sqrtvar` are variables of the composition of BatchNorm, so these are the names of its steps.
    """

    def __init__(self, steps: Mapping[int, Step]) -> None:
        self._steps = steps
        self._variables: dict[CodeType, frozenset[str] | None] = {}  # of each function; None for one to leave out
        self._before: dict[int, int] = {}  # of each running call, how many steps there were

    def watching(self, before: Any) -> Callable[[FrameType, str, object], None]:
        """A profile function, for `sys.setprofile`, after which the one of before is called too."""

        def watch(frame: FrameType, event: str, value: object) -> None:
            self._watch(frame, event)
            if callable(before):
                before(frame, event, value)

        return watch

    def _watch(self, frame: FrameType, event: str) -> None:
        if event not in ("call", "return"):
            return
        code = frame.f_code
        if code not in self._variables:
            self._variables[code] = _own_variables(code)
        if not (own := self._variables[code]):
            return
        if event == "call":
            self._before[id(frame)] = len(self._steps)
            return
        since = self._before.pop(id(frame), 0)
        for name, value in frame.f_locals.items():
            if name in own and isinstance(value, Tensor):
                step = self._steps.get(id(value))
                if step and step.op and step.number >= since and name not in step.names:
                    step.names.append(name)


def resume(before: Any) -> None:
    """Put back what profiled before: a function, or a profiler in C as cProfile's, which is none and starts itself."""
    sys.setprofile(before if callable(before) else None)
    if hasattr(before, "enable"):
        before.enable()


def _own_variables(code: CodeType) -> frozenset[str] | None:
    """The variables that a function assigns, without its arguments; None for code of the engine and of libraries."""
    file = code.co_filename
    ours = file.startswith(PACKAGE) and file not in ENGINE and not file.startswith(HERE)
    if code.co_name.startswith("<") or not (ours or not file.startswith(("<frozen", PACKAGE, *LIBRARIES))):
        return None
    given = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 4) + bool(code.co_flags & 8)
    return frozenset((*code.co_varnames[given:], *code.co_cellvars)) - set(code.co_varnames[:given])


def caller_variables(frame: FrameType) -> dict[str, Any]:
    """The variables of the program at the end of the block, which an ExitStack may have ended."""
    while frame.f_code.co_filename == contextlib.__file__ and frame.f_back:
        frame = frame.f_back
    return {k: v for k, v in frame.f_locals.items() if isinstance(v, Tensor) and not k.startswith("_")}


def parameters_of(f: Callable[..., Any], count: int) -> list[str]:
    """The names of the first parameters of a function, or of a module's forward; `input3` beyond those it has."""
    try:
        parameters = list(signature(f.forward if isinstance(f, module.Module) else f).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    own = [p.name for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    return own[:count] if len(own) >= count else [*own, *(f"input{i}" for i in range(len(own), count))]


def by_path(steps: Iterable[Step]) -> dict[str, Step]:
    """Each step under `scope.name`. The second of one name is `name@2`."""
    taken: Counter[str] = Counter()
    found: dict[str, Step] = {}
    for step in steps:
        path = f"{step.scope}.{step.name}" if step.scope else step.name
        taken[path] += 1
        found[path if taken[path] == 1 else f"{path}@{taken[path]}"] = step
    return found


def find(paths: Mapping[str, Step], name: str) -> Step:
    """The step of a name: its path, another name of it, or the end of its path if that is one step's.

    Raises KeyError for any other name; the message lists near ones.
    """
    if not isinstance(name, str):
        raise TypeError(f"a step is found by its name, such as '1.xhat'; got a {type(name).__name__}")
    if name in paths:
        return paths[name]
    scope, _, last = name.rpartition(".")
    exact = {p: s for p, s in paths.items() if name in s.aliases or (s.scope == scope and last in s.all_names)}
    by_end = {
        p: s for p, s in paths.items() if last in s.all_names and f".{s.scope}".endswith(f".{scope}" * bool(scope))
    }
    found = exact or by_end or {p: s for p, s in paths.items() if p.endswith(f".{name}")}
    if len(found) == 1:
        return next(iter(found.values()))
    if found:
        raise KeyError(f"{name!r} is the name of {len(found)} steps: {', '.join(list(found)[:12])}")
    if inside := [p for p in paths if p.startswith(f"{name}.")]:
        raise KeyError(f"{name!r} is a module or a fused op; its steps are {', '.join(inside[:20])}")
    ends = {path.rpartition(".")[2]: path for path in paths}
    near = get_close_matches(name, paths, n=5, cutoff=0.5) or [
        ends[e] for e in get_close_matches(last, ends, n=5, cutoff=0.5)
    ]
    some = f"near ones are {', '.join(near)}" if near else f"there are {', '.join(list(paths)[:20]) or 'none'}"
    raise KeyError(f"no step is called {name!r}; {some}")
