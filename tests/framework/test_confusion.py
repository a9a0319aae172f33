"""Confusion matrices: counted one by one, and drawn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tools.training import network, samples
from tinygrad_bn import nn, viz
from tinygrad_bn.train import confusion, evaluate


@given(st.integers(1, 5), st.integers(1, 30), st.integers(1, 40), st.integers(0, 2**32 - 1), st.booleans())
def test_counts_are_those_of_a_loop(classes, n, batch_size, seed, planes):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 3, (n, classes, *([2, 3] if planes else []))).astype(np.float32)
    y = rng.integers(-1, classes, (n, *x.shape[2:]))
    want = np.zeros((classes, classes), np.int64)
    for i in np.ndindex(y.shape):
        if y[i] >= 0:
            scores = [x[(i[0], c, *i[1:])] for c in range(classes)]
            want[y[i], scores.index(max(scores))] += 1
    got = confusion(nn.Sequential(nn.Identity()), (x, y), batch_size=batch_size)
    assert got.dtype == np.int64
    np.testing.assert_array_equal(got, want)


def test_the_diagonal_is_the_accuracy_and_modes_stay():
    model, data = network(), samples(200)
    model[1].train()
    model[2].eval()
    counts = confusion(model, data)
    assert counts.sum() == 200
    assert counts.sum(axis=1).tolist() == np.bincount(data[1]).tolist()
    assert np.trace(counts) / 200 == evaluate(model, data).accuracy
    assert [m.training for m in model] == [True, True, False, True]
    assert model[1].num_batches_tracked == 0, "in evaluation mode"


def test_what_cannot_be_counted():
    model, (x, y) = network(), samples(20)
    with pytest.raises(ValueError, match="there is a target 3, and the outputs have the classes 0 to 2"):
        confusion(model, (x, y + 1))
    with pytest.raises(ValueError, match=r"targets have to be integers, .* got float32 of shape \(20, 4\)"):
        confusion(model, (x, x))
    with pytest.raises(ValueError, match="outputs of the model are NaN"):
        confusion(model, (x * np.nan, y))
    with pytest.raises(ValueError, match="no samples"):
        confusion(model, (x[:0], y[:0]))
    with pytest.raises(TypeError, match="model has to be a module"):
        confusion(len, (x, y))


def texts(axes):
    return {(round(t.get_position()[1]), round(t.get_position()[0])): t.get_text() for t in axes.texts}


def test_the_figure_has_counts_and_percentages_of_rows():
    figure = viz.plot_confusion([[3, 1, 0], [0, 2000, 0], [0, 0, 0]], ["cat", "dog", "horse"], "pets")
    axes = figure.axes[0]
    assert texts(axes) == {(0, 0): "3\n75.0%", (0, 1): "1\n25.0%", (1, 1): "2,000\n100.0%"}
    assert axes.images[0].get_array().tolist() == [[0.75, 0.25, 0], [0, 1, 0], [0, 0, 0]]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["cat", "dog", "horse"]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["cat", "dog", "horse"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("predicted class", "true class", "pets")
    figure.draw_without_rendering()


@pytest.mark.parametrize(("classes", "written", "labels"), [(20, 400, 20), (21, 0, 21), (100, 0, 34)])
def test_many_classes(classes, written, labels):
    axes = viz.plot_confusion(np.ones((classes, classes))).axes[0]
    assert (len(axes.texts), len(axes.get_xticklabels())) == (written, labels)
    assert not any("%" in t.get_text() for t in axes.texts)


def test_no_text_overlaps_another():
    counts = np.full((12, 12), 100_000)
    figure = viz.plot_confusion(counts, [f"class number {i}" for i in range(12)])
    figure.draw_without_rendering()
    axes = figure.axes[0]
    for labels in (axes.texts, axes.get_xticklabels(), axes.get_yticklabels()):
        boxes = [t.get_window_extent() for t in labels]
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize(
    ("matrix", "names", "message"),
    [
        ([[1, 2]], None, r"has shape \(C, C\) and counts; got int64 of shape \(1, 2\)"),
        ([1], None, "has shape"),
        ([[1, 2], [3]], None, r"have equal lengths; got \[\[1, 2\], \[3\]\]"),
        (np.zeros((0, 0)), None, "has shape"),
        ([["a"]], None, "has shape"),
        ([[-1]], None, "at least 0, and finite"),
        ([[np.nan]], None, "at least 0, and finite"),
        ([[1]], ["a", "b"], "2 names for 1 classes"),
    ],
)
def test_what_cannot_be_drawn(matrix, names, message):
    with pytest.raises(ValueError, match=message):
        viz.plot_confusion(matrix, names)
