"""Modules: their attributes, state, modes and summary; layers."""

import copy
import math
import pickle
from collections import UserDict, deque

import numpy as np
import pytest

from tinygrad_bn import Tensor, functional, manual_seed, nn, random, testing


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


class Residual(nn.Module):
    """Modules in a list, a shared layer, a buffer, and no super().__init__()."""

    def __init__(self):
        self.blocks = [nn.Linear(4, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 4))]
        self.again = self.blocks[0]
        self.scale = nn.Parameter([2.0])
        self.count = nn.Buffer(np.int64(7))
        self.constant = Tensor([1.0])

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x) * self.scale
        return self.again(x)


def test_keys_of_parameters_and_buffers():
    model = Residual()
    keys = ["scale", "count", "blocks.0.weight", "blocks.0.bias", "blocks.1.1.weight", "blocks.1.1.bias"]
    assert list(model.state_dict()) == [*keys, "again.weight", "again.bias"]
    assert [name for name, _ in model.named_parameters()] == [k for k in keys if k != "count"]
    assert [name for name, _ in model.named_buffers()] == ["count"]
    assert len(list(model.parameters())) == 5
    model(np.ones((2, 4), np.float32)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    assert all(p.grad is None for p in model.parameters())


def test_train_eval_apply_and_requires_grad():
    model = network()
    assert model.training
    model.eval()
    assert not any(m.training for m in model.modules())
    model[1].train()
    with nn.evaluating(model):
        assert not model[1].training
    assert [m.training for m in model] == [False, True, False, False, False]
    seen = []
    model.apply(lambda m: seen.append(type(m).__name__))
    assert seen == ["Sequential", "Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear"]
    model.requires_grad_(False)
    assert not model(np.ones((2, 4), np.float32)).requires_grad


def test_state_moves_a_model_exactly():
    a, b = network(), network()
    a(np.random.default_rng(0).normal(size=(8, 4)))
    b.load_state_dict(a.state_dict())
    x = np.random.default_rng(1).normal(size=(5, 4))
    np.testing.assert_array_equal(a.eval()(x).numpy(), b.eval()(x).numpy())
    a.state_dict()["0.weight"][:] = 0  # a copy
    assert a[0].weight.numpy().any()


def test_loading_is_all_or_nothing_and_names_the_wrong_keys():
    model = network()
    before, state = model.state_dict(), model.state_dict()
    del state["0.bias"]
    state["5.weight"] = state["0.weight"] * 0
    state["0.weight"] *= 0
    with pytest.raises(KeyError, match=r"missing keys: \['0.bias'\]; unexpected keys: \['5.weight'\]"):
        model.load_state_dict(state)
    wrong = {**before, "0.weight": np.zeros((8, 5)), "4.bias": np.zeros(2), "0.bias": np.ones(8)}
    message = r"0.weight: got \(8, 5\), expected \(8, 4\); 4.bias: got \(2,\), expected \(3,\)"
    with pytest.raises(ValueError, match=message):
        model.load_state_dict(wrong)
    for key, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[key])
    model.load_state_dict(state, strict=False)
    assert not model[0].weight.numpy().any()


def test_old_checkpoints_have_no_counter_or_one_of_shape_1():
    model = network()
    state = model.state_dict()
    model.load_state_dict({k: v for k, v in state.items() if k != "1.num_batches_tracked"})
    model.load_state_dict({**state, "1.num_batches_tracked": np.array([5])})
    assert model[1].num_batches_tracked.item() == 5
    assert model[1].num_batches_tracked.shape == ()


def test_deepcopy_is_independent():
    a = network()
    b = copy.deepcopy(a)
    b[0].weight.data = np.zeros((8, 4))
    assert a[0].weight.numpy().any()


@pytest.mark.parametrize("copied", [copy.deepcopy, pickle.dumps])
def test_a_model_that_keeps_a_result_says_so_when_it_is_copied(copied):
    model = network()
    model[2].kept = model(np.ones((4, 4), np.float32))
    with pytest.raises(RuntimeError, match=rf"{type(model[2]).__name__}\.kept is a result with a graph.*detach\(\)"):
        copied(model)
    model[2].kept = model[2].kept.detach()
    copied(model)


def test_summary_counts_4c_for_batch_norm_as_keras_does(capsys):
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    model[2].weight.data = np.full(32, 3.0)
    model.summary((28, 28))
    lines = [line for line in capsys.readouterr().out.splitlines() if "│" in line or "Parameters:" in line]
    words = [line.replace("│", " ").split() for line in lines]
    assert ["BatchNorm1d", "(N,", "32)", "128"] in words
    assert ["Linear", "(N,", "32)", "25,120"] in words
    assert "Parameters: 25,578 = 25,514 trainable + 64 non-trainable" in lines[-1]
    assert model.training
    assert model[2].num_batches_tracked.item() == 0


def test_observe_sees_every_output():
    model, seen = network(), []
    with nn.observe(lambda module, y: seen.append((type(module).__name__, y.shape))):
        model(np.ones((2, 4), np.float32))
    model(np.ones((2, 4), np.float32))
    assert seen[0] == ("Linear", (2, 8))
    assert seen[-1] == ("Sequential", (2, 3))
    assert len(seen) == 6


def test_repr_is_nested():
    assert repr(nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Dropout(0.2)))) == (
        "Sequential(\n  (0): Linear(2, 3, bias=True)\n  (1): Sequential(\n    (0): Dropout(p=0.2)\n  )\n)"
    )


def test_sequential_as_a_list():
    model = network()
    assert len(model) == 5
    assert isinstance(model[-1], nn.Linear)
    assert [type(m) for m in model[1:3]] == [nn.BatchNorm1d, nn.ReLU]
    with pytest.raises(TypeError, match="module 1 is a function"):
        nn.Sequential(nn.ReLU(), functional.relu)
    with pytest.raises(TypeError, match="defines no forward"):
        nn.Module()(1)


# ---- layers ----------------------------------------------------------------------------------------------


def test_linear():
    layer = nn.Linear(3, 2).astype(np.float64)
    assert layer.weight.shape == (2, 3)
    x = np.random.default_rng(0).normal(size=(4, 5, 3))
    np.testing.assert_allclose(layer(x).numpy(), x @ layer.weight.numpy().T + layer.bias.numpy())
    assert nn.Linear(3, 2, bias=False).bias is None
    assert np.abs(nn.Linear(100, 50).weight.numpy()).max() <= 0.1
    with pytest.raises(ValueError, match=r"Linear\(3, 2, bias=True\) got an input of shape \(4, 5\)"):
        layer(np.ones((4, 5)))
    with pytest.raises(ValueError, match="in_features has to be"):
        nn.Linear(0, 2)


ACTIVATIONS = {
    nn.ReLU(): lambda x: np.maximum(x, 0),
    nn.LeakyReLU(0.2): lambda x: np.where(x > 0, x, 0.2 * x),
    nn.ELU(0.5): lambda x: np.where(x > 0, x, 0.5 * np.expm1(x)),
    nn.Sigmoid(): lambda x: 1 / (1 + np.exp(-x)),
    nn.Tanh(): np.tanh,
    nn.Softplus(): lambda x: np.log1p(np.exp(x)),
    nn.SiLU(): lambda x: x / (1 + np.exp(-x)),
    nn.GELU(): lambda x: x * functional.erf(x / np.sqrt(2)) / 2 + x / 2,
    nn.Softmax(): lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True),
    nn.Flatten(): lambda x: x.reshape(len(x), -1),
}


@pytest.mark.parametrize("layer", ACTIVATIONS, ids=repr)
def test_layers_without_parameters(layer):
    x = np.random.default_rng(0).normal(size=(2, 3, 2)) * 3
    np.testing.assert_allclose(layer(x).numpy(), ACTIVATIONS[layer](x), rtol=1e-12)
    testing.gradcheck(layer, x)


def test_dropout():
    layer = nn.Dropout(0.25, rng=np.random.default_rng(0))
    x = Tensor(np.ones((200, 200), np.float32), requires_grad=True)
    y = layer(x)
    assert y.dtype == np.float32
    assert set(np.unique(y.numpy()).round(6)) == {0.0, np.float32(4 / 3).round(6)}
    assert abs((y.numpy() == 0).mean() - 0.25) < 0.01
    y.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), y.numpy())  # the same mask backwards
    assert layer.eval()(x) is x
    assert not nn.Dropout(1.0)(x).numpy().any()
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        nn.Dropout(1.5)


def test_manual_seed_makes_initialisation_and_dropout_reproducible():
    def draw():
        manual_seed(3)
        model = network()
        return model[0].weight.numpy(), model(np.ones((3, 4), np.float32)).numpy()

    for a, b in zip(draw(), draw(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["layer", "instance", "group", "rms"])
def test_normalisation_siblings(kind):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 4, 6)) * 5 + 2
    layer, axis = {
        "layer": (nn.LayerNorm((4, 6)), (1, 2)),
        "instance": (nn.InstanceNorm1d(4, affine=True), (2,)),
        "group": (nn.GroupNorm(2, 4), None),
        "rms": (nn.RMSNorm(6), (2,)),
    }[kind]
    layer.astype(np.float64)
    y = layer(x).numpy()
    if kind == "rms":
        want = x / np.sqrt((x**2).mean(2, keepdims=True) + np.finfo(np.float64).eps)
    elif kind == "group":
        grouped = x.reshape(3, 2, 12)
        want = (grouped - grouped.mean(2, keepdims=True)) / np.sqrt(grouped.var(2, keepdims=True) + 1e-5)
        want = want.reshape(x.shape)
    else:
        want = (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + 1e-5)
    np.testing.assert_allclose(y, want, rtol=1e-12, atol=1e-12)
    layer.weight.data = rng.normal(size=layer.weight.shape)
    testing.gradcheck(layer, x)
    testing.gradgradcheck(layer, x)


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (nn.LayerNorm(4), (2, 3), "normalized_shape"),
        (nn.RMSNorm((3, 4)), (2, 4), "normalized_shape"),
        (nn.GroupNorm(2, 4), (2, 3, 5), r"takes \(N, 4, \.\.\.\)"),
        (nn.InstanceNorm2d(3), (2, 3, 4), r"4 axes with 3 channels; got \(2, 3, 4\)"),
        (nn.InstanceNorm1d(3), (2, 3, 1), "more than one value per channel"),
    ],
)
def test_siblings_refuse_wrong_shapes(layer, shape, message):
    with pytest.raises(ValueError, match=message):
        layer(np.ones(shape, np.float32))


# ---- seeds, states and summaries ------------------------------------------------------------------------


def test_seeds_and_generators_are_checked():
    for seed in (-1, None, "0", 1.5, True, [1, 2]):
        with pytest.raises((TypeError, ValueError), match="seed has to be"):
            manual_seed(seed)
    for key, count in ((-1, 4), (2**64, 4), (0.5, 4), (0, -1), (0, 2.5)):
        with pytest.raises((TypeError, ValueError), match="has to be"):
            random.philox(key, count)
    for rng in (0, 42, "x"):
        for draw in (lambda rng: nn.Linear(2, 2, rng=rng), lambda rng: functional.dropout(Tensor([1.0]), rng=rng)):
            with pytest.raises(TypeError, match="rng has to be a NumPy Generator"):
                draw(rng)


def test_parameters_that_would_not_be_found_are_refused():
    model = Residual()
    with pytest.raises(TypeError, match=r"Residual\.extra\[0\] would not be found"):
        model.extra = [nn.Parameter([1.0])]
    with pytest.raises(TypeError, match="would not be found"):
        model.extra = [[nn.Linear(1, 1)]]
    model.extra = {}
    model.extra["a"] = nn.Linear(1, 1)
    with pytest.raises(TypeError, match=r"Residual\.extra is a dictionary"):
        model.state_dict()
    model.extra = model
    with pytest.raises(ValueError, match="contains itself, as 'extra'"):
        model.eval()


def test_loading_other_types_of_numbers_is_refused():
    model = network()
    before = model.state_dict()
    for key, value in (("4.bias", np.array(["a", "b", "c"])), ("1.num_batches_tracked", np.array(3.7))):
        with pytest.raises(TypeError, match=key):
            model.load_state_dict({**{k: v + 1 for k, v in before.items()}, key: value})
    for k, v in model.state_dict().items():
        np.testing.assert_array_equal(v, before[k])


def test_summary_has_a_row_for_parameters_beside_children(capsys):
    Residual().summary((4,))
    out = capsys.readouterr().out
    assert any("Residual" in line and line.rstrip(" │").endswith(" 1") for line in out.splitlines())
    assert "Parameters: 41 = 41 trainable" in out


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("0.weight", None), ("0.weight", "a"), ("0.weight", np.ones((2, 2), complex)), ("0.weight", [[1, 2], [3]]),
        ("0.weight", np.ones((2, 2), object)), ("0.weight", np.full((2, 2), 1e300)), ("1.running_var", [1.0, -1.0]),
        ("1.num_batches_tracked", -1), ("1.num_batches_tracked", 1.5), ("1.running_mean", 5.0),
    ],
)  # fmt: skip
def test_a_state_that_does_not_fit_changes_nothing(key, value):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = repr(model.state_dict())
    with pytest.raises((TypeError, ValueError), match=rf"{key}\b"):
        model.load_state_dict(model.state_dict() | {"0.bias": np.ones(2), key: value})
    assert repr(model.state_dict()) == before


@pytest.mark.parametrize("state", [None, 3, [], "weight"])
def test_a_state_is_a_dictionary(state):
    with pytest.raises(TypeError, match="a state is a dictionary of arrays, as state_dict"):
        nn.Linear(2, 2).load_state_dict(state)


# ---- what a user means as state does not vanish ---------------------------------------------------------------


class Holder(nn.Module):
    def __init__(self, value: object) -> None:
        self.value = value


TRAINED = {
    "parameter in a list": lambda: [nn.Parameter([1.0])],
    "tensor with a gradient in a tuple": lambda: (Tensor([1.0], requires_grad=True),),
    "set": lambda: {nn.Linear(2, 2)},
    "frozen set": lambda: frozenset({nn.Parameter([1.0])}),
    "deque": lambda: deque([nn.Linear(2, 2)]),
    "keys": lambda: {nn.Linear(2, 2): 1},
    "mapping": lambda: UserDict(a=nn.Parameter([1.0])),
    "dictionary in a list": lambda: [{"a": nn.Buffer([1.0])}],
    "array of objects": lambda: np.array([nn.Linear(2, 2)], dtype=object),
    "array among modules": lambda: [nn.Linear(2, 2), np.ones(2)],
    "tensor among modules": lambda: (nn.Linear(2, 2), Tensor([1.0])),
}


@pytest.mark.parametrize("name", TRAINED)
def test_state_that_would_not_be_found_is_refused(name):
    with pytest.raises(TypeError, match=r"Holder\.value"):
        Holder(TRAINED[name]())
    if isinstance(items := TRAINED[name](), list):
        module = Holder([])
        module.value.extend(items)
        with pytest.raises(TypeError, match=r"Holder\.value"):
            list(module.parameters())


@pytest.mark.parametrize("value", [{"a": 1}, {1, 2}, [1.0], [np.ones(2)], (Tensor([1.0]),), np.ones(2), [None, len]])
def test_constants_are_attributes(value):
    module = Holder(value)
    assert list(module.state_dict()) == []
    module.value = 3


def test_modules_in_a_list_are_replaced_by_modules_only():
    module = Holder([nn.Linear(2, 2)])
    for wrong in ([np.ones(2)], (Tensor([1.0]),), {"a": 1}, 3):
        with pytest.raises(TypeError, match=r"Holder\.value"):
            module.value = wrong
    for right in ([nn.ReLU(), nn.Linear(2, 2)], nn.Linear(2, 2), [], None, (nn.Linear(2, 2),)):
        module.value = right
    module.value = [nn.Linear(2, 2)]
    module.value[0] = np.ones(2)
    with pytest.raises(
        TypeError, match=r"Holder\.value\[0\] would not be found, since it is not a module but a ndarray"
    ):
        module.state_dict()


def test_parameters_of_a_class_are_refused():
    for value in (nn.Parameter([1.0]), nn.Buffer([1.0]), nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=r"Odd\.value would not be found, since the class has it"):
            type("Odd", (nn.Module,), {"value": value})
    type("Even", (nn.Module,), {"value": nn.ReLU()})


# ---- options set after building ---------------------------------------------------------------------------

WRONG_OPTIONS = {
    "momentum": [5, -1, math.nan, "a", True], "eps": [0, -1, math.nan, math.inf, "a", None],
    "training": ["no", None, 2], "stats_frozen": ["no", None], "virtual_batch_size": [-1, 0, 1.5, "a"],
    "running_var_correction": [2, "a", None], "num_features": [0, 1.5],
}  # fmt: skip


@pytest.mark.parametrize("option", WRONG_OPTIONS)
def test_options_of_batch_norm_set_by_hand_are_checked(option):
    for layer in (nn.BatchNorm1d(2), nn.BatchNorm2d(2)):
        for value in WRONG_OPTIONS[option]:
            before = getattr(layer, option)
            with pytest.raises((TypeError, ValueError), match=f"{option} (has to|may) be"):
                setattr(layer, option, value)
            assert getattr(layer, option) is before
    if option in ("eps", "momentum"):
        with pytest.raises((TypeError, ValueError), match=f"{option} has to be"):
            nn.BatchNorm1d(2, **{option: "a"})


@pytest.mark.parametrize("mode", ["no", None, 1])
def test_modes_are_true_or_false(mode):
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for call in (model.train, model.requires_grad_, model[1].freeze, lambda mode: setattr(model[0], "training", mode)):
        with pytest.raises(TypeError, match="has to be True or False"):
            call(mode)
    assert all(m.training for m in model.modules())
