"""BatchNorm folded into the layer before it gives the same outputs."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinygrad_bn import Tensor, nn, no_grad

LAYERS = {
    0: lambda i, o, bias: (nn.Linear(i, o, bias=bias), nn.BatchNorm1d(o)),
    1: lambda i, o, bias: (nn.Conv1d(i, o, 2, bias=bias), nn.BatchNorm1d(o)),
    2: lambda i, o, bias: (nn.Conv2d(i, o, 2, stride=2, bias=bias), nn.BatchNorm2d(o)),
    3: lambda i, o, bias: (nn.Conv3d(i, o, 2, bias=bias), nn.BatchNorm3d(o)),
}


def unusual(norm: nn.BatchNorm1d, rng: np.random.Generator) -> None:
    """State that changes the output, so that a fold must use it."""
    for t in (norm.weight, norm.bias, norm.running_mean):
        if t is not None:
            t.data = rng.normal(1, 1, t.shape).astype(np.float32)
    norm.running_var.data = rng.uniform(0.1, 9, norm.running_var.shape).astype(np.float32)


@given(st.sampled_from(list(LAYERS)), st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_same_outputs_without_batch_norm(axes, bias, affine, seed):
    rng = np.random.default_rng(seed)
    layer, norm = LAYERS[axes](3, 4, bias)
    if not affine:
        norm = type(norm)(4, affine=False)
    unusual(norm, rng)
    model = nn.Sequential(layer, norm, nn.ReLU(), nn.Sequential(nn.Flatten(), nn.Softplus())).eval()
    before = copy.deepcopy(model.state_dict())
    x = rng.normal(size=(2, 3, *(4,) * axes)).astype(np.float32)
    folded, norms, difference = nn.fold_batch_norm(model, x)
    with no_grad():
        y, z = model(Tensor(x)).numpy(), folded(Tensor(x)).numpy()
    np.testing.assert_allclose(z, y, rtol=1e-4, atol=1e-5)
    assert (norms, len(folded)) == (1, 4)
    assert difference == pytest.approx(np.abs(y - z).max() / np.abs(y).max())
    assert not any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) for m in folded.modules())
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_what_cannot_be_folded():
    x = np.ones((2, 3), np.float32)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match=r"the model is in training mode: call eval\(\)"):
        nn.fold_batch_norm(model, x)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout()).eval()
    model[2].train()
    with pytest.raises(ValueError, match="in training mode"):
        nn.fold_batch_norm(model, x)
    with pytest.raises(ValueError, match="not finite"):
        nn.fold_batch_norm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), x * np.nan)
    with pytest.raises(ValueError, match=r"the example \(0, 3\) gives no outputs"):
        nn.fold_batch_norm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval(), x[:0])
    with pytest.raises(ValueError, match="track_running_stats=False"):
        nn.fold_batch_norm(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)).eval(), x)
    with pytest.raises(ValueError, match="no BatchNorm follows"):
        nn.fold_batch_norm(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4)).eval(), x)


def test_a_batch_norm_over_another_axis_is_refused():
    norm = nn.BatchNorm1d(4)
    unusual(norm, np.random.default_rng(0))
    model = nn.Sequential(nn.Linear(3, 4), norm).eval()
    with pytest.raises(ValueError, match="normalises another"):
        nn.fold_batch_norm(model, np.random.default_rng(1).normal(size=(2, 4, 3)).astype(np.float32))


def test_outputs_that_are_all_0_do_not_differ():
    linear = nn.Linear(3, 4)
    linear.bias.data = np.full(4, -99, np.float32)
    model = nn.Sequential(linear, nn.BatchNorm1d(4), nn.ReLU()).eval()
    assert nn.fold_batch_norm(model, np.ones((2, 3), np.float32)).difference == 0


def test_a_layer_that_is_used_twice_is_folded_where_a_batch_norm_follows():
    shared, norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
    unusual(norm, np.random.default_rng(0))
    model = nn.Sequential(shared, norm, nn.Sequential(shared)).eval()
    assert nn.fold_batch_norm(model, np.ones((2, 3), np.float32)).difference < 1e-6


class Doubled(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) * 2


class Squared(nn.Linear):
    def forward(self, x):
        return super().forward(x) ** 2


def with_its_own_forward(module):
    module.forward = lambda x: type(module).forward(module, x) * 3
    return module


@pytest.mark.parametrize(
    "other",
    [
        lambda: (nn.Linear(4, 4), Doubled(4)),
        lambda: (Squared(4, 4), nn.BatchNorm1d(4)),
        lambda: (nn.Linear(4, 4), with_its_own_forward(nn.BatchNorm1d(4))),
        lambda: (with_its_own_forward(nn.Linear(4, 4)), nn.BatchNorm1d(4)),
    ],
)
def test_modules_with_a_forward_of_their_own_are_left_as_they_are(other):
    rng = np.random.default_rng(0)
    layers = [nn.Linear(3, 4), nn.BatchNorm1d(4), *other()]
    for norm in (layers[1], layers[3]):
        unusual(norm, rng)
    model, x = nn.Sequential(*layers).eval(), rng.normal(size=(5, 3)).astype(np.float32)
    folded, norms, difference = nn.fold_batch_norm(model, x)
    assert norms == 1
    assert difference < 1e-5
    assert [type(m) for m in folded] == [nn.Linear, nn.Identity, *map(type, layers[2:])]
    with pytest.raises(ValueError, match="no BatchNorm follows"):
        nn.fold_batch_norm(nn.Sequential(*layers[2:]).eval(), np.ones((5, 4), np.float32))
