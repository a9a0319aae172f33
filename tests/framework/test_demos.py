"""The demos: their output, their files, and their errors for wrong arguments."""

import csv
import gzip
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from demos import common, deep_mlp, gallery, mnist_cnn, mnist_mlp, new_op
from demos.__main__ import main, names
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
    for name in names():
        doc = importlib.import_module(f"demos.{name}").__doc__
        assert re.search(rf"^  {name} +{re.escape(doc.splitlines()[0])}$", done.stdout, re.M)
    files = {path.stem for path in (ROOT / "demos").glob("*.py")} - {"__init__", "__main__", "common", "gallery"}
    assert set(re.findall(r"^  (\w+)", done.stdout, re.M)) == files | {"all"}


def test_a_demo_that_is_not_there():
    done = demos("nope")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("no demo 'nope'; the demos are batch_size, bn_backward, deep_mlp")


@pytest.mark.parametrize("name", names())
def test_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert f"python -m demos {name}" in printed
    for option in ("--seed", "--out", "--no-plot", "--quiet", "--check"):
        assert option in printed


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


def test_new_op_learns(tmp_path, capsys):
    run = new_op.main(["--quiet", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    accuracy = run.histories["squareplus"]["val_accuracy"][-1]
    assert accuracy > 0.8
    assert "every property of the test-suite: ok" in printed
    assert f"{accuracy:.3f}" in printed


def test_deep_mlp_writes_what_it_returns(tmp_path, capsys):
    run = deep_mlp.main(["--epochs", "2", "--quiet", "--seed", "5", "--out", str(tmp_path / "a")])
    printed = capsys.readouterr()
    assert (len(printed.out.splitlines()), printed.err) == (2, "")
    assert tuple(run.histories) == MODELS
    saved = json.loads((tmp_path / "a" / "results.json").read_text())
    assert (saved["settings"]["epochs"], saved["settings"]["seed"]) == (2, 5)
    assert saved["figures"] == ["history.png"]
    assert saved["claims"] == run.claims
    for name, history in run.histories.items():
        assert history["epoch"] == [1, 2]
        assert saved["results"][name] == {"interrupted": False, "epochs": history.rows()}
        with (tmp_path / "a" / f"{name.replace(' ', '_')}.csv").open(newline="") as file:
            assert [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)] == history.rows()
        assert f"{name:17} accuracy {history['val_accuracy'][-1]:.3f}" in printed.out
    picture = (tmp_path / "a" / "history.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 20_000

    arguments = ["--epochs", "1", "--seed", "5", "--no-plot", "--out", str(tmp_path / "b")]
    again = deep_mlp.main(arguments)
    for name in MODELS:
        assert numbers(again.histories[name]) == numbers(run.histories[name])[:1], "same seed, same numbers"
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "results.json", "with_BatchNorm.csv", "without_BatchNorm.csv",
    ]  # fmt: skip
    assert f"{run.histories[MODELS[1]]['loss'][0]:.4f}" in capsys.readouterr().out, "not quiet: the table"


def test_ctrl_c_keeps_the_epochs_so_far(tmp_path, monkeypatch, capsys):
    def interrupt(optimizer):
        if (steps := optimizer.__dict__.setdefault("steps", 0)) == 12:  # of 8 in an epoch
            raise KeyboardInterrupt
        optimizer.steps = steps + 1
        step(optimizer)

    step = optim.Adam.step
    monkeypatch.setattr(optim.Adam, "step", interrupt)
    run = deep_mlp.main(["--epochs", "3", "--quiet", "--no-plot", "--out", str(tmp_path)])
    assert [len(history) for history in run.histories.values()] == [1]
    assert (tmp_path / "without_BatchNorm.csv").exists()
    assert json.loads((tmp_path / "results.json").read_text())["results"]["without BatchNorm"]["interrupted"]
    assert main(["new_op", "--quiet", "--out", str(tmp_path / "b")]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_check_sets_the_options_left_out_and_fails_with_a_claim(tmp_path):
    def run(*arguments: str) -> common.Run:
        return common.Run(
            "none", "Title\n\nText.", [*arguments, "--out", str(tmp_path)], epochs=9, lr=0.1, check={"epochs": 2}
        )

    assert (run().args.epochs, run("--check").args.epochs, run("--check", "--epochs", "5").args.epochs) == (9, 2, 5)
    for arguments, holds, code in (([], False, 0), (["--check"], True, 0), (["--check"], False, 1)):
        one = run("--quiet", *arguments)
        one.claim("it does", True)
        one.claim("so does this", holds)
        assert one.finish(found=1).code == code
        saved = json.loads((tmp_path / "results.json").read_text())
        assert saved["claims"] == {"it does": True, "so does this": holds}
        assert (saved["title"], saved["text"], saved["results"]) == ("Title", "Text.", {"found": 1})


def test_the_network_of_the_first_article(capsys):
    mnist_cnn.build(0).summary((1, 28, 28))
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines() if "│" in line]
    counts = [row[-1] for row in rows if row[-1][0].isdigit()]
    assert [n for n in counts if n != "0"] == ["320", "128", "18,496", "256", "409,856", "2,570"]
    assert any("(N, 64, 5, 5)" in " ".join(row) for row in rows)


def test_the_log_of_the_third_article(tmp_path, capsys):
    run = mnist_mlp.main(["--epochs", "1", "--no-plot", "--out", str(tmp_path)])
    printed, number = capsys.readouterr().out, r"\d+\.\d{5}"
    for part in ("TRAIN", "VALID"):
        found = re.search(
            rf"^\[Epoch 1-{part}\] Batchnorm Loss\(Acc\): bn_loss:({number})\(bn_acc:0\.\d\d\) "
            rf"vs No Batchnorm Loss\(Acc\): nn_loss:({number})\(nn_acc:0\.\d\d\)$",
            printed,
            re.M,
        )
        for model, loss in zip(MODELS[::-1], found.groups(), strict=True):
            assert float(loss) == pytest.approx(run.results[f"{model}, {part}"][0].loss, abs=6e-6)


def test_the_page_of_all_demos(tmp_path, capsys):
    assert gallery.main(["bn_backward", "deep_mlp"], ["--out", str(tmp_path), "--check"]) == 0
    page = (tmp_path / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "with BatchNorm the network reaches 0.90 in validation" in page
    assert "∂xhat = ∂gammax · weight" in page, "what was printed"
    assert not re.search(r"https?://|src=\"[^d]", page), "everything is inside"
    assert "does not hold" not in page

    def fails(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "a word\n", "an error")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "run", fails)
        assert gallery.main(["bn_backward"], ["--out", str(tmp_path / "b")]) == 1
    assert "an error" in capsys.readouterr().out
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        gallery.main(["bn_backward"], ["--out", str(tmp_path / "file" / "x")])
    assert "cannot write to" in capsys.readouterr().err


def test_both_models_start_with_equal_parameters():
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
                seen[-1].append(x.tobytes() + y.tobytes())
                yield x, y

    def fit(*args, **options):
        seen.append([])
        return train_fit(*args, **options)

    train_fit = train.fit
    monkeypatch.setattr(train.loop, "Batches", Recorded)
    monkeypatch.setattr(train, "fit", fit)
    options = ["--epochs", "3", "--batch-size", "10", "--optimizer", "sgd", "--lr", "0.1", "--no-plot", "--quiet"]
    run = deep_mlp.main([*options, "--seed", "1", "--data", str(idx_folder), "--out", str(tmp_path / "out")])
    assert len(seen[0]) == 12
    assert len(set(seen[0])) == 12
    assert seen[0] == seen[1]
    assert run.histories["with BatchNorm"]["accuracy"][-1] > 0.5
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert (settings["data"], settings["lr"]) == (str(idx_folder), 0.1)
    assert optim.SGD is common.OPTIMIZERS["sgd"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--epochs", "0"], "argument --epochs: has to be at least 1; got 0"),
        (["--batch-size", "-3"], "argument --batch-size: has to be at least 1; got -3"),
        (["--epochs", "many"], "argument --epochs"),
        (["--optimizer", "newton"], "argument --optimizer: invalid choice: 'newton'"),
        (["--data", "no/such/folder"], "no data set or folder 'no/such/folder'"),
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
