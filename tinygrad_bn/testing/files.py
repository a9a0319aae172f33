"""The ops that a file of a user declares."""

from __future__ import annotations

import hashlib
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from tinygrad_bn.tensor import OPS


def ops_of(file: str | Path) -> list[str]:
    """Run a Python file as a module, and give the names of the ops that it declares, in its order.

    Raises ValueError if it is no file of Python or declares no op, and whatever the file raises.
    """
    path = Path(file).resolve()
    if path.suffix != ".py" or not path.is_file():
        raise ValueError(f"{file} is no file of Python: name one that declares ops")
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"  # beside a module of the same name
    spec = spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    before = dict(OPS)
    module = sys.modules[name] = module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # as if the file was run
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    found = [op for op, declared in OPS.items() if before.get(op) is not declared]
    found += [op for op, declared in before.items() if op in OPS and _file(op) == str(path) and op not in found]
    if not found:
        raise ValueError(f"{file} declares no op: use primitive or fused of tinygrad_bn.extend")
    return found


def _file(op: str) -> str:
    return getattr(getattr(OPS[op].forward, "__code__", None), "co_filename", "")
