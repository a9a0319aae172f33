"""Threads that run parts of compiled loops, without Python and its lock.

Large work is announced on a board in memory: the address of the loop, those of its arguments, and how many parts there
are. Whoever has a core takes the next part until none is left. A helper then looks out for more, awake, for some
milliseconds before it goes to sleep: waking a thread takes 50 to 300 µs, as long as a pass over a million elements.

What a board says is written before its parts are offered, and read after one was taken. Its author waits until all
parts are finished, so nobody who has taken one can find the board changed.
"""

# What intrinsics return is known to Numba only.
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

intrinsic: Any = extending.intrinsic  # makes what loops call, with arguments that they do not name

# What stands on a board. The first two are written by everybody, each in a cache line of its own.
LEFT, FINISHED, ENTRY, ARGUMENTS, ITEMS, PARTS, FAILED, CLOSED = 0, 8, 16, 17, 18, 19, 20, 21
BOARD = 24

SLOTS = 256  # of eight bytes, for the arguments of a loop: a number takes one, an array five and two for each axis

LOOKS = 1 << 20  # about two milliseconds
PATIENCE = 1 << 10  # looks after which a thread gives way: the one that it waits for may have to share its core

_slot = ir.IntType(64)
_REAL = (ir.FloatType, ir.DoubleType)
_entry = ir.FunctionType(ir.IntType(32), [_slot.as_pointer(), _slot, _slot])


# ---- what compiled code can do beside Numba's -------------------------------------------------------------


def _place(context, builder, signature, args):
    data = context.make_array(signature.args[0])(context, builder, args[0]).data
    return builder.gep(data, [args[1]])


@intrinsic
def _read(typingctx, board, i):
    """The element as it is in memory now, whoever wrote it."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_place(context, builder, signature, args), "acquire", 8)

    return types.int64(board, types.intp), codegen


@intrinsic
def _write(typingctx, board, i, value):
    """Set the element, after all that was written before."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[2], _place(context, builder, signature, args), "release", 8)
        return context.get_dummy_value()

    return types.void(board, types.intp, types.int64), codegen


@intrinsic
def _add(typingctx, board, i, value):
    """Add to the element, at once; it gives what was there."""

    def codegen(context, builder, signature, args):
        return builder.atomic_rmw("add", _place(context, builder, signature, args), args[2], "acq_rel")

    return types.int64(board, types.intp, types.int64), codegen


@intrinsic
def _replace(typingctx, board, i, old, new):
    """Set the element if it is `old`, at once, and tell whether it was."""

    def codegen(context, builder, signature, args):
        place = _place(context, builder, signature, args)
        return builder.extract_value(builder.cmpxchg(place, args[2], args[3], "acq_rel", "acquire"), 1)

    return types.boolean(board, types.intp, types.int64, types.int64), codegen


@intrinsic
def _call(typingctx, entry, arguments, start, stop):
    """Call the loop at an address; it gives 0, or something else for an error."""

    def codegen(context, builder, signature, args):
        function = builder.inttoptr(args[0], _entry.as_pointer())
        return builder.call(function, [builder.inttoptr(args[1], _slot.as_pointer()), *args[2:]])

    return types.int32(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def _give_way(typingctx):
    """Let another thread have this core, if one waits for it."""

    def codegen(context, builder, signature, args):
        if hasattr(os, "sched_yield"):
            kind = ir.FunctionType(ir.IntType(32), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), codegen


# ---- loops -----------------------------------------------------------------------------------------------


@njit()
def _take_parts(board):
    """Do one part after the other until none is left."""
    while True:
        left = _read(board, LEFT)
        if left <= 0:
            return
        if not _replace(board, LEFT, left, left - 1):
            continue
        items, parts = board[ITEMS], board[PARTS]
        start, stop = (left - 1) * items // parts, left * items // parts
        if _call(board[ENTRY], board[ARGUMENTS], start, stop) != 0:
            _write(board, FAILED, 1)
        _add(board, FINISHED, 1)


@njit()
def _offer(board):
    """Let the parts be taken."""
    _write(board, LEFT, board[PARTS])


@njit()
def _wait(board):
    """Wait a while for the parts that others took, and tell whether all are finished."""
    looks = 0
    while looks < LOOKS and _read(board, FINISHED) < board[PARTS]:
        looks += 1
        if looks % PATIENCE == 0:
            _give_way()  # maybe to the one that is waited for
    return looks < LOOKS


@njit()
def _serve(board):
    """Take parts, until there was nothing to do for a while."""
    looks = 0
    while looks < LOOKS and not _read(board, CLOSED):
        looks += 1
        if _read(board, LEFT) > 0:
            _take_parts(board)
            looks = 0
        elif looks % PATIENCE == 0:
            _give_way()


# ---- arguments -------------------------------------------------------------------------------------------


def _address(x: Array) -> int:
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(x))  # type: ignore[arg-type]  # three times as fast
    except (TypeError, ValueError):  # read-only, or empty, or with gaps
        return x.ctypes.data


def _flat(arg: Any) -> tuple[Any, ...]:
    """An argument as compiled code takes it: of an array its place, shape and strides in bytes."""
    if isinstance(arg, np.ndarray):
        return 0, 0, arg.size, arg.itemsize, _address(arg), *arg.shape, *arg.strides
    return arg if isinstance(arg, tuple) else (arg,)


def _kind(arg: Any) -> Any:
    """What decides the type of an argument."""
    if isinstance(arg, np.ndarray):
        return arg.dtype.char, arg.ndim, arg.flags.num & _LAYOUT
    return tuple(map(type, arg)) if isinstance(arg, tuple) else type(arg)


_LAYOUT = 0x1 | 0x2 | 0x100 | 0x400  # NumPy's flags: in C's order, in Fortran's, aligned, writable


class _Entry:
    """A loop, compiled for some types, as a function of the arguments' address, start and stop.

    It takes the arguments from their slots and calls what Numba compiled, at its address: the loop itself is not
    compiled anew. `format` says how `struct` writes the slots.
    """

    def __init__(self, loop: Any, args: tuple[Any, ...]) -> None:
        with global_compiler_lock:
            self._compile(loop, args)

    def _compile(self, loop: Any, args: tuple[Any, ...]) -> None:
        kinds = tuple(typeof(arg) for arg in (*args, 0, 0))
        loop.compile(kinds)
        compiled = loop.overloads[kinds]
        context, described = compiled.target_context, compiled.fndesc
        callee = context.call_conv.get_function_type(described.restype, described.argtypes)
        module = ir.Module("entry")
        function = ir.Function(module, _entry, f"entry.{described.llvm_func_name}")
        builder = ir.IRBuilder(function.append_basic_block())
        results = [builder.alloca(kind.pointee) for kind in callee.args[:2]]
        slots, start, stop = function.args
        values = [self._load(builder, slots, i, kind) for i, kind in enumerate(callee.args[2:-2])]
        place = ir.Constant(_slot, compiled.library.get_pointer_to_function(described.llvm_func_name))
        called = builder.inttoptr(place, callee.as_pointer())
        builder.ret(builder.call(called, [*results, *values, start, stop]))
        self.format = "".join("d" if isinstance(kind, _REAL) else "q" for kind in callee.args[2:-2])
        self._compiled, self._library = compiled.library, context.codegen().create_library("entry")
        self._library.add_ir_module(module)
        self._library.finalize()
        self.address = self._library.get_pointer_to_function(function.name)

    @staticmethod
    def _load(builder: Any, slots: Any, i: int, kind: Any) -> Any:
        place = builder.gep(slots, [ir.Constant(ir.IntType(32), i)])
        if isinstance(kind, ir.FloatType):
            return builder.fptrunc(_Entry._load(builder, slots, i, ir.DoubleType()), kind)
        if isinstance(kind, ir.PointerType | ir.DoubleType):
            return builder.load(builder.bitcast(place, kind.as_pointer()))
        number = builder.load(place)
        return number if kind.width == 64 else builder.trunc(number, kind)


_entries: dict[tuple[Any, ...], _Entry] = {}


# ---- helpers ---------------------------------------------------------------------------------------------


class Team:
    """Whoever calls `run`, and helpers. `run` is for one thread at a time; a team of which it raised has to leave."""

    def __init__(self) -> None:
        self._board, arguments = np.zeros(BOARD, np.int64), np.zeros(SLOTS, np.int64)
        self._arguments, self._address = memoryview(arguments), arguments.ctypes.data  # type: ignore[arg-type]
        self._asleep: dict[Thread, SimpleQueue[None]] = {}
        self._helpers: list[Thread] = []
        self._in_use: object = None  # what helpers may still work on, should whoever waits for them be interrupted

    def hire(self, count: int) -> None:
        """Have `count` helpers, or more. Raises RuntimeError if there can be no more threads."""
        while len(self._helpers) < count:
            helper = Thread(target=self._help, name="tinygrad_bn", daemon=True)
            helper.start()
            self._helpers.append(helper)

    def run(self, loop: Callable[..., object], items: int, parts: int, args: tuple[Any, ...]) -> None:
        """Do `loop(*args, start, stop)` over all of `items`, in `parts`. The loop has to be compiled by Numba."""
        key = (loop, *map(_kind, args))
        entry = _entries.get(key) or _entries.setdefault(key, _Entry(loop, args))
        struct.pack_into(entry.format, self._arguments, 0, *[x for arg in args for x in _flat(arg)])
        board = self._board
        board[FINISHED] = 0
        board[ENTRY:CLOSED] = entry.address, self._address, items, parts, 0
        self._in_use = entry, args
        _offer(board)
        self._ring()
        _take_parts(board)
        while not _wait(board):
            time.sleep(5e-5)  # somebody was sent from its core
        self._in_use = None
        if board[FAILED]:
            loop(*args, 0, items)  # once more, to raise what it raises
            raise MemoryError(f"a part of {loop} failed")

    def leave(self) -> None:
        """End the helpers."""
        self._board[CLOSED] = 1
        self._ring()
        for helper in self._helpers:
            helper.join()

    def _ring(self) -> None:
        """Wake whoever sleeps; a helper looks at the board once more when it can be rung for, so none is missed."""
        while self._asleep:
            self._asleep.popitem()[1].put(None)

    def _help(self) -> None:
        me = current_thread()
        while not self._board[CLOSED]:
            _serve(self._board)
            bell = self._asleep[me] = SimpleQueue()
            if not (self._board[LEFT] or self._board[CLOSED]):
                bell.get()
            self._asleep.pop(me, None)
