"""The output of demos where it cannot be written, or not as it is."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from demos import bn_backward, common, deep_mlp, gallery, iris_mlp, learning_rates, mnist_mlp, titanic_mlp
from demos.common import Run
from tinygrad_bn import viz

ROOT = Path(deep_mlp.__file__).parents[1]
MODELS = ("without BatchNorm", "with BatchNorm")


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_output_in_any_encoding(encoding, tmp_path):
    for arguments in (["bn_backward", "--out", str(tmp_path)], ["gradient_flow", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "demos", *arguments],
            cwd=ROOT, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.decode(encoding)
    assert json.loads((tmp_path / "results.json").read_text())["claims"]


def test_a_pipe_that_closes_early_and_results_before_text(tmp_path):
    script = f"{shlex.join([sys.executable, '-u', '-m', 'demos', 'bn_backward', '--out', str(tmp_path)])} | head -3"
    done = subprocess.run(["sh", "-c", script], cwd=ROOT, capture_output=True, encoding="utf-8")
    assert (len(done.stdout.splitlines()), done.stderr) == (3, "")
    assert {"results.json", "steps.png"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_text_that_cannot_be_written_is_an_error_in_a_line(tmp_path):
    for redirect, code, error in ((">/dev/full", 1, "No space left"), (">&-", 0, "")):
        command = [sys.executable, "-m", "demos", "normalize_numbers", "--out", str(tmp_path)]
        script = f"{shlex.join(command)} {redirect}"
        done = subprocess.run(["sh", "-c", script], cwd=ROOT, capture_output=True, encoding="utf-8")
        assert done.returncode == code
        assert error in done.stderr
        assert len(done.stderr.splitlines()) == code, "no traceback"
        (tmp_path / "results.json").unlink()


def test_a_full_disk_leaves_the_old_file_and_the_text(tmp_path, monkeypatch, capsys):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "results.json").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    run = bn_backward.main(["--out", str(tmp_path)])
    printed = capsys.readouterr()
    assert run.code == 1
    assert printed.err.count("cannot write") == 5, "settings, environment, two figures and the results"
    assert "results.json: No space left on device" in printed.err
    assert "largest difference" in printed.out
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"], "nothing half-written"
    assert (tmp_path / "results.json").read_text() == "old"


def test_half_a_file_of_results_fails_alone(tmp_path, monkeypatch):
    def writes_half(name, args, children):
        folder = args.out / name
        folder.mkdir()
        folder.joinpath("results.json").write_text('{"demo": "x", ')
        return 1, "printed <this>", 0.5

    monkeypatch.setattr(gallery, "run_demo", writes_half)
    assert gallery.main(["iris_mlp", "new_op"], ["--out", str(tmp_path)]) == 1
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("printed &lt;this&gt;") == 2


@pytest.mark.compiled
def test_a_narrow_terminal_cuts_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(common, "SEEDS", 2)
    options = ["--epochs", "1", "--seeds", "2", "--no-plot", "--out", str(tmp_path)]
    for demo in (titanic_mlp, deep_mlp, iris_mlp, learning_rates):
        demo.main([*options, "--check"] if demo is learning_rates else options)
        lines = [line for line in capsys.readouterr().out.splitlines() if "/1  loss" not in line]  # not the bars
        printed = "\n".join(lines)
        assert "…" not in printed
        assert all(len(line) <= 40 for line in lines if not line.startswith("wrote"))
        for name in MODELS:
            assert name in printed


@pytest.mark.compiled
@pytest.mark.parametrize("language", ["en", "ko"])
def test_a_lesson_prints_in_any_encoding(language):
    pytest.importorskip("marimo", reason="needs pip install 'tinygrad-bn[lessons]'")
    done = subprocess.run(
        [sys.executable, ROOT / "demos" / "lessons" / "lesson_1_chain_rule.py", "--lang", language],
        capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode("ascii").startswith("# 1. ")


def test_negative_numbers_as_options(tmp_path, capsys):
    run = bn_backward.main(["--out", str(tmp_path), "--no-plot", "--x", "1", "-1e-3", "-2", "-.5E+1"])
    assert run.args.x == [1, -1e-3, -2, -5]
    for wrong, words in (
        (["--x", "1", "-inf"], "finite numbers"),
        (["--x", "1", "-nan"], "finite numbers"),
        (["--x", "1", "-1e"], "-1e"),
        (["--seed", "-1"], "has to be at least 0; got -1\n"),
    ):
        with pytest.raises(SystemExit):
            bn_backward.main(wrong)
        assert words in capsys.readouterr().err


@pytest.mark.parametrize("data", ["iris", "digits"])
def test_data_that_do_not_fit_a_demo(data, capsys):
    with pytest.raises(SystemExit):
        mnist_mlp.main(["--data", data])
    error = capsys.readouterr().err
    assert f"as in mnist5k, mnist and fashion_mnist; got Dataset('{data}'" in error
    with pytest.raises(SystemExit):
        iris_mlp.main(["--data", "mnist5k"])
    assert "as in iris and titanic; got Dataset('mnist5k'" in capsys.readouterr().err


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:BatchNorm1d")
def test_networks_that_learn_nothing_are_not_equal(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "SEEDS", 2)
    options = ["--epochs", "1", "--seeds", "2", "--no-plot", "--quiet", "--out", str(tmp_path)]
    run = iris_mlp.main([*options, "--lr", "1e300"])
    assert not any(run.claims.values())
    assert any("but one learned to an accuracy of 0." in claim for claim in run.claims)


def test_a_claim_of_equality(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "SEEDS", 2)
    run = Run("iris_mlp", "Title", ["--out", str(tmp_path)], seeds=2)
    good, bad = np.array([0.9, 0.8]), np.array([0.5, 0.6])
    for learned, holds in (((good, good), True), ((good, bad), False), ((), True), ((np.full(2, np.nan),), False)):
        run.claims.clear()
        run.claim_mean("equal", [0.1, 0.0], -2, 2, learned=learned)
        assert list(run.claims.values()) == [holds]


def test_a_mean_on_a_logarithmic_axis_is_geometric_and_its_band_stays_above_0():
    values = np.exp(np.random.default_rng(0).normal(size=(10, 4)) * 3)
    _, grid = viz.subplots(1, 2, 6, 3)
    viz.plot_seeds(grid[0, 0], range(4), values, "with BatchNorm", log=True)
    assert grid[0, 0].get_yscale() == "log"
    np.testing.assert_allclose(grid[0, 0].lines[-1].get_ydata(), np.exp(np.log(values).mean(axis=0)))
    (band,) = grid[0, 0].collections
    assert (band.get_paths()[0].vertices[:, 1] > 0).all()
    viz.plot_seeds(grid[0, 1], range(4), values, "with BatchNorm", style=" o")
    (bars,) = grid[0, 1].collections
    assert len(bars.get_paths()) == 4  # without a line, no band either
    viz.plot_seeds(grid[0, 0], range(4), np.where(values > 1, values, np.nan), "without BatchNorm", log=True)
