"""What surrounds the launches: the driver's interface, what is said where something is missing, and the cache."""

import ctypes
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from tinygrad_bn_kernels.cuda import launch

from tests.ptx.compile import need_compiler, offline
from tests.ptx.interpreter import Device as Interpreter

# ---- without a device ------------------------------------------------------------------------------------

MISSING = """
import importlib.util, sys
import tinygrad_bn
from tinygrad_bn import Tensor, cuda
assert not [m for m in sys.modules if m.split(".")[0] in ("numba", "cuda", "numba_cuda")], "importing loaded them"
find = importlib.util.find_spec
cuda.find_spec = lambda name: None if name == "numba_cuda" else find(name)
try:
    Tensor([1.0]).to("cuda")
except RuntimeError as error:
    assert 'pip install "tinygrad-bn[cuda]"' in str(error), error
else:
    raise AssertionError("no error")
assert not cuda.is_available()
assert "reason" in cuda.info()
model = tinygrad_bn.nn.Linear(2, 2)
try:
    model.to("cuda")
except RuntimeError:
    assert model.weight.device == "cpu"
"""


def test_without_the_extra_the_error_says_what_to_install():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-W", "error", "-c", MISSING], env=environment, check=True, timeout=60)


def test_without_a_device_the_error_says_so():
    need_compiler()
    from tinygrad_bn import Tensor, cuda

    if cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(RuntimeError, match='there is no device "cuda" here'):
        Tensor([1.0]).to("cuda")


# ---- with a driver that writes down what it is asked -----------------------------------------------------


class Answer(int):
    """A result code of the driver."""


class Bindings(types.ModuleType):
    """The functions of `cuda.bindings.driver` that are called, over the interpreter's memory and launches."""

    def __init__(self):
        super().__init__("driver")
        self.device = Interpreter()
        self.calls = []
        self.full = False
        self.CUresult = types.SimpleNamespace(CUDA_ERROR_OUT_OF_MEMORY=2, CUDA_ERROR_UNSUPPORTED_PTX_VERSION=222)
        self.is_old = False
        self.CUdevice_attribute = types.SimpleNamespace(
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR="minor",
            CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT="processors",
        )
        self.CUmemPool_attribute = types.SimpleNamespace(CU_MEMPOOL_ATTR_RELEASE_THRESHOLD="threshold")
        self.cuuint64_t = int
        self.modules = {}

    def __getattr__(self, name):
        simple = {
            "cuInit": (),
            "cuDeviceGetCount": (1,),
            "cuDeviceGet": (0,),
            "cuDevicePrimaryCtxRetain": ("context",),
            "cuCtxSetCurrent": (),
            "cuDeviceGetName": (b"a device\0\0",),
            "cuDeviceGetDefaultMemPool": ("pool",),
            "cuMemPoolSetAttribute": (),
            "cuCtxSynchronize": (),
            "cuGetErrorName": (b"CUDA_ERROR_OF_SOME_KIND",),
        }[name]
        return lambda *args: (self.calls.append(name), (0, *simple))[1]

    def cuDeviceGetAttribute(self, which, device):
        return 0, {"major": 7, "minor": 5, "processors": 3}[which]

    def cuMemAllocAsync(self, nbytes, stream):
        return (2, None) if self.full else (0, self.device.alloc(nbytes))

    def cuMemFreeAsync(self, pointer, stream):
        self.device.free(pointer)
        return (0,)

    def cuMemcpyHtoD(self, pointer, host, nbytes):
        self.device.write(pointer, np.frombuffer(ctypes.string_at(host, nbytes), np.uint8))
        return (0,)

    def cuMemcpyDtoH(self, host, pointer, nbytes):
        ctypes.memmove(host, self.device.read(pointer, (nbytes,), np.uint8).tobytes(), nbytes)
        return (0,)

    def cuMemcpyDtoDAsync(self, to, source, nbytes, stream):
        self.device.write(to, self.device.read(source, (nbytes,), np.uint8))
        return (0,)

    def cuModuleLoadData(self, image):
        if self.is_old and image.startswith(b"//"):
            return 222, None
        assert image.endswith(b"\0")
        self.calls.append("load")
        self.modules[len(self.modules)] = image[:-1].decode()
        return 0, len(self.modules) - 1

    def cuModuleGetFunction(self, module, name):
        return 0, (self.modules[module], name.decode())

    def cuLaunchKernel(self, function, gx, gy, gz, bx, by, bz, shared, stream, params, extra):
        ptx, name = function
        sizes = [line.split()[1] for line in ptx.split(".entry")[1].split("{")[0].splitlines() if ".param" in line]
        addresses = (ctypes.c_uint64 * len(sizes)).from_address(params)
        kinds = {".u64": "u8", ".u32": "u4", ".f32": "f4", ".f64": "f8", ".u8": "u1"}
        args = [
            np.frombuffer(ctypes.string_at(at, int(kinds[s][1])), kinds[s])[0]
            for at, s in zip(addresses, sizes, strict=True)
        ]
        self.device.launch(ptx, (gx, gy, gz), (bx, by, bz), args, name=name)
        return (0,)


@pytest.fixture
def bindings(monkeypatch):
    need_compiler()
    from tinygrad_bn_kernels.cuda import driver

    fake = Bindings()
    monkeypatch.setattr(driver, "_bindings", lambda: fake)
    with offline((7, 5)), launch.using(driver.Device()):
        yield fake


def test_the_driver_is_asked_for_memory_copies_and_launches(bindings):
    from tinygrad_bn import Tensor, cuda

    x = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    t = Tensor(x).to("cuda")
    np.testing.assert_allclose(((t + t) * 0.25).numpy(), x / 2)
    np.testing.assert_allclose(t.sum(axis=0).numpy(), x.sum(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(Tensor(t).numpy(), x)
    before = bindings.calls.count("load")
    np.testing.assert_allclose((t + t).numpy(), 2 * x)
    assert bindings.calls.count("load") == before, "a program is loaded once"
    assert cuda.info() == {"available": True, "name": "a device", "compute_capability": (7, 5), "multiprocessors": 3}
    live = len(bindings.device.sizes)
    del t
    assert len(bindings.device.sizes) == live - 1, "memory goes back with its last array"


def test_memory_that_is_full_is_a_memory_error(bindings):
    from tinygrad_bn import Tensor

    bindings.full = True
    with pytest.raises(MemoryError, match="memory of the CUDA device is full"):
        Tensor([1.0]).to("cuda")


def test_a_failed_call_names_the_drivers_error(bindings):
    bindings.cuCtxSynchronize = lambda: (700,)
    from tinygrad_bn import cuda

    with pytest.raises(RuntimeError, match="CUDA: CUDA_ERROR_OF_SOME_KIND"):
        cuda.synchronize()


def test_a_driver_older_than_the_compiler_gets_machine_code(bindings, monkeypatch):
    from tinygrad_bn_kernels.cuda import driver

    from tinygrad_bn import Tensor

    linked = []
    bindings.is_old = True
    monkeypatch.setattr(driver, "_linked", lambda ptx, cc: linked.append(cc) or b" " + ptx.encode() + b"\0")
    assert (Tensor([1.0, 2.0]).to("cuda") * 2.0).numpy().tolist() == [2, 4]
    assert linked == [(7, 5)]
