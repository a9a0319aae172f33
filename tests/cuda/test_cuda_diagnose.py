"""Diagnostics on cuda: the same findings as on the CPU, executed from PTX."""

import numpy as np
import pytest

from tests.cuda.ptx.compile import require_compiler
from tests.cuda.ptx.programs import interpreted
from tests.cuda.training import network
from tinygrad_bn import Tensor, functional, nn, train
from tinygrad_bn.diagnose import AnomalyError, LayerHistograms, StatisticsGaps, UpdateRatios, detect_anomaly, lint

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 6)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)


@pytest.fixture(scope="module", autouse=True)
def device():
    require_compiler()
    with interpreted() as used:
        yield used


@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_the_origin_of_an_infinity(where):
    norm = nn.BatchNorm1d(6).astype(np.float64).to(where)
    with pytest.raises(AnomalyError) as error, detect_anomaly():
        norm(Tensor(X.astype(np.float64) * 1e200).to(where))
    anomaly = error.value.anomaly
    assert (anomaly.op, anomaly.step.op, anomaly.step.kind) == ("batch_norm_training", "mul", "Inf")
    assert "sq = xmu * xmu" in str(anomaly.step.line)
    x = Tensor(np.array([4.0, 0.0], np.float32), requires_grad=True)
    with pytest.raises(AnomalyError, match=r"sqrt made Inf, in the backward pass"), detect_anomaly():
        functional.sqrt(x.to(where)).sum().backward()


def test_lint_and_recorders():
    found = []
    for where in ("cpu", "cuda"):
        model = network().to(where)
        model[1].eps = 1e3
        recorders = [LayerHistograms((X, Y)), UpdateRatios(), StatisticsGaps(X)]
        with detect_anomaly():
            train.fit(model, (X, Y), epochs=2, batch_size=20, seed=0, progress=False, callbacks=recorders)
        histograms, ratios, gaps = recorders
        numbers = [
            *ratios.ratios["0.weight"][1:],
            *gaps.shift["1"],
            *gaps.ratio["5"],
            histograms.activations["7"][1].high,
        ]
        found.append((lint(model, X, show=False).kinds, numbers))
    assert found[0][0] == found[1][0] >= {"eps-dominates", "dropout"}
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-2)
