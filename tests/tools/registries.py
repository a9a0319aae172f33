"""The registries of ops and kernels in tests that declare some."""

import pytest
from tinygrad_bn_kernels import _declared, _kernels

from tinygrad_bn.tensor import OPS


@pytest.fixture(autouse=True)
def registries():
    """Ops and kernels that a test declares are forgotten after it; a module that imports this has it for all its tests.

    Kernels of the package, which are imported on first use, stay.
    """
    ops, kernels = dict(OPS), dict(_kernels)
    yield
    for name in OPS.keys() - ops.keys():
        del OPS[name]
        _declared.pop(name, None)
    for key, function in list(_kernels.items()):
        if function and not function.__module__.startswith("tinygrad_bn") and kernels.get(key) is not function:
            del _kernels[key]
