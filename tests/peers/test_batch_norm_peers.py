"""BatchNorm against PyTorch's: training, running statistics, evaluation, state dicts, derivatives up to the fourth."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.peers.compare import TOLERANCE, close, peer, torch
from tinygrad_bn import Tensor, grad, nn

DTYPES = st.sampled_from(list(TOLERANCE))
LAYERS = {  # ours, PyTorch's, and the axes after the channels
    "1d": (nn.BatchNorm1d, torch.nn.BatchNorm1d, ()),
    "1d, sequences": (nn.BatchNorm1d, torch.nn.BatchNorm1d, (3,)),
    "2d": (nn.BatchNorm2d, torch.nn.BatchNorm2d, (2, 3)),
    "3d": (nn.BatchNorm3d, torch.nn.BatchNorm3d, (2, 1, 2)),
}
OPTIONS = st.fixed_dictionaries(
    {
        "eps": st.sampled_from([1e-5, 1e-3, 0.5]),
        "momentum": st.sampled_from([None, 0.0, 0.1, 0.3, 1.0]),
        "affine": st.booleans(),
        "track_running_stats": st.booleans(),
    }
)


def pair(name, features, options, dtype, rng):
    """Our layer and PyTorch's (in float64, see compare.peer), with the same random weight and bias."""
    ours_type, theirs_type, rest = LAYERS[name]
    ours, theirs = ours_type(features, **options).astype(dtype), theirs_type(features, **options).double()
    for key, parameter in theirs.named_parameters():
        value = rng.normal(1, 0.5, features).astype(dtype)
        parameter.data = peer(value)
        getattr(ours, key).data = value
    return ours, theirs, rest


def same_state(ours, theirs, tolerance):
    mine, state = ours.state_dict(), theirs.state_dict()
    assert list(mine) == list(state)
    for key, value in state.items():
        close(mine[key], value, tolerance, key)


def same_pass(ours, theirs, x, rng, tolerance):
    """Outputs, and the gradients of x, weight and bias under a random cotangent."""
    mine, their = Tensor(x, requires_grad=True), peer(x).requires_grad_()
    y, z = ours(mine), theirs(their)
    assert y.dtype == x.dtype
    close(y, z, tolerance, "output")
    g = rng.normal(size=x.shape).astype(x.dtype)
    ours.zero_grad()
    theirs.zero_grad()
    y.backward(g)
    z.backward(peer(g))
    close(mine.grad, their.grad, tolerance, "dx")
    for key, parameter in theirs.named_parameters():
        close(getattr(ours, key).grad, parameter.grad, tolerance, f"d{key}")


@pytest.mark.parametrize("name", LAYERS)
@given(
    seed=st.integers(0, 2**32),
    features=st.integers(1, 4),
    batches=st.lists(st.integers(4, 7), min_size=1, max_size=4),
    options=OPTIONS,
    dtype=DTYPES,
    offset=st.floats(-10, 10),
)
def test_training_then_evaluation(name, seed, features, batches, options, dtype, offset):
    rng = np.random.default_rng(seed)
    ours, theirs, rest = pair(name, features, options, dtype, rng)
    for n in batches:
        x = rng.normal(offset, 2, (n, features, *rest)).astype(dtype)
        same_pass(ours, theirs, x, rng, TOLERANCE[dtype])
        same_state(ours, theirs, TOLERANCE[dtype])
    ours.eval()
    theirs.eval()
    x = rng.normal(offset, 2, (3, features, *rest)).astype(dtype)
    same_pass(ours, theirs, x, rng, TOLERANCE[dtype])
    same_state(ours, theirs, TOLERANCE[dtype])  # evaluation leaves the state as it was


@pytest.mark.parametrize("name", LAYERS)
@given(
    seed=st.integers(0, 2**32),
    affine=st.booleans(),
    track_running_stats=st.booleans(),
    ours_gives=st.booleans(),
    momentum=st.sampled_from([None, 0.3]),
)
def test_a_state_dict_continues_the_others_training(name, seed, affine, track_running_stats, ours_gives, momentum):
    """Train one, load its state into a new one of the other, and go on with both."""
    rng = np.random.default_rng(seed)
    options = {"affine": affine, "track_running_stats": track_running_stats, "momentum": momentum}
    ours, theirs, rest = pair(name, 3, options, "float64", rng)
    for _ in range(2):
        x = rng.normal(1, 2, (4, 3, *rest))
        (ours if ours_gives else theirs)(x if ours_gives else peer(x))
    if ours_gives:
        theirs = LAYERS[name][1](3, **options).double()
        theirs.load_state_dict({k: torch.tensor(v) for k, v in ours.state_dict().items()})
    else:
        ours = LAYERS[name][0](3, **options).astype("float64")
        ours.load_state_dict(theirs.state_dict())
    same_state(ours, theirs, TOLERANCE["float64"])
    same_pass(ours, theirs, rng.normal(1, 2, (4, 3, *rest)), rng, TOLERANCE["float64"])
    same_state(ours, theirs, TOLERANCE["float64"])


@pytest.mark.parametrize("name", LAYERS)
def test_defaults_and_dtypes_of_a_new_layer(name):
    ours, theirs = (layer(3) for layer in LAYERS[name][:2])
    mine, state = ours.state_dict(), theirs.state_dict()
    assert [(k, v.dtype, v.shape) for k, v in mine.items()] == [
        (k, v.numpy().dtype, tuple(v.shape)) for k, v in state.items()
    ]
    same_state(ours, theirs, 0)
    assert (ours.eps, ours.momentum, ours.affine, ours.track_running_stats) == (
        theirs.eps,
        theirs.momentum,
        theirs.affine,
        theirs.track_running_stats,
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_channel_that_is_constant_and_one_whose_mean_is_large(dtype):
    rng = np.random.default_rng(0)
    ours, theirs, _ = pair("1d", 2, {}, dtype, rng)
    x = np.stack([np.full(6, 3.0), 1000 + rng.normal(size=6)], axis=1).astype(dtype)
    same_pass(ours, theirs, x, rng, TOLERANCE[dtype] * 10)  # 1/√eps multiplies the rounding error of x − mean
    same_state(ours, theirs, TOLERANCE[dtype])


def test_directional_derivatives_of_orders_1_to_4():
    # PyTorch's part is written from its primitives: its own batch_norm (2.13) agrees with them, and with us, at
    # orders 1 and 2 only, and gives other numbers from order 3 on.
    rng = np.random.default_rng(4)
    x, v, *directions = rng.normal(size=(3, 6, 3))
    weight, bias, dweight, dbias = rng.normal(size=(4, 3))
    directions += [dweight, dbias]

    layer = nn.BatchNorm1d(3).astype("float64")
    layer.weight.data, layer.bias.data = weight, bias
    ours = [Tensor(x, requires_grad=True), layer.weight, layer.bias]
    y = (layer(ours[0]) * v).sum()

    theirs = [peer(a).requires_grad_() for a in (x, weight, bias)]
    xmu = theirs[0] - theirs[0].mean(0)
    xhat = xmu / torch.sqrt((xmu * xmu).mean(0) + layer.eps)
    z = ((xhat * theirs[1] + theirs[2]) * peer(v)).sum()

    for order in range(1, 5):
        dy = grad(y, ours, create_graph=True)
        dz = torch.autograd.grad(z, theirs, create_graph=True, materialize_grads=True)
        for mine, their in zip(dy, dz, strict=True):
            close(mine, their, TOLERANCE["float64"], f"order {order}")
        y = sum((g * d).sum() for g, d in zip(dy, directions, strict=True))
        z = sum((g * peer(d)).sum() for g, d in zip(dz, directions, strict=True))
        close(y, z, TOLERANCE["float64"], f"order {order}")
        assert abs(y.item()) > 1e-3  # or there was nothing to compare
