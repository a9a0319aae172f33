"""The demos: what they print and write, and their errors for wrong arguments."""

import csv
import gzip
import importlib
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from demos import (
    common,
    dead_bias,
    deep_mlp,
    eval_gradient,
    gallery,
    gradient_flow,
    layer_norm,
    learning_rates,
    mnist_cnn,
    mnist_mlp,
    new_op,
    output,
    titanic_mlp,
)
from demos.__main__ import ORDER, main, names
from tinygrad_bn import Tensor, datasets, functional, nn, optim, train
from tinygrad_bn.train.interval import Interval, interval, number, quantile

ROOT = Path(deep_mlp.__file__).parents[1]
MODELS = ("without BatchNorm", "with BatchNorm")


def demos(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "demos", *arguments],
        cwd=ROOT, capture_output=True, encoding="utf-8", env=os.environ | {"PYTHONIOENCODING": "utf-8"} | environment,
    )  # fmt: skip


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
    assert re.findall(r"^  (\w+)", done.stdout, re.M) == [*ORDER, "all", "quiz"], "in the order of learning"
    scripts = {path.stem for path in (ROOT / "demos").glob("*.py") if "Run(" in path.read_text(encoding="utf-8")}
    assert set(ORDER) == scripts - {"common"}


def test_a_demo_that_is_not_there():
    done = demos("nope")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("no demo 'nope'; the demos are bn_backward, normalize_numbers, eval_gradient")


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


def test_bn_backward_takes_a_batch_of_ones_own_and_evaluation(tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert main(["bn_backward", "--x", "1", "2", "3", "4", "6", *out]) == 0
    printed = capsys.readouterr().out
    assert {"steps.png", "paths.png"} <= {path.name for path in tmp_path.iterdir()}
    shares = re.findall(
        r"^(direct|through [a-z ]+): x → .*\n(?:.*out\n)?  gradient (\[\[[^\]]*\](?:\s*\[.*\])*\])", printed, re.M
    )
    names, numbers = zip(*shares, strict=True)
    assert names == ("direct", "through var", "through mu", "through mu and var")
    parts = np.array([re.findall(r"-?\d+\.\d*", text) for text in numbers], float)
    x, g = np.array([1.0, 2, 3, 4, 6]), np.random.default_rng(0).normal(size=5)
    h, loss = 1e-5, lambda z: (1.5 * (z - z.mean()) / np.sqrt(z.var() + 1e-5) * g).sum()
    slope = [(loss(x + h * e) - loss(x - h * e)) / (2 * h) for e in np.eye(5)]
    np.testing.assert_allclose(parts.sum(axis=0), slope, atol=3e-4)
    assert main(["bn_backward", "--eval", "--x", "-1", "2", *out]) == 0
    printed = capsys.readouterr().out
    assert "along one path" in printed
    assert "\nvar = " not in printed
    for wrong in (["1"], ["1", "nan"], ["one", "two"]):
        with pytest.raises(SystemExit):
            main(["bn_backward", "--x", *wrong, *out])


def test_bn_backward(tmp_path, capsys):
    assert main(["bn_backward", "--seed", "3", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    steps = functional.Normalization._fields
    assert steps == ("mu", "xmu", "sq", "var", "sqrtvar", "ivar", "xhat", "gammax", "out")
    for step in steps:
        block = re.search(rf"^{step} = .*\n  value .*(\n .*)*\n  ∂{step} = .*\n  gradient ", printed, re.M)
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


@pytest.mark.compiled
def test_new_op_learns(tmp_path, capsys):
    run = new_op.main(["--seeds", "2", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    accuracy = run.results["accuracy"]
    assert accuracy == [history["val_accuracy"][-1] for history in run.histories.values()]
    assert min(accuracy) > 0.8
    assert "every property of the test-suite: ok" in printed
    assert f"digits: {interval(accuracy)}" in printed


def test_an_interval_is_students():
    assert interval([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, 3.182 * np.std([1, 2, 3, 4], ddof=1) / 2))
    assert (interval([2.0, 2.0]).low, interval([2.0, 2.0]).high) == (2.0, 2.0)
    alone = interval([0.25])
    assert (str(alone), str(Interval(0.5, 0.01))) == ("0.250", "0.500 ± 0.010")
    assert np.isnan(alone.low), "one value has no interval"
    # Tables of the t distribution. A sample of normal numbers: the interval holds the mean in 95 % of cases.
    assert [round(quantile(n), 3) for n in (1, 2, 10, 20, 30, 120)] == pytest.approx(
        [12.706, 4.303, 2.228, 2.086, 2.042, 1.980], abs=2e-3
    )
    samples = np.random.default_rng(0).normal(0.3, 1.0, (4000, 14))
    inside = [abs(interval(sample).mean - 0.3) < interval(sample).half for sample in samples]
    assert np.mean(inside) == pytest.approx(0.95, abs=0.015)


def test_numbers_are_short_at_any_size():
    assert [number(x) for x in (0.1234, -2, 0.0, 1e9, 2e-7, 999.9)] == [
        "0.123", "-2.000", "0.000", "1.0e+09", "2.0e-07", "999.900",
    ]  # fmt: skip
    assert (number(float("nan")), number(float("-inf"))) == ("nan", "-inf")


def example(*arguments: str, **options: object) -> common.Run:
    return common.Run("none", "Title\n\nText.", arguments, **options)


def test_a_claim_is_about_ten_seeds(tmp_path, monkeypatch, capsys):
    few = example("--out", str(tmp_path), seeds=10)
    few.claim_mean("nine seeds", [1.0] * 9, above=0)
    assert not few.claims
    monkeypatch.setattr(common, "SEEDS", 4)
    run = example("--out", str(tmp_path), seeds=4)
    run.claim_mean("far above", [1.0, 1.1, 0.9, 1.0], above=0.5)
    run.claim_mean("not surely above", [1.0, 1.1, 0.0, 1.0], above=0.5)
    run.claim_mean("between", [0.1, -0.1, 0.1, -0.1], above=-0.3, below=0.3)
    run.claim_mean("below, but not surely", [0.2, -0.1, 0.1, -0.1], below=0.1)
    assert list(run.claims.values()) == [True, False, True, False]
    assert "far above: 1.000 ± 0.130 (4 seeds)" in run.claims
    one = example("--seeds", "1", "--out", str(tmp_path), seeds=4)
    one.claim_mean("one seed", [1.0], above=0)
    assert not one.claims
    one.finish()
    assert "nothing is claimed" in capsys.readouterr().out.replace("\n", " ")
    with pytest.raises(SystemExit):
        example("--seeds", "1", "--check", seeds=4)
    assert "--check needs at least 4 seeds" in capsys.readouterr().err


def test_titanic_with_one_seed_has_no_interval(tmp_path, capsys):
    assert titanic_mlp.main(["--seeds", "1", "--epochs", "2", "--no-plot", "--out", str(tmp_path)]).code == 0
    printed = capsys.readouterr().out
    assert "± 0.000" not in printed
    assert re.search(r"raw inputs, SGD +0\.\d\d\d +0\.\d\d\d +-?0\.\d\d\d *$", printed, re.M)


@pytest.mark.compiled
def test_deep_mlp_writes_what_it_returns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "SEEDS", 2)
    options = ["--seed", "5", "--seeds", "2"]
    run = deep_mlp.main(["--epochs", "2", "--quiet", *options, "--out", str(tmp_path / "a")])
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines, "quiet prints the verdict"
    assert "".join(lines).count("(2 seeds)") == 2
    assert printed.err == ""
    assert list(run.histories) == [f"{name}, seed {seed}" for seed in (5, 6) for name in MODELS]
    saved = json.loads((tmp_path / "a" / "results.json").read_text())
    assert (saved["settings"]["epochs"], saved["settings"]["seed"]) == (2, 5)
    assert saved["figures"] == ["history.png"]
    assert saved["claims"] == run.claims
    for name in MODELS:
        histories = [run.histories[f"{name}, seed {seed}"] for seed in (5, 6)]
        assert saved["results"][name] == [history.rows() for history in histories]
        for seed, history in zip((5, 6), histories, strict=True):
            assert history["epoch"] == [1, 2]
            with (tmp_path / "a" / f"{name.replace(' ', '_')}_seed_{seed}.csv").open(newline="") as file:
                assert [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)] == history.rows()
    picture = (tmp_path / "a" / "history.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 20_000

    again = deep_mlp.main(["--epochs", "1", *options, "--no-plot", "--out", str(tmp_path / "b")])
    for name, history in again.histories.items():
        assert numbers(history) == numbers(run.histories[name])[:1], "same seed, same numbers"
    files = [f"{name.replace(' ', '_')}_seed_{seed}.csv" for name in MODELS[::-1] for seed in (5, 6)]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == [
        "config.toml", "environment.json", "results.json", *files,
    ]  # fmt: skip
    mean = np.mean([again.histories[f"{MODELS[1]}, seed {seed}"]["loss"][0] for seed in (5, 6)])
    assert number(mean) in capsys.readouterr().out, "not quiet: the table"


def interrupt(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Ctrl-C instead of step `at` of Adam, counted over all networks."""
    step, steps = optim.Adam.step, []

    def stepped(optimizer):
        steps.append(1)
        if len(steps) == at:
            raise KeyboardInterrupt
        step(optimizer)

    monkeypatch.setattr(optim.Adam, "step", stepped)


@pytest.mark.compiled
def test_ctrl_c_in_the_first_seed_keeps_the_epochs_so_far(tmp_path, monkeypatch, capsys):
    interrupt(monkeypatch, 30)  # of 24 in the first network of 3 epochs
    with pytest.raises(SystemExit) as end:
        output.start(lambda: main(["deep_mlp", "--epochs", "3", "--quiet", "--out", str(tmp_path)]))
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted after step 5: there is no checkpoint yet\ninterrupted\n"
    files = ["checkpoints", "config.toml", "environment.json", "without_BatchNorm_seed_0.csv"]
    assert sorted(path.name for path in tmp_path.iterdir()) == files, "nothing to compare"


@pytest.mark.compiled
def test_ctrl_c_reports_the_finished_seeds_and_claims_nothing(tmp_path, monkeypatch, capsys):
    interrupt(monkeypatch, 40)  # of 16 in each network of 2 epochs
    run = deep_mlp.main(["--epochs", "2", "--seeds", "3", "--no-plot", "--out", str(tmp_path)])
    assert (run.code, run.claims) == (130, {})
    assert [len(run.results[name]) for name in MODELS] == [1, 1], "as many seeds for both"
    assert {len(rows) for name in MODELS for rows in run.results[name]} == {2}, "and as many epochs"
    assert "interrupted: results of 1 of 3 trainings" in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text())["interrupted"]


def test_ctrl_c_during_all_writes_the_page_of_the_finished(tmp_path, monkeypatch, capsys):
    run = gallery.run_demo

    def interrupted(name, *args):
        if name == "deep_mlp":
            raise KeyboardInterrupt
        return run(name, *args)

    monkeypatch.setattr(gallery, "run_demo", interrupted)
    code = gallery.main(["normalize_numbers", "deep_mlp", "iris_mlp"], ["--out", str(tmp_path)])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert code == 130
    assert "1 of 3 demos are finished" in capsys.readouterr().out
    assert re.findall('<h2 id="([a-z_]+)"', page) == ["normalize_numbers"]


def test_check_sets_the_options_left_out_and_fails_with_a_claim(tmp_path):
    def run(*arguments: str) -> common.Run:
        return example(*arguments, "--out", str(tmp_path), epochs=9, lr=0.1, check={"epochs": 2})

    assert (run().args.epochs, run("--check").args.epochs, run("--check", "--epochs", "5").args.epochs) == (9, 2, 5)
    for arguments, holds, code in (([], False, 0), (["--check"], True, 0), (["--check"], False, 1)):
        one = run("--quiet", *arguments)
        one.claim("it does", True)
        one.claim("so does this", holds)
        assert one.finish(found=1).code == code
        saved = json.loads((tmp_path / "results.json").read_text())
        assert saved["claims"] == {"it does": True, "so does this": holds}
        assert (saved["title"], saved["text"], saved["results"]) == ("Title", "Text.", {"found": 1})


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:BatchNorm1d.*not finite")
def test_a_network_that_overflows_is_shown_as_such(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "SEEDS", 2)
    run = deep_mlp.main(["--epochs", "1", "--seeds", "2", "--optimizer", "sgd", "--lr", "1e9", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines() if not line.startswith("wrote"))
    assert not all(run.claims.values())
    json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)


def test_slow_is_not_diverged():
    nan, guess = np.nan, 0.13
    accuracy = np.array([[0.12, 0.2, 0.9, 0.1, 0.3, nan], [0.1, 0.1, nan, 0.1, 0.1, nan]])
    assert learning_rates.diverged(accuracy, guess).tolist() == [
        [False, False, False, True, False, True],  # 0.12 at the smallest rate is slow; 0.1 above a rate of 0.9 is not
        [False, False, True, False, False, True],
    ]
    digits = datasets.load("mnist5k")
    assert 0.1 < learning_rates.guessing(digits) < 0.12


def test_gradients_grow_backwards_with_batch_norm():
    data = datasets.load("mnist5k").scaled().take(np.arange(0, 5000, 50))
    norm = {w: gradient_flow.norms(gradient_flow.build("ReLU", w, True, 0), data) for w in gradient_flow.GAINS}
    growth = (norm["small"][1] / norm["small"][-2]) ** (1 / 17)
    assert 1.1 < growth < 1.3
    np.testing.assert_allclose(norm["small"][:-1], 4 * norm["large"][:-1], rtol=0.05)  # eps is not scaled
    tiny = gradient_flow.norms(gradient_flow.build("tanh", "small", False, 0), data)
    assert tiny.max() < 1e-4
    assert 0.1 < tiny[1] / tiny[-2] < 10, "as tiny in all layers"


def test_before_batch_norm_a_bias_is_dead_and_a_weight_has_no_scale():
    digits = datasets.load("mnist5k").scaled().take(np.arange(0, 5000, 50))
    data = replace(digits, x=digits.x.astype(np.float64))
    bias, angle, changed = dead_bias.facts(data, 0)
    assert bias < 1e-12
    assert angle < 1e-12
    assert changed < 1e-9
    first, *_, last = (m for m in dead_bias.build(0, bias=True) if isinstance(m, nn.Linear))
    model = nn.Sequential(nn.Flatten(), first, nn.ReLU(), last)  # without the BatchNorm all three are wrong
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dead_bias, "build", lambda seed, bias=False: model)
        assert min(dead_bias.facts(data, 0)) > 1e-3


def test_the_gradient_in_evaluation_is_the_direct_part():
    bn, x, g = eval_gradient.layer(3)
    part = eval_gradient.parts(bn, x, g)
    np.testing.assert_allclose(part[eval_gradient.DIRECT], g / np.sqrt(x.numpy().var() + bn.eps), rtol=1e-6)
    np.testing.assert_allclose(sum(list(part.values())[:3]), part[eval_gradient.WHOLE], atol=1e-12)
    coupled, alone = (eval_gradient.jacobian(bn, x, training) for training in (True, False))
    np.testing.assert_allclose(coupled.sum(axis=1), 0, atol=1e-12)
    assert np.abs(coupled).min() > 0
    np.testing.assert_array_equal(alone, np.diag(np.diag(alone)))


def test_what_the_two_normalisations_couple():
    x = Tensor(np.random.default_rng(0).normal(size=(4, 3)), requires_grad=True)
    same_channel, same_sample = np.kron(np.ones((4, 4)), np.eye(3)) > 0, np.kron(np.eye(4), np.ones((3, 3))) > 0
    for name, coupled in (("BatchNorm", same_channel), ("LayerNorm", same_sample)):
        np.testing.assert_array_equal(layer_norm.jacobian(name, x) != 0, coupled)


def test_the_network_of_the_first_article(capsys):
    mnist_cnn.build(0).summary((1, 28, 28))
    rows = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines() if "│" in line]
    counts = [row[-1] for row in rows if row[-1][0].isdigit()]
    assert [n for n in counts if n != "0"] == ["320", "128", "18,496", "256", "409,856", "2,570"]
    assert any("(N, 64, 5, 5)" in " ".join(row) for row in rows)


@pytest.mark.compiled
def test_the_log_of_the_third_article(tmp_path, capsys):
    run = mnist_mlp.main(["--epochs", "1", "--seeds", "2", "--no-plot", "--out", str(tmp_path)])
    printed, number = capsys.readouterr().out, r"\d+\.\d{5}"
    for part in ("TRAIN", "VALID"):
        found = re.search(
            rf"^\[Epoch 1-{part}\] Batchnorm Loss\(Acc\): bn_loss:({number})\(bn_acc:0\.\d\d\) "
            rf"vs No Batchnorm Loss\(Acc\): nn_loss:({number})\(nn_acc:0\.\d\d\)$",
            printed,
            re.M,
        )
        for model, loss in zip(MODELS[::-1], found.groups(), strict=True):
            assert float(loss) == pytest.approx(run.results[f"{model}, {part}"][0][0].loss, abs=6e-6)


@pytest.mark.compiled
def test_the_page_of_all_demos(tmp_path, capsys):
    assert gallery.main(["bn_backward", "deep_mlp"], ["--out", str(tmp_path), "--check"]) == 0
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == page.count('type="checkbox"') == 3, "a click enlarges each figure"
    assert "with BatchNorm the validation accuracy is above 0.85" in page
    assert page.count("<details open>") == 1, "the output of bn_backward is not folded"
    assert "`" not in page
    assert "∂xhat = ∂gammax · weight" in page, "what was printed"
    assert not re.search(r"https?://|src=\"[^d]", page), "everything is inside"
    assert "does not hold" not in page

    def fails(*_: object) -> tuple[int, str, float]:
        return 1, "a word\nan error", 0.5

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gallery, "run_demo", fails)
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
        def in_order(self, order, start=0):
            for x, y in super().in_order(order, start):
                seen[-1].append(x.tobytes() + y.tobytes())
                yield x, y

    def fit(*args, **options):
        seen.append([])
        return train_fit(*args, **options)

    train_fit = train.fit
    monkeypatch.setattr(train.loop, "Batches", Recorded)
    monkeypatch.setattr(train, "fit", fit)
    options = [
        "--epochs", "3", "--seeds", "1", "--batch-size", "10", "--optimizer", "sgd", "--lr", "0.1",
        "--no-plot", "--quiet",
    ]  # fmt: skip
    run = deep_mlp.main([*options, "--seed", "1", "--data", str(idx_folder), "--out", str(tmp_path / "out")])
    assert len(seen[0]) == 12
    assert len(set(seen[0])) == 12
    assert seen[0] == seen[1]
    assert run.histories["with BatchNorm, seed 1"]["accuracy"][-1] > 0.5
    settings = json.loads((tmp_path / "out" / "results.json").read_text())["settings"]
    assert (settings["data"], settings["lr"]) == (str(idx_folder), 0.1)


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
        (["--out", "/dev/null"], "cannot write to /dev/null"),
    ],
)
def test_what_cannot_be(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        deep_mlp.main(options)
    assert end.value.code not in (0, None)
    assert message in capsys.readouterr().err + str(end.value.code)  # a text as code goes to stderr, with status 1
    assert not list(tmp_path.iterdir()), "nothing is left behind"
