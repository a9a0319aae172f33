"""Finding the device. Importing this module loads neither Numba nor the driver."""

from importlib.util import find_spec
from typing import Any

from tinygrad_bn_kernels.cuda import array, launch


def device_arrays() -> Any:
    """The module `array`, with `DeviceArray` and `full`. RuntimeError names the missing package or driver."""
    if launch.installed() is None:
        if find_spec("numba_cuda") is None:
            raise RuntimeError('device "cuda" needs the package numba-cuda: pip install "tinygrad-bn[cuda]"')
        launch.driver()
    return array
