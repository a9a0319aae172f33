"""The demos: what they print, what they write, and how they end when asked for what cannot be."""

import csv
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from demos import bn_backward, deep_mlp, new_op, normalize_numbers
from demos.__main__ import main
from tinygrad_bn import datasets, functional, nn, optim, train

ROOT = Path(deep_mlp.__file__).parents[1]
MODELS = ("without BatchNorm", "with BatchNorm")


def demos(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "demos", *arguments], cwd=ROOT, capture_output=True, text=True)


def numbers(history: train.History) -> list[tuple[float, ...]]:
    return [(e.epoch, e.loss, e.accuracy, e.val_loss, e.val_accuracy) for e in history.epochs]


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """Three classes of bright images, 40 to train on and 20 to test on."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "my_digits"
    folder.mkdir()
    for prefix, n in (("train", 40), ("t10k", 20)):
        labels = rng.integers(0, 3, n).astype(np.uint8)
        images = (rng.integers(0, 50, (n, 28, 28)) + 60 * labels[:, None, None]).astype(np.uint8)
        for name, array in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return folder


def test_the_list_has_every_demo_with_its_first_line():
    done = demos()
    assert (done.returncode, done.stderr) == (0, "")
    for module in (bn_backward, deep_mlp, new_op, normalize_numbers):
        assert re.search(rf"^  {module.__name__[6:]} +{re.escape(module.__doc__.splitlines()[0])}$", done.stdout, re.M)
    files = {path.stem for path in (ROOT / "demos").glob("*.py")} - {"__init__", "__main__", "common"}
    assert set(re.findall(r"^  (\w+)", done.stdout, re.M)) == files


def test_a_demo_that_is_not_there():
    done = demos("nope")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("there is no demo 'nope'; there are bn_backward, deep_mlp")


@pytest.mark.parametrize("name", ["bn_backward", "deep_mlp", "new_op", "normalize_numbers"])
def test_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert f"python -m demos {name}" in printed
    assert "--seed" in printed


def test_normalize_numbers_prints_the_values_of_the_article(capsys):
    assert main(["normalize_numbers"]) == 0
    printed = capsys.readouterr().out
    assert "[-1.64750894 -1.47408695 -1.30066495" in printed
    assert float(re.search(r"largest difference : (\S+)", printed)[1]) < 1e-12
    assert float(re.search(r"largest difference from X : (\S+),", printed)[1]) < 1e-4


def test_bn_backward(capsys):
    main(["bn_backward", "--seed", "3"])
    printed = capsys.readouterr().out
    steps = functional.Normalization._fields
    assert steps == ("mu", "xmu", "sq", "var", "sqrtvar", "ivar", "xhat", "gammax", "out")
    for step in steps:
        block = re.search(rf"^{step} = .*∂{step} = .*\n  value .*(\n .*)*\n  gradient ", printed, re.M)
        assert block, f"{step} is not explained"
    shown = {}
    for label in ("sum", "autograd", "closed"):
        text = re.search(rf"^  {label} +(\[\[[^\]]*\](?:\s*\[[^\]]*\])*\])", printed, re.M)[1]
        shown[label] = np.array(re.findall(r"[-\d.]+", text), float).reshape(5, 2)
    np.testing.assert_array_equal(shown["sum"], shown["autograd"])
    np.testing.assert_array_equal(shown["closed"], shown["autograd"])
    assert np.abs(shown["autograd"]).max() > 0.01
    assert float(re.search(r"largest difference: (\S+)", printed)[1]) < 1e-12
    rng = np.random.default_rng(3)  # the same gradient, by differences of the loss
    x, weight, _g = rng.normal(3.0, 2.0, (5, 2)), np.array([1.5, -0.5]), rng.normal(size=(5, 2))
    for i, j in ((0, 0), (4, 1)):
        h = np.zeros((5, 2))
        h[i, j] = 1e-5
        up, down = (weight * (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5) for z in (x + h, x - h))
        assert shown["autograd"][i, j] == pytest.approx(((up - down) * _g).sum() / 2e-5, abs=6e-5)


def test_new_op_learns(capsys):
    history = new_op.main(["--quiet"])
    printed = capsys.readouterr().out
    assert history["val_accuracy"][-1] > 0.8
    assert "every property of the test-suite: ok" in printed
    assert f"{history['val_accuracy'][-1]:.3f}" in printed


def test_deep_mlp_writes_what_it_returns(tmp_path, capsys):
    histories = deep_mlp.main(["--epochs", "2", "--quiet", "--seed", "5", "--out", str(tmp_path / "a")])
    printed = capsys.readouterr()
    assert (len(printed.out.splitlines()), printed.err) == (2, "")
    assert tuple(histories) == MODELS
    saved = json.loads((tmp_path / "a" / "history.json").read_text())
    assert (saved["settings"]["epochs"], saved["settings"]["seed"]) == (2, 5)
    for name, history in histories.items():
        assert history["epoch"] == [1, 2]
        assert saved["models"][name] == {"seconds": history.seconds, "interrupted": False, "epochs": history.rows()}
        with (tmp_path / "a" / f"{name.replace(' ', '_')}.csv").open(newline="") as file:
            assert [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)] == history.rows()
        assert f"{name:17} accuracy {history['val_accuracy'][-1]:.3f}" in printed.out
    picture = (tmp_path / "a" / "history.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 20_000

    arguments = ["--epochs", "1", "--seed", "5", "--no-plot", "--out", str(tmp_path / "b")]
    again = deep_mlp.main(arguments)
    for name in MODELS:
        assert numbers(again[name]) == numbers(histories[name])[:1], "same seed, same numbers"
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "history.json", "with_BatchNorm.csv", "without_BatchNorm.csv",
    ]  # fmt: skip
    assert f"{histories[MODELS[1]]['loss'][0]:.4f}" in capsys.readouterr().out, "not quiet: the table"


def test_both_models_start_alike():
    plain, normed = deep_mlp.build(False, 3), deep_mlp.build(True, 3)
    linears = [[m for m in model.modules() if isinstance(m, nn.Linear)] for model in (plain, normed)]
    assert [m.weight.shape[::-1] for m in linears[0]] == list(zip(deep_mlp.SIZES, deep_mlp.SIZES[1:], strict=False))
    for a, b in zip(*linears, strict=True):
        assert a.weight.numpy().tobytes() == b.weight.numpy().tobytes()
        assert a.bias.numpy().tobytes() == b.bias.numpy().tobytes()
    kinds = [type(m).__name__ for m in normed.modules()][2:]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU"] * 6 + ["Linear"]
    other = deep_mlp.build(False, 4).state_dict()["1.weight"]
    assert not np.array_equal(other, plain.state_dict()["1.weight"])


def test_a_folder_of_ones_own_and_the_same_batches_for_both(idx_folder, tmp_path, monkeypatch, capsys):
    seen: list[list[bytes]] = []

    class Recorded(datasets.Batches):
        def __iter__(self):
            for x, y in super().__iter__():
                if self.shuffle:  # not the evaluations
                    seen[-1].append(x.tobytes() + y.tobytes())
                yield x, y

    def fit(*args, **options):
        seen.append([])
        return train_fit(*args, **options)

    train_fit = train.fit
    monkeypatch.setattr(train, "Batches", Recorded)
    monkeypatch.setattr(train, "fit", fit)
    options = ["--epochs", "3", "--batch-size", "10", "--optimizer", "sgd", "--lr", "0.1", "--no-plot", "--quiet"]
    histories = deep_mlp.main([*options, "--seed", "1", "--data", str(idx_folder), "--out", str(tmp_path / "out")])
    assert len(seen[0]) == 12
    assert len(set(seen[0])) == 12
    assert seen[0] == seen[1]
    assert histories["with BatchNorm"]["accuracy"][-1] > 0.5
    settings = json.loads((tmp_path / "out" / "history.json").read_text())["settings"]
    assert (settings["data"], settings["lr"]) == (str(idx_folder), 0.1)
    assert optim.SGD is deep_mlp.OPTIMIZERS["sgd"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "argument --epochs: has to be at least 1; got 0"),
        (["--batch-size", "-3"], "argument --batch-size: has to be at least 1; got -3"),
        (["--epochs", "many"], "argument --epochs"),
        (["--optimizer", "newton"], "argument --optimizer: invalid choice: 'newton'"),
        (["--data", "no/such/folder"], "train-images-idx3-ubyte in no/such/folder"),
        (["--seed", "-1"], "argument --seed: has to be at least 0"),
        (["--lr", "-1"], "argument --lr: has to be greater than 0"),
        (["--batch-size", "3999"], "leave a batch of one for BatchNorm"),
        (["--out", "/dev/null/x"], "cannot write to /dev/null/x"),
    ],
)
def test_what_cannot_be(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        deep_mlp.main(options)
    assert end.value.code not in (0, None)
    assert message in capsys.readouterr().err + str(end.value.code)  # a text as code goes to stderr, with status 1
    assert not list(tmp_path.iterdir()), "nothing is left behind"
