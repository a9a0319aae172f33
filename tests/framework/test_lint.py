"""`lint`: each finding on a model that has it and on one that has not, and no false alarm on the demos."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
from rich.console import Console

from demos import (
    batch_size,
    common,
    deep_mlp,
    gradient_flow,
    init_scale,
    iris_mlp,
    learning_rates,
    loss_landscape,
    mnist_cnn,
    mnist_mlp,
    new_op,
    paper_figure1,
    titanic_mlp,
)
from tinygrad_bn import Tensor, backend, datasets, functional, manual_seed, nn, optim, train
from tinygrad_bn.diagnose import Finding, Findings, lint

RNG = np.random.default_rng(0)
X = RNG.normal(size=(128, 6)).astype(np.float32)
Y = (X[:, 0] > 0).astype(np.int64)


def kinds(model, x=None, **options):
    return {(found.kind, found.where.split(" ")[0]) for found in lint(model, x, show=False, **options)}


def net(*middle, bias=False, first=6):
    manual_seed(0)
    return nn.Sequential(nn.Linear(first, 32, bias=bias), *middle, nn.Linear(32, 2))


class Block(nn.Module):
    """A residual block, whose order only data can show."""

    def __init__(self, bias):
        self.norm, self.linear = nn.BatchNorm1d(6), nn.Linear(6, 6, bias=bias)

    def forward(self, x):
        return x + self.norm(self.linear(x)).relu()


# ---- known without data ---------------------------------------------------------------------------------


def test_a_bias_before_batch_norm():
    assert kinds(net(nn.BatchNorm1d(32), nn.ReLU(), bias=True)) == {("useless-bias", "0")}
    assert kinds(net(nn.BatchNorm1d(32), nn.ReLU())) == set()
    assert kinds(net(nn.ReLU(), nn.BatchNorm1d(32), bias=True)) == set(), "the ReLU is between"
    assert kinds(net(nn.LayerNorm(32), nn.ReLU(), bias=True)) == set(), "LayerNorm subtracts another mean"
    assert kinds(net(nn.BatchNorm1d(32).freeze(), nn.ReLU(), bias=True)) == set(), "frozen statistics subtract no bias"
    nested = nn.Sequential(
        nn.Sequential(nn.Flatten(), nn.Linear(6, 4)), nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2))
    )
    assert kinds(nested) == {("useless-bias", "0.1")}
    images = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    assert kinds(images) == {("useless-bias", "0")}


def test_a_useless_bias_has_no_gradient_and_the_cure_cures():
    model = net(nn.BatchNorm1d(32), nn.ReLU(), bias=True).astype(np.float64)
    functional.cross_entropy(model(X.astype(np.float64)), Y).backward()
    assert np.abs(model[0].bias.grad.numpy()).max() < 1e-12 < 1e-4 < np.abs(model[0].weight.grad.numpy()).max()


def test_the_data_show_the_order_of_any_module():
    assert kinds(nn.Sequential(Block(True), nn.Linear(6, 2))) == set()
    assert kinds(nn.Sequential(Block(True), nn.Linear(6, 2)), X) == {("useless-bias", "0.linear")}
    assert kinds(nn.Sequential(Block(False), nn.Linear(6, 2)), X) == set()
    assert kinds(nn.Sequential(nn.Linear(6, 6), Block(False)), X) == set(), (
        "a Linear, but not right before the BatchNorm"
    )


class Branches(nn.Module):
    """Dropout on one of two ways, the other of which may go to a BatchNorm."""

    def __init__(self, through):
        self.drop, self.norm, self.linear = nn.Dropout(0.2), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.through = through

    def forward(self, x):
        hidden = self.linear(x).tanh()
        dropped = self.drop(hidden)
        return self.norm(dropped * 2 if self.through else hidden) + dropped


def test_the_data_show_dropout_before_batch_norm_in_any_module():
    assert kinds(nn.Sequential(Branches(True), nn.Linear(6, 2))) == set()
    assert kinds(nn.Sequential(Branches(True), nn.Linear(6, 2)), X) == {("dropout", "0.drop")}
    assert kinds(nn.Sequential(Branches(False), nn.Linear(6, 2)), X) == set(), "dropout is on another way"
    again = nn.Sequential(nn.Dropout(0.2), Branches(False), Branches(False), nn.Linear(6, 2))
    assert ("dropout", "0") in kinds(again, X)
    [found] = [f for f in lint(again, X, show=False) if f.where.startswith("0 ")]
    assert "1.norm" in found.what, "the first one, not those behind it"
    norm = nn.BatchNorm1d(32), nn.ReLU()
    assert kinds(net(nn.Dropout(0.2), *norm, bias=True), X) == {("dropout", "1")}, "a bias is dropped too, so it counts"


def test_dropout_before_batch_norm():
    norm = nn.BatchNorm1d(32), nn.ReLU()
    assert kinds(net(nn.Dropout(0.2), *norm)) == {("dropout", "1")}
    assert kinds(net(nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 32, bias=False), *norm)) == {("dropout", "2")}
    assert kinds(net(*norm, nn.Dropout(0.2))) == set()
    assert kinds(net(nn.Dropout(0.0), *norm)) == set()


def test_a_momentum_of_keras():
    with pytest.warns(UserWarning, match="weight of the NEW batch"):
        wrong = nn.BatchNorm1d(32, momentum=0.99)
    assert kinds(net(wrong, nn.ReLU())) == {("momentum", "1")}
    (found,) = lint(net(wrong, nn.ReLU()), show=False)
    assert found.cure.startswith("momentum=0.01, or BatchNorm1d.keras")
    for right in (nn.BatchNorm1d(32), nn.BatchNorm1d.keras(32), nn.BatchNorm1d(32, momentum=None)):
        assert kinds(net(right, nn.ReLU())) == set()


def test_an_eps_too_small_for_half_precision():
    def gradient(eps):
        bn = nn.BatchNorm1d(1, eps=eps)
        x = Tensor(np.array([[0], [0], [6e-8]], np.float16), requires_grad=True)
        with np.errstate(over="ignore"):
            bn(x).backward(np.array([[1], [-1], [0]], np.float16))
        return np.abs(x.grad.numpy()).max()

    assert np.isinf(gradient(1e-10))
    assert np.isfinite(gradient(1e-5))
    for eps, found in ((1e-10, {("eps", "1")}), (1e-5, set())):
        model = net(nn.BatchNorm1d(32, eps=eps), nn.ReLU())
        assert kinds(model) == set(), "float32 reaches further"
        assert kinds(model.astype(np.float16)) == found
    assert kinds(net(nn.LayerNorm(32, eps=1e-12)).astype(np.float16)) == {("eps", "1")}


def test_a_last_layer_that_fits_no_loss():
    assert kinds(nn.Sequential(nn.Linear(6, 2, bias=False), nn.BatchNorm1d(2))) == {("last-norm", "1")}
    assert kinds(nn.Sequential(nn.Linear(6, 2), nn.Sequential(nn.Softmax()))) == {("last-softmax", "1.0")}
    assert kinds(net(nn.Softmax())) == set(), "not last"
    residual = nn.Sequential(nn.Linear(6, 6), Block(False))
    assert kinds(residual) == kinds(residual, X) == set()
    last = Block(False)
    last.forward = lambda x: last.norm(last.linear(x))
    assert kinds(last, X) == {("last-norm", "norm")}


def test_weights_whose_scale_does_not_matter():
    model = net(nn.BatchNorm1d(32), nn.ReLU())
    assert kinds(model, optimizer=optim.SGD(model.parameters(), lr=0.1, weight_decay=0.01)) == {("decayed-scale", "0")}
    assert kinds(model, optimizer=optim.SGD(model.parameters(), lr=0.1)) == set()
    groups = [{"params": [model[3].weight], "weight_decay": 0.01}, {"params": [model[0].weight], "weight_decay": 0.0}]
    assert kinds(model, optimizer=optim.SGD(groups, lr=0.1)) == set()
    frozen = net(nn.BatchNorm1d(32).freeze(), nn.ReLU())
    assert kinds(frozen, optimizer=optim.SGD(frozen.parameters(), lr=0.1, weight_decay=0.01)) == set()
    plain = net(nn.ReLU(), bias=True)
    assert kinds(plain, optimizer=optim.SGD(plain.parameters(), lr=0.1, weight_decay=0.01)) == set()


# ---- shown by data --------------------------------------------------------------------------------------


def test_batches_of_one_and_two():
    model = net(nn.BatchNorm1d(32), nn.ReLU())
    for n, found in ((1, {("batch-of-one", "1")}), (2, {("batch-of-one", "1")}), (3, set())):
        assert kinds(model, X[:n]) == found
    image = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 3))
    assert kinds(image, RNG.normal(size=(1, 1, 8, 8)).astype(np.float32)) == set(), "36 values of each channel"
    assert kinds(net(nn.LayerNorm(32)), X[:1]) == set()


def test_constant_channels():
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2))
    constant = X.copy()
    constant[:, 2] = 0.1
    assert kinds(model, constant) == {("constant-channels", "0")}
    assert kinds(model, X) == set()


@pytest.mark.parametrize(("dtype", "mean"), [(np.float32, 3e4), (np.float64, 3e12), (np.float16, 300)])
def test_digits_lost_to_a_large_mean(dtype, mean):
    model = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)).astype(dtype)
    assert kinds(model, (X.astype(np.float64) + mean).astype(dtype)) == {("digits-lost", "0")}
    assert kinds(model, (X + 1).astype(dtype)) == set()


def test_the_digits_are_lost_indeed():
    bn = nn.BatchNorm1d(6)
    far, near = bn((X.astype(np.float64) + 3e4).astype(np.float32)).numpy(), bn(X).numpy()
    assert 1e-4 < np.abs(far - near).max() < 1e-2


def test_a_variance_below_eps():
    model = net(nn.BatchNorm1d(32), nn.ReLU())
    assert kinds(model, X) == set()
    model[0].weight.data = model[0].weight.numpy() * 1e-4
    assert kinds(model, X) == {("eps-dominates", "1")}
    assert model[1](model[0](X)).numpy().std() < 0.1


def test_running_statistics_that_do_not_fit():
    model = net(nn.BatchNorm1d(32), nn.ReLU())
    assert kinds(model, X) == set(), "not trained yet"
    model(X)
    assert kinds(model, X) == {("stale-statistics", "1")}
    train.recalibrate(model, X)
    assert kinds(model, X) == set()
    assert kinds(model, 3 * X) == {("stale-statistics", "1")}
    assert kinds(net(nn.BatchNorm1d(32, track_running_stats=False), nn.ReLU()), X) == set()


def test_dead_units():
    model = net(nn.ReLU(), bias=True)
    assert kinds(model, X) == set()
    model[0].bias.data = np.where(np.arange(32) < 20, -100, 0)
    assert kinds(model, X) == {("dead-units", "1")}
    (found,) = lint(model, X, show=False)
    assert found.what.startswith("20 of 32 units are 0 for all 128 samples")
    assert kinds(model, X[:4]) == set(), "four samples show nothing"
    block = Block(False)
    block.norm.bias.data = np.full(6, -100)
    assert kinds(nn.Sequential(block, nn.Linear(6, 2)), X) == {("dead-units", "0")}, "no ReLU layer, but an op"


@pytest.mark.parametrize("layer", [nn.Sigmoid, nn.Tanh])
def test_saturated_units(layer):
    model = net(layer(), bias=True)
    assert kinds(model, X) == set()
    assert kinds(model, 1000 * X) == {("saturated", "1")}
    assert kinds(nn.Sequential(nn.Linear(6, 2), layer()), 1000 * X) == set(), "outputs may be sure of themselves"


# ---- all together ---------------------------------------------------------------------------------------


def test_no_false_alarm_on_the_demos():
    digits = datasets.load("mnist5k").scaled()
    images = digits.x[::20]
    both = (False, True)
    models = [module.build(bn, 0) for module in (deep_mlp, mnist_mlp, batch_size, learning_rates) for bn in both]
    models += [paper_figure1.build(bn, 0) for bn in both]
    models += [loss_landscape.build(name, 0) for name in common.MODELS]
    models += [init_scale.build(bn, 0.29, 0) for bn in both]
    models += [gradient_flow.build(a, "small", bn, 0) for a in gradient_flow.ACTIVATIONS for bn in both]
    models.append(nn.Sequential(nn.Flatten(), nn.Linear(784, 32), new_op.Swish(), nn.Linear(32, 10)))
    cases = [(model, images) for model in models] + [(mnist_cnn.build(0), images[:, None])]
    iris, titanic = datasets.load("iris"), datasets.load("titanic").complete()
    cases += [(iris_mlp.build(bn, 4, 3), iris.x) for bn in both] + [
        (titanic_mlp.build(bn, 0), titanic.x) for bn in both
    ]
    for model, x in cases:
        layers = list(model)
        biased = {
            str(i)
            for i, (a, b) in enumerate(pairwise(layers))
            if "BatchNorm" in type(b).__name__ and getattr(a, "bias", None) is not None
        }
        assert kinds(model, x) == {("useless-bias", name) for name in biased}, model


def test_the_demos_that_show_a_fault_have_it():
    images = datasets.load("mnist5k").scaled().x[::20]
    found = kinds(gradient_flow.build("sigmoid", "large", False, 0), images)
    assert {kind for kind, _ in found} == {"saturated"}
    assert ("eps-dominates", "2") in kinds(init_scale.build(True, 1e-4, 0), images)


def test_the_model_stays_as_it_was():
    model = net(nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(), bias=True)
    model[1].eval()
    before, functions = model.state_dict(), (backend.forward, backend.vjp)
    lint(model, X, optim.Adam(model.parameters()), show=False)
    assert all(np.array_equal(before[key], value) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == [True, True, False, True, True, True]
    assert (backend.forward, backend.vjp) == functions
    assert all(p.grad is None for p in model.parameters())


def test_the_table(capsys):
    found = lint(net(nn.BatchNorm1d(32), nn.ReLU(), bias=True))
    printed = capsys.readouterr().out
    for word in ("where", "what", "cure", "0 (Linear)", "bias=False"):
        assert word in printed
    assert found == [Finding("useless-bias", "0 (Linear)", found[0].what, found[0].cure)]
    assert found.kinds == {"useless-bias"}
    lint(net(nn.ReLU()))
    assert capsys.readouterr().out.strip() == "nothing found"
    console = Console(width=80)
    with console.capture() as capture:
        console.print(Findings([Finding("k", "[b]1", "same", "cure"), Finding("k", "2", "same", "cure")]))
    assert capture.get().count("same") == 1, "one row for both places"


def test_wrong_arguments():
    model = net(nn.ReLU())
    with pytest.raises(TypeError, match="model has to be a module; got a list"):
        lint([model])
    with pytest.raises(TypeError, match="lint takes a tensor or an array; got a str"):
        lint(model, "x")
    with pytest.raises(ValueError, match=r"needs a batch of samples \(N, ...\); got shape \(0, 6\)"):
        lint(model, X[:0])
    with pytest.raises(TypeError, match="optimizer has to be an Optimizer"):
        lint(model, X, "adam")
    with pytest.raises(TypeError, match="show has to be True or False"):
        lint(model, show=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lint(model, np.full((20, 6), np.nan, np.float32), show=False)
