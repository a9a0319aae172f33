"""Values that make no sense, at every operand and option: a TypeError or a ValueError that says what is wrong."""

import datetime
import re
from contextlib import nullcontext

import numpy as np
import pytest

from tinygrad_bn import Tensor, composed, fused, grad, manual_seed, nn, optim, tensor, train
from tinygrad_bn import functional as F
from tinygrad_bn.backend import kernels_disabled
from tinygrad_bn.nn import init
from tinygrad_bn.sample import REAL, elementwise


class Foreign:
    """An array of another library, as far as its attributes go."""

    class Dtype:
        """Without a kind."""

    dtype, device, shape, ndim = Dtype(), object(), (2, 3), 2


NONSENSE = {
    "text": "abc", "bytes": b"x", "dict": {}, "filled dict": {1: 2}, "set": {1.0}, "complex": 1j, "function": len,
    "complex scalar": np.complex64(1), "datetime": datetime.datetime(2026, 1, 1), "date": np.datetime64("2020"),
    "object": object(), "ellipsis": ..., "slice": slice(0, 1), "text array": np.array(["a", "b"]),
    "complex array": np.full(3, 1j), "object array": np.array([object()]), "long doubles": np.ones((2, 3), "g"),
    "long double": np.longdouble(1), "foreign": Foreign(), "module": nn.ReLU(), "huge": 10**400, "endless": -(10**5000),
}  # fmt: skip

X = np.arange(6, dtype=np.float32).reshape(2, 3)
PLANES, KERNELS = np.ones((2, 2, 4, 4), np.float32), np.ones((2, 2, 2, 2), np.float32)
TWO, THREE, CLASSES = np.ones(2, np.float32), np.ones(3, np.float32), np.array([0, 1])
NORM = {"weight": THREE, "bias": THREE, "eps": 1e-5}
LOSS = {"x": X, "target": X, "reduction": "mean"}
SCORES = {"x": X, "target": CLASSES, "weight": THREE, "ignore_index": -100, "reduction": "mean"}
CONV = {"x": PLANES, "weight": KERNELS, "bias": TWO, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
POOL = {"x": PLANES, "kernel_size": 2, "stride": 1, "padding": 0, "ceil_mode": False}
FUNCTIONS = {
    **{f: {"x": X} for f in (F.abs, F.exp, F.erf, F.gelu, F.log, F.neg, F.relu, F.sigmoid, F.sign, F.silu, F.softplus)},
    **{f: {"a": X, "b": X} for f in (F.add, F.sub, F.mul, F.div, F.pow, F.maximum, F.minimum, F.equal, F.less)},
    **{f: {"x": X, "axis": 0, "keepdims": True} for f in (F.sum, F.max, F.min, F.mean, F.argmax, F.logsumexp)},
    **{f: {"x": X, "axis": 0, "keepdims": True, "correction": 0.5} for f in (F.var, F.std, F.mean_and_var)},
    F.matmul: {"a": X, "b": X.T},
    F.where: {"condition": X > 1, "a": X, "b": X},
    F.broadcast_to: {"x": X, "shape": (2, 2, 3)},
    F.reshape: {"x": X, "shape": (3, 2)},
    F.transpose: {"x": X, "axes": (1, 0)},
    F.astype: {"x": X, "dtype": np.float64},
    F.clip: {"x": X, "min": 0.0, "max": 1.0},
    F.pad: {"x": X, "width": ((1, 1), (0, 1)), "value": 0.5},
    F.linear: {"x": X, "weight": X, "bias": TWO},
    F.concatenate: {"tensors": [X, X], "axis": 0},
    F.stack: {"tensors": [X, X], "axis": 0},
    F.flatten: {"x": PLANES, "start_axis": 1},
    F.softmax: {"x": X, "axis": -1},
    F.leaky_relu: {"x": X, "negative_slope": 0.1},
    F.elu: {"x": X, "alpha": 1.0},
    F.dropout: {"x": X, "p": 0.5, "training": True, "rng": None},
    F.batch_norm: {"x": X, "running_mean": THREE, "running_var": THREE, **NORM, "training": False},
    F.batch_norm_steps: {"x": X, **NORM},
    F.batch_norm_training: {"x": X, **NORM},
    F.batch_norm_relu: {"x": X, **NORM},
    F.batch_norm_inference: {"x": X, "mean": THREE, "var": THREE, **NORM},
    F.layer_norm: {"x": X, "normalized_shape": 3, **NORM},
    F.rms_norm: {"x": X, "normalized_shape": 3, "weight": THREE, "eps": 1e-5},
    F.group_norm: {"x": PLANES, "num_groups": 2, "weight": TWO, "bias": TWO, "eps": 1e-5},
    F.instance_norm: {"x": PLANES, "weight": TWO, "bias": TWO, "eps": 1e-5},
    F.conv2d: CONV,
    F.conv_transpose2d: {**CONV, "output_padding": 0},
    F.max_pool2d: {**POOL, "dilation": 1},
    F.avg_pool2d: {**POOL, "count_include_pad": True},
    F.adaptive_avg_pool: {"x": PLANES, "output_size": 2},
    F.adaptive_max_pool: {"x": PLANES, "output_size": 2},
    F.mse_loss: LOSS,
    F.l1_loss: LOSS,
    F.huber_loss: {**LOSS, "delta": 1.0},
    F.binary_cross_entropy_with_logits: {**LOSS, "weight": THREE, "pos_weight": THREE},
    F.nll_loss: SCORES,
    F.cross_entropy: {**SCORES, "label_smoothing": 0.1},
    F.softmax_cross_entropy: {**SCORES, "smoothing": 0.1},
}


def refused(function, arguments, option, value):
    """Check that the call raises an error with words of its own."""
    with pytest.raises((TypeError, ValueError, IndexError)) as raised:
        function(**{**arguments, option: value})
    assert len(str(raised.value)) > 10
    assert not re.search(r"has no attribute|did not contain a loop|numba|int_max_str_digits", str(raised.value))


@pytest.mark.parametrize("route", [nullcontext, kernels_disabled, composed])
@pytest.mark.parametrize("made", [np.asarray, Tensor], ids=["arrays", "tensors"])
@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore")  # NumPy's, of casts, before the error
def test_functions_refuse_nonsense(function, made, route):
    arguments = {k: made(v) if isinstance(v, np.ndarray) else v for k, v in FUNCTIONS[function].items()}
    with route():
        function(**arguments)
        for option in arguments:
            for kind, value in NONSENSE.items():
                if option != "dtype" or kind not in ("function", "foreign", "endless"):  # NumPy's own errors
                    refused(function, arguments, option, value)


def linear():
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


POOLING = {k: v for k, v in POOL.items() if k != "x"}
DATA = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32), np.arange(6) % 3
WEIGHT, PARAMS = Tensor(np.ones((3, 2))), [nn.Parameter([1.0, 2.0])]
SGD = optim.SGD(PARAMS)
RATES = {"params": PARAMS, "lr": 0.1, "weight_decay": 0.1}
CHANNELS = {"in_channels": 2, "out_channels": 2, "kernel_size": 2, "stride": 1, "padding": 0, "bias": True, "groups": 1}
OTHERS = {
    Tensor: {"data": X, "requires_grad": True},
    nn.Linear: {"in_features": 2, "out_features": 3, "bias": True, "rng": None},
    nn.Conv2d: {**CHANNELS, "dilation": 1, "rng": None},
    nn.ConvTranspose2d: {**CHANNELS, "output_padding": 0, "dilation": 1, "rng": None},
    nn.BatchNorm1d: {
        "num_features": 3, "eps": 1e-5, "momentum": 0.1, "affine": True, "track_running_stats": True,
        "running_var_correction": 1, "virtual_batch_size": None,
    },
    nn.MaxPool2d: {**POOLING, "dilation": 1},
    nn.AvgPool2d: {**POOLING, "count_include_pad": True},
    nn.AdaptiveAvgPool2d: {"output_size": 2},
    nn.Dropout: {"p": 0.5, "rng": None},
    nn.LeakyReLU: {"negative_slope": 0.1},
    nn.ELU: {"alpha": 1.0},
    nn.LayerNorm: {"normalized_shape": 3, "eps": 1e-5, "elementwise_affine": True},
    nn.RMSNorm: {"normalized_shape": 3, "eps": 1e-5, "elementwise_affine": True},
    nn.GroupNorm: {"num_groups": 2, "num_channels": 4, "eps": 1e-5, "affine": True},
    nn.InstanceNorm1d: {"num_features": 2, "eps": 1e-5, "affine": True},
    init.constant_: {"t": WEIGHT, "value": 1.0},
    init.normal_: {"t": WEIGHT, "mean": 0.0, "std": 1.0, "rng": None},
    init.uniform_: {"t": WEIGHT, "low": 0.0, "high": 1.0, "rng": None},
    init.xavier_normal_: {"t": WEIGHT, "gain": 1.0, "rng": None},
    init.kaiming_uniform_: {"t": WEIGHT, "a": 0.1, "mode": "fan_in", "nonlinearity": "relu", "rng": None},
    init.orthogonal_: {"t": WEIGHT, "gain": 1.0, "rng": None},
    optim.SGD: {**RATES, "momentum": 0.9, "dampening": 0.0, "nesterov": True},
    optim.Adam: {**RATES, "betas": (0.9, 0.99), "eps": 1e-8},
    optim.RMSprop: {**RATES, "alpha": 0.9, "eps": 1e-8, "momentum": 0.1, "centered": False},
    optim.Adagrad: {**RATES, "lr_decay": 0.1, "initial_accumulator_value": 0.1, "eps": 1e-8},
    optim.StepLR: {"optimizer": SGD, "step_size": 2, "gamma": 0.1},
    optim.CosineAnnealingLR: {"optimizer": SGD, "T_max": 3, "eta_min": 0.0},
    optim.WarmupLR: {"optimizer": SGD, "warmup_steps": 3, "after": None},
    optim.clip_grad_norm_: {"params": PARAMS, "max_norm": 1.0},
    optim.clip_grad_value_: {"params": PARAMS, "clip_value": 1.0},
    nn.fold_batch_norm: {"model": linear().eval(), "example": DATA[0]},
    train.fit: {
        "model": linear(), "data": DATA, "optimizer": None, "drop_last": False, "schedule": None, "clip_norm": None,
        "nonfinite": "raise", "capture": True, "progress": False, "epochs": 1,
    },
    train.recalibrate: {"model": linear(), "data": DATA},
}  # fmt: skip
METHODS = {
    "train": lambda v: linear().train(v),
    "requires_grad_": lambda v: linear().requires_grad_(v),
    "freeze": lambda v: nn.BatchNorm1d(2).freeze(v),
    "astype": lambda v: linear().astype(v),
    "to": lambda v: linear().to(v),
    "load_state_dict": lambda v: linear().load_state_dict(v, strict=v),
    "backward": lambda v: (Tensor(2.0, requires_grad=True) * 2).backward(create_graph=v),
    "retain_graph": lambda v: (Tensor(2.0, requires_grad=True) * 2).backward(retain_graph=v),
    "data": lambda v: setattr(Tensor(X), "data", v),
    "requires_grad": lambda v: setattr(Tensor(X), "requires_grad", v),
    "tensor": lambda v: Tensor(X).to(v),
    "seed": lambda v: manual_seed(-1 if isinstance(v, int) else v),  # a seed may be large
}


@pytest.mark.parametrize("function", OTHERS, ids=lambda f: f.__name__)
@pytest.mark.filterwarnings("ignore")
def test_layers_and_training_refuse_nonsense(function):
    arguments = OTHERS[function]
    function(**arguments)
    may_be = {("module", "model"), ("huge", "epochs"), ("huge", "virtual_batch_size")}
    for option in arguments:
        for kind, value in NONSENSE.items():
            if (kind, option) not in may_be:
                refused(function, arguments, option, value)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_methods_refuse_nonsense(method):
    for kind, value in NONSENSE.items():
        if kind not in ("foreign", "function", "filled dict", "dict"):
            refused(METHODS[method], {}, "v", value)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Flatten,
        nn.ReLU,
        nn.Identity,
        nn.Sigmoid,
        nn.Tanh,
        nn.Softplus,
        nn.SiLU,
        nn.ReLU6,
        nn.Hardsigmoid,
        nn.Hardswish,
        nn.Mish,
        nn.SELU,
        nn.Softsign,
        nn.LogSigmoid,
    ],
)
def test_layers_without_options_take_none(layer):
    for wrong in (lambda: layer("a"), lambda: layer(-1), lambda: layer(inplace=True)):
        with pytest.raises(TypeError, match=f"{layer.__name__} takes no options"):
            wrong()


def test_lists_of_tensors_are_lists():
    assert F.stack((X, X)).shape == F.stack(np.stack([X, X])).shape == (2, 2, 3)
    assert F.concatenate(Tensor(np.stack([X, X]))).shape == (4, 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_long_double_is_converted_only_when_asked(dtype):
    assert Tensor(np.ones(3, np.longdouble), dtype=dtype).dtype == dtype


def test_large_integers_are_numbers_while_a_float_holds_them():
    assert (Tensor([1.0], dtype=np.float64) * 10**300).item() == 1e300
    assert F.clip(Tensor([5.0]), max=2**70).item() == 5
    with pytest.raises(ValueError, match="mul takes numbers that fit a float64"):
        Tensor([1.0]) * 10**400
    with pytest.raises(ValueError, match=r"sum\(float32.*too large"):
        F.sum(X, axis=10**400)


def test_an_op_of_the_user_gives_names_their_own_meaning(monkeypatch):
    monkeypatch.setattr(tensor, "OPS", dict(tensor.OPS))

    @fused(formula="y = xᵖ", sample=elementwise(REAL, p=3, times=2, fully=True))
    def powered(x, *, p: float, times: int = 1, fully: bool = True, shape: str = "round"):
        if shape == "square":
            raise ValueError("no square powers")
        return x**p * times

    assert powered(Tensor([2.0]), p=3, times=np.int64(2)).item() == 16
    with pytest.raises(ValueError, match="no square powers"):
        powered(Tensor([2.0]), p=3, shape="square")
    for wrong in ({"p": "a"}, {"p": True}, {"p": 3, "times": 1.5}, {"p": 3, "fully": 1}):
        with pytest.raises(TypeError, match=r"powered\(\): \w+ has to be"):
            powered(Tensor([2.0]), **wrong)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Conv2d(1, 1, 2**40), "the weight of Conv2d would have the shape"),
        (lambda: nn.Conv2d(1, 1, 2, stride=2**70), r"stride may be at most 2\*\*60"),
        (lambda: nn.Linear(2**40, 2**40), "the weight of Linear would have the shape"),
        (lambda: nn.BatchNorm1d(2**70), "num_features may be at most"),
        (lambda: nn.LayerNorm((2**40, 2**40)), "the block to normalise would have the shape"),
        (lambda: nn.GroupNorm(2**61, 2**61), "num_channels may be at most"),
        (lambda: F.adaptive_avg_pool(PLANES, 2**60), "the output of adaptive pooling would have the shape"),
    ],
)
def test_sizes_that_no_memory_holds(make, words):
    with pytest.raises((MemoryError, ValueError), match=words):
        make()


INTEGERS, ROWS = Tensor([1, 2]), Tensor(np.ones((2, 3)))
TOO_LARGE = (2**63, -(2**63) - 1, 2**64, -(2**70))


@pytest.mark.parametrize("number", TOO_LARGE)
@pytest.mark.parametrize("dtype", [np.int8, np.int64, np.uint8, np.bool_])
@pytest.mark.parametrize(
    "call",
    [
        lambda x, n: x + n,
        lambda x, n: n - x,
        lambda x, n: x * n,
        lambda x, n: x**n,
        lambda x, n: n**x,
        F.maximum,
        F.minimum,
        lambda x, n: F.where(x > 0, x, n),
        lambda x, n: F.clip(x, max=n if n < 0 else None, min=n if n > 0 else None),
    ],
)
def test_an_integer_beyond_int64_is_an_overflow_that_names_dtype_and_number(call, dtype, number):
    held = "int64" if dtype is np.bool_ else np.dtype(dtype).name
    with pytest.raises(OverflowError, match=rf"{held} cannot hold {number}; convert"):
        call(Tensor([1, 0], dtype=dtype), number)


def test_an_axis_beyond_int64_is_no_overflow():
    for reduce in (F.sum, F.max, F.argmax):
        for made in (INTEGERS, ROWS):
            with pytest.raises(ValueError, match=f"^{reduce.__name__}.*axis={2**70}"):
                reduce(made, axis=2**70)


@pytest.mark.parametrize("shape", [..., object(), {}, 1.5, (1.5, 3), ((2, 3),), (True, 3)])
@pytest.mark.parametrize("function", [F.broadcast_to, F.reshape])
def test_a_shape_is_of_integers(function, shape):
    if shape == (True, 3) and function is F.broadcast_to:
        shape = (True, 1)  # an error of NumPy, in any case
    with pytest.raises(TypeError, match=rf"^{function.__name__}\(float64 \(2, 3\).*shape is an integer, or a tuple"):
        function(ROWS, shape=shape)


@pytest.mark.parametrize("shape", [(-2, 3), (2, -3), -2, (-1, -1), [-7, 2], np.array([-2, 3])])
@pytest.mark.parametrize("made", [np.asarray, Tensor])
def test_one_minus_one_alone_stands_for_the_rest_of_a_shape(made, shape):
    x = made(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"^reshape\(float64 \(2, 3\).*no numbers below 0, but for one -1"):
        F.reshape(x, shape=shape)
    assert F.reshape(x, shape=(-1, 2)).shape == F.reshape(x, shape=[3, -1]).shape == (3, 2)
    assert F.reshape(x, shape=-1).shape == F.reshape(x, shape=np.array([6])).shape == (6,)


def test_widths_of_pad():
    def pad(width):
        return lambda: F.pad(ROWS, width=width)

    cases = {
        ((2**62, 0), (0, 0)): (ValueError, "each number of width may be at most"),
        ((2**70, 0), (0, 0)): (ValueError, "each number of width may be at most"),
        ((2**60, 0), (0, 0)): (MemoryError, "the result would have the shape"),
        ((-1, 0), (0, 0)): (ValueError, "each number of width has to be at least 0; got -1"),
        ((1.5, 0), (0, 0)): (TypeError, "each number of width has to be an integer; got 1.5"),
        ((True, 0), (0, 0)): (TypeError, "each number of width has to be an integer; got True"),
        (1, 1): (ValueError, "width needs a pair"),
        ((1, 1),): (ValueError, r"width needs a pair \(before, after\) for each of 2 axes; got \(\(1, 1\),\)"),
    }
    for width, (error, words) in cases.items():
        with pytest.raises(error, match=words):
            pad(width)()
    assert F.pad(ROWS, width=np.array([[1, 0], [0, 2]])).shape == (3, 5)


def test_powers_of_numbers():
    for a, b in ((7, 10**9), (7, -(10**9)), (-7, 2**62), (3, -(2**62)), (2, 64), (-2, 65), (2**62, 2)):
        if b < 0:
            assert F.pow(a, b) == 0
        else:
            with pytest.raises(OverflowError, match="more than 64 bits; make one of the numbers a float"):
                F.pow(a, b)
    exact = {(2, 63): 2**63, (-2, 63): -(2**63), (7, 0): 1, (-1, 10**9 + 1): -1, (0, 10**9): 0, (True, 2): 1}
    assert {ab: F.pow(*ab).item() for ab in exact} == exact
    with np.errstate(all="ignore"):
        assert F.pow(0, -1) == F.pow(0.0, -1) == F.div(1, 0) == np.inf
        assert F.pow(10, 400.0) == np.inf
        assert np.isnan(F.pow(-8, 1 / 3))
        assert np.isnan((Tensor([-8.0]) ** (1 / 3)).item())


def test_an_axis_beyond_any_integer_of_64_bits():
    for axis in (10**30, -(2**70)):
        with pytest.raises(ValueError, match=r"sum.*: an axis is too large"):
            F.sum(np.ones(3), axis=axis)


@pytest.mark.parametrize("pool", [F.adaptive_avg_pool, F.adaptive_max_pool])
def test_adaptive_pooling_of_nothing(pool):
    with pytest.raises(ValueError, match=r"at least one element on each axis; got \(1, 3, 0, 2\)"):
        pool(Tensor(np.zeros((1, 3, 0, 2))), 1)


def test_one_axis_is_no_tuple():
    for function in (F.argmax, F.argmin):
        with pytest.raises(
            TypeError, match=rf"{function.__name__}\(\): axis is one axis, an integer or None; got \(0,"
        ):
            function(ROWS, axis=(0, 1))
    for function in (F.concatenate, F.stack):
        with pytest.raises(TypeError, match=r"axis is one axis, an integer; got \(0,\)"):
            function([ROWS, ROWS], axis=(0,))


TWO_TENSORS = {
    "sub": lambda: F.sub(INTEGERS > 1, INTEGERS > 1),
    "neg": lambda: -(INTEGERS > 1),
}


@pytest.mark.parametrize("name", TWO_TENSORS)
def test_booleans_have_no_difference(name):
    with pytest.raises(TypeError, match=rf"^{name}\(bool \(2,\).*not defined for booleans; convert with astype first"):
        TWO_TENSORS[name]()


@pytest.mark.parametrize("made", [np.asarray, Tensor])
@pytest.mark.parametrize("shapes", [((2, 3), (4, 5)), ((3,), (4,)), ((2, 3), (4,)), ((5, 2, 3), (5, 4, 3))])
def test_products_whose_axes_differ(shapes, made):
    a, b = (made(np.ones(shape)) for shape in shapes)
    with pytest.raises(ValueError, match=r"^matmul\(.*the last axis of a and the rows of b differ: 3 and 4$"):
        F.matmul(a, b)
    if a.ndim == 2:
        with pytest.raises(ValueError, match=r"^linear\(.*the last axes of x and of the weight differ: 3 and 4$"):
            F.linear(a, made(np.ones((5, 4))))


def test_tensors_that_are_not_in_a_list():
    for join in (F.concatenate, F.stack):
        with pytest.raises(TypeError, match=rf"takes a list of tensors and an axis: {join.__name__}\(\[a, b\]\)"):
            join(ROWS, ROWS)
        with pytest.raises(TypeError, match=rf"takes a list of tensors, as in {join.__name__}\(\[a, b\]\); got an int"):
            join(1, 0)
        assert join([ROWS, ROWS], np.array(0)).shape[-1] == 3


@pytest.mark.parametrize("wrong", [None, 3, [3]])
def test_grad_by_something_else_than_a_tensor(wrong):
    x = Tensor(2.0, requires_grad=True)
    with pytest.raises(TypeError, match=r"grad\(\) differentiates a tensor by tensors; got a"):
        grad(x * x, wrong)
