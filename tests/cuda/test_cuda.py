"""Ops, training and devices on cuda, executed from PTX by the interpreter of `tests/cuda/ptx`."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest

from tests.cuda.ptx.compile import require_compiler
from tests.cuda.ptx.programs import interpreted
from tests.cuda.training import BUILT_IN, OPTIMISERS, cuda_matches_cpu, images_network, network, three_steps
from tinygrad_bn import Tensor, checkpoint, cuda, functional, nn, optim, sample, train
from tinygrad_bn.tensor import OPS


@pytest.fixture(scope="module", autouse=True)
def device():
    require_compiler()
    with interpreted() as used:
        yield used


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_op_is_the_same_as_on_the_cpu(name):
    for example, dtype in enumerate((np.float32, np.float32, np.float64)):
        xs, params = OPS[name].sample(sample.RandomDraw(example))
        cuda_matches_cpu(OPS[name], xs, params, example, dtype)


RNG = np.random.default_rng(0)
DECLINED = {  # what kernels of gradients leave to the composition
    "block_norm": ([np.ones((0, 4, 5))], {"blocks": (0, 2, 2, 5), "eps": 1e-5, "centered": True}, 2),
    "linear": ([np.ones((0, 3)), np.ones((4, 3)), np.ones(4)], {}, 0),
    "matmul": ([np.ones(3), np.ones((3, 2))], {}, 0),
}


@pytest.mark.parametrize("name", DECLINED)
def test_gradients_that_kernels_decline_are_the_same_as_on_the_cpu(name):
    arrays, params, others = DECLINED[name]
    cuda_matches_cpu(OPS[name], [*arrays, *[None] * others], params, 0, np.float32)


def test_the_gradient_of_an_affine_map_of_two_dtypes_is_the_same_as_on_the_cpu():
    x, weight, g = RNG.normal(size=(5, 3)), RNG.normal(size=(4, 3)).astype(np.float32), RNG.normal(size=(5, 4))
    found = []
    for where in ("cpu", "cuda"):
        leaves = [Tensor(a).to(where).detach() for a in (x, weight)]
        for t in leaves:
            t.requires_grad = True
        functional.linear(*leaves).backward(Tensor(g).to(where))
        found.append([t.grad.numpy() for t in leaves])
    for one, want in zip(*found, strict=True):
        assert one.dtype == want.dtype
        np.testing.assert_allclose(one, want, rtol=1e-5)


# ---- training --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "optimiser", "shape"),
    [(network, "adam", (32, 6)), (network, "sgd", (33, 6)), (images_network, "rmsprop", (8, 1, 6, 6))],
)
def test_three_training_steps_are_those_of_the_cpu(make, optimiser, shape):
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=shape) + 1).astype(np.float32), rng.integers(0, 3, shape[0])
    losses, state, _ = three_steps(make, optimiser, x, y, "cuda")
    want, want_state, _ = three_steps(make, optimiser, x, y, "cpu")
    np.testing.assert_allclose(losses, want, rtol=1e-5)
    assert losses[-1] < losses[0]
    for name, value in want_state.items():
        np.testing.assert_allclose(state[name], value, rtol=1e-3, atol=1e-4, err_msg=name)


def test_fit_and_evaluate_on_cuda_and_load_the_checkpoint_on_the_cpu():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 6)).astype(np.float32)
    data = x, (x[:, 0] > 0).astype(np.int64)
    results = []
    for where in ("cuda", "cpu"):
        model = network()
        options = {"epochs": 2, "batch_size": 20, "seed": 0, "progress": False}
        history = train.fit(model, data, validation=data, device=where, **options)
        assert {p.device for p in model.parameters()} == {where}
        results.append((history["loss"], history["val_loss"], model))
    np.testing.assert_allclose(results[0][:2], results[1][:2], rtol=1e-3)
    copy = network()
    copy.load_state_dict(results[0][2].state_dict())
    assert {type(a) for a in results[0][2].state_dict().values()} == {np.ndarray}
    on_cuda, on_cpu = (train.evaluate(m, data) for m in (results[0][2], copy))
    np.testing.assert_allclose(on_cuda, on_cpu, rtol=1e-5)
    results[0][2].load_state_dict(results[1][2].to("cuda").state_dict())
    with pytest.raises(TypeError, match=r"data has to be on the CPU.* got arrays on cuda: copy them with \.numpy"):
        train.fit(copy, (Tensor(x).to("cuda"), data[1]), device="cuda", progress=False)


@pytest.mark.parametrize(("here", "there"), [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")])
def test_a_checkpoint_file_of_another_device(here, there, tmp_path):
    def trained(where, seed):
        rng = np.random.default_rng(seed)
        model = network().to(where)
        optimizer = OPTIMISERS["adam"](model.parameters())
        loss = functional.cross_entropy(
            model(Tensor(rng.normal(size=(16, 6)).astype(np.float32)).to(where)),
            Tensor(rng.integers(0, 3, 16)).to(where),
        )
        loss.backward()
        optimizer.step()
        return model, optimizer

    def whole(model, optimizer):
        return repr(({k: a.tobytes() for k, a in model.state_dict().items()}, optimizer.state_dict()))

    own, other = trained(here, 0), trained(there, 1)
    path = checkpoint.save(tmp_path / "a.safetensors", own[0], optimizer=own[1], arrays={"x": own[0][0].weight})
    assert whole(*own) != (before := whole(*other))
    state = own[1].state_dict()
    unfit = dataclasses.replace(checkpoint.read(path), optimizer={**state, "state": {**state["state"], 9: {}}})
    with pytest.raises(checkpoint.CheckpointError, match="nothing was loaded"):
        checkpoint.apply(unfit, other[0], optimizer=other[1])
    assert whole(*other) == before
    contents = checkpoint.load(path, other[0], optimizer=other[1])
    assert whole(*other) == whole(*own)
    assert {t.device for _, t in other[0].named_tensors()} == {there}
    assert contents.arrays["x"].tobytes() == own[0].state_dict()["0.weight"].tobytes()
    functional.cross_entropy(
        other[0](Tensor(np.ones((4, 6), np.float32)).to(there)), Tensor([0, 1, 2, 0]).to(there)
    ).backward()
    other[1].step()


def test_an_optimiser_resumes_from_a_checkpoint_of_another_device():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 6)).astype(np.float32), rng.integers(0, 3, 16)
    _, state, optimizer_state = three_steps(network, "adam", x, y, "cuda")
    model = network()
    model.load_state_dict(state)
    optimizer = OPTIMISERS["adam"](model.parameters())
    optimizer.load_state_dict(optimizer_state)
    functional.cross_entropy(model(Tensor(x)), y).backward()
    optimizer.step()
    moved = network().to("cuda")
    moved.load_state_dict(state)
    optimizer = OPTIMISERS["adam"](moved.parameters())
    optimizer.load_state_dict(optimizer_state)
    assert {v.device for s in optimizer.state.values() for v in s.values() if not isinstance(v, int)} == {"cuda"}


def test_a_batch_that_is_not_finite_leaves_the_running_statistics():
    layer = nn.BatchNorm1d(2).to("cuda")
    x = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    layer(Tensor(x).to("cuda"))
    before = layer.state_dict()
    x[2, 1] = np.inf
    layer(Tensor(x).to("cuda"))
    np.testing.assert_array_equal(layer.state_dict()["running_mean"], before["running_mean"])
    np.testing.assert_array_equal(layer.state_dict()["running_var"], before["running_var"])


# ---- devices ---------------------------------------------------------------------------------------------


def test_mixing_devices_is_an_error_that_names_both():
    here, there = Tensor([1.0, 2.0], requires_grad=True), Tensor([3.0, 4.0]).to("cuda")
    for mix in (
        lambda: here + there, lambda: there + here, lambda: there * np.ones(2), lambda: here @ there,
        lambda: functional.where(here > 0, here, there), lambda: functional.concatenate([here, there]),
        lambda: here > there, lambda: functional.cross_entropy(there.reshape(1, 2), np.array([0])),
        lambda: functional.batch_norm(there.reshape(2, 1), weight=here[:1], bias=here[:1], training=True),
        lambda: nn.Linear(2, 3)(there), lambda: (here * 2).sum().backward(Tensor(1.0).to("cuda")),
        lambda: functional.cross_entropy(here.reshape(1, 2), Tensor([0]).to("cuda")),
        lambda: there[Tensor([1])], lambda: there[None, here > 1], lambda: there[[Tensor(0), Tensor(1)]],
        lambda: here[Tensor([1]).to("cuda")], lambda: here[Tensor([1]).to("cuda").data],
        lambda: setattr(there, "data", here), lambda: setattr(here, "data", there), lambda: here.__iadd__(there),
        lambda: nn.BatchNorm1d(2, affine=False)(Tensor(np.eye(2)).to("cuda")),
        lambda: nn.BatchNorm1d(2, affine=False).to("cuda")(Tensor(np.eye(2))),
        lambda: functional.nll_loss(there.reshape(1, 2), Tensor([0])),
        lambda: functional.nll_loss(here.reshape(1, 2), Tensor([0]).to("cuda")),
        lambda: functional.cross_entropy(there.reshape(1, 2), Tensor([0]).to("cuda"), weight=here.detach()),
        lambda: functional.conv2d(Tensor(np.ones((1, 1, 2, 2))).to("cuda"), Tensor(np.ones((1, 1, 1, 1)))),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=r"cpu.*cuda|cuda.*cpu"):
            mix()


def test_numpy_arrays_and_lists_index_and_assign_on_any_device():
    t = Tensor([[1.0, 2.0], [3.0, 4.0]]).to("cuda")
    for index in (1, [1, 0], np.array([1, 0]), np.array([False, True]), (slice(None), np.int32(1)), (..., [[0]])):
        np.testing.assert_array_equal(t[index].numpy(), t.numpy()[index])
    assert nn.BatchNorm1d(2, affine=False).to("cuda")(np.eye(2)).device == "cuda"
    t.data = np.eye(2)
    assert (t.device, t.numpy().tolist()) == ("cuda", [[1, 0], [0, 1]])
    for index in (1.5, "a", True):
        with pytest.raises(IndexError, match="an index must be a number, a slice, an array"):
            t[index]


def test_a_gradient_on_another_device_is_an_error_before_anything_changes():
    p = Tensor([1.0, 2.0], requires_grad=True)
    p.grad = Tensor([1.0, 1.0]).to("cuda")
    for use in (optim.SGD([p], lr=0.1).step, lambda: optim.clip_grad_norm_([p], 1.0)):
        with pytest.raises(TypeError, match=r"cpu.*cuda"):
            use()
    assert p.numpy().tolist() == [1, 2]


def test_an_optimiser_whose_model_moved_says_so():
    p = Tensor([1.0, 2.0], requires_grad=True)
    optimizer = optim.Adam([p])
    p.grad = Tensor([1.0, 1.0])
    optimizer.step()
    p.data, p._data = p.data, p.detach().to("cuda")._data
    p.grad = Tensor([1.0, 1.0]).to("cuda")
    with pytest.raises(TypeError, match="cpu and cuda"):
        optimizer.step()


def test_nothing_is_copied_to_the_host_implicitly():
    t = Tensor([1.0, 2.0]).to("cuda")
    with pytest.raises(TypeError, match=r"lives on cuda.*\.numpy\(\)"):
        np.asarray(t)
    with pytest.raises(TypeError, match=r"not converted to NumPy implicitly: copy it with \.numpy\(\)"):
        np.asarray(t.data)
    with pytest.raises(TypeError):
        np.add(t.data, 1)
    assert t.numpy().tolist() == [1, 2]
    assert t.sum().item() == 3
    assert "cuda" in repr(t)
    assert t.to("cuda") is t
    assert t.to("cpu").device == "cpu"


def test_the_gradient_comes_back_to_the_device_that_a_tensor_came_from():
    x = Tensor([1.0, 2.0], requires_grad=True)
    (x.to("cuda") * 3.0).sum().backward()
    assert x.grad.device == "cpu"
    assert x.grad.numpy().tolist() == [3, 3]


def test_unsupported_dtypes_devices_and_indices():
    with pytest.raises(TypeError, match=r"cannot have dtype float16; it can have .*float32, float64"):
        Tensor([1.0], dtype=np.float16).to("cuda")
    with pytest.raises(ValueError, match=r"no device 'cuda:0'.* \"cuda\" is one GPU, the first"):
        Tensor([1.0]).to("cuda:0")
    with pytest.raises(ValueError, match="there is no device 'gpu'"):
        Tensor([1.0]).to("gpu")
    with pytest.raises(IndexError, match="out of bounds"):
        Tensor([1.0, 2.0]).to("cuda")[2]
    out = Tensor([1.0, 2.0]).to("cuda")[Tensor([0, 5]).to("cuda")]
    assert np.isnan(out.numpy()).tolist() == [False, True]
    loss = functional.cross_entropy(Tensor([[0.0, 0.0]]).to("cuda"), Tensor([7]).to("cuda"))
    assert np.isnan(loss.item())


def test_arrays_and_views():
    t = Tensor(np.arange(12, dtype=np.float32).reshape(3, 4)).to("cuda")
    array = t.data
    assert array.reshape(-1, 2)[1:3].numpy().tolist() == [[2, 3], [4, 5]]
    assert array[1:].pointer == array.pointer + 16
    with pytest.raises(ValueError, match=r"cannot reshape .* \(3, 4\) into \(5, -1\)"):
        array.reshape(5, -1)
    interface = array.__cuda_array_interface__
    assert interface["data"] == (array.pointer, False)
    assert (interface["shape"], interface["typestr"], interface["strides"]) == ((3, 4), "<f4", None)


def test_dropout_draws_the_same_elements_as_on_the_cpu():
    x = np.ones((37, 5), np.float32)
    for key in (0, 7, 2**63 - 1):
        ys = [
            functional.basics.dropout_by_key(Tensor(x).to(where), p=0.4, key=key).numpy() for where in ("cpu", "cuda")
        ]
        np.testing.assert_array_equal(*ys)


def test_info(device):
    assert cuda.is_available()
    assert cuda.info()["compute_capability"] == device.cc
    cuda.synchronize()


def test_dlpack_shares_memory_in_both_directions():
    from tinygrad_bn_kernels.cuda import dlpack

    t = Tensor(np.arange(6.0, dtype=np.float32).reshape(2, 3)).to("cuda")
    shared = cuda.from_dlpack(t.data)
    assert shared.data.pointer == t.data.pointer
    np.testing.assert_array_equal(shared.numpy(), t.numpy())
    assert len(dlpack._exports) == 1
    del shared
    assert not dlpack._exports
    assert t.data.__dlpack_device__() == (2, 0)
    with pytest.raises(TypeError, match="is not on cuda:0"):
        cuda.from_dlpack(np.ones(3))


# ---- BatchNorm -------------------------------------------------------------------------------------------

SHAPES = [(1025, 3), (3, 33), (5, 2, 7), (3, 2, 8, 8), (2, 3, 51, 20), (9, 1, 31)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("offset", "relu"), [(0, False), (1e3, True)])
def test_batch_norm_is_exact_at_any_mean(shape, offset, relu):
    rng = np.random.default_rng(0)
    x = (rng.normal(size=shape) + offset).astype(np.float32)
    g = rng.normal(size=shape).astype(np.float32)
    weight, bias = rng.normal(size=(2, shape[1])).astype(np.float32)
    results = []
    for where, dtype in (("cuda", np.float32), ("cpu", np.float64)):
        ts = [Tensor(a, dtype=dtype).to(where).detach() for a in (x, weight, bias)]
        for t in ts:
            t.requires_grad = True
        y, (mean, var) = (functional.batch_norm_relu if relu else functional.batch_norm_training).run(*ts, eps=1e-5)
        y.backward(Tensor(g, dtype=dtype).to(where))
        results.append([y.numpy(), *(np.asarray(s if where == "cpu" else s.numpy()) for s in (mean, var))])
        results[-1] += [t.grad.numpy() for t in ts]
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-5 * np.abs(want).max())


def test_a_constant_channel_gives_exactly_bias_on_cuda():
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    x[:, 1] = 1e10
    bias = Tensor([0.1, 0.2, 0.3]).to("cuda")
    y, (_, var) = functional.batch_norm_training.run(Tensor(x).to("cuda"), None, bias, eps=1e-5)
    assert (y.numpy()[:, 1] == np.float32(0.2)).all()
    assert var.numpy()[1] == 0


FUNCTIONS = {
    "adaptive_max_pool": lambda x: functional.adaptive_max_pool(x, (2, 3)),
    "adaptive_avg_pool": lambda x: functional.adaptive_avg_pool(x, (2, 3)),
    "avg_pool2d": lambda x: functional.avg_pool2d(x, 2, padding=1, count_include_pad=False),
    "gelu": functional.gelu, "elu": functional.elu, "silu": functional.silu, "leaky_relu": functional.leaky_relu,
    "softmax": functional.softmax, "std": lambda x: functional.std(x, (0, 2)),
    "huber": lambda x: functional.huber_loss(x, x.detach() * 0.5),
    "group_norm": lambda x: functional.group_norm(x, 2), "rms_norm": lambda x: functional.rms_norm(x, 5),
    "nll": lambda x: functional.nll_loss(x, Tensor(np.zeros((2, 5, 5), int)).to(x.device)),
    "bce": lambda x: functional.binary_cross_entropy_with_logits(x, x.detach().sigmoid()),
    "index": lambda x: x[:, [1, 0, 1], ::-2] * x[:, :3, :3], "iteration": lambda x: functional.stack(list(x)),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compositions_are_the_same_as_on_the_cpu(name):
    x = np.random.default_rng(0).normal(size=(2, 4, 5, 5)).astype(np.float32)
    results = []
    for where in ("cuda", "cpu"):
        t = Tensor(x).to(where).detach()
        t.requires_grad = True
        y = FUNCTIONS[name](t)
        y.backward(Tensor(np.random.default_rng(1).normal(size=y.shape), dtype=np.float32).to(where))
        results.append((y.numpy(), t.grad.numpy()))
    for got, want in zip(*results, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_copies_and_pickles_do_not_share_memory():
    layer = nn.Linear(2, 3).to("cuda")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        np.testing.assert_array_equal(other.weight.numpy(), layer.weight.numpy())
        assert other.weight.data.pointer != layer.weight.data.pointer


@pytest.mark.parametrize("far", [2**15, 2**32, 2**40])
def test_windows_far_outside_the_input(far):
    def results(device):
        x = Tensor(np.arange(16.0).reshape(1, 1, 4, 4), requires_grad=True)
        weight = Tensor(np.arange(1.0, 5).reshape(1, 1, 2, 2), requires_grad=True)
        a, b = x.to(device), weight.to(device)
        wide = functional.conv2d(a, b, stride=far, padding=far)
        back = functional.conv_transpose2d(a[..., :3, :3], b, stride=far, padding=far)
        (wide.sum() + back.sum()).backward()
        return [t.numpy() for t in (wide, back, x.grad, weight.grad)]

    for got, want in zip(results("cuda"), results("cpu"), strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_a_step_that_would_overflow_is_undone_on_cuda():
    rng = np.random.default_rng(0)
    data = rng.normal(size=(8, 6)).astype(np.float32), rng.integers(0, 3, 8)
    model = network()
    optimizer = optim.Adam(model.to("cuda").parameters())
    options = {"epochs": 1, "batch_size": 8, "optimizer": optimizer, "progress": False}
    train.fit(model, data, **options)
    before = repr((model.state_dict(), optimizer.state_dict()["state"]))
    optimizer.param_groups[0]["lr"] = 1e300
    with pytest.raises(train.NonFiniteError, match=r"^epoch 1, step 1 of 1: 0\.weight would become NaN or infinite"):
        train.fit(model, data, **options)
    assert repr((model.state_dict(), optimizer.state_dict()["state"])) == before
