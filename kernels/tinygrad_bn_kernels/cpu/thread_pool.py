"""A thread pool that runs parts of compiled loops without the GIL.

A job is an array in memory: the address of the loop, the address of its arguments, the number of items and parts. The
caller and the workers take parts with atomic operations until none remain. An idle worker spins for about two
milliseconds before it sleeps: waking a thread takes 50 to 300 µs, as long as a pass over a million elements.

The job is written before its parts are released, and read after a part is acquired. The caller waits until all parts
are done before it writes the next job, so a thread with a part never sees the job change.
"""

# Only Numba knows the types of intrinsics.
# mypy: disable-error-code="no-untyped-def"

import ctypes
import os
import struct
import time
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread, current_thread
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, typeof, types
from numba.core import cgutils
from numba.core.compiler_lock import global_compiler_lock

from tinygrad_bn_kernels.cpu.arrays import Array
from tinygrad_bn_kernels.cpu.jit import njit

intrinsic: Any = extending.intrinsic  # untyped: Numba binds its first argument

# Indices into a job. All threads write the first two; each has its own cache line.
REMAINING, FINISHED, ENTRY, ARGUMENTS, ITEMS, PARTS, FAILED, CLOSED = 0, 8, 16, 17, 18, 19, 20, 21
JOB_SIZE = 24

SLOTS = 256  # of eight bytes for the arguments of a loop: one for a number, five and two per axis for an array

SPIN_COUNT = 1 << 20  # about two milliseconds
YIELD_EVERY = 1 << 10  # spins between two sched_yield: a thread that is waited for may need this core

_slot = ir.IntType(64)
_REAL = (ir.FloatType, ir.DoubleType)
_entry = ir.FunctionType(ir.IntType(32), [_slot.as_pointer(), _slot, _slot])


# ---- intrinsics ------------------------------------------------------------------------------------------


def _element_pointer(context, builder, signature, args):
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.gep(data, [args[1]])


@intrinsic
def _atomic_load(typingctx, array, i):
    """array[i], with acquire ordering."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_element_pointer(context, builder, signature, args), "acquire", 8)

    return types.int64(array, types.intp), codegen


@intrinsic
def _atomic_store(typingctx, array, i, value):
    """array[i] = value, with release ordering."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[2], _element_pointer(context, builder, signature, args), "release", 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.int64), codegen


@intrinsic
def _atomic_add(typingctx, array, i, value):
    """array[i] += value; returns the old value."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _element_pointer(context, builder, signature, args), args[2], "acq_rel")

    return types.int64(array, types.intp, types.int64), codegen


@intrinsic
def _compare_exchange(typingctx, array, i, old, new):
    """Set array[i] to `new` if it is `old`; returns whether it was."""

    def codegen(context, builder, signature, args):
        pointer = _element_pointer(context, builder, signature, args)
        return builder.extract_value(builder.cmpxchg(pointer, args[2], args[3], "acq_rel", "acquire"), 1)

    return types.boolean(array, types.intp, types.int64, types.int64), codegen


@intrinsic
def _call(typingctx, entry, arguments, start, stop):
    """Call the loop at an address; returns 0, or another number after an error."""

    def codegen(context, builder, signature, args):
        function = builder.inttoptr(args[0], _entry.as_pointer())
        return builder.call(function, [builder.inttoptr(args[1], _slot.as_pointer()), *args[2:]])

    return types.int32(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def _yield_core(typingctx):
    """sched_yield, where the system has it."""

    def codegen(context, builder, signature, args):
        if hasattr(os, "sched_yield"):
            signature = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, signature, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


# ---- loops -----------------------------------------------------------------------------------------------


@njit(allocates=False)
def _run_parts(job):
    """Take and run parts until none remain."""
    while True:
        remaining = _atomic_load(job, REMAINING)
        if remaining <= 0:
            return
        if not _compare_exchange(job, REMAINING, remaining, remaining - 1):
            continue
        items, parts = job[ITEMS], job[PARTS]
        start, stop = (remaining - 1) * items // parts, remaining * items // parts
        if _call(job[ENTRY], job[ARGUMENTS], start, stop) != 0:
            _atomic_store(job, FAILED, 1)
        _atomic_add(job, FINISHED, 1)


@njit(allocates=False)
def _publish(job):
    """Release the parts of a job."""
    _atomic_store(job, REMAINING, job[PARTS])


@njit(allocates=False)
def _spin_until_finished(job):
    """Spin until the workers finish their parts; returns False after SPIN_COUNT."""
    spins = 0
    while spins < SPIN_COUNT and _atomic_load(job, FINISHED) < job[PARTS]:
        spins += 1
        if spins % YIELD_EVERY == 0:
            _yield_core()
    return spins < SPIN_COUNT


@njit(allocates=False)
def _work(job):
    """Run parts until there are none for SPIN_COUNT spins, or the pool is closed."""
    spins = 0
    while spins < SPIN_COUNT and not _atomic_load(job, CLOSED):
        spins += 1
        if _atomic_load(job, REMAINING) > 0:
            _run_parts(job)
            spins = 0
        elif spins % YIELD_EVERY == 0:
            _yield_core()


# ---- arguments -------------------------------------------------------------------------------------------


def _address(x: Array) -> int:
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(x))  # type: ignore[arg-type]  # three times as fast
    except (TypeError, ValueError):  # read-only, empty, or not contiguous
        return x.ctypes.data


def _flat(arg: Any) -> tuple[Any, ...]:
    """An argument as Numba passes it: an array as (meminfo, parent, size, itemsize, data, *shape, *strides)."""
    if isinstance(arg, np.ndarray):
        return 0, 0, arg.size, arg.itemsize, _address(arg), *arg.shape, *arg.strides
    return arg if isinstance(arg, tuple) else (arg,)


def _type_key(arg: Any) -> Any:
    """A key for the Numba type of an argument; cheaper than `typeof`."""
    if isinstance(arg, np.ndarray):
        return arg.dtype.char, arg.ndim, arg.flags.num & _LAYOUT
    return tuple(map(type, arg)) if isinstance(arg, tuple) else type(arg)


_LAYOUT = 0x1 | 0x2 | 0x100 | 0x400  # NumPy's flags: C order, Fortran order, aligned, writable


class _Entry:
    """A wrapper of a compiled loop with one signature for all: (address of the arguments, start, stop).

    It reads the arguments from their slots and calls the loop at its address, so the loop is not compiled again.
    `format` is the `struct` format of the slots.
    """

    def __init__(self, loop: Any, args: tuple[Any, ...]) -> None:
        with global_compiler_lock:
            self._compile(loop, args)

    def _compile(self, loop: Any, args: tuple[Any, ...]) -> None:
        signature = tuple(typeof(arg) for arg in (*args, 0, 0))
        loop.compile(signature)
        compiled = loop.overloads[signature]
        context, described = compiled.target_context, compiled.fndesc
        callee = context.call_conv.get_function_type(described.restype, described.argtypes)
        module = ir.Module("entry")
        function = ir.Function(module, _entry, f"entry.{described.llvm_func_name}")
        builder = ir.IRBuilder(function.append_basic_block())
        results = [builder.alloca(type_.pointee) for type_ in callee.args[:2]]
        slots, start, stop = function.args
        values = [self._load(builder, slots, i, type_) for i, type_ in enumerate(callee.args[2:-2])]
        address = ir.Constant(_slot, compiled.library.get_pointer_to_function(described.llvm_func_name))
        called = builder.inttoptr(address, callee.as_pointer())
        builder.ret(builder.call(called, [*results, *values, start, stop]))
        self.format = "".join("d" if isinstance(type_, _REAL) else "q" for type_ in callee.args[2:-2])
        self._callee, self._library = compiled.library, context.codegen().create_library("entry")
        self._library.add_ir_module(module)
        self._library.finalize()
        self.address = self._library.get_pointer_to_function(function.name)

    @staticmethod
    def _load(builder: Any, slots: Any, i: int, type_: Any) -> Any:
        pointer = builder.gep(slots, [ir.Constant(ir.IntType(32), i)])
        if isinstance(type_, ir.FloatType):
            return builder.fptrunc(_Entry._load(builder, slots, i, ir.DoubleType()), type_)
        if isinstance(type_, ir.PointerType | ir.DoubleType):
            return builder.load(builder.bitcast(pointer, type_.as_pointer()))
        number = builder.load(pointer)
        return number if type_.width == 64 else builder.trunc(number, type_)


_entries: dict[tuple[Any, ...], _Entry] = {}


# ---- the pool --------------------------------------------------------------------------------------------


class ThreadPool:
    """Workers for `run`. One thread at a time calls `run`; after an exception in it the pool has to be shut down."""

    def __init__(self) -> None:
        self._job, arguments = np.zeros(JOB_SIZE, np.int64), np.zeros(SLOTS, np.int64)
        self._arguments, self._address = memoryview(arguments), arguments.ctypes.data  # type: ignore[arg-type]
        self._sleeping: dict[Thread, SimpleQueue[None]] = {}
        self._workers: list[Thread] = []
        self._in_use: object = None  # keeps the loop and its arguments alive if an exception interrupts `run`

    def start_workers(self, count: int) -> None:
        """Start workers until there are `count`. Raises RuntimeError if the system allows no more threads."""
        while len(self._workers) < count:
            worker = Thread(target=self._worker, name="tinygrad_bn", daemon=True)
            worker.start()
            self._workers.append(worker)

    def run(self, loop: Callable[..., object], items: int, parts: int, args: tuple[Any, ...]) -> None:
        """Run `loop(*args, start, stop)`, compiled by Numba, over `items` items in `parts` parts."""
        key = (loop, *map(_type_key, args))
        entry = _entries.get(key) or _entries.setdefault(key, _Entry(loop, args))
        struct.pack_into(entry.format, self._arguments, 0, *[x for arg in args for x in _flat(arg)])
        job = self._job
        job[FINISHED] = 0
        job[ENTRY:CLOSED] = entry.address, self._address, items, parts, 0
        self._in_use = entry, args
        _publish(job)
        self._wake()
        _run_parts(job)
        while not _spin_until_finished(job):
            time.sleep(5e-5)  # a worker may need this core
        self._in_use = None
        if job[FAILED]:
            loop(*args, 0, items)  # run again serially for its exception
            raise MemoryError(f"a part of {loop} failed")

    def shutdown(self) -> None:
        """End the workers and wait for them."""
        self._job[CLOSED] = 1
        self._wake()
        for worker in self._workers:
            worker.join()

    def _wake(self) -> None:
        """Wake all sleeping workers."""
        while self._sleeping:
            self._sleeping.popitem()[1].put(None)

    def _worker(self) -> None:
        me = current_thread()
        while not self._job[CLOSED]:
            _work(self._job)
            wake = self._sleeping[me] = SimpleQueue()
            if not (self._job[REMAINING] or self._job[CLOSED]):  # checked after registering: no wake-up is lost
                wake.get()
            self._sleeping.pop(me, None)
