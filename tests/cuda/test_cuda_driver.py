"""The driver API, streams, shared memory and cuBLAS, with stand-ins for the driver and CuPy."""

import ctypes
import gc
import os
import subprocess
import sys
import threading
import types
from contextlib import contextmanager

import numpy as np
import pytest
from tinygrad_bn_kernels.cuda import launch

from tests.cuda.cuda_bindings import OURS, Bindings
from tests.cuda.ptx.compile import offline, require_compiler

# ---- without a device ------------------------------------------------------------------------------------

MISSING = """
import importlib.util, sys
import tinygrad_bn
from tinygrad_bn import Tensor, cuda
from tinygrad_bn_kernels.cuda import available
loaded = {m.split(".")[0] for m in sys.modules} & {"numba", "cuda", "numba_cuda", "cupy"}
assert not loaded, loaded
find = importlib.util.find_spec
available.find_spec = lambda name: None if name == "numba_cuda" else find(name)
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
    require_compiler()
    from tinygrad_bn import Tensor, cuda

    if cuda.is_available():
        pytest.skip("there is a device")
    words = r'no device "cuda" here: no NVIDIA driver was found \(libcuda\); tensors live on "cpu"'
    with pytest.raises(RuntimeError, match=words):
        Tensor([1.0]).to("cuda")


# ---- with a stand-in for the driver ----------------------------------------------------------------------


@pytest.fixture
def bindings(monkeypatch):
    require_compiler()
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
    assert len(bindings.device.sizes) == live - 1, "memory is freed with its last array"


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
        assert (bindings.made_on[y.data.pointer], bindings.made_on[z.data.pointer]) == (0, 5)
        with cuda.stream(6):
            w = z * 10.0
        z = z + w
        assert len(bindings.streams[5]) > 1
        with cuda.stream(5):
            pass
    assert z.data.__cuda_array_interface__["stream"] == 1
    assert (z + 1.0).numpy().tolist() == [45, 89, 133]
    assert [call for call in bindings.calls if isinstance(call, tuple)] == [(0, 5), (5, 6), (6, 5), (5, 0)]
    assert not bindings.events, "each event is destroyed"


def test_a_network_trains_on_a_stream(bindings):
    from tests.cuda.training import network, three_steps
    from tinygrad_bn import cuda

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 6)).astype(np.float32), rng.integers(0, 3, 8)
    want = three_steps(network, "adam", x, y, "cpu")[0]
    with cuda.stream(5):
        losses = three_steps(network, "adam", x, y, "cuda")[0]
    np.testing.assert_allclose(losses, want, rtol=1e-5)


def test_memory_of_another_stream_is_freed_after_its_work(bindings):
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


def test_memory_collected_at_the_end_of_a_stream_block_waits_for_the_block(bindings, monkeypatch):
    from tinygrad_bn import Tensor, cuda

    x = Tensor([1.0, 2.0]).to("cuda")  # made on the default stream
    cycle = [x]
    cycle.append(cycle)
    create = bindings.cuEventCreate
    gc.disable()
    try:
        with cuda.stream(5):
            y = x * 3.0
            del x, cycle
            monkeypatch.setattr(
                bindings, "cuEventCreate", lambda flags: (gc.collect(), create(flags))[1], raising=False
            )
    finally:
        gc.enable()
    assert y.numpy().tolist() == [3, 6]


def test_memory_with_an_unknown_user_is_freed_after_all_work(bindings):
    from tinygrad_bn import Tensor

    a = (Tensor([1.0, 2.0]).to("cuda") * 3.0).data
    pointer, got = a.__cuda_array_interface__["data"][0], []
    bindings.cuStreamSynchronize(0)
    bindings.cuCtxPushCurrent(OURS)
    bindings.later(44, lambda: got.append(bindings.device.read(pointer, (2,), np.float32).tolist()))
    del a
    Tensor([9.0]).to("cuda")  # synchronises the default stream, which frees
    assert got == [[3, 6]]


def test_a_stream_needs_a_device():
    from tinygrad_bn import cuda

    if cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(RuntimeError), cuda.stream(5):
        pass


class Other:
    """An array of another library that records the streams it is exported to."""

    def __init__(self, capsule_of):
        self.capsule_of, self.asked = capsule_of, []

    def __dlpack_device__(self):
        return 2, 0

    def __dlpack__(self, *, stream):
        self.asked.append(stream)
        return self.capsule_of(stream)


def test_dlpack_lets_the_consumers_stream_wait(bindings):
    from tinygrad_bn_kernels.cuda.array import DeviceArray

    from tinygrad_bn import Tensor

    a = (Tensor([1.0, 2.0]).to("cuda") * 3.0).data
    orders = {None: [], 1: [], -1: [], 2: [(0, 2)], 77: [(0, 77)]}
    for stream, order in orders.items():
        bindings.calls.clear()
        borrowed = DeviceArray.from_dlpack(
            Other(lambda _, to=stream: a.__dlpack__(stream=to, max_version=(1, 0), dl_device=(2, 0)))
        )
        assert [call for call in bindings.calls if isinstance(call, tuple)] == order
        del borrowed
        assert bindings.calls.count("cuCtxSynchronize") == (stream not in (None, 1)), "freeing waits for the consumer"
    with pytest.raises(ValueError, match="stream 0 is ambiguous"):
        a.__dlpack__(stream=0)
    with pytest.raises(BufferError, match=r"cannot be shared with DLPack device \(1, 0\)"):
        a.__dlpack__(dl_device=(1, 0), copy=False)
    with pytest.raises(BufferError, match=r"cannot be shared with DLPack device \(2, 1\)"):
        a.__dlpack__(dl_device=(2, 1))
    np.testing.assert_array_equal(np.from_dlpack(a, device="cpu"), [3, 6])


def test_imported_memory_is_released_after_our_work(bindings):
    from tinygrad_bn_kernels.cuda import dlpack

    from tinygrad_bn import Tensor, cuda

    a = (Tensor([1.0, 2.0]).to("cuda") * 3.0).data
    other = Other(lambda stream: a.__dlpack__(stream=stream, copy=True))
    copied = cuda.from_dlpack(other)
    assert copied.data.pointer != a.pointer
    bindings.calls.clear()
    with cuda.stream(9):
        on_9 = cuda.from_dlpack(other) + 1.0
        assert bindings.calls.count("cuCtxSynchronize") == 1
        kept = cuda.from_dlpack(other)
    assert other.asked == [1, 9, 9]
    assert (copied.numpy().tolist(), on_9.numpy().tolist()) == ([3, 6], [4, 7])

    waits = []

    def theirs(managed):
        waits.append(bindings.calls.count("cuCtxSynchronize"))
        dlpack._release(managed)

    managed = kept.data.buffer._managed.contents
    managed.deleter = type(dlpack._deleter)(theirs)
    del managed
    bindings.calls.clear()
    del kept  # on the default stream, imported on another
    assert waits == [1]


def test_an_imported_array_has_the_address_and_strides_of_its_capsule(bindings):
    from tinygrad_bn_kernels.cuda import dlpack

    from tinygrad_bn import Tensor, cuda

    t = Tensor(np.arange(6.0, dtype=np.float32).reshape(2, 3)).to("cuda")

    def changed(**fields):
        capsule = t.data.__dlpack__()
        tensor = dlpack._exports[max(dlpack._exports)][0].tensor
        for name, value in fields.items():
            setattr(tensor, name, value)
        return Other(lambda stream: capsule)

    strides = (ctypes.c_int64 * 2)(1, 2)
    with pytest.raises(TypeError, match=r"shape \(2, 3\) and strides \(1, 2\) is not C-contiguous"):
        cuda.from_dlpack(changed(strides=strides))
    shape = (ctypes.c_int64 * 2)(1, 3)
    second = cuda.from_dlpack(changed(byte_offset=12, shape=shape))
    assert second.numpy().tolist() == [[3, 4, 5]]


def test_an_unclaimed_capsule_is_released_and_keeps_the_consumers_error(bindings):
    from tinygrad_bn_kernels.cuda import dlpack

    from tinygrad_bn import Tensor

    t = Tensor([1.0]).to("cuda")
    with pytest.raises((BufferError, RuntimeError), match="device"):
        np.from_dlpack(t.data)
    kept = t.data.__dlpack__()
    assert len(dlpack._exports) == 1, "the first is released"
    t.data.__dlpack__()
    assert len(dlpack._exports) == 2, "the second is alive"
    del kept
    t.data.__dlpack__()
    assert len(dlpack._exports) == 1
    dlpack._release_unclaimed()
    assert not dlpack._exports


def test_another_librarys_context_is_restored(bindings):
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
    """A stand-in for CuPy's array: a view of device memory."""

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
    """A stand-in for CuPy: NumPy computes when the stream executes."""

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
    """Products of all layouts and their gradients, as NumPy arrays."""
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
    ours = 4  # batches with a transposed factor, which CuPy would copy
    assert cupy.calls == [("matmul", 5)] * (10 - ours) + [("add", 5)]
    for one, want in zip(got, _products("cpu", dtype, 11), strict=True):
        np.testing.assert_allclose(one, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


def test_small_products_and_products_without_cublas_or_gpu_are_ours(cupy):
    from tests.cuda.ptx.programs import interpreted

    _products("cuda", np.float32, 1)
    assert not cupy.calls
    with interpreted():
        _products("cuda", np.float32, 11)
    assert not cupy.calls
    cupy.has_cublas = False
    for one, want in zip(_products("cuda", np.float32, 11), _products("cpu", np.float32, 11), strict=True):
        np.testing.assert_allclose(one, want, rtol=1e-5, atol=1e-5)
    assert not cupy.calls
