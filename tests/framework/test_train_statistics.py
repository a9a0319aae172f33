"""BatchNorm's running statistics after training: compared, and computed anew."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tools.training import QUIET, by_hand, network, samples, state
from tinygrad_bn import manual_seed, nn
from tinygrad_bn.train import evaluate, fit, recalibrate, statistics_gap


def modes(model: nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def deep(**options: object) -> nn.Sequential:
    """Two BatchNorms, the statistics of the second depending on how the first normalises; and dropout."""
    manual_seed(0)
    first, second = nn.BatchNorm1d(16, **options), nn.BatchNorm1d(8, **options)
    layers = nn.Linear(4, 16), first, nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 8), second, nn.ReLU(), nn.Linear(8, 3)
    return nn.Sequential(*layers)


@given(
    st.sampled_from([nn.BatchNorm1d, nn.BatchNorm2d]),
    st.integers(2, 40),
    st.integers(2, 9),
    st.sampled_from([0, 1]),
    st.sampled_from([0.1, 0.0, None]),
)
def test_recalibrated_statistics_are_those_of_all_data_for_any_batch_size(layer, n, batch_size, correction, momentum):
    x = np.random.default_rng(n).normal(size=(n, 3) if layer is nn.BatchNorm1d else (n, 3, 2, 5))
    x += np.arange(n).reshape(-1, *[1] * (x.ndim - 1))  # the samples differ, so batches have different means
    bn = layer(3, momentum=momentum, running_var_correction=correction).astype(np.float64)
    bn(x * 100)
    recalibrate(bn, x, batch_size=batch_size)
    axes = (0, *range(2, x.ndim))
    np.testing.assert_allclose(bn.running_mean.numpy(), x.mean(axes), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(bn.running_var.numpy(), x.var(axes, ddof=correction), rtol=1e-10)
    assert bn.num_batches_tracked.item() == max(1, n // batch_size)
    assert bn.momentum == momentum


@given(st.integers(3, 60), st.integers(0, 99))
def test_recalibrated_on_one_batch_there_is_no_gap_in_any_layer(n, seed):
    data = samples(n, seed)
    model = deep(running_var_correction=0)
    fit(model, samples(12, seed + 1), epochs=1, batch_size=4, **QUIET)
    before = statistics_gap(model, data, batch_size=n)
    recalibrate(model, data, batch_size=n)
    gap = statistics_gap(model, data, batch_size=n)
    assert gap.running == pytest.approx(gap.batch, rel=1e-5)
    assert gap.batch == before.batch, "the batch's statistics do not depend on the running ones"
    assert abs(before.running.loss - before.batch.loss) > 1e-4


def test_recalibrate_changes_running_statistics_and_nothing_else():
    model = deep()
    model[5].freeze()
    model[6].eval()
    before, was = state(model), modes(model)
    recalibrate(model, samples(50), batch_size=7)
    after = state(model)
    assert {key for key in after if after[key] != before[key]} == {
        "1.running_mean", "1.running_var", "1.num_batches_tracked",
    }  # fmt: skip
    assert modes(model) == was
    again = state(model)
    recalibrate(model, samples(50)[0], batch_size=7)
    assert state(model) == again, "the same data, the same statistics, and no label is needed"
    for unchanged in (network(batch_norm=False), nn.BatchNorm1d(4, track_running_stats=False)):
        recalibrate(unchanged, samples(5))


@pytest.mark.parametrize(
    ("x", "batch_size", "message"),
    [
        (samples(0)[0], 10, "no samples"),
        (samples(5)[0], 0, "batch_size has to be at least 1; got 0"),
        (samples(5)[0], 1, "more than one value per channel"),
        (np.where(np.arange(20)[:, None] == 13, np.float32(np.nan), samples(20)[0]), 4, "not finite in BatchNorm1d"),
        (np.where(np.arange(20)[:, None] == 13, np.float32(3e38), samples(20)[0]), 4, "not finite in BatchNorm1d"),
    ],
)
def test_an_error_leaves_the_statistics_as_they_were(x, batch_size, message):
    model = deep()
    fit(model, samples(12), epochs=1, batch_size=4, **QUIET)
    before, was = state(model), modes(model)
    with pytest.raises(ValueError, match=message), np.errstate(all="ignore"):
        recalibrate(model, x, batch_size=batch_size)
    assert state(model) == before
    model(samples(4)[0])  # statistics are tracked again
    assert state(model) != before
    assert modes(model) == was


@pytest.mark.parametrize("n", [5, 7, 32])
def test_the_gap_by_hand(n):
    model = network()
    fit(model, samples(32), epochs=2, **QUIET)
    x, y = samples(n, seed=1)
    model[1].eval()
    before, was = state(model), modes(model)
    gap = statistics_gap(model, (x, y), batch_size=max(n - 2, n // 2 + 1))  # one batch: no other may be smaller
    assert (state(model), modes(model)) == (before, was)
    assert gap.running == pytest.approx(evaluate(model, (x, y)), rel=1e-6)
    loss, accuracy = by_hand(model, x, y, by_batch=True)
    assert gap.batch.loss == pytest.approx(loss, rel=1e-4)
    assert gap.batch.accuracy == pytest.approx(accuracy, rel=1e-12)
    assert abs(gap.batch.loss - gap.running.loss) > 1e-3


def test_without_running_statistics_in_use_there_is_no_gap():
    frozen = network()
    frozen[1].freeze()
    for model in (frozen, network(batch_norm=False)):
        gap = statistics_gap(model, samples(20), batch_size=4)
        assert gap.batch == gap.running
