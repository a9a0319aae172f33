"""Vectors of 256 or 512 bits as values in compiled loops, for the few loops that LLVM does not vectorise well.

With `load`, `larger` and `store` a loop keeps its numbers in registers. On a processor with smaller registers LLVM
splits the vectors.
"""

# Only Numba knows the types of intrinsics.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

from llvmlite import ir
from numba import config, extending, types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.extending import models, register_model

FEATURES = config.CPU_FEATURES or get_host_cpu_features()  # type: ignore[attr-defined]
BITS = 512 if "+avx512f" in FEATURES.split(",") else 256
intrinsic: Any = extending.intrinsic  # untyped: Numba binds its first argument


class Vector(types.Type):
    """BITS bits of numbers of one floating-point type."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.lanes = BITS // dtype.bitwidth
        super().__init__(name=f"Vector({dtype})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        scalar = manager.lookup(vector.dtype).get_value_type()
        super().__init__(manager, vector, ir.VectorType(scalar, vector.lanes))


def address(context, builder, array_type, array, i):
    """The address of element `i` of a contiguous array."""
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [i])


def load_from(context, builder, vector, pointer):
    """The vector at the address of its first element."""
    pointer = builder.bitcast(pointer, context.get_value_type(vector).as_pointer())
    return builder.load(pointer, align=vector.dtype.bitwidth // 8)


def store_to(context, builder, vector, value, pointer):
    """The reverse of `load_from`."""
    pointer = builder.bitcast(pointer, context.get_value_type(vector).as_pointer())
    builder.store(value, pointer, align=vector.dtype.bitwidth // 8)


def _mask(indices):
    return ir.Constant(ir.VectorType(ir.IntType(32), len(indices)), list(indices))


def call_llvm(builder, name, vector, result, args, **options):
    """Call the LLVM intrinsic `name` for vectors of this type."""
    signature = ir.FunctionType(result, [arg.type for arg in args])
    suffix = f"v{vector.lanes}f{vector.dtype.bitwidth}"
    function = cgutils.get_or_insert_function(builder.module, signature, f"{name}.{suffix}")
    return builder.call(function, args, **options)


@intrinsic
def lanes(typingctx, array):
    """Elements of a vector of the array's dtype: a constant."""

    def codegen(context, builder, signature, args):
        return context.get_constant(types.intp, Vector(array.dtype).lanes)

    return types.intp(array), codegen


@intrinsic
def load(typingctx, array, i):
    """The vector from element `i` of a contiguous 1-d array."""
    vector = Vector(array.dtype)

    def codegen(context, builder, signature, args):
        return load_from(context, builder, vector, address(context, builder, array, *args))

    return vector(array, types.intp), codegen


@intrinsic
def store(typingctx, array, i, vector):
    """Write a vector to a contiguous 1-d array from element `i`."""
    if vector.dtype != array.dtype:
        return None  # a typing error

    def codegen(context, builder, signature, args):
        store_to(context, builder, vector, args[2], address(context, builder, array, *args[:2]))
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), codegen


def broadcast(context, builder, vector, number):
    """The vector with a number in all lanes."""
    undefined = ir.Constant(context.get_value_type(vector), ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, _mask([0] * vector.lanes))


@intrinsic
def splat(typingctx, x):
    """The vector with x in all lanes."""
    vector = Vector(x)

    def codegen(context, builder, signature, args):
        return broadcast(context, builder, vector, args[0])

    return vector(x), codegen


@intrinsic
def no_unroll(typingctx):
    """Keeps LLVM from unrolling the surrounding loop: two steps at once may need more registers than there are."""

    def codegen(context, builder, signature, args):
        barrier = ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "", "", side_effect=True)
        builder.call(barrier, [], attrs=("convergent",))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def mul(typingctx, a, b):
    """a · b in each lane."""

    def codegen(context, builder, signature, args):
        return builder.fmul(*args)

    return a(a, a), codegen


def _shuffled(typingctx, a, b, indices):
    """Signature and code of an intrinsic that picks lanes `indices` of the concatenation of two vectors."""

    def codegen(context, builder, signature, args):
        return builder.shuffle_vector(*args, _mask(indices))

    return a(a, b), codegen


@intrinsic
def evens(typingctx, a, b):
    """Lanes 0, 2, 4, … of the concatenation of two vectors."""
    return _shuffled(typingctx, a, b, range(0, 2 * a.lanes, 2))


@intrinsic
def odds(typingctx, a, b):
    """Lanes 1, 3, 5, … of the concatenation of two vectors."""
    return _shuffled(typingctx, a, b, range(1, 2 * a.lanes, 2))


@intrinsic
def zip_first(typingctx, a, b):
    """The first half of a₀, b₀, a₁, b₁, …"""
    return _shuffled(typingctx, a, b, [i // 2 + i % 2 * a.lanes for i in range(a.lanes)])


@intrinsic
def zip_last(typingctx, a, b):
    """The last half of a₀, b₀, a₁, b₁, …"""
    return _shuffled(typingctx, a, b, [i // 2 + i % 2 * a.lanes for i in range(a.lanes, 2 * a.lanes)])


@intrinsic
def transpose(typingctx, source, at, source_stride, target, to, target_stride):
    """target[to + j · target_stride + i] = source[at + i · source_stride + j] for all i and j below `lanes`.

    Both arrays are contiguous, 1-d, and of one dtype.
    """
    vector = Vector(source.dtype)
    if target.dtype != source.dtype:
        return None

    def codegen(context, builder, signature, args):
        lanes = range(vector.lanes)

        def row(i, array, first, stride):
            index = builder.add(args[first], builder.mul(args[stride], ir.Constant(args[stride].type, i)))
            return address(context, builder, signature.args[array], args[array], index)

        rows = [load_from(context, builder, vector, row(i, 0, 1, 2)) for i in lanes]
        side = 1
        while side < vector.lanes:  # swap the off-diagonal squares of each 2 × 2 block of squares
            upper = _mask([j + vector.lanes - side if j & side else j for j in lanes])
            lower = _mask([j + vector.lanes if j & side else j + side for j in lanes])
            pairs = [(rows[i & ~side], rows[i | side], lower if i & side else upper) for i in lanes]
            rows = [builder.shuffle_vector(*pair) for pair in pairs]
            side *= 2
        for i in lanes:
            store_to(context, builder, vector, rows[i], row(i, 3, 4, 5))
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), codegen


@intrinsic
def larger(typingctx, a, b):
    """The maximum in each lane: a if they are equal, NaN if either is NaN."""

    def codegen(context, builder, signature, args):
        x, y = args
        beats = builder.or_(builder.fcmp_ordered(">", y, x), builder.fcmp_unordered("uno", y, y))
        return builder.select(beats, y, x)

    return a(a, b), codegen


def _selected(typingctx, x, y, g, equal_lanes):
    """Signature and code of an intrinsic: g in the lanes where x == y or x is NaN, or in the others; else 0."""

    def codegen(context, builder, signature, args):
        x, y, g = args
        equal = builder.or_(builder.fcmp_ordered("==", x, y), builder.fcmp_unordered("uno", x, x))
        zero = ir.Constant(g.type, [0.0] * g.type.count)
        return builder.select(equal, *((g, zero) if equal_lanes else (zero, g)))

    return g(x, y, g), codegen


@intrinsic
def where_equal(typingctx, x, y, g):
    """g in the lanes where x == y or x is NaN, else 0."""
    return _selected(typingctx, x, y, g, True)


@intrinsic
def where_different(typingctx, x, y, g):
    """g − where_equal(x, y, g)."""
    return _selected(typingctx, x, y, g, False)
