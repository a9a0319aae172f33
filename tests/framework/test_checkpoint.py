"""Checkpoint files: what is saved comes back with the same bits, and a damaged file changes nothing."""

import errno
import os

import numpy as np
import pytest

from tinygrad_bn import nn, optim
from tinygrad_bn.checkpoint import CheckpointError, Folder, files, load, read, save

X = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)


def training(kind=optim.Adam, seed=1):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5, np.random.default_rng(seed)))
    optimizer = kind(model.parameters(), lr=0.1)
    return model, optimizer, optim.WarmupLR(optimizer, 2, optim.StepLR(optimizer, 2))


def steps(model, optimizer, schedule):
    for _ in range(3):
        optimizer.zero_grad()
        (model(X) ** 2).sum().backward()
        optimizer.step()
        schedule.step()
    return model.state_dict()


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop, optim.Adagrad])
def test_training_goes_on_with_the_same_bits(tmp_path, kind):
    own = training(kind)
    steps(*own)
    path = save(tmp_path / "a.safetensors", own[0], optimizer=own[1], schedule=own[2])
    other = training(kind, seed=2)
    load(path, other[0], optimizer=other[1], schedule=other[2])
    expected, got = steps(*own), steps(*other)
    assert all(expected[k].tobytes() == got[k].tobytes() for k in expected)


def test_extra_comes_back_the_same(tmp_path):
    extra = {"inf": -np.inf, "long": 10**5000, 3: (1, [2.5, None]), "$int": "0x1", "array": np.arange(3)}
    path = save(tmp_path / "a.safetensors", nn.Linear(1, 1), extra={**extra, "nan": np.nan}, arrays={"z": np.ones(2)})
    got = read(path).extra
    assert np.isnan(got.pop("nan"))
    assert got.pop("array").tolist() == extra.pop("array").tolist()
    assert got == extra
    assert "extra: " in str(read(path))


def test_every_truncation_and_every_flipped_bit_is_found(tmp_path):
    path = save(tmp_path / "a.safetensors", nn.BatchNorm1d(1))
    whole, damaged = path.read_bytes(), tmp_path / "b.safetensors"
    same = read(path)
    for length in range(len(whole)):
        damaged.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            read(damaged)
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        damaged.write_bytes(data)
        try:
            got = read(damaged)
        except CheckpointError:
            continue
        assert {k: v.tobytes() for k, v in got.model.items()} == {k: v.tobytes() for k, v in same.model.items()}
        assert (got.generators, got.metadata) == (same.generators, same.metadata)


def test_a_failed_load_changes_nothing(tmp_path):
    own, other = training(), training(optim.SGD)
    path = save(tmp_path / "a.safetensors", own[0], optimizer=own[1])
    before = {k: v.copy() for k, v in other[0].state_dict().items()}
    with pytest.raises(CheckpointError, match="optimizer is Adam"):
        load(path, other[0], optimizer=other[1])
    own[1].param_groups[0]["params"].pop()  # fails after the model was loaded
    with pytest.raises(CheckpointError, match="nothing was loaded"):
        load(path, other[0], optimizer=optim.Adam(list(other[0].parameters())[:1]))
    assert all(before[k].tobytes() == v.tobytes() for k, v in other[0].state_dict().items())


def test_a_different_eps_is_named(tmp_path):
    nn.BatchNorm1d(2, eps=1e-3).save(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"eps is 0\.001 in the file, 1e-05 in the model"):
        nn.BatchNorm1d(2).load(tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=r"eps is 0\.001"):
        nn.BatchNorm1d(2).load(tmp_path / "a.safetensors", strict=False)


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_an_error_while_writing_leaves_the_file_before(tmp_path, monkeypatch, call, number):
    path = save(tmp_path / "a.safetensors", nn.Linear(1, 1))
    before = path.read_bytes()

    def fail(*args):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(files.os, call, fail)
        with pytest.raises(OSError, match="not saved") as caught:
            save(path, nn.Linear(1, 1))
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_damaged_newest_generation_is_passed_over(tmp_path):
    model = nn.Linear(1, 1)
    with Folder(tmp_path, keep=2) as folder:
        for step in range(3):
            folder.save(step, model, extra=step)
        folder.newest().write_bytes(b"damaged")
        with pytest.warns(UserWarning, match="step-00000002"):
            assert folder.load_newest(model).extra == 1
