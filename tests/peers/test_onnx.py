"""Models out to onnxruntime and back, and in from PyTorch; and files that are not read."""

import copy
import warnings

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tests.fuzz.target import check
from tests.fuzz.targets import TARGETS
from tinygrad_bn import Tensor, manual_seed, nn, optim, train
from tinygrad_bn import functional as F
from tinygrad_bn.onnx import OnnxError, export, load
from tinygrad_bn.onnx.reading import array_of_proto
from tinygrad_bn.transforms import functional_call, grad


class Residual(nn.Module):
    def __init__(self):
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)) + x)


class Sliced(nn.Module):
    def forward(self, x):
        a, b = x[:, 1:, ::-1], x[:, :-1, 2:0:-1]
        joined = F.concatenate([a[..., :2], b], axis=2)
        return F.stack([joined[:, 0], joined[:, -1]], axis=1)[:, None] * F.std(x, axis=(1, 2), keepdims=True)[..., None]


class Compared(nn.Module):
    def forward(self, x):
        y = F.where((x > 0.5) != (x[:, :1] <= x), F.clip(x, max=2.0), F.maximum(-x, 0.25))
        return F.log_softmax(y, axis=1) + F.logsumexp(x, axis=1, keepdims=True) + F.max(x, axis=-1, keepdims=True)


class Scaled(nn.Module):
    def forward(self, x):
        return x / len(x)


class Numbered(nn.Module):
    def forward(self, x):
        return x * np.arange(len(x), dtype=np.float32)[:, None]


class Branching(nn.Module):
    def forward(self, x):
        return x if float(x.sum()) > 0 else -x


class Indexed(nn.Module):
    def forward(self, x):
        return x[F.argmax(x, axis=0)]


MODELS = {
    "mlp": (lambda: [nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3, bias=False), nn.Softmax()], (4,)),
    "cnn": (lambda: [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.LeakyReLU(),
                     nn.Conv2d(4, 6, 3, stride=2, groups=2), nn.BatchNorm2d(6, affine=False), nn.AvgPool2d(2),
                     nn.Flatten(), nn.Dropout(0.5), nn.Linear(6, 2)], (1, 12, 12)),
    "pooling": (lambda: [nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), nn.AvgPool2d(3, 2, padding=1, ceil_mode=True),
                         nn.AdaptiveAvgPool2d(2)], (2, 11, 12)),
    "residual": (lambda: [Residual()], (3, 6, 6)),
    "activations": (lambda: [nn.Linear(6, 6), nn.GELU(), nn.SiLU(), nn.ELU(), nn.Sigmoid(), nn.Tanh(), nn.Softplus()],
                    (6,)),
    "norms": (lambda: [nn.LayerNorm((4, 7)), nn.RMSNorm(7), nn.GroupNorm(2, 4), nn.InstanceNorm1d(4)], (4, 7)),
    "transposed": (lambda: [nn.ConvTranspose2d(2, 3, 3, stride=2, output_padding=1, groups=1)], (2, 5, 5)),
    "sequences": (lambda: [nn.Linear(5, 7), nn.ReLU(), nn.LayerNorm(7)], (3, 5)),
    "1 axis": (lambda: [nn.Conv1d(2, 4, 3, dilation=2, groups=2), nn.BatchNorm1d(4), nn.MaxPool1d(2)], (2, 9)),
    "3 axes": (lambda: [nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4), nn.AvgPool3d(2)], (2, 5, 5, 5)),
    "slices": (lambda: [Sliced()], (3, 4)),
    "comparisons": (lambda: [Compared()], (3, 4)),
}  # fmt: skip


def trained(name, dtype=np.float32):
    """A model whose BatchNorms have met batches, in evaluation mode, and the shape of a sample."""
    manual_seed(0)
    layers, shape = MODELS[name]
    model = nn.Sequential(*layers()).astype(dtype)
    for seed in range(3):
        model(np.random.default_rng(seed).normal(1, 2, (4, *shape)).astype(dtype))
    for i, p in enumerate(model.parameters()):  # weights of norms are not 1
        p.data = p.numpy() + np.random.default_rng(i).normal(0, 0.3, p.shape).astype(dtype)
    return model.eval(), shape


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    found = {}
    for name in MODELS:
        model, shape = trained(name)
        export(model, np.ones((2, *shape), np.float32), folder / f"{name}.onnx")
        session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
        found[name] = model, shape, session, load(folder / f"{name}.onnx")
    return found


@pytest.mark.parametrize("name", MODELS)
@given(n=st.integers(1, 6), seed=st.integers(0, 999), scale=st.sampled_from([1e-3, 1.0, 30.0]))
@settings(max_examples=10)
def test_onnxruntime_computes_the_same_for_any_batch(name, exported, n, seed, scale):
    model, shape, session, back = exported[name]
    x = np.random.default_rng(seed).normal(0, scale, (n, *shape)).astype(np.float32)
    want = model(x).numpy()
    (got,) = session.run(None, {"input": x})
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * np.abs(want).max()}
    np.testing.assert_allclose(got, want, **tolerance)
    np.testing.assert_allclose(back(x).numpy(), want, **tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_weights_keep_their_names_and_values(name, exported):
    model, _, _, back = exported[name]
    own, state = model.state_dict(), back.state_dict()
    of_onnx = {"6.weight", "6.bias"} if name == "cnn" else set()  # there every BatchNormalization has them
    assert state.keys() - of_onnx == own.keys()
    for key in own:
        if not key.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(state[key], own[key], err_msg=key)


def test_float64_and_a_batch_of_fixed_size(tmp_path):
    model, shape = trained("mlp", np.float64)
    x = np.random.default_rng(0).normal(size=(3, *shape))
    export(model, Tensor(x), tmp_path / "a.onnx", dynamic_batch=False)
    np.testing.assert_allclose(load(tmp_path / "a.onnx")(x).numpy(), model(x).numpy(), rtol=1e-12)
    proto = onnx.load(tmp_path / "a.onnx")
    assert [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == [3, *shape]
    export(nn.Sequential(Scaled()), x, tmp_path / "a.onnx", dynamic_batch=False)
    np.testing.assert_allclose(load(tmp_path / "a.onnx")(x).numpy(), x / 3)


class Clashing(nn.Module):
    """Parameters with the names that an exporter might choose."""

    def __init__(self):
        for i, name in enumerate(("input", "constant_0", "mul_0", "add_1", "add_1_1")):
            setattr(self, name, nn.Parameter(np.full(3, 1.5 + i, np.float32)))

    def forward(self, x):
        y = x * np.array([1.0, 2.0, 3.0], np.float32) + 0.5
        return (y * self.input + self.constant_0) * self.mul_0 + self.add_1 / self.add_1_1


class Integers(nn.Module):
    def forward(self, x):
        return (
            F.where(x < 0.5, x, x + 10) + F.astype(x == 0.5, dtype=np.int64) + F.astype(F.mean(x) > 1, dtype=np.int64)
        )


class Promoting(nn.Module):
    def forward(self, x):
        return x / 255 * (x > 3) + F.sum(x > 1, axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (Clashing(), np.ones((2, 3), np.float32)), (Integers(), np.array([[0, 1], [2, 0]])),
        (Promoting(), np.array([[0, 1, 200], [2, 9, 4]], np.uint8)),
        (nn.BatchNorm1d(3), np.ones((2, 3), np.float32)),
        (nn.BatchNorm1d(3, affine=False), np.ones((2, 3), np.float32)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dynamic", [True, False])
def test_names_and_dtypes(model, x, dynamic, tmp_path):
    model.eval()
    export(model, x, tmp_path / "a.onnx", dynamic_batch=dynamic)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    want = model(x).numpy()
    for got in (session.run(None, {session.get_inputs()[0].name: x})[0], load(tmp_path / "a.onnx")(x).numpy()):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, rtol=1e-6)
    if isinstance(model, nn.BatchNorm1d):
        back = load(tmp_path / "a.onnx")
        assert {key.rpartition(".")[2] for key, _ in back.named_parameters()} == {"weight", "bias"}


class Turned(nn.Module):
    def forward(self, x):
        return F.transpose(x) @ F.reshape(x, shape=(len(x), -1))


def test_sizes_of_the_output_that_follow_the_batch_have_its_name(tmp_path):
    for model, wanted in ((Turned(), [3, 3]), (nn.Linear(3, 2), ["batch", 2]), (nn.Flatten(), ["batch", 3])):
        export(model, np.ones((2, 3), np.float32), tmp_path / "a.onnx")
        (output,) = onnx.load(tmp_path / "a.onnx").graph.output
        assert [d.dim_param or d.dim_value for d in output.type.tensor_type.shape.dim] == wanted


# ---- training further -------------------------------------------------------------------------------------


def test_an_imported_network_is_trained_as_the_original(exported):
    """The same steps: gradients, and running statistics by ONNX' convention, which is that of `BatchNorm.onnx`."""
    model, _, _, back = exported["mlp"]
    model, back = copy.deepcopy(model), copy.deepcopy(back)
    model[1].running_var_correction = 0
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 4)).astype(np.float32), rng.integers(0, 3, 40)
    losses = []
    for network in (model, back):
        network.train()
        history = train.fit(
            network, (x, y), epochs=5, batch_size=8, optimizer=optim.SGD(network.parameters(), lr=0.1), seed=0,
            loss=lambda p, y: F.nll_loss(F.log(p), y), progress=False,
        )  # fmt: skip
        losses.append(history["loss"])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert losses[1][-1] < losses[1][0]
    own, state = model.state_dict(), back.state_dict()
    for key in state.keys() - {"1.num_batches_tracked"}:
        np.testing.assert_allclose(state[key], own[key], rtol=1e-4, atol=1e-6, err_msg=key)


def test_a_frozen_network_stays(exported, tmp_path):
    _, shape, _, back = exported["cnn"]
    back = copy.deepcopy(back)
    back.requires_grad_(False)
    head = nn.Linear(2, 2)
    model = nn.Sequential(back, head)
    before = back.state_dict()
    back.eval()
    x = np.ones((3, *shape), np.float32)
    F.cross_entropy(model(x), np.array([0, 1, 0])).backward()
    assert head.weight.grad is not None
    assert all(p.grad is None for p in back.parameters())
    after = back.state_dict()
    assert all(np.array_equal(before[key], after[key]) for key in before)
    back.save(tmp_path / "a.safetensors")
    again = copy.deepcopy(back)
    again.load(tmp_path / "a.safetensors")
    np.testing.assert_array_equal(again(x).numpy(), back(x).numpy())


@pytest.mark.parametrize("kind", ["cnn", "attention"])
def test_a_model_of_pytorch(kind, tmp_path):
    torch.manual_seed(0)
    layers, shape = {
        "cnn": ([torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.MaxPool2d(2),
                 torch.nn.GELU(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(16, 5),
                 torch.nn.LayerNorm(5), torch.nn.Softmax(1)], (2, 1, 10, 10)),
        "attention": ([torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)], (2, 5, 8)),
    }[kind]  # fmt: skip
    model, x = torch.nn.Sequential(*layers), torch.randn(*shape)
    model(x)
    model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about its exporters
        torch.onnx.export(model, (x,), str(tmp_path / "a.onnx"), dynamo=False)
    got = load(tmp_path / "a.onnx")(x.numpy()).numpy()
    np.testing.assert_allclose(got, model(x).detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_batch_norms_of_pytorch_stay_layers(training, tmp_path):
    """Its exporter writes equal vectors once, and the others as Identity."""
    torch.manual_seed(0)
    layers = [
        torch.nn.Linear(4, 3),
        torch.nn.BatchNorm1d(3),
        torch.nn.ReLU(),
        torch.nn.Linear(3, 3),
        torch.nn.BatchNorm1d(3),
    ]
    model, x = torch.nn.Sequential(*layers), torch.randn(6, 4)
    mode = torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.PRESERVE
    model.train(training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), str(tmp_path / "a.onnx"), dynamo=False, training=mode, do_constant_folding=False)
    graph = load(tmp_path / "a.onnx")  # in the mode that the file asks for
    norms = [m for m in graph.modules() if isinstance(m, nn.BatchNorm1d.__bases__[0])]
    assert len(norms) == 2
    assert not any("running" in name for name, _ in graph.named_parameters())
    for mode in (None, True, False):
        ours, theirs = copy.deepcopy(graph), copy.deepcopy(model)
        if mode is not None:
            ours.train(mode)
            theirs.train(mode)
        np.testing.assert_allclose(ours(x.numpy()).numpy(), theirs(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_gradients_of_a_graph_as_a_function(exported):
    _, shape, _, back = exported["mlp"]
    x, state = np.ones((3, *shape), np.float32), dict(back.named_parameters())
    slopes = grad(lambda s: functional_call(back, s, x)[:, 0].sum())(state)
    back.zero_grad()
    back(x)[:, 0].sum().backward()
    for name, p in state.items():
        np.testing.assert_allclose(slopes[name].numpy(), p.grad.numpy(), rtol=1e-6, err_msg=name)
    back.zero_grad()


@pytest.mark.parametrize(
    ("operator", "attributes", "opset"),
    [
        ("Softmax", {"axis": 1}, 11),
        ("Softmax", {}, 11),
        ("LogSoftmax", {"axis": 1}, 12),
        ("Softmax", {"axis": 1}, 13),
        ("Clip", {"min": -0.5, "max": 0.5}, 10),
        ("Squeeze", {}, 12),
        ("Unsqueeze", {"axes": [1]}, 12),
        ("ReduceSum", {"axes": [1], "keepdims": 0}, 12),
        ("Slice", {"starts": [1], "ends": [9], "axes": [2]}, 9),
        ("Pad", {"pads": [0, 1, 0, 0, 0, 2], "value": 1.5}, 10),
        ("Dropout", {"ratio": 0.5}, 11),
        ("Flatten", {"axis": 2}, 9),
    ],
)
def test_older_forms(operator, attributes, opset, tmp_path):
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    proto = model_of([NODE(operator, ["x"], ["y"], **attributes)], opset=opset)
    proto.ir_version = 8
    (tmp_path / "a.onnx").write_bytes(proto.SerializeToString())
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", providers=["CPUExecutionProvider"])
    (want,) = session.run(None, {"x": x})
    np.testing.assert_allclose(load(tmp_path / "a.onnx")(x).numpy(), want, rtol=1e-6)


# ---- what is not written, or not read ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Scaled(), "the op div follows the batch; use dynamic_batch=False"),
        (Numbered(), "something else for another size of the batch"),
        (Branching(), "the model reads the values of a tensor"),
        (Indexed(), "an index or another array of the model comes from its input"),
        (nn.AdaptiveMaxPool1d(1), "reads values that come from its input"),
        (F.relu, "export takes a module; got a function"),
        (nn.Sequential(), "does not come from its input"),
    ],
)
def test_models_that_are_not_written(model, message, tmp_path):
    (tmp_path / "a.onnx").write_bytes(b"before")
    x = np.ones((2, 3, 4) if isinstance(model, nn.AdaptiveMaxPool1d) else (2, 3), np.float32)
    with pytest.raises((OnnxError, TypeError), match=message):
        export(model, x, tmp_path / "a.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == b"before"
    assert len(list(tmp_path.iterdir())) == 1


def model_of(nodes, arrays=(), inputs=("x",), outputs=("y",), opset=18):
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names] for names in (inputs, outputs)
    ]
    graph = helper.make_graph(nodes, "g", *values, list(arrays))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def outside():
    tensor = TensorProto(name="w", data_type=1, dims=[2], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../etc/passwd")
    return tensor


NODE = helper.make_node
BAD = {
    "no model": (b"\x89PNG", "is no ONNX model, or it is damaged"),
    "empty": (b"", "it uses none of the standard operators"),
    "unknown operator": (model_of([NODE("Einsum", ["x"], ["y"])]), "the operator 'Einsum' is not computed"),
    "unknown attribute": (model_of([NODE("Relu", ["x"], ["y"], slope=1.0)]), "the attribute 'slope' of Relu"),
    "missing attribute": (model_of([NODE("Concat", ["x", "x"], ["y"])]), "the attribute 'axis' of Concat is missing"),
    "missing input": (model_of([NODE("Add", ["x"], ["y"])]), "Add takes 2 inputs; the node has 1"),
    "order": (model_of([NODE("Relu", ["z"], ["y"]), NODE("Relu", ["x"], ["z"])]), "'z', which nothing before it makes"),
    "no output": (model_of([NODE("Relu", ["x"], ["z"])]), "nothing makes its output 'y'"),
    "twice": (model_of([NODE("Relu", ["x"], ["y"]), NODE("Relu", ["x"], ["y"])]), "'y', which is there already"),
    "outside": (model_of([NODE("Add", ["x", "w"], ["y"])], [outside()]), "'w' lies in another file"),
    "short": (
        model_of([NODE("Add", ["x", "w"], ["y"])], [TensorProto(name="w", data_type=1, dims=[9**9], raw_data=b"abcd")]),
        "has 4 bytes of float32",
    ),
    "input and attribute": (
        model_of([NODE("Add", ["x", "x"], ["y"], b=1.0)]),
        "Add has 'b' as an attribute and as an input",
    ),
    "two outputs": (model_of([NODE("Relu", ["x"], ["y", "z"])]), "Relu has a first output, and here no others"),
    "no input": (model_of([NODE("Add", ["x", ""], ["y"])]), "Add takes 2 inputs"),
    "too many inputs": (model_of([NODE("Relu", ["x", "x"], ["y"])]), "Relu takes 1 inputs; the node has 2"),
    "no value": (model_of([NODE("Constant", [], ["y"])]), "Constant has one attribute"),
    "attribute twice": (
        model_of(
            [
                onnx.NodeProto(
                    op_type="Elu",
                    input=["x"],
                    output=["y"],
                    attribute=[helper.make_attribute("alpha", 1.0), helper.make_attribute("alpha", 2.0)],
                )
            ]
        ),
        "stands twice",
    ),
    "initializer twice": (
        model_of([NODE("Add", ["x", "w"], ["y"])], [onnx.numpy_helper.from_array(np.ones(2, "f4"), "w")] * 2),
        "stands twice",
    ),
    "another domain": (model_of([NODE("Relu", ["x"], ["y"], domain="com.example")]), "of the domain 'com.example'"),
    "booleans": (
        model_of([NODE("Not", ["w"], ["y"])], [TensorProto(name="w", data_type=9, dims=[2], raw_data=b"\1\2")]),
        "neither 0 nor 1",
    ),
    "a graph inside": (
        model_of([NODE("If", ["x"], ["y"], then_branch=model_of([NODE("Relu", ["x"], ["y"])]).graph)]),
        "is a graph",
    ),
    "variances below 0": (
        model_of(
            [NODE("BatchNormalization", ["x", "g", "b", "m", "v"], ["y"])],
            [onnx.numpy_helper.from_array(np.full(2, -1, "f4"), name) for name in "gbmv"],
        ),
        "running_var is negative",
    ),
    "old": (model_of([NODE("Relu", ["x"], ["y"])], opset=3), "it uses version 3 of the standard operators"),
}


def test_numbers_of_other_widths(tmp_path):
    """bfloat16, and integers that the file keeps in wider fields."""
    bits = np.array([1.5, -2.0], np.float32).view(np.uint32) >> 16
    tensors = [
        TensorProto(name="a", data_type=16, dims=[2], raw_data=bits.astype("<u2").tobytes()),
        TensorProto(name="b", data_type=12, dims=[2], uint64_data=[3, 2**32 - 1]),
        TensorProto(
            name="c", data_type=10, dims=[2], int32_data=np.array([0.5, -4], np.float16).view(np.uint16).tolist()
        ),
    ]
    arrays = {t.name: array_of_proto(t) for t in tensors}
    assert arrays["a"].tolist() == [1.5, -2]
    assert (arrays["b"].dtype, arrays["b"].tolist()) == (np.uint32, [3, 2**32 - 1])
    assert (arrays["c"].dtype, arrays["c"].tolist()) == (np.float16, [0.5, -4])


@pytest.mark.parametrize("name", BAD)
def test_files_that_are_not_read(name, tmp_path):
    content, message = BAD[name]
    path = tmp_path / "a.onnx"
    path.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
    with pytest.raises(OnnxError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("operator", "attributes", "inputs"),
    [
        ("Gather", {"axis": 99}, ["x", "i"]), ("Flatten", {"axis": 99}, ["x"]), ("Softmax", {"axis": 99}, ["x"]),
        ("Squeeze", {}, ["x", "far"]), ("Unsqueeze", {}, ["x", "far"]), ("Split", {}, ["x", "i"]),
        ("Range", {}, ["zero", "zero", "zero"]), ("ReduceSum", {}, ["x", "far"]),
    ],
)  # fmt: skip
def test_axes_and_sizes_that_make_no_sense(operator, attributes, inputs, tmp_path):
    arrays = {"i": np.array([0, 1]), "far": np.array([9]), "zero": np.array(0)}
    tensors = [onnx.numpy_helper.from_array(a, name) for name, a in arrays.items()]
    opset = 11 if operator == "Softmax" else 18
    proto = model_of([NODE(operator, inputs, ["y"], **attributes)], tensors, opset=opset)
    (tmp_path / "a.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises((OnnxError, ValueError)):
        load(tmp_path / "a.onnx")(np.ones((2, 3), np.float32))


@pytest.mark.parametrize("name", ["forward", "training", "_nodes", "inputs", "__class__", "block/weight", "0.weight"])
def test_initializers_of_any_name(name, tmp_path):
    """None of them replaces a method or an option of the module."""
    array = onnx.numpy_helper.from_array(np.array([1.0, 2.0], np.float32), name)
    content = model_of([NODE("Add", ["x", name], ["y"])], [array]).SerializeToString()
    (tmp_path / "a.onnx").write_bytes(content)
    graph = load(tmp_path / "a.onnx")
    assert graph(np.zeros((3, 2), np.float32)).numpy().tolist() == [[1, 2]] * 3
    (key,) = graph.state_dict()
    assert key.strip("w_") == name.replace("/", ".").strip("w_")
    graph.save(tmp_path / "a.safetensors")
    graph.load(tmp_path / "a.safetensors")


def test_errors_of_a_graph_name_the_node(tmp_path):
    (tmp_path / "a.onnx").write_bytes(model_of([NODE("MatMul", ["x", "x"], ["y"], name="product")]).SerializeToString())
    graph = load(tmp_path / "a.onnx")
    with pytest.raises(ValueError, match="matmul") as caught:
        graph(np.ones((2, 3)))
    assert "in the node MatMul 'product' of an ONNX graph" in caught.value.__notes__
    with pytest.raises(ValueError, match="takes 1 inputs, 'x'; got 2"):
        graph(np.ones(2), np.ones(2))
    with pytest.raises(OSError, match=r"b\.onnx"):
        load(tmp_path / "b.onnx")


@given(files=TARGETS["onnx"].files)
def test_damaged_files(tmp_path_factory, files):
    check(TARGETS["onnx"], files, tmp_path_factory.mktemp("fuzz"))
