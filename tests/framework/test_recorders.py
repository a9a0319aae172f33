"""The recorders of `diagnose` as callbacks of `fit`: what they measure, and that they change nothing."""

import numpy as np
import pytest

from tinygrad_bn import Tensor, functional, grad, manual_seed, nn, optim, train
from tinygrad_bn.diagnose import LayerHistograms, StatisticsGaps, UpdateRatios

RNG = np.random.default_rng(0)
X = RNG.normal(2, 3, size=(120, 5)).astype(np.float32)
Y = (X[:, 0] > 2).astype(np.int64)


def net(batch_norm=True):
    manual_seed(0)
    norm = [nn.BatchNorm1d(8)] if batch_norm else []
    return nn.Sequential(
        nn.Flatten(), nn.Sequential(nn.Linear(5, 8), *norm, nn.ReLU()), nn.Dropout(0.5), nn.Linear(8, 2)
    )


def recorders():
    return [LayerHistograms((X, Y), bins=20), UpdateRatios(), StatisticsGaps(X)]


def fit(model, x=X, **options):
    return train.fit(model, (x, Y), **{"epochs": 3, "progress": False, "seed": 0, **options})


def test_a_training_is_the_same_with_recorders():
    states = []
    for callbacks in ([], recorders()):
        model = net()
        for recorder in callbacks:
            recorder.measure(model)
        fit(model, callbacks=callbacks)
        states.append(model.state_dict())
        if callbacks:
            assert [recorder.epochs for recorder in callbacks] == [[0, 1, 2, 3]] * 3
    assert all(np.array_equal(states[0][key], states[1][key]) for key in states[0])


def test_modes_and_gradients_stay():
    model = net()
    model[1].eval()
    modes = [m.training for m in model.modules()]
    for recorder in recorders():
        recorder.measure(model)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_histograms_are_those_of_outputs_and_gradients():
    model = net(batch_norm=False)
    recorder = LayerHistograms((X, Y), bins=20)
    recorder.measure(model)
    assert list(recorder.activations) == ["0", "1.0", "1.1", "2", "3"]
    assert list(recorder.gradients) == ["1.0", "1.1", "2", "3"], "the samples have no gradient"
    hidden = model[1][0](X)
    outputs = model[3](hidden.relu())
    loss = functional.cross_entropy(outputs, Y)
    for values, histogram in ((hidden, recorder.activations["1.0"][0]), (outputs, recorder.activations["3"][0])):
        counts, edges = np.histogram(values.numpy().astype(np.float64), 20)
        assert np.array_equal(histogram.counts, counts)
        assert (histogram.low, histogram.high, histogram.left_out) == (edges[0], edges[-1], 0)
    g = grad(loss, hidden).numpy().astype(np.float64)
    histogram = recorder.gradients["1.0"][0]
    assert histogram.left_out == (g == 0).sum() > 0, "where the ReLU is 0"
    np.testing.assert_array_equal(histogram.counts, np.histogram(np.log10(np.abs(g[g != 0])), 20)[0])


def test_a_layer_that_is_not_finite_is_counted():
    model = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2))
    model[0].bias.data = [np.nan, 0, np.inf]
    recorder = LayerHistograms((X, Y))
    recorder.measure(model)
    assert recorder.activations["0"][0].left_out == 2 * len(X)
    assert recorder.activations["2"][0].counts.sum() == 0
    recorder.plot()
    recorder.plot("gradients")


def test_update_ratios_are_the_way_of_an_epoch():
    model = net()
    recorder = UpdateRatios()
    recorder.measure(model)
    before = model[3].weight.numpy().copy()
    fit(model, epochs=1, optimizer=optim.SGD(model.parameters(), lr=0.1), callbacks=recorder)
    way = np.linalg.norm(model[3].weight.numpy() - before) / np.linalg.norm(before)
    first, second = recorder.ratios["3.weight"]
    assert np.isnan(first)
    assert second == pytest.approx(way, rel=1e-6)
    assert recorder.ratios["1.1.bias"][1] == np.inf, "from zeros"
    recorder.measure(model, 2)
    assert recorder.ratios["3.weight"][2] == 0


def test_update_ratios_are_those_of_the_steps():
    model, rates = net(), []
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    recorder, want = UpdateRatios(), []

    class Watch(train.Callback):
        """Looks at the weight by itself."""

        before = model[3].weight.numpy().copy()

        def on_step(self, training):
            w = model[3].weight.numpy().astype(np.float64)
            want.append(np.linalg.norm(w - self.before) / np.linalg.norm(self.before))
            self.before = w

        def on_epoch(self, training):
            rates.append(len(want))

    recorder.measure(model)
    fit(model, epochs=2, batch_size=50, optimizer=optimizer, callbacks=[recorder, Watch()])
    assert rates == [3, 6], "two epochs of three steps"
    np.testing.assert_allclose(recorder.steps["3.weight"], want, rtol=1e-6)
    net_way = recorder.ratios["3.weight"][1]
    assert 0 < net_way <= 1.01 * sum(want[:3])
    assert recorder.steps["1.1.bias"][0] == np.inf, "from zeros"
    [line] = [line for line in recorder.plot().axes[0].lines if line.get_label() == "3.weight"]
    np.testing.assert_array_equal(line.get_ydata(), recorder.steps["3.weight"])
    late = UpdateRatios()
    fit(model, epochs=1, batch_size=50, optimizer=optimizer, callbacks=late)
    assert np.isnan(late.steps["3.weight"]).tolist() == [True, False, False], "nothing to compare the first with"


def test_a_step_that_is_skipped_moves_nothing():
    x = X.copy()
    x[70] = np.nan
    recorder = UpdateRatios()
    model = net()
    recorder.measure(model)
    with pytest.warns(RuntimeWarning, match="statistics are not finite"):
        history = fit(model, x, epochs=1, batch_size=40, nonfinite="skip", callbacks=recorder)
    assert history.skipped == 1
    assert sorted(v > 0 for v in recorder.steps["3.weight"]) == [False, True, True]


def test_gaps_close_in_training_and_by_recalibration():
    model = net()
    recorder = StatisticsGaps(X)
    recorder.measure(model)
    x = model[1][0](X).numpy().astype(np.float64)
    assert recorder.shift["1.1"][0] == pytest.approx(np.median(np.abs(x.mean(0)) / x.std(0)), rel=1e-4)
    factor = np.exp(np.median(np.abs(np.log(x.var(0, ddof=1)))))
    assert recorder.ratio["1.1"][0] == pytest.approx(factor, rel=1e-4)
    fit(model, epochs=8, callbacks=recorder)
    assert recorder.shift["1.1"][-1] < 0.5 * recorder.shift["1.1"][0]
    train.recalibrate(model, X)
    recorder.measure(model, 9)
    assert recorder.shift["1.1"][-1] < 1e-5
    assert recorder.ratio["1.1"][-1] == pytest.approx(1, abs=1e-5)
    plain = StatisticsGaps(X)
    plain.measure(net(batch_norm=False))
    assert plain.shift == {}


def test_plots_show_every_layer_and_epoch():
    model, callbacks = net(), recorders()
    fit(model, callbacks=callbacks)
    histograms, ratios, gaps = callbacks
    figure = histograms.plot()
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert titles == ["0 (Flatten)", "1.0 (Linear)", "1.1 (BatchNorm1d)", "1.2 (ReLU)", "2 (Dropout)", "3 (Linear)"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["1", "2", "3"]
    assert len(figure.axes[0].lines) == 3
    assert len(histograms.plot("gradients").axes[0].lines) == 3
    labels = [text.get_text() for text in ratios.plot().axes[0].get_legend().get_texts()]
    assert labels == ["1.0.weight", "3.weight"]
    left, right = gaps.plot().axes
    np.testing.assert_allclose(left.lines[0].get_ydata(), gaps.shift["1.1"])
    np.testing.assert_allclose(right.lines[0].get_ydata(), gaps.ratio["1.1"])
    gaps_of_none = StatisticsGaps(X)
    gaps_of_none.measure(net(batch_norm=False))
    with pytest.raises(ValueError, match="no BatchNorm with running statistics"):
        gaps_of_none.plot()


def test_wrong_arguments():
    with pytest.raises(ValueError, match="no samples"):
        LayerHistograms((X[:0], Y[:0]))
    with pytest.raises(ValueError, match="bins has to be at least 1; got 0"):
        LayerHistograms((X, Y), bins=0)
    with pytest.raises(TypeError, match="a pair of arrays"):
        LayerHistograms(X)
    with pytest.raises(ValueError, match="several samples"):
        StatisticsGaps(X[:1])
    with pytest.raises(ValueError, match="UpdateRatios has measured nothing"):
        UpdateRatios().plot()
    with pytest.raises(TypeError, match="model has to be a module"):
        UpdateRatios().measure([Tensor(1.0)])
    recorder = LayerHistograms((X, Y))
    recorder.measure(net())
    with pytest.raises(ValueError, match="there are 'activations' and 'gradients'; got 'weights'"):
        recorder.plot("weights")
