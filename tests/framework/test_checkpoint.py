"""Loading checkpoints: all that was saved is there again, or an error that says why, and nothing is changed."""

import math
import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import save as other_bytes

import tinygrad_bn
from tests.tools.interrupts import interrupted_at
from tinygrad_bn import __main__ as command
from tinygrad_bn import manual_seed, nn, optim, random
from tinygrad_bn.checkpoint import CheckpointError, apply, files, load, load_model, read, save

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


# ---- files that do not fit -------------------------------------------------------------------------------


def whole_state(model, optimizer, schedule, generators=()):
    """All that loading may change, as a text."""
    drawn = [rng.bit_generator.state for rng in (model[2].rng, random.generator(), *dict(generators).values())]
    arrays = {k: (v.dtype, v.shape, v.tobytes()) for k, v in model.state_dict().items()}
    return repr((arrays, optimizer.state_dict(), schedule.state_dict(), drawn))


def rewritten(path, change):
    """The file with its content changed, and the right hash for it."""
    arrays, metadata, _ = files._parse(path, path.read_bytes())
    content = files.json.loads(metadata[files.CONTENT])
    change(arrays, content)
    path.write_bytes(files.to_bytes(arrays, content))


def fill(name, value):
    return lambda arrays, content: arrays[name].fill(value)


def drop(*place):
    def change(arrays, content):
        *above, last = place
        for part in above:
            content = content[part]
        del content[last]

    return change


def rename(old, new):
    def change(arrays, content):
        arrays[new] = arrays.pop(old)
        content["keys"] = [new if k == old else k for k in content["keys"]]

    return change


UNFIT = {
    "negative variance": (fill("1.running_var", -1e-9), "nothing was loaded: 1.running_var is negative"),
    "infinitely negative variance": (fill("1.running_var", -math.inf), "1.running_var is negative"),
    "negative count": (fill("1.num_batches_tracked", -1), "1.num_batches_tracked is negative"),
    "unknown key": (rename("0.weight", "0.w"), r"missing keys: \['0.weight'\]; unexpected keys: \['0.w'\]"),
    "no part": (drop("schedule"), "wrong form: KeyError\\('schedule'"),
    "a part of a part": (drop("optimizer", "state"), "nothing was loaded: a state is what"),
    "a generator": (drop("generators", "batches"), "it has no state of the generator 'batches'; it has "),
    "a part of a generator": (
        drop("generators", "batches", "state"),
        "the state of the generator 'batches' does not fit",
    ),
    "a version": (drop("metadata", "package_version"), "wrong form: KeyError\\('package_version'"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_does_not_fit_changes_nothing(name, tmp_path):
    own, other = training(), training(seed=2)
    steps(*own)
    rng = {"batches": np.random.default_rng(0)}
    path = save(tmp_path / "a.safetensors", own[0], optimizer=own[1], schedule=own[2], generators=rng)
    change, words = UNFIT[name]
    rewritten(path, change)
    rng = {"batches": np.random.default_rng(1)}
    before = whole_state(*other, rng)
    with pytest.raises(CheckpointError, match=words) as caught:
        load(path, other[0], optimizer=other[1], schedule=other[2], generators=rng)
    assert str(path) in str(caught.value)
    assert whole_state(*other, rng) == before
    rewritten(path, lambda arrays, content: None)


@pytest.mark.parametrize(
    ("key", "values", "words"),
    [
        (
            "weight",
            np.ones((1, 2), np.float32),
            r"shapes differ, as of another model: weight: got \(1, 2\), expected \(2,\)",
        ),
        ("weight", np.full(2, 1e300), "float32"),
        ("num_batches_tracked", np.float32(1), "num_batches_tracked is float32, not int64"),
    ],
)
def test_shapes_and_dtypes_have_to_fit(key, values, words, tmp_path):
    model = nn.BatchNorm1d(2)
    before = {k: v.tobytes() for k, v in model.state_dict().items()}
    (tmp_path / "a.safetensors").write_bytes(other_bytes({**nn.BatchNorm1d(2).state_dict(), key: np.asarray(values)}))
    with pytest.raises(CheckpointError, match=f"nothing was loaded: .*{words}"):
        model.load(tmp_path / "a.safetensors")
    assert {k: v.tobytes() for k, v in model.state_dict().items()} == before


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_and_statistics_that_are_not_finite_load(value, tmp_path):
    """As those of a training that diverged, which is to be looked into."""
    own, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    own.load_state_dict({k: np.full(2, value) for k in ("weight", "bias", "running_mean", "running_var")}, strict=False)
    own.save(tmp_path / "a.safetensors")
    other.load(tmp_path / "a.safetensors")
    assert own.state_dict()["running_var"].tolist() != [1, 1]
    for key, a in own.state_dict().items():
        assert a.tobytes() == other.state_dict()[key].tobytes()


@pytest.mark.parametrize("version", ["2", "0", "", "1.0", "x" * 999])
def test_another_version_is_refused(version, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(files, "VERSION", version)
        path = save(tmp_path / "a.safetensors", nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match=f"it has format {version[:20]}, and this version reads 1; use the"):
        read(path)


def test_missing_and_unexpected_keys_without_strict(tmp_path):
    small, large = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    small.save(tmp_path / "a.safetensors")
    before = large.state_dict()["1.weight"].tobytes()
    for model in (large, nn.Sequential(nn.ReLU(), nn.Linear(2, 3))):
        with pytest.raises(CheckpointError, match="missing keys"):
            model.load(tmp_path / "a.safetensors")
    large.load(tmp_path / "a.safetensors", strict=False)
    assert large.state_dict()["0.weight"].tobytes() == small.state_dict()["0.weight"].tobytes()
    assert large.state_dict()["1.weight"].tobytes() == before


def test_a_missing_count_of_batches_is_noted(tmp_path):
    state = nn.BatchNorm1d(2).state_dict()
    del state["num_batches_tracked"]
    (tmp_path / "a.safetensors").write_bytes(other_bytes(state))
    model = nn.BatchNorm1d(2)
    model.load_state_dict({"num_batches_tracked": np.int64(7)}, strict=False)
    notes = load_model(tmp_path / "a.safetensors", model).notes
    assert notes == ("not in the file, and left as it was: num_batches_tracked",)
    assert model.num_batches_tracked.item() == 7


def test_a_shared_tensor_may_stand_once_in_a_file(tmp_path):
    model = nn.Sequential(layer := nn.Linear(2, 2), layer)
    (tmp_path / "a.safetensors").write_bytes(other_bytes({"0.weight": np.eye(2), "0.bias": np.ones(2)}))
    model.load(tmp_path / "a.safetensors")
    assert model[1].weight is model[0].weight
    np.testing.assert_array_equal(model[1].weight.data, np.eye(2))


def test_names_are_keys_and_no_paths(tmp_path):
    for name in ("../x", "/etc/passwd", "a/b"):
        (tmp_path / "a.safetensors").write_bytes(other_bytes({name: np.ones(2)}))
        with pytest.raises(CheckpointError, match=f"'{name}' is not a name of a parameter"):
            read(tmp_path / "a.safetensors")


def test_an_error_can_be_pickled_and_shows_control_characters(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(other_bytes({"\x1b[2J/" + "x" * 5000: np.ones(2)}))
    with pytest.raises(CheckpointError) as caught:
        read(tmp_path / "a.safetensors")
    text = str(caught.value)
    assert text.isprintable()
    assert str(pickle.loads(pickle.dumps(caught.value))) == text


@pytest.mark.parametrize("shape", [(), (0,), (1, 2)])
def test_bfloat16_becomes_float32(shape, tmp_path):
    body = bytes.fromhex("c03f80ff")[: 2 * math.prod(shape)]  # 1.5 and -inf
    header = b'{"a": {"dtype": "BF16", "shape": %a, "data_offsets": [0, %d]}}' % (list(shape), len(body))
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + body)
    contents = read(tmp_path / "a.safetensors")
    got = contents.model["a"]
    assert type(got) is np.ndarray
    assert (got.dtype, got.shape, got.ravel().tolist()) == (np.float32, shape, [1.5, -math.inf][: got.size])
    assert "note: bfloat16 became float32, exactly: a" in str(contents)


def test_an_error_about_many_keys_is_short(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(other_bytes({f"key{i}": np.ones(2) for i in range(999)}))
    with pytest.raises(CheckpointError, match=r"missing keys.* … .*'key998'") as caught:
        nn.Linear(1, 1).load(tmp_path / "a.safetensors")
    assert len(caught.value.problem) < 1000


@pytest.mark.parametrize(
    ("size", "extra", "times"), [(1000, None, 2.1), (1, [[[[]]]] * 50_000, 100), (1, [{"": {}}] * 50_000, 100)]
)
def test_memory_follows_the_size_of_the_file(size, extra, times, tmp_path):
    path = save(tmp_path / "a.safetensors", nn.Linear(size, size), extra=extra)
    read(path)  # imports
    tracemalloc.start()
    try:
        contents = read(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert contents.model["weight"].shape == (size, size)
    assert peak < times * path.stat().st_size


# ---- generators ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PCG64", "MT19937", "PCG64DXSM", "Philox", "SFC64"])
def test_each_kind_of_generator_goes_on_with_the_same_numbers(kind, tmp_path):
    def made(seed):
        return np.random.Generator(getattr(np.random, kind)(seed))

    def draw(rng):
        return rng.integers(0, 100, 3, dtype=np.uint32).tolist(), rng.normal(size=3).tolist()

    rng, other = made(1), made(2)
    draw(rng)  # an odd number of 32 bits, of which a part is kept
    path = save(tmp_path / "a.safetensors", nn.ReLU(), generators={"own": rng})
    load(path, nn.ReLU(), generators={"own": other})
    assert draw(other) == draw(rng)
    wrong_kind = "SFC64" if kind != "SFC64" else "Philox"
    wrong = np.random.Generator(getattr(np.random, wrong_kind)(0))
    before = repr(wrong.bit_generator.state)
    with pytest.raises(CheckpointError, match=f"the generator 'own' was a '{kind}', and is a {wrong_kind} here"):
        load(path, nn.ReLU(), generators={"own": wrong})
    assert repr(wrong.bit_generator.state) == before


def test_shared_generators_stay_shared(tmp_path):
    def made(seed, shared=True):
        first = np.random.default_rng(seed)
        second = first if shared else np.random.default_rng(seed)
        return nn.Sequential(nn.Dropout(0.5, first), nn.Dropout(0.5, second)), {"batches": first}

    own, generators = made(1)
    own(np.ones((2, 9), np.float32))
    path = save(tmp_path / "a.safetensors", own, generators=generators)
    other, generators = made(2)
    load(path, other, generators=generators)
    assert other[0].rng is other[1].rng is generators["batches"]
    x = np.ones((3, 9), np.float32)
    assert other(x).numpy().tolist() == own(x).numpy().tolist()
    apart, generators = made(3, shared=False)
    load(path, apart, generators=generators)  # two that were one: they draw the same
    assert apart[0].rng.normal() == apart[1].rng.normal()
    apart[1].rng.normal()
    path = save(tmp_path / "a.safetensors", apart)
    with pytest.raises(
        CheckpointError, match=r"'module:0.rng' and 'module:1.rng' are one generator here, but were two"
    ):
        load(path, other)


def test_the_default_generator_is_restored(tmp_path):
    manual_seed(3)
    path = save(tmp_path / "a.safetensors", nn.ReLU())
    expected = random.generator().normal()
    manual_seed(4)
    load(path, nn.ReLU())
    assert random.generator().normal() == expected


@pytest.mark.parametrize(
    ("generators", "error"),
    [({"default": np.random.default_rng()}, ValueError), ({"module:x": np.random.default_rng()}, ValueError),
     ({1: np.random.default_rng()}, TypeError), ({"a": 3}, TypeError), ({"a": np.random.PCG64()}, TypeError)],
)  # fmt: skip
def test_wrong_generators(generators, error, tmp_path):
    with pytest.raises(error, match="generator"):
        save(tmp_path / "a.safetensors", nn.ReLU(), generators=generators)
    path = save(tmp_path / "b.safetensors", nn.ReLU())
    with pytest.raises(error, match="generator"):
        load(path, nn.ReLU(), generators=generators)


# ---- interrupts ------------------------------------------------------------------------------------------


def test_ctrl_c_at_any_line_of_a_load_leaves_the_old_state_or_the_new_one(tmp_path):
    own, other = training(), training(seed=2)
    steps(*own)
    rng = {"batches": np.random.default_rng(0)}
    contents = read(save(tmp_path / "a", own[0], optimizer=own[1], schedule=own[2], generators=rng))
    for _ in range(2):  # so that the schedules differ too
        steps(*other)
    rng = {"batches": np.random.default_rng(1)}
    old = read(save(tmp_path / "b", other[0], optimizer=other[1], schedule=other[2], generators=rng))

    def load_contents(which):
        return apply(which, other[0], optimizer=other[1], schedule=other[2], generators=rng)

    paths = tuple(module.__path__[0] for module in (tinygrad_bn.checkpoint, nn, optim))
    before = whole_state(*other, rng)
    _, lines = interrupted_at(0, lambda: load_contents(contents), paths)
    after = whole_state(*other, rng)
    assert lines > 300
    seen = []
    for moment in range(1, lines + 1):
        load_contents(old)
        assert whole_state(*other, rng) == before
        result, _ = interrupted_at(moment, lambda: load_contents(contents), paths)
        assert result is None
        seen.append(now := whole_state(*other, rng))
        assert now in (before, after), moment
    assert (seen[0], seen[-1]) == (before, after)


# ---- the short ways --------------------------------------------------------------------------------------


def test_module_save_and_load(tmp_path):
    own, other = (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)) for _ in range(2))
    own(np.random.default_rng(0).normal(size=(4, 2)).astype(np.float32))
    own.save(str(tmp_path / "a.safetensors"))
    assert other.load(tmp_path / "a.safetensors") is None
    assert all(
        a.tobytes() == b.tobytes() for a, b in zip(*(m.state_dict().values() for m in (own, other)), strict=True)
    )
    contents = read(tmp_path / "a.safetensors")
    assert (contents.optimizer, contents.schedule, contents.generators, contents.extra) == (None, None, {}, None)
    with pytest.raises(CheckpointError, match="it has no state of the optimizer; load it without"):
        load(tmp_path / "a.safetensors", other, optimizer=optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(FileNotFoundError):
        other.load(tmp_path / "no.safetensors")
    with pytest.raises(IsADirectoryError):
        other.load(tmp_path)


def test_the_command_prints_a_summary(tmp_path, capsys, monkeypatch):
    model, optimizer, schedule = training()
    path = save(
        tmp_path / "a.safetensors", model, optimizer=optimizer, schedule=schedule, extra={"note": 7}, arrays={"z": X},
        generators={"batches": np.random.default_rng(0)},
    )  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["tinygrad_bn", "checkpoint", str(path)])
    command.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        str(path),
        "  model: 22 numbers in 7 arrays",
        "    0.weight: float32 (3, 2)",
        "    0.bias: float32 (3,)",
        "    1.weight: float32 (3,)",
        "    1.bias: float32 (3,)",
        "    1.running_mean: float32 (3,)",
        "    1.running_var: float32 (3,)",
        "    1.num_batches_tracked: int64 ()",
        "  optimizer: Adam",
        "  schedule: WarmupLR",
        "  generators: batches, module:2.rng, default",
        "  arrays: z",
        "  extra: {'note': 7}",
        "  1: eps=1e-05, momentum=0.1, running_var_correction=1",
        f"  format 1, by tinygrad_bn {tinygrad_bn.__version__}",
    ]


def test_the_command_says_what_is_wrong_with_a_file(tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no")
    missing = tmp_path / "no"
    for path, words in ((bad, "it has no header, of 2 in the file"), (missing, f"cannot read {missing}: No such file")):
        call = [sys.executable, "-m", "tinygrad_bn", "checkpoint", str(path)]
        done = subprocess.run(call, capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)})
        assert (done.returncode, done.stdout) == (1, "")
        assert words in done.stderr
        assert str(path) in done.stderr
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("start", [b"PK\3\4", b"\x80\2"])
def test_files_of_torch_save_are_refused(start, tmp_path):
    (tmp_path / "model.pt").write_bytes(start + bytes(100))
    with pytest.raises(CheckpointError, match=r"torch\.save, which may run any program.*convert it where torch is"):
        nn.Linear(1, 1).load(tmp_path / "model.pt")
