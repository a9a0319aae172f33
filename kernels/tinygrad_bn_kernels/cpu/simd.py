"""Vectors of 256 bits as values in compiled loops, for the few loops that LLVM does not vectorise well by itself.

A loop over `load`, `fma` and `store` says which numbers stay in registers: what the inner loop of a matrix product
needs, and what a compiler does not find. On a processor with other registers LLVM splits or joins the vectors.
"""

# What intrinsics return is known to Numba only.
# mypy: disable-error-code="no-untyped-def"

from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.extending import models, register_model

BITS = 256
intrinsic: Any = extending.intrinsic  # makes what loops call, with arguments that they do not name


class Vector(types.Type):
    """As many numbers of a floating-point type as fit into 256 bits."""

    def __init__(self, dtype):
        self.dtype = dtype
        self.lanes = BITS // dtype.bitwidth
        super().__init__(name=f"Vector({dtype})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, vector):
        scalar = manager.lookup(vector.dtype).get_value_type()
        super().__init__(manager, vector, ir.VectorType(scalar, vector.lanes))


def _pointer(context, builder, vector, array_type, array, i):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [i]), context.get_value_type(vector).as_pointer())


def _mask(indices):
    return ir.Constant(ir.VectorType(ir.IntType(32), len(indices)), list(indices))


def _call(builder, name, vector, result, args, **options):
    """Call an intrinsic of LLVM: `name` for vectors of this type."""
    kind = ir.FunctionType(result, [arg.type for arg in args])
    suffix = f"v{vector.lanes}f{vector.dtype.bitwidth}"
    function = cgutils.get_or_insert_function(builder.module, kind, f"{name}.{suffix}")
    return builder.call(function, args, **options)


@intrinsic
def lanes(typingctx, array):
    """How many elements of the array make a vector: a constant."""

    def codegen(context, builder, signature, args):
        return context.get_constant(types.intp, Vector(array.dtype).lanes)

    return types.intp(array), codegen


@intrinsic
def load(typingctx, array, i):
    """The vector that starts at element `i` of a contiguous array of one axis."""
    vector = Vector(array.dtype)

    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, vector, signature.args[0], *args)
        return builder.load(pointer, align=array.dtype.bitwidth // 8)

    return vector(array, types.intp), codegen


@intrinsic
def store(typingctx, array, i, vector):
    """Write a vector from element `i` on."""
    if vector.dtype != array.dtype:
        return None  # a typing error, as it would write beyond the elements

    def codegen(context, builder, signature, args):
        pointer = _pointer(context, builder, vector, signature.args[0], *args[:2])
        builder.store(args[2], pointer, align=array.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector), codegen


def _everywhere(context, builder, vector, number):
    undefined = ir.Constant(context.get_value_type(vector), ir.Undefined)
    first = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(first, undefined, _mask([0] * vector.lanes))


@intrinsic
def splat(typingctx, x):
    """The vector that has one number everywhere."""
    vector = Vector(x)

    def codegen(context, builder, signature, args):
        return _everywhere(context, builder, vector, args[0])

    return vector(x), codegen


@intrinsic
def load_splat(typingctx, array, i):
    """The vector that has element `i` of a contiguous array everywhere."""
    vector = Vector(array.dtype)

    def codegen(context, builder, signature, args):
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return _everywhere(context, builder, vector, builder.load(builder.gep(data, [args[1]])))

    return vector(array, types.intp), codegen


@intrinsic
def fma(typingctx, a, b, c):
    """a · b + c in each lane, rounded once."""

    def codegen(context, builder, signature, args):
        return _call(builder, "llvm.fma", a, args[0].type, args)

    return a(a, a, a), codegen


@intrinsic
def as_written(typingctx):
    """The loop in which this stands is not unrolled: two rounds at once may want more registers than there are."""

    def codegen(context, builder, signature, args):
        nothing = ir.InlineAsm(ir.FunctionType(ir.VoidType(), []), "", "", side_effect=True)
        builder.call(nothing, [], attrs=("convergent",))
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def add(typingctx, a, b):
    """a + b in each lane."""

    def codegen(context, builder, signature, args):
        return builder.fadd(*args)

    return a(a, a), codegen


@intrinsic
def mul(typingctx, a, b):
    """a · b in each lane."""

    def codegen(context, builder, signature, args):
        return builder.fmul(*args)

    return a(a, a), codegen


@intrinsic
def total(typingctx, vector):
    """The sum of the lanes, in pairs."""

    def codegen(context, builder, signature, args):
        scalar = args[0].type.element
        start = ir.Constant(scalar, -0.0)
        return _call(builder, "llvm.vector.reduce.fadd", vector, scalar, [start, args[0]], fastmath=("reassoc",))

    return vector.dtype(vector), codegen


def _shuffled(typingctx, a, b, indices):
    """The signature and code of an intrinsic that takes lanes `indices` of two vectors put together."""

    def codegen(context, builder, signature, args):
        return builder.shuffle_vector(*args, _mask(indices))

    return a(a, b), codegen


@intrinsic
def evens(typingctx, a, b):
    """Lanes 0, 2, 4, … of two vectors put together."""
    return _shuffled(typingctx, a, b, range(0, 2 * a.lanes, 2))


@intrinsic
def odds(typingctx, a, b):
    """Lanes 1, 3, 5, … of two vectors put together."""
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
def transpose(typingctx, source, at, pitch, target, to, apart):
    """Copy a square, as many rows of as many elements as there are lanes, so that columns become rows: rows are `pitch`
    apart from `at` on, then `apart` from `to` on. Both arrays are contiguous, of one axis and one type."""
    vector = Vector(source.dtype)
    if target.dtype != source.dtype:
        return None

    def codegen(context, builder, signature, args):
        lanes, align = range(vector.lanes), vector.dtype.bitwidth // 8

        def row(i, array, first, distance):
            index = builder.add(args[first], builder.mul(args[distance], ir.Constant(args[distance].type, i)))
            return _pointer(context, builder, vector, signature.args[array], args[array], index)

        rows = [builder.load(row(i, 0, 1, 2), align=align) for i in lanes]
        side = 1
        while side < vector.lanes:  # in two rows, `side` apart, small squares change places: upper right, lower left
            upper = _mask([j + vector.lanes - side if j & side else j for j in lanes])
            lower = _mask([j + vector.lanes if j & side else j + side for j in lanes])
            pairs = [(rows[i & ~side], rows[i | side], lower if i & side else upper) for i in lanes]
            rows = [builder.shuffle_vector(*pair) for pair in pairs]
            side *= 2
        for i in lanes:
            builder.store(rows[i], row(i, 3, 4, 5), align=align)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), codegen


@intrinsic
def larger(typingctx, a, b):
    """The larger in each lane: a if they are equal, NaN if one of them is."""

    def codegen(context, builder, signature, args):
        x, y = args
        beats = builder.or_(builder.fcmp_ordered(">", y, x), builder.fcmp_unordered("uno", y, y))
        return builder.select(beats, y, x)

    return a(a, b), codegen


def _divided(typingctx, x, y, g, where_equal):
    """The signature and code of an intrinsic: g in the lanes where x is y, or in the others, and 0 elsewhere."""

    def codegen(context, builder, signature, args):
        x, y, g = args
        equal = builder.or_(builder.fcmp_ordered("==", x, y), builder.fcmp_unordered("uno", x, x))
        zero = ir.Constant(g.type, [0.0] * g.type.count)
        return builder.select(equal, *((g, zero) if where_equal else (zero, g)))

    return g(x, y, g), codegen


@intrinsic
def taken(typingctx, x, y, g):
    """g in the lanes where x is y, or NaN; 0 in the others."""
    return _divided(typingctx, x, y, g, True)


@intrinsic
def left(typingctx, x, y, g):
    """What `taken` leaves."""
    return _divided(typingctx, x, y, g, False)
