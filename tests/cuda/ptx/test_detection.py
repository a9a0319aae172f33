"""Planted bugs that the interpreter must detect, in kernels compiled by Numba and in handwritten PTX."""

from functools import partial

import numpy as np
import pytest

from tests.cuda.ptx.barriers import barriers, without_barrier
from tests.cuda.ptx.compile import compile_ptx, require_compiler
from tests.cuda.ptx.interpreter import (
    DataRace,
    Device,
    DivergentBarrier,
    InactiveLane,
    Misaligned,
    OutOfBounds,
    PTXError,
    Uninitialised,
    array_argument,
)

THREADS = 64


@pytest.fixture(scope="module")
def numba():
    require_compiler()
    return pytest.importorskip("numba")


def launch(numba, kernel, *arrays, grid=1, block=THREADS, dynamic_shared=0, edit=lambda ptx: ptx):
    """Compile a kernel and run it on arrays; returns the report and the resulting arrays."""
    types = [numba.from_dtype(a.dtype)[(slice(None),) * (a.ndim - 1) + (slice(None, None, 1),)] for a in arrays]
    ptx = edit(compile_ptx(kernel, numba.void(*types)))
    device, args, addresses = Device(), [], []
    for a in arrays:
        addresses.append(device.alloc(a.nbytes))
        device.write(addresses[-1], a)
        args += array_argument(addresses[-1], a.shape, a.dtype)
    report = device.launch(ptx, grid, block, args, dynamic_shared)
    return report, [device.read(p, a.shape, a.dtype) for p, a in zip(addresses, arrays, strict=True)]


def kernels(numba):
    """The kernels of this file. They are built in a fixture because Numba is optional."""
    from numba import cuda, float32

    def scale(x, out):
        i = cuda.grid(1)
        out[i] = x[i]

    def reverse(x, out):
        tile = cuda.shared.array(THREADS, float32)
        t = cuda.threadIdx.x
        tile[t] = x[t]
        cuda.syncthreads()
        out[t] = tile[THREADS - 1 - t]

    def twice(x, out):
        tile = cuda.shared.array(THREADS, float32)
        t = cuda.threadIdx.x
        tile[t] = x[t]
        cuda.syncthreads()
        v = tile[(t + 1) % THREADS]
        cuda.syncthreads()
        tile[t] = v
        cuda.syncthreads()
        out[t] = tile[(t + 1) % THREADS]

    def divergent(x, out):
        t = cuda.threadIdx.x
        if x[t] > float32(0):
            cuda.syncthreads()
        out[t] = x[t]

    def early_exit(x, out):
        t = cuda.threadIdx.x
        if t >= x.shape[0] - 8:
            return
        cuda.syncthreads()
        out[t] = x[t]

    def warp_tail(x, out):
        tile = cuda.shared.array(THREADS, float32)
        t = cuda.threadIdx.x
        tile[t] = x[t]
        cuda.syncthreads()
        if t < 32:
            tile[t] += tile[t + 32]
            cuda.syncwarp()
            if t < 16:
                tile[t] += tile[t + 16]
            cuda.syncwarp()
        if t < 16:
            out[t] = tile[15 - t]

    def shuffle(x, out):
        t = cuda.threadIdx.x
        v = x[t]
        if t < 16:
            v += cuda.shfl_xor_sync(0xFFFF, v, 8)
        out[t] = v

    def shuffle_all(x, out):
        t = cuda.threadIdx.x
        v = x[t]
        if t < 16:
            v += cuda.shfl_down_sync(0xFFFFFFFF, v, 8)
        out[t] = v

    def unwritten(x, out):
        tile = cuda.shared.array(THREADS, float32)
        t = cuda.threadIdx.x
        if t > 0:
            tile[t] = x[t]
        cuda.syncthreads()
        out[t] = tile[t]

    def strided(x, out):
        t = cuda.threadIdx.x
        out[t] = x[8 * t]

    def column(x, out):
        tile = cuda.shared.array((32, 32), float32)
        t = cuda.threadIdx.x
        for k in range(32):
            tile[k, t] = x[t]
        cuda.syncthreads()
        total = float32(0)
        for k in range(32):
            total += tile[t, k]
        out[t] = total

    def padded_column(x, out):
        tile = cuda.shared.array((32, 33), float32)
        t = cuda.threadIdx.x
        for k in range(32):
            tile[k, t] = x[t]
        cuda.syncthreads()
        total = float32(0)
        for k in range(32):
            total += tile[t, k]
        out[t] = total

    def neighbour(x, out):
        i = cuda.grid(1)
        out[i] = x[i]
        if i + 1 < out.shape[0]:
            out[i + 1] = x[i]

    def total(x, out):
        out[0] += x[cuda.grid(1)]

    def atomic_total(x, out):
        cuda.atomic.add(out, 0, x[cuda.grid(1)])

    def shift_in_place(x, out):
        i = cuda.grid(1)
        if i + 1 < x.shape[0]:
            x[i] = x[i + 1]
        out[i] = float32(0)

    return {name: f for name, f in locals().items() if callable(f) and name not in ("cuda", "float32", "numba")}


@pytest.fixture(scope="module")
def kernel(numba):
    return kernels(numba)


def numbers(n=THREADS):
    return np.arange(1, n + 1, dtype=np.float32)


def zeros(n=THREADS):
    return np.zeros(n, np.float32)


@pytest.mark.parametrize("name", ["scale", "reverse", "twice", "warp_tail", "shuffle", "padded_column", "atomic_total"])
def test_correct_kernels_pass(numba, kernel, name):
    block = 32 if name == "padded_column" else THREADS
    report, (_, out) = launch(numba, kernel[name], numbers(), zeros(), block=block)
    x = numbers()
    expected = {
        "scale": x,
        "reverse": x[::-1],
        "twice": np.roll(x, -2),
        "warp_tail": np.pad(x.reshape(4, 16).sum(0)[::-1], (0, 48)),
        "shuffle": np.concatenate([np.tile(x[:8] + x[8:16], 2), x[16:]]),
        "padded_column": np.pad(np.full(32, x[:32].sum()), (0, 32)),
        "atomic_total": np.pad(x.sum(keepdims=True), (0, 63)),
    }
    np.testing.assert_array_equal(out, expected[name])
    assert report.bank_conflicts == 0


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("divergent", DivergentBarrier, r"waits for thread 0, which waits|waits for thread 0, which has ended"),
        ("early_exit", DivergentBarrier, "waits for thread 56, which has ended"),
        ("shuffle_all", InactiveLane, "waits for lanes of its mask that never arrive"),
        ("unwritten", Uninitialised, "never written"),
        ("neighbour", DataRace, "overwrites what thread"),
        ("total", DataRace, "thread"),
        ("shift_in_place", DataRace, "thread"),
    ],
)
def test_planted_bugs_are_found(numba, kernel, name, error, message):
    x = numbers()
    x[0] = -1
    with pytest.raises(error, match=message) as caught:
        launch(numba, kernel[name], x, zeros())
    assert f"{name}, line" in str(caught.value)


@pytest.mark.parametrize("grid", [2, 3])
def test_reading_past_the_end_is_found(numba, kernel, grid):
    with pytest.raises(OutOfBounds, match=r"ld.global.*\n.*thread \(0, 0, 0\) of block \(1, 0, 0\).*byte 256"):
        launch(numba, kernel["scale"], numbers(), zeros(THREADS * grid), grid=grid)


def test_a_block_larger_than_its_shared_array_is_found(numba, kernel):
    with pytest.raises(OutOfBounds, match=r"st.shared.*\n.*thread \(64, 0, 0\).*256 of .* shared memory \(256 bytes\)"):
        launch(numba, kernel["reverse"], numbers(96), zeros(96), block=96)


def test_blocks_race_also_if_they_are_executed_one_after_the_other(monkeypatch, numba, kernel):
    monkeypatch.setattr("tests.cuda.ptx.interpreter.LANES", 32)
    with pytest.raises(DataRace, match=r"block \(1, 0, 0\).*what thread 0 of block 0 wrote"):
        launch(numba, kernel["total"], numbers(), zeros(), grid=2, block=1)
    _, (_, out) = launch(numba, kernel["scale"], numbers(), zeros(), grid=4, block=16)
    np.testing.assert_array_equal(out, numbers())


def test_blocks_that_meet_in_global_memory_race(numba, kernel):
    with pytest.raises(DataRace, match=r"of block \(0, 0, 0\).*overwrites what thread 0 of block 1 read"):
        launch(numba, kernel["total"], numbers(), zeros(), grid=2, block=1)
    _, (_, out) = launch(numba, kernel["atomic_total"], numbers(), zeros(), grid=2, block=32)
    assert out[0] == numbers().sum()


@pytest.mark.parametrize(("name", "count"), [("reverse", 1), ("twice", 3), ("warp_tail", 3)])
def test_a_missing_barrier_is_found(numba, kernel, name, count):
    def edit(k, ptx):
        assert len(barriers(ptx)) == count
        return without_barrier(ptx, k)

    for k in range(count):
        with pytest.raises(DataRace):
            launch(numba, kernel[name], numbers(), zeros(), edit=partial(edit, k))


def test_strided_loads_are_counted_in_sectors(numba, kernel):
    near, _ = launch(numba, kernel["scale"], numbers(), zeros())
    far, _ = launch(numba, kernel["strided"], numbers(8 * THREADS), zeros())
    assert near.traffic["global", "load", 32].sectors == 8  # 64 numbers of 4 bytes
    assert far.traffic["global", "load", 32].sectors == 64  # one each
    assert far.traffic["global", "store", 32].sectors == 8
    assert near.sectors_per_request(32) == 4
    assert near.moved("load") == far.moved("load") == 256


def test_walking_a_column_of_a_tile_conflicts(numba, kernel):
    bad, (_, out) = launch(numba, kernel["column"], numbers(32), zeros(32), block=32)
    assert out[0] == numbers(32).sum()  # correct but slow: each of 32 reads accesses 32 words of one bank
    assert bad.bank_conflicts == 32 * 31


# Handwritten PTX

HEAD = """.version 9.0
.target sm_75
.address_size 64
.visible .entry k(.param .u64 x) {
.reg .b64 a, b; .reg .b32 t, r, s; .reg .pred p; .shared .align 16 .b8 tile[1024];
ld.param.u64 a, [x]; mov.u32 t, %tid.x;
"""


def execute(code: str, nbytes: int = 1024, threads: int = 32, grid: int = 1):
    device = Device()
    address = device.alloc(nbytes)
    device.write(address, np.zeros(nbytes, np.uint8))
    return device.launch(HEAD + code + "ret;\n}\n", grid, threads, [address])


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("add.u64 a, a, 4; ld.global.v4.u32 {r, r, r, r}, [a];", Misaligned, "not a multiple of the 16 bytes"),
        ("ld.global.u64 b, [a+4];", Misaligned, "not a multiple of the 8 bytes"),
        ("ld.global.v2.u32 {r, s}, [a+1024];", OutOfBounds, "byte 1024 of the allocation of 1024 bytes"),
        ("ld.global.u32 r, [a-4];", OutOfBounds, "before every allocation"),
        ("mov.u64 b, 0; st.u32 [b], t;", OutOfBounds, "0x0, before"),
        ("mov.u64 b, tile; ld.shared.u32 r, [b];", Uninitialised, "never written"),
        ("mov.u64 b, tile; atom.shared.add.u32 r, [b], 1;", Uninitialised, "never written"),
        ("st.shared.u32 [tile], t;", DataRace, "thread 31 of block 0 writes at the same time"),
        ("st.global.u32 [a], 0;", DataRace, "writes at the same time"),
        ("ld.volatile.global.u32 r, [a]; st.global.u32 [a], 0;", DataRace, "writes at the same time"),
        ("setp.eq.u32 p, t, 0; @p st.global.u32 [a], 0; ld.global.u32 r, [a];", DataRace, "reads what thread 0"),
        ("setp.eq.u32 p, t, 9; ld.global.u32 r, [a]; @p st.global.u32 [a], 0;", DataRace, "overwrites what thread"),
        (
            "setp.eq.u32 p, t, 9; @p st.global.u32 [a], 0; red.global.add.u32 [a], 1;",
            DataRace,
            "overwrites what thread 9",
        ),
        ("red.global.add.u32 [a], 1; ld.global.u32 r, [a];", DataRace, "reads what thread 31"),
        ("setp.gt.u32 p, t, 4; @p shfl.sync.bfly.b32 r, t, 1, 31, 0xf;", InactiveLane, "not in its own mask"),
        ("shfl.sync.down.b32 r, t, 1, 31, -1;", InactiveLane, "waits for lanes|reads lane 24"),
        ("setp.gt.u32 p, t, 4; @p bra end; bar.sync 0; bra end; end: bar.sync 0;", DivergentBarrier, "waits at line"),
        ("setp.gt.u32 p, t, 4; @p ret; bar.sync 0;", DivergentBarrier, "which has ended"),
        ("bar.warp.sync 0xffff;", InactiveLane, "not in its own mask"),
    ],
)
def test_planted_bugs_in_ptx_are_found(code, error, message):
    threads = 24 if "down" in code else 32
    with pytest.raises(error, match=message):
        execute(code, threads=threads)


def test_the_race_detector_knows_which_barriers_order_accesses():
    store = "mov.u64 b, tile; mad.wide.u32 b, t, 4, b; st.shared.u32 [b], t; xor.b32 s, t, {other};"
    load = "mov.u64 b, tile; mad.wide.u32 b, s, 4, b; ld.shared.u32 r, [b];"
    near, far = store.format(other=1), store.format(other=32)  # of the same warp, of the next one
    execute(near + "bar.sync 0;" + load, threads=64)
    execute(near + "bar.warp.sync -1;" + load, threads=64)
    execute(far + "bar.sync 0;" + load, threads=64)
    with pytest.raises(DataRace):  # lanes of a warp do not run in lockstep
        execute(near + load, threads=64)
    with pytest.raises(DataRace):  # a shuffle does not order memory
        execute(near + "shfl.sync.bfly.b32 r, t, 1, 31, -1;" + load, threads=64)
    with pytest.raises(DataRace):  # a warp barrier does not order two warps
        execute(far + "bar.warp.sync -1;" + load, threads=64)


def test_reads_are_remembered_until_a_barrier():
    """A write races with every read since the last barrier, however many threads have read since."""
    read = "ld.global.u32 r, [a];"
    write = "setp.eq.u32 p, t, {thread}; @p st.global.u32 [a], 7;"
    for thread in (0, 31, 40):
        execute(read + "bar.sync 0;" + write.format(thread=thread), threads=64)
        with pytest.raises(DataRace):
            execute(read + "bar.warp.sync -1;" + write.format(thread=thread), threads=64)
    one = "setp.eq.u32 p, t, {thread}; @p ld.global.u32 r, [a];"
    two_readers = one.format(thread=0) + "bar.warp.sync -1;" + one.format(thread=33)
    with pytest.raises(DataRace):
        execute(two_readers + write.format(thread=33), threads=64)
    execute(one.format(thread=33) + write.format(thread=33), threads=64)
    with pytest.raises(DataRace):  # one block reads, another writes
        execute("mov.u32 s, %ctaid.x; setp.eq.u32 p, s, 1;" + read + "@p st.global.u32 [a], 1;", threads=1, grid=2)


def test_bytes_of_a_word_do_not_race():
    execute("cvt.u64.u32 b, t; add.u64 b, a, b; st.global.u8 [b], 1;")
    with pytest.raises(DataRace):
        execute("and.b32 s, t, 30; cvt.u64.u32 b, s; add.u64 b, a, b; st.global.u8 [b], 1;")


@pytest.mark.parametrize(
    ("width", "stride", "conflicts"),
    [("u32", 4, 0), ("u32", 8, 1), ("u32", 0, 0), ("u64", 8, 0), ("u64", 16, 2), ("v4.u32", 16, 0), ("u32", 32, 7)],
)
def test_bank_conflicts_are_counted(width, stride, conflicts):
    """Two words of one bank take two cycles; 64 bits a lane always take two cycles, 128 bits four."""
    into = {"u32": "r", "u64": "b", "v4.u32": "{r, r, r, r}"}[width]
    fill = "mov.u64 b, tile; mad.wide.u32 b, t, 4, b;" + "".join(f"st.shared.u32 [b+{128 * k}], t;" for k in range(8))
    code = fill + f"bar.sync 0; mov.u64 b, tile; mad.wide.u32 b, t, {stride}, b; ld.shared.{width} {into}, [b];"
    assert execute(code).bank_conflicts == conflicts


def test_memory_that_was_freed_is_out_of_bounds():
    device = Device()
    address = device.alloc(128)
    device.free(address)
    with pytest.raises(OutOfBounds, match="byte 0 of the freed allocation of 128 bytes"):
        device.launch(HEAD + "ld.global.u32 r, [a]; ret;\n}", 1, 32, [address])
    with pytest.raises(PTXError, match="a second time"):
        device.free(address)
    with pytest.raises(OutOfBounds, match="a copy of 4 bytes"):
        device.write(address, np.zeros(1, np.float32))
    with pytest.raises(OutOfBounds):
        device.read(device.alloc(4), (2,), np.float32)


def test_uninitialised_memory_is_not_read():
    device = Device()
    address = device.alloc(128)
    with pytest.raises(Uninitialised, match="byte 0 of the allocation"):
        device.launch(HEAD + "ld.global.u32 r, [a]; ret;\n}", 1, 32, [address])
    device.launch(HEAD + "mad.wide.u32 a, t, 4, a; st.global.u32 [a], t; ret;\n}", 1, 32, [address])
    np.testing.assert_array_equal(device.read(address, (32,), "u4"), np.arange(32))
    with pytest.raises(Uninitialised):  # the first half was written, the second was not
        device.launch(HEAD + "ld.global.u64 b, [a+128]; ret;\n}", 1, 1, [device.alloc(8) - 128])


def test_freed_memory_is_reused_only_after_quarantine(monkeypatch):
    monkeypatch.setattr("tests.cuda.ptx.interpreter.QUARANTINE", 2000)
    device = Device(4096)
    addresses = [device.alloc(100) for _ in range(20)]
    assert len(set(addresses)) == 20
    assert all(a % 256 == 0 for a in addresses)
    for a in addresses:
        device.free(a)
    assert device.alloc(100) == addresses[0]
    assert device.alloc(5000) > max(addresses)


def test_memory_may_be_freed_in_the_middle_of_an_allocation():
    """A finalizer frees whenever the garbage collector runs."""
    device = Device(4096)
    first, second, third = (device.alloc(100) for _ in range(3))
    late = [second, third]

    class Sizes(dict[int, int]):
        def __getitem__(self, address: int) -> int:
            if late:
                device.free(late.pop())
            return super().__getitem__(address)

    device.freed = Sizes()
    device.free(first)
    device.alloc(100)
    assert set(device.freed) == {first, third}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": 2048}, "a grid of .* is impossible"),
        ({"grid": 0}, "a grid of .* is impossible"),
        ({"args": []}, "0 arguments for 1 parameters"),
        ({"dynamic_shared": 50000}, "more than the 49152"),
    ],
)
def test_impossible_launches_are_errors(changes, message):
    arguments = {"grid": 1, "block": 32, "args": [0], **changes}
    with pytest.raises(PTXError, match=message):
        Device().launch(HEAD + "ret;\n}", **arguments)
