"""Wrong numbers that other suites and fuzzing found: the smallest input, and the right value."""

import copy
import json
import pickle
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
from tinygrad_bn_kernels import _kernels

from tinygrad_bn import Tensor, composed, fused, grad, nn, optim, primitive, testing
from tinygrad_bn import functional as F
from tinygrad_bn.backend import kernels_disabled
from tinygrad_bn.sample import REAL, elementwise
from tinygrad_bn.tensor import OPS


@pytest.mark.parametrize("value", [np.ones(3), Tensor(np.ones(3)), "2 x", nn.Buffer(np.ones(3)), 1.0])
def test_a_parameter_is_not_replaced_by_anything_else(value):
    layer = nn.BatchNorm1d(3)
    value = layer.weight * 2 if isinstance(value, str) else value
    with pytest.raises(TypeError, match=r"BatchNorm1d.weight is a Parameter; assign a Parameter or None, or .*\.data"):
        layer.weight = value
    with pytest.raises(TypeError, match=r"BatchNorm1d\.running_mean is a Buffer"):
        layer.running_mean = np.ones(3)
    layer.weight = nn.Parameter(np.full(3, 2.0, np.float32))
    assert layer(np.eye(3)).shape == (3, 3)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    layer.weight = None
    assert list(layer.state_dict()) == ["bias", "running_mean", "running_var", "num_batches_tracked"]


class Net(nn.Module):
    def __init__(self):
        self.scale, self.inner, self.cache = nn.Parameter([1.0]), nn.Linear(2, 2), None


def untracked():
    return nn.BatchNorm1d(3, track_running_stats=False)


@pytest.mark.parametrize("copied", [lambda m: m, copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("value", [np.ones(3), Tensor(np.ones(3)), 1.0])
@pytest.mark.parametrize(
    ("make", "name", "kind"),
    [
        (lambda: nn.BatchNorm1d(3, affine=False), "weight", "Parameter"),
        (lambda: nn.BatchNorm1d(3), "weight", "Parameter"),
        (lambda: nn.Linear(2, 3, bias=False), "bias", "Parameter"),
        (lambda: nn.Conv2d(2, 3, 1, bias=False), "bias", "Parameter"),
        (lambda: nn.LayerNorm(3, elementwise_affine=False), "bias", "Parameter"),
        (lambda: nn.GroupNorm(1, 3, affine=False), "weight", "Parameter"),
        (lambda: nn.InstanceNorm1d(3), "weight", "Parameter"),
        (lambda: nn.RMSNorm(3, elementwise_affine=False), "weight", "Parameter"),
        (untracked, "running_mean", "Buffer"),
        (untracked, "num_batches_tracked", "Buffer"),
        (Net, "scale", "Parameter"),
        (Net, "inner", "Module"),
    ],
)
def test_an_attribute_that_is_none_keeps_its_kind(make, name, kind, value, copied):
    module = make()
    for _ in range(2):
        with pytest.raises(TypeError, match=rf"\.{name} is a {kind}; assign a {kind} or None.*; got a"):
            setattr(copied(module), name, value)
        setattr(module, name, None)
    assert getattr(copied(module), name) is None
    setattr(module, name, nn.ReLU() if kind == "Module" else getattr(nn, kind)([1.0]))
    delattr(module, name)
    setattr(module, name, value)  # as PyTorch: what was deleted may be anything
    assert getattr(module, name) is value


def test_other_attributes_hold_anything():
    net = Net()
    for value in (np.ones(3), Tensor([1.0]), None, nn.Linear(1, 1), nn.ReLU(), None):
        net.cache = value
        assert net.cache is value


@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_running_statistics_go_together(name):
    layer = nn.BatchNorm1d(3)
    setattr(layer, name, None)
    with pytest.raises(ValueError, match="running_mean, running_var and num_batches_tracked go together"):
        layer(np.eye(3))


def test_rms_norm_of_half_precision_takes_the_eps_of_float32():
    x = np.array([0.01, -0.02, 0.03, 0.01])
    y = F.rms_norm(Tensor(x, dtype=np.float16), 4)
    np.testing.assert_allclose(y.numpy(), [0.516, -1.033, 1.549, 0.516], rtol=2e-3)


def test_losses_of_half_precision_are_counted_wider():
    scores = np.full((1, 2, 256, 256), np.log(0.5), np.float16)
    target = np.zeros((1, 256, 256), np.int64)
    assert F.nll_loss(Tensor(scores), target).item() == pytest.approx(0.693, abs=1e-3)
    x = Tensor(np.zeros((1, 2, 256, 256), np.float16), requires_grad=True)
    plain, differentiable = (grad(F.cross_entropy(x, target), x, create_graph=c).numpy() for c in (False, True))
    np.testing.assert_array_equal(plain, differentiable)
    assert (plain != 0).all()


@pytest.mark.parametrize(
    ("x", "dtype", "want"),
    [([0, 600], "f2", 300), ([0, 1e-4], "f2", 5e-5), ([0, 1e20], "f4", 5e19), ([0, 1e-25], "f4", 5e-26)],
)
def test_the_root_of_a_variance_is_taken_before_rounding(x, dtype, want):
    assert F.std(Tensor(np.array(x, dtype))).item() == pytest.approx(want, rel=2e-3)


def test_centred_rmsprop_stays_finite_under_a_constant_gradient():
    p = nn.Parameter(np.zeros(1, np.float32))
    optimizer = optim.RMSprop([p], centered=True)
    for _ in range(1500):
        p.grad = Tensor(np.full(1, 0.1, np.float32))
        optimizer.step()
    assert np.isfinite(p.numpy()).all()


@pytest.mark.parametrize("stride", [5, 2**20, 2**31, 2**40])
def test_one_window_needs_no_stride(stride):
    x = Tensor(np.arange(16.0).reshape(1, 1, 4, 4), requires_grad=True)
    weight = Tensor(np.ones((1, 1, 2, 2)), requires_grad=True)
    y = F.conv2d(x, weight, stride=stride)
    y.sum().backward()
    assert y.numpy().tolist() == [[[[10]]]]
    assert weight.grad.numpy().reshape(-1).tolist() == [0, 1, 4, 5]
    back = F.conv_transpose2d(Tensor(np.full((1, 1, 1, 1), 2.0)), weight, stride=stride)
    assert back.numpy().reshape(-1).tolist() == [2] * 4
    assert F.conv1d(Tensor(np.ones((1, 1, 3))), np.ones((1, 1, 2)), stride=stride).item() == 2


@pytest.mark.parametrize("kernel", [12, 2**20, 2**40, 2**59])
@pytest.mark.parametrize("create_graph", [False, True])
def test_pooling_with_a_kernel_far_larger_than_the_input(kernel, create_graph):
    x = Tensor(np.arange(12.0).reshape(1, 1, 3, 4), requires_grad=True)
    for context in (nullcontext(), composed()):
        with context:
            assert F.max_pool2d(x, kernel, padding=kernel // 2).item() == 11
            assert F.max_pool2d(x, kernel, stride=1, padding=kernel // 2).numpy()[..., 0, 0] == 11
            assert F.max_pool2d(x, (2, kernel), stride=kernel, ceil_mode=True, padding=(0, 0)).item() == 7
            assert F.avg_pool2d(x, kernel, padding=kernel // 2, count_include_pad=False).item() == 5.5
            assert F.avg_pool2d(x, kernel, padding=kernel // 2).item() == pytest.approx(66 / kernel**2)
    dx = grad(F.max_pool2d(x, kernel, padding=kernel // 2).sum(), x, create_graph=create_graph)
    assert dx.numpy().reshape(-1).tolist() == [0] * 11 + [1]


@pytest.mark.parametrize("dilation", [5, 2**40, 2**59])
def test_pooling_with_a_dilation_far_larger_than_the_input(dilation):
    x = Tensor(np.arange(16.0).reshape(1, 1, 4, 4))
    for context in (nullcontext(), composed()):
        with context:
            y = F.max_pool2d(x, 2, stride=dilation, dilation=dilation, ceil_mode=True)
            assert y.numpy().tolist() == [[[[0]]]]
            with pytest.raises(ValueError, match="does not fit x"):
                F.max_pool2d(x, 2, dilation=dilation)


def test_sizes_that_no_memory_holds_are_errors_at_once():
    x = Tensor(np.ones((1, 1, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"kernel_size may be at most 2\*\*60"):
        F.max_pool2d(x, 2**70, padding=2**69)
    for function in (F.adaptive_avg_pool, F.adaptive_max_pool):
        with pytest.raises(MemoryError):
            function(x, 2**44)
    with pytest.raises(MemoryError):
        F.pad(x, width=((0, 0), (0, 0), (2**44, 0), (0, 0)))


def test_a_mean_of_integers_does_not_overflow():
    assert F.mean(Tensor(np.full(10, 17 * 10**17))).item() == pytest.approx(1.7e18)


def test_the_huber_loss_is_smooth_at_its_target():
    x = Tensor(np.array([0.0, 0.5, 3.0]), requires_grad=True)
    dx = grad(F.huber_loss(x, np.zeros(3), reduction="sum"), x, create_graph=True)
    assert dx.numpy().tolist() == [0, 0.5, 1]
    assert grad(dx.sum(), x).numpy().tolist() == [1, 1, 0]


def test_clipping_half_precision_does_not_round_the_factor():
    p = nn.Parameter(np.zeros(2, np.float16), dtype=np.float16)
    p.grad = Tensor(np.full(2, 60000, np.float16))
    optim.clip_grad_norm_([p], 0.001)
    assert np.linalg.norm(p.grad.numpy().astype(float)) == pytest.approx(0.001, rel=2e-3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_dampening_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="dampening has to be finite"):
        optim.SGD([nn.Parameter([1.0])], momentum=0.9, dampening=value)


PRODUCTS = {
    "matmul": (F.matmul, (3, 5), (5, 40)),
    "large matmul": (F.matmul, (80, 90), (90, 80)),
    "batched matmul": (F.matmul, (2, 3, 5), (5, 4)),
    "linear": (F.linear, (20, 90), (40, 90)),
    "batched linear": (F.linear, (2, 3, 5), (4, 5)),
    "conv1d": (F.conv1d, (2, 3, 9), (4, 3, 2)),
    "conv2d": (F.conv2d, (2, 3, 5, 6), (4, 3, 2, 2)),
    "conv_transpose2d": (F.conv_transpose2d, (2, 3, 5, 6), (3, 4, 2, 2)),
}


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "reference"])
@pytest.mark.parametrize("dtypes", ["ee", "ff", "dd", "fd"])
@pytest.mark.parametrize(("product", "left", "right"), PRODUCTS.values(), ids=PRODUCTS)
def test_no_product_warns_of_a_flag_that_some_processors_raise(product, left, right, dtypes, kernels):
    """BLAS pads vectors with 0, and 0 · inf raises the invalid flag; here a product raises it on every processor."""
    a = Tensor(np.full(left, np.inf, dtypes[0]), requires_grad=True)
    b = Tensor(np.zeros(right, dtypes[1]), requires_grad=True)
    with nullcontext() if kernels else kernels_disabled(), warnings.catch_warnings():
        warnings.simplefilter("error")
        y = product(a, b)
        assert np.isnan(y.numpy()).any()
        db = grad(y, (a, b), np.zeros(y.shape, y.dtype), create_graph=True)[1]
        assert np.isnan(db.numpy()).any()
        grad(db, (a, b), np.zeros(db.shape, db.dtype))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_the_huber_loss_far_from_its_target(dtype):
    x = Tensor(np.array([300.0, np.inf], dtype), requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.huber_loss(x, np.zeros(2, dtype), reduction="sum").backward()
    assert x.grad.numpy().tolist() == [1, 1]


@pytest.mark.parametrize(
    ("x", "want"), [([0, 1e-39], [-0.5, 0.5]), ([3e38, -3e38, 0], [0.408248, -0.408248, 0]), ([2, 2, 2], [0, 0, 0])]
)
def test_the_gradient_of_a_deviation_of_any_scale(x, want):
    t = Tensor(np.array(x, np.float32), requires_grad=True)
    for create_graph in (False, True):
        np.testing.assert_allclose(grad(F.std(t), t, create_graph=create_graph).numpy(), want, rtol=1e-5)


@pytest.mark.parametrize("function", [F.batch_norm_training, F.batch_norm_relu])
def test_batch_norm_of_integers_is_an_error(function):
    with pytest.raises(TypeError, match="floating-point"):
        function(Tensor([[1], [5], [9]]), None, None, eps=1e-5)


def test_integers_are_not_rounded_by_a_kernel():
    x, one = Tensor([[1], [5], [9]]), np.ones(1)
    np.testing.assert_allclose(F.batch_norm_inference(x, one, one * 4, None, None, eps=0.0).numpy(), [[0], [2], [4]])
    loss = F.softmax_cross_entropy(Tensor([[0, 8]]), np.array([0]), None)
    assert loss.item() == pytest.approx(8.000335)


def test_statistics_collected_in_two_nested_blocks():
    layer, x = nn.BatchNorm1d(1), np.array([[1.0], [3.0]])
    with nn.batch_statistics(layer) as outer:
        with nn.batch_statistics(layer) as inner:
            layer(x)
        layer(x)
    assert (len(inner[layer]), len(outer[layer]), layer.running_mean.item()) == (1, 1, 0)


def test_a_scalar_of_numpy_as_an_option_keeps_the_dtype():
    assert F.clip(Tensor([1.0, 2.0]), min=np.float64(1.5)).dtype == np.float32


def test_options_of_a_call_do_not_leak_into_the_next():
    x = Tensor(np.ones((2, 3)), requires_grad=True)
    F.sum(x).node.params["axis"] = 0
    assert F.sum(x).shape == ()


# ---- declarations that would give wrong numbers ----------------------------------------------------------


@pytest.fixture
def ops():
    """A registry whose new ops are forgotten."""
    before = dict(OPS)
    yield OPS
    OPS.clear()
    OPS.update(before)


ANY = {"formula": "y", "sample": elementwise(REAL)}


def test_an_op_that_overwrites_takes_arrays_only(ops):
    @primitive(None, None, updates=("v",), formula="y", sample=elementwise(REAL, REAL))
    def overwrite(p, v):
        v[...] = v + p
        return p - v

    v = np.ones(2)
    assert overwrite(np.ones(2), v).tolist() == [-1, -1]
    assert v.tolist() == [2, 2]
    with pytest.raises(TypeError, match=r"overwrite\(\) overwrites .*'v'.*pass arrays"):
        overwrite(np.ones(2), Tensor([1.0, 2.0]))


def test_a_tensor_that_is_no_operand_is_an_error(ops):
    scale = Tensor(2.0, requires_grad=True)

    @fused(**ANY)
    def scaled(x):
        return x * scale

    with pytest.raises(TypeError, match="scaled used a tensor that is not one of its operands"):
        scaled(Tensor([1.0]))


def test_by_products_are_counted(ops):
    @fused(saves=("half",), **ANY)
    def forgets(x):
        return x * 2

    @fused(saves=("half", "third"), **ANY)
    def one(x):
        return x * 2, x / 2

    @fused(**ANY)
    def unnamed(x):
        return x * 2, x / 2

    @fused(**ANY)
    def nothing(x):
        return None

    wanted = {forgets: r"\(y, half\)", one: r"\(y, half, third\)", unnamed: "one array", nothing: "one array"}
    for function, words in wanted.items():
        for context in (nullcontext(), composed()):
            with context, pytest.raises(TypeError, match=f"has to return {words}.*; it returned a"):
                function(Tensor([1.0, 2.0]))


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_composition_that_leaves_the_graph_is_an_error(ops, create_graph):
    @fused(**ANY)
    def detached(x):
        return getattr(x, "_data", x) * 2.0

    x = Tensor([1.0, 2.0], requires_grad=True)
    with pytest.raises(TypeError, match="detached made a ndarray of tensors, which loses their gradients"):
        grad(detached(x).sum(), x, create_graph=create_graph)


def test_by_products_of_an_outside_tensor_are_refused(ops):
    outside = Tensor([1.0])

    @fused(saves=("twice",), **ANY)
    def leaks(x):
        return x * 2, outside

    with pytest.raises(TypeError, match="leaks used a tensor that is not one of its operands"):
        leaks(Tensor([1.0]))


@pytest.mark.parametrize(("dtype", "far"), [(np.float16, 300), (np.float32, 2e19), (np.float64, 1e150)])
@pytest.mark.parametrize("delta", [np.inf, 1e300])
def test_the_huber_loss_with_a_delta_out_of_reach_is_half_the_square(dtype, far, delta):
    values = np.array([0.5, -2, far], dtype)
    x = Tensor(values, requires_grad=True)
    loss = F.huber_loss(x, np.zeros(3, dtype), delta=delta, reduction="none")
    np.testing.assert_allclose(loss.numpy(), values.astype(float) ** 2 / 2, rtol=1e-3)
    assert grad(loss.sum(), x).numpy().tolist() == values.tolist()


def test_what_holds_no_numbers_is_not_equal():
    x = Tensor([1.0])
    for other in ("auto", None, object()):
        assert (x == other) is False
        assert (x != other) is True
    assert Tensor(1.0) in ["x", 1.0]
    assert F.equal(x, [1.0]).numpy().tolist() == (x == np.float64(1)).numpy().tolist() == [True]
    assert (Tensor([0.1]) == 0.1).item()


@pytest.mark.parametrize("shapes", [((1,), (3,)), ((), (3,)), ((3, 1), (4,)), ((3, 2), (1,))])
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_statistics_do_not_broadcast(dtype, shapes):
    x, v = (np.ones(shape, dtype) for shape in shapes)
    for context in (nullcontext(), composed()):
        with context, pytest.raises(ValueError, match="shape"):
            F.batch_norm_inference(Tensor(x), v, v, None, None, eps=1e-5)


def test_a_parameter_is_replaced_by_any_parameter():
    class Named(nn.Parameter):
        pass

    layer = nn.Linear(2, 3)
    layer.weight = Named(np.ones((3, 2)))
    layer.weight = nn.Parameter(np.zeros((3, 2)))
    assert type(layer.weight) is nn.Parameter


def test_a_fused_op_takes_the_dtype_of_its_first_floating_operand(ops):
    @fused(**ANY)
    def middle(a, b):
        return (a + b) * 0.5

    @fused(**ANY)
    def positive(x):
        return x > 0

    for context in (nullcontext(), composed()):
        with context:
            assert middle(0.0, Tensor([1.0])).dtype == np.float32
            assert middle(Tensor([1]), Tensor([1.0])).dtype == np.float32
            assert positive(Tensor([1.0])).dtype == bool
    assert F.var(Tensor(np.array([1, 2], ">f4"))).dtype == np.dtype("=f4")


def test_a_constant_composition_has_no_gradient(ops):
    @fused(**ANY)
    def constant(x):
        return 3.0

    x = Tensor([1.0, 2.0], requires_grad=True)
    assert grad((constant(x) * x).sum(), x).numpy().tolist() == [3, 3]


def test_checks_know_the_defaults_of_options(ops, monkeypatch):
    @fused(**ANY)
    def scaled(x, *, k=2, most=100):
        if k != 2:
            raise ValueError("no other factor")
        return F.clip(x * k, max=most)

    monkeypatch.setitem(_kernels, ("scaled", "cpu"), lambda x, *, k, most: np.minimum(x * k, most))
    assert testing.check_op(scaled, examples=3).fixed == {"k": 2, "most": 100}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda x: F.linear(x), r"linear\(x, weight, bias=None\): missing: weight"),
        (lambda x: F.linear(x, x, foo=3), "unknown: foo"),
        (lambda x: F.linear(x, x, weight=x), "given twice: weight"),
        (lambda x: F.relu(x, x, x), "too many operands"),
        (lambda x: F.batch_norm_training(x, None, None), "missing: eps"),
        (lambda x: F.add(a=x, foo=1), r"\): unknown: foo; missing: b$"),
        (lambda x: F.sum(x, 0, axis=1), "given twice: axis"),
    ],
)
def test_a_wrong_call_says_what_is_wrong(wrong, words):
    with pytest.raises(TypeError, match=words):
        wrong(Tensor([[1.0]]))


def test_functions_of_arrays_give_numpys_scalars():
    assert {F.sum(np.ones(3)): 1} == {3.0: 1}
    assert isinstance(F.mean(np.ones(3)), float)
    assert json.dumps(F.mse_loss(np.ones(3), np.zeros(3))) == "1.0"
