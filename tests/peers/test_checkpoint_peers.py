"""Files of weights that PyTorch and this package exchange."""

import numpy as np
import pytest

from tests.peers.compare import torch
from tinygrad_bn import nn
from tinygrad_bn.checkpoint import CheckpointError, load_model, read

peers = pytest.importorskip("safetensors.torch")
T = torch.nn
ADVICE = (
    r"torch\.save, which may run any program.*safetensors\.torch\.save_file\(torch\.load\(FILE, weights_only=True\)"
)


def network(m):
    """The same layers of `nn` or `torch.nn`."""
    return m.Sequential(m.Conv2d(2, 4, 3), m.BatchNorm2d(4), m.ReLU(), m.Flatten(), m.Linear(16, 3), m.LayerNorm(3))


def trained():
    """A network of PyTorch with running statistics."""
    model = network(T)
    model(torch.randn(5, 2, 4, 4))
    return model.eval()


X = np.random.default_rng(0).normal(size=(3, 2, 4, 4)).astype(np.float32)


def test_our_file_in_torch(tmp_path):
    ours, theirs = network(nn), network(T)
    ours(X)
    ours.save(tmp_path / "a.safetensors")
    state = peers.load_file(tmp_path / "a.safetensors")
    theirs.load_state_dict(state, strict=True)
    for key, want in ours.state_dict().items():
        got = state[key].numpy()
        assert (got.dtype, got.shape, got.tobytes()) == (want.dtype, want.shape, want.tobytes())
    want = ours.eval()(X).numpy()
    np.testing.assert_allclose(theirs.eval()(torch.tensor(X)).detach().numpy(), want, rtol=1e-4, atol=1e-5)


def test_torchs_file_here(tmp_path):
    theirs, ours = trained(), network(nn)
    peers.save_file(theirs.state_dict(), tmp_path / "a.safetensors")
    contents = load_model(tmp_path / "a.safetensors", ours)
    assert contents.model.keys() == theirs.state_dict().keys()
    assert (contents.notes, contents.metadata) == ((), {})
    for key, want in theirs.state_dict().items():
        assert ours.state_dict()[key].tobytes() == want.numpy().tobytes()
    want = theirs(torch.tensor(X)).detach().numpy()
    np.testing.assert_allclose(ours.eval()(X).numpy(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_of_torch(dtype, tmp_path):
    theirs, ours = trained().to(dtype), network(nn)
    peers.save_model(theirs, str(tmp_path / "a.safetensors"), metadata={"format": "pt"})
    notes = load_model(tmp_path / "a.safetensors", ours).notes
    assert [note.partition(",")[0] for note in notes] == ["bfloat16 became float32"] * (dtype == torch.bfloat16)
    for key, want in theirs.state_dict().items():
        assert (
            ours.state_dict()[key].tobytes() == (want.float() if want.is_floating_point() else want).numpy().tobytes()
        )


def test_every_bfloat16_and_half_number(tmp_path):
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    found = {"b": bits.view(torch.bfloat16), "h": bits.clone().view(torch.float16)}
    peers.save_file(found, tmp_path / "a.safetensors")
    got = read(tmp_path / "a.safetensors").model
    assert (got["b"].dtype, got["h"].dtype) == (np.float32, np.float16)
    assert (got["b"].view(np.uint32) == bits.numpy().astype(np.uint32) << 16).all()
    finite = ~np.isnan(got["b"])
    np.testing.assert_array_equal(got["b"][finite], found["b"].float().numpy()[finite])
    assert got["h"].tobytes() == bits.numpy().tobytes()


def test_batch_norm_of_an_old_torch_has_no_count_of_batches(tmp_path):
    state = trained().state_dict()
    del state["1.num_batches_tracked"]
    peers.save_file(state, tmp_path / "a.safetensors")
    ours = network(nn)
    contents = load_model(tmp_path / "a.safetensors", ours)
    assert contents.notes == ("not in the file, and left as it was: 1.num_batches_tracked",)
    assert ours.state_dict()["1.running_var"].tobytes() == state["1.running_var"].numpy().tobytes()


def test_a_shared_weight_which_torch_writes_once(tmp_path):
    layer = T.Linear(3, 3)
    peers.save_model(T.Sequential(layer, layer), str(tmp_path / "a.safetensors"))
    ours = nn.Sequential(own := nn.Linear(3, 3), own)
    ours.load(tmp_path / "a.safetensors")
    assert own.state_dict()["weight"].tobytes() == layer.weight.detach().numpy().tobytes()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64])
def test_dtypes_that_do_not_exist_here(dtype, tmp_path):
    peers.save_file({"weight": torch.ones(2, 3).to(dtype)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"'weight' has the dtype .*; convert it to float32 before"):
        nn.Linear(3, 2).load(tmp_path / "a.safetensors")


@pytest.mark.parametrize("old", [False, True])
def test_files_of_torch_save_are_refused(old, tmp_path):
    for what in (trained().state_dict(), trained(), [1]):
        torch.save(what, tmp_path / "a.pt", _use_new_zipfile_serialization=not old)
        with pytest.raises(CheckpointError, match=ADVICE):
            network(nn).load(tmp_path / "a.pt")


def test_the_advice_for_files_of_torch_save_works(tmp_path):
    theirs, ours = trained(), network(nn)
    torch.save(theirs.state_dict(), tmp_path / "a.pt")
    peers.save_file(torch.load(tmp_path / "a.pt", weights_only=True), tmp_path / "model.safetensors")
    ours.load(tmp_path / "model.safetensors")
    assert ours.state_dict()["0.weight"].tobytes() == theirs.state_dict()["0.weight"].numpy().tobytes()
