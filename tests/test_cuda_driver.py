"""What surrounds the launches: the driver's interface, what is said where something is missing, and the cache."""

import ctypes
import os
import subprocess
import sys
import threading
import types
from collections import defaultdict, deque
from contextlib import contextmanager

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
loaded = {m.split(".")[0] for m in sys.modules} & {"numba", "cuda", "numba_cuda", "cupy"}
assert not loaded, loaded
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


OURS = 1000  # the handle of the device's primary context


class Bindings(types.ModuleType):
    """The functions of `cuda.bindings.driver` that are called, over the interpreter's memory and launches.

    A stream does nothing before it is waited for, and then in its order: so what relies on an order that nobody asked
    for goes wrong.
    """

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
        self.CUevent_flags = types.SimpleNamespace(CU_EVENT_DISABLE_TIMING=2)
        self.cuuint64_t = int
        self.modules = {}
        self.streams = defaultdict(deque)  # what is still to be done on each
        self.contexts = threading.local()  # a stack of them for each thread

    def __getattr__(self, name):
        simple = {
            "cuInit": (),
            "cuDeviceGetCount": (1,),
            "cuDeviceGet": (0,),
            "cuDevicePrimaryCtxRetain": (OURS,),
            "cuDeviceGetName": (b"a device\0\0",),
            "cuDeviceGetDefaultMemPool": ("pool",),
            "cuMemPoolSetAttribute": (),
            "cuEventDestroy": (),
            "cuGetErrorName": (b"CUDA_ERROR_OF_SOME_KIND",),
        }[name]
        return lambda *args: (self.calls.append(name), (0, *simple))[1]

    def cuDeviceGetAttribute(self, which, device):
        return 0, {"major": 7, "minor": 5, "processors": 3}[which]

    # Contexts: each thread has a stack of them.

    def cuCtxGetCurrent(self):
        return 0, (getattr(self.contexts, "stack", None) or [0])[-1]

    def cuCtxPushCurrent(self, context):
        self.contexts.stack = [*getattr(self.contexts, "stack", []), context]
        return (0,)

    def cuCtxPopCurrent(self):
        return 0, self.contexts.stack.pop()

    # Streams.

    def later(self, stream, work):
        if self.cuCtxGetCurrent()[1] != OURS:
            return (201,)  # CUDA_ERROR_INVALID_CONTEXT
        self.streams[stream].append(work)
        return (0,)

    def cuStreamSynchronize(self, stream):
        while self.streams[stream]:
            self.streams[stream].popleft()()
        return (0,)

    def cuCtxSynchronize(self):
        self.calls.append("cuCtxSynchronize")
        for stream in list(self.streams):
            self.cuStreamSynchronize(stream)
        return (0,)

    def cuEventCreate(self, flags):
        return 0, {}

    def cuEventRecord(self, event, stream):
        event["work"], event["stream"] = lambda: None, stream
        return self.later(stream, event["work"])

    def cuStreamWaitEvent(self, stream, event, flags):
        self.calls.append((event["stream"], stream))

        def wait():
            while event["work"] in self.streams[event["stream"]]:
                self.streams[event["stream"]].popleft()()

        return self.later(stream, wait)

    # Memory.

    def cuMemAllocAsync(self, nbytes, stream):
        return (2, None) if self.full else (0, self.device.alloc(nbytes))

    def cuMemFreeAsync(self, pointer, stream):
        return self.later(stream, lambda: self.device.free(pointer))

    def cuMemcpyHtoDAsync(self, pointer, host, nbytes, stream):
        return self.later(
            stream, lambda: self.device.write(pointer, np.frombuffer(ctypes.string_at(host, nbytes), np.uint8))
        )

    def cuMemcpyDtoHAsync(self, host, pointer, nbytes, stream):
        return self.later(
            stream,
            lambda: ctypes.memmove(host, self.device.read(pointer, (nbytes,), np.uint8).tobytes(), nbytes),
        )

    def cuMemcpyDtoDAsync(self, to, source, nbytes, stream):
        return self.later(stream, lambda: self.device.write(to, self.device.read(source, (nbytes,), np.uint8)))

    # Programs.

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
        return self.later(stream, lambda: self.device.launch(ptx, (gx, gy, gz), (bx, by, bz), args, name=name))


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
    cuda.synchronize()
    live = len(bindings.device.sizes)
    del t
    cuda.synchronize()
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


# ---- streams and contexts --------------------------------------------------------------------------------


def test_work_goes_to_the_stream_of_the_block_in_the_order_of_the_program(bindings):
    from tinygrad_bn import Tensor, cuda

    x = Tensor([1.0, 2.0, 3.0]).to("cuda")
    y = x * 2.0
    with cuda.stream(5):
        assert y.data.__cuda_array_interface__["stream"] == 5
        z = y + y  # y is made on the default stream
        with cuda.stream(6):
            w = z * 10.0
        z = z + w
        assert len(bindings.streams[5]) > 1
        with cuda.stream(5):
            pass
    assert z.data.__cuda_array_interface__["stream"] == 1
    assert (z + 1.0).numpy().tolist() == [45, 89, 133]
    assert [call for call in bindings.calls if isinstance(call, tuple)] == [(0, 5), (5, 6), (6, 5), (5, 0)]


def test_a_network_trains_on_a_stream(bindings):
    from tests import test_cuda
    from tinygrad_bn import cuda

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 6)).astype(np.float32), rng.integers(0, 3, 8)
    want = test_cuda.three_steps(test_cuda.network, "adam", x, y, "cpu")[0]
    with cuda.stream(5):
        losses = test_cuda.three_steps(test_cuda.network, "adam", x, y, "cuda")[0]
    np.testing.assert_allclose(losses, want, rtol=1e-5)


def test_memory_that_another_stream_may_still_use_is_freed_when_that_is_done(bindings):
    from tinygrad_bn import Tensor, cuda

    results = []

    def work():
        with cuda.stream(7):
            x = Tensor([1.0, 2.0]).to("cuda")
            results.extend([x, x * 3.0])
            bindings.streams[7].append(lambda: results.append("done"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    waits = bindings.calls.count("cuCtxSynchronize")
    del results[0]  # on the default stream
    assert bindings.calls.count("cuCtxSynchronize") == waits + 1
    assert results[-1] == "done"
    assert results[0].numpy().tolist() == [3, 6]


def test_a_stream_needs_a_device():
    from tinygrad_bn import cuda

    if cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(RuntimeError), cuda.stream(5):
        pass


def test_dlpack_lets_the_consumers_stream_wait(bindings):
    from tinygrad_bn import Tensor, cuda

    a = (Tensor([1.0, 2.0]).to("cuda") * 3.0).data
    orders = {None: [], 1: [], -1: [], 2: [(0, 2)], 77: [(0, 77)]}
    for stream, order in orders.items():
        bindings.calls.clear()
        a.__dlpack__(stream=stream, max_version=(1, 0), dl_device=(2, 0))  # nobody takes it: it comes back
        assert [call for call in bindings.calls if isinstance(call, tuple)] == order
        assert bindings.calls.count("cuCtxSynchronize") == (stream not in (None, 1)), "theirs is waited for"
    with pytest.raises(ValueError, match="stream 0 is ambiguous"):
        a.__dlpack__(stream=0)
    with pytest.raises(BufferError, match=r"cannot be shared with DLPack device \(1, 0\)"):
        a.__dlpack__(dl_device=(1, 0), copy=False)
    with pytest.raises(BufferError, match=r"cannot be shared with DLPack device \(2, 1\)"):
        a.__dlpack__(dl_device=(2, 1))
    np.testing.assert_array_equal(np.from_dlpack(a, device="cpu"), [3, 6])

    asked = []

    class Other:
        """An array of another library."""

        __dlpack_device__ = staticmethod(lambda: (2, 0))

        def __dlpack__(self, *, stream):
            asked.append(stream)
            return a.__dlpack__(stream=stream, copy=True)

    copied = cuda.from_dlpack(Other())
    assert copied.data.pointer != a.pointer
    bindings.calls.clear()
    with cuda.stream(9):
        on_9 = cuda.from_dlpack(Other()) + 1.0
        assert bindings.calls.count("cuCtxSynchronize") == 1, "what was borrowed goes back when ours is done"
    assert asked == [1, 9]
    assert (copied.numpy().tolist(), on_9.numpy().tolist()) == ([3, 6], [4, 7])


def test_another_librarys_context_is_left_as_it_is(bindings):
    from tinygrad_bn import Tensor

    theirs = 2000
    bindings.cuCtxPushCurrent(theirs)  # as torch.cuda.set_device(1) does
    t = Tensor([1.0, 2.0]).to("cuda")
    assert (t * 2.0).numpy().tolist() == [2, 4]
    assert bindings.contexts.stack == [theirs]
    bindings.contexts.stack = []
    results = []
    thread = threading.Thread(target=lambda: results.append((t + t).numpy().tolist()))
    thread.start()
    thread.join()
    assert results == [[2, 4]]


# ---- cuBLAS ----------------------------------------------------------------------------------------------


class Shared:
    """What stands for CuPy's array: a view of the device's memory."""

    def __init__(self, bindings, shape, dtype, pointer, is_swapped=False):
        self.made = bindings, shape, dtype, pointer
        self.is_swapped = is_swapped

    def swapaxes(self, i, j):
        assert (i, j) == (-1, -2)
        return Shared(*self.made, is_swapped=True)

    def read(self):
        bindings, shape, dtype, pointer = self.made
        values = bindings.device.read(pointer, shape, dtype)
        return values.swapaxes(-1, -2) if self.is_swapped else values


class CuPy(types.ModuleType):
    """What of CuPy is called, computed by NumPy, when the stream that it is asked on gets to it."""

    def __init__(self, bindings):
        super().__init__("cupy")
        self.bindings, self.stream, self.calls = bindings, None, []
        self.has_cublas = True
        self.cuda = types.SimpleNamespace(
            Device=self.entered, ExternalStream=self.on, UnownedMemory=lambda pointer, nbytes, owner: pointer,
            MemoryPointer=lambda memory, offset: memory + offset,
            device=types.SimpleNamespace(get_cublas_handle=self.handle),
        )  # fmt: skip

    @contextmanager
    def entered(self, device):
        self.bindings.cuCtxPushCurrent(OURS)
        yield
        self.bindings.cuCtxPopCurrent()

    @contextmanager
    def on(self, stream):
        self.stream = stream
        yield
        self.stream = None

    def handle(self):
        if not self.has_cublas:
            raise RuntimeError("CuPy failed to load libcublas")

    def ndarray(self, shape, dtype, pointer):
        return Shared(self.bindings, shape, dtype, pointer)

    def _later(self, function, a, b, out):
        self.calls.append((function.__name__, self.stream))
        write = self.bindings.device.write
        assert self.bindings.later(self.stream, lambda: write(out.made[-1], function(a.read(), b.read()))) == (0,)

    def matmul(self, a, b, out):
        self._later(np.matmul, a, b, out)

    def add(self, a, b, out):
        self._later(np.add, a, b, out)


@pytest.fixture
def cupy(bindings, monkeypatch):
    from tinygrad_bn_kernels.cuda import blas

    fake = CuPy(bindings)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(blas, "LARGE", 1000)
    blas._cupy.cache_clear()
    yield fake
    blas._cupy.cache_clear()


def _products(where, dtype, size):
    """Products of every kind and their gradients, as NumPy arrays."""
    from tinygrad_bn import Tensor, functional, grad

    rng = np.random.default_rng(0)
    results = []
    for shapes in ([(size, 12), (12, 9)], [(3, size, 12), (12, 9)], [(3, size, 12), (3, 12, 9)]):
        xs = [Tensor(rng.normal(size=shape), dtype=dtype).to(where).detach() for shape in shapes]
        for x in xs:
            x.requires_grad = True
        y = functional.matmul(*xs)
        results += [y, *grad(y, xs, y.detach())]
    x, w, b = (Tensor(rng.normal(size=shape), dtype=dtype).to(where) for shape in ((size, 12), (9, 12), (9,)))
    return [t.numpy() for t in (*results, functional.linear(x, w, b))]


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-13)])
def test_large_products_are_cublas_on_our_memory_and_stream(cupy, dtype, tolerance):
    from tinygrad_bn import cuda

    with cuda.stream(5):
        got = _products("cuda", dtype, 11)
    assert cupy.calls == [("matmul", 5)] * 10 + [("add", 5)]
    for one, want in zip(got, _products("cpu", dtype, 11), strict=True):
        np.testing.assert_allclose(one, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


def test_products_are_ours_where_they_are_small_or_there_is_no_cublas_or_no_gpu(cupy):
    from tests.ptx.programs import interpreted

    _products("cuda", np.float32, 1)
    assert not cupy.calls
    with interpreted():
        _products("cuda", np.float32, 11)
    assert not cupy.calls
    cupy.has_cublas = False
    for one, want in zip(_products("cuda", np.float32, 11), _products("cpu", np.float32, 11), strict=True):
        np.testing.assert_allclose(one, want, rtol=1e-5, atol=1e-5)
    assert not cupy.calls
