"""Every demo that trains goes on after an interrupt, and ends with the results of a run without one."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demos import gallery
from demos.common import CHECKPOINTS
from tests.framework.test_demos import ORDER
from tinygrad_bn.train import steps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.compiled,
    pytest.mark.filterwarnings("ignore:BatchNorm1d.*not finite", "ignore:.*encountered in:RuntimeWarning"),
]
# Options that make a demo short, on 640 images.
TRAINING = {
    "deep_mlp": ["--epochs", "3", "--batch-size", "10", "--seeds", "2"],
    "mnist_mlp": ["--epochs", "2", "--batch-size", "10", "--seeds", "2"],
    "mnist_cnn": ["--epochs", "2", "--batch-size", "20", "--seeds", "2"],
    "init_scale": ["--epochs", "1", "--batch-size", "20", "--seeds", "1"],
    "learning_rates": ["--epochs", "1", "--batch-size", "20", "--seeds", "1"],
    "gradient_flow": ["--epochs", "2", "--batch-size", "20", "--seeds", "1"],
    "iris_mlp": ["--epochs", "3", "--seeds", "2"],
    "titanic_mlp": ["--epochs", "2", "--seeds", "1"],
    "batch_size": ["--epochs", "1", "--seeds", "1"],
    "paper_figure1": ["--epochs", "3", "--batch-size", "20", "--seeds", "1"],
    "loss_landscape": ["--epochs", "2", "--batch-size", "8", "--seeds", "2"],
    "new_op": ["--epochs", "2", "--batch-size", "10", "--seeds", "2"],
    "batch_renorm": ["--epochs", "1", "--batch-size", "10", "--seeds", "1"],
    "dead_bias": ["--epochs", "2", "--batch-size", "10", "--seeds", "2"],
    "layer_norm": ["--epochs", "1", "--seeds", "1"],
    "eval_gradient": ["--epochs", "2", "--batch-size", "10", "--seeds", "1"],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of three classes of bright images, 640 to train on and 60 to test on."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("images")
    for prefix, n in (("train", 640), ("t10k", 60)):
        labels = rng.integers(0, 3, n).astype(np.uint8)
        pictures = (rng.integers(0, 50, (n, 28, 28)) + 60 * labels[:, None, None]).astype(np.uint8)
        for name, array in ((f"{prefix}-images-idx3-ubyte", pictures), (f"{prefix}-labels-idx1-ubyte", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / name).write_bytes(header + array.tobytes())
    return str(folder)


class Killed(BaseException):
    """The process ends."""


def test_no_demo_that_trains_is_left_out():
    found = {name for name in ORDER if re.search(r"run\.(fit|once)\(", source(name))}
    assert found == set(TRAINING)


def source(name: str) -> str:
    return Path(importlib.import_module(f"demos.{name}").__file__).read_text(encoding="utf-8")


def main(name: str, *options: str) -> Any:
    return importlib.import_module(f"demos.{name}").main([*options])


def timeless(value: Any) -> Any:
    """Results without times."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if "seconds" not in k}
    return list(map(timeless, value)) if isinstance(value, list) else value


def results(folder: Path) -> Any:
    content = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return timeless({k: content[k] for k in ("results", "claims", "interrupted")})


@pytest.mark.parametrize("name", [name for name in TRAINING if name != "loss_landscape"])
def test_interrupted_and_killed(name, images, tmp_path, monkeypatch, capsys):
    data = [] if name in ("iris_mlp", "titanic_mlp") else ["--data", images]
    options = [*TRAINING[name], *data, "--no-plot", "--quiet"]
    main(name, *options, "--out", str(tmp_path / "whole"))

    take, taken, plan = steps.Steps.take, [0], dict[str, Any]()

    def broken_off(self: Any, *args: Any) -> str:
        taken[0] += 1
        if taken[0] == plan["at"]:
            plan["end"]()
        return take(self, *args)

    def kill() -> None:
        raise Killed

    monkeypatch.setattr(steps.Steps, "take", broken_off)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
    rng, go_on = np.random.default_rng(0), [*options, "--out", str(tmp_path / "cut")]
    for ending in (partial(signal.raise_signal, signal.SIGINT), kill):
        plan, taken[0] = {"at": int(rng.integers(2, 9)), "end": ending}, 0
        with suppress(KeyboardInterrupt, Killed):
            main(name, *go_on)
        assert (tmp_path / "cut" / CHECKPOINTS / "001").is_dir()
        go_on = ["--resume", str(tmp_path / "cut")]
    assert f"to go on: python -m demos {name} --resume" in capsys.readouterr().err
    signal.signal(signal.SIGINT, former)
    plan = {"at": -1}
    main(name, *go_on)
    assert results(tmp_path / "cut") == results(tmp_path / "whole")
    assert not (tmp_path / "cut" / CHECKPOINTS).exists()
    with pytest.raises(SystemExit):
        main(name, *go_on)
    assert "is finished" in capsys.readouterr().err


def test_a_part_that_was_finished_is_not_computed_again(images, tmp_path, monkeypatch):
    demo = importlib.import_module("demos.loss_landscape")
    descend, calls = demo.descend, []
    options = [*TRAINING["loss_landscape"], "--data", images, "--no-plot", "--quiet"]
    main("loss_landscape", *options, "--out", str(tmp_path / "whole"))

    def counted(*args: Any) -> np.ndarray:
        calls.append(args[1:3])
        if len(calls) == 5:
            raise Killed
        return descend(*args)

    monkeypatch.setattr(demo, "descend", counted)
    with pytest.raises(Killed):
        main("loss_landscape", *options, "--out", str(tmp_path / "cut"))
    main("loss_landscape", "--resume", str(tmp_path / "cut"))
    assert len(calls) == 7, "six parts, of which one was begun twice"
    assert results(tmp_path / "cut") == results(tmp_path / "whole")


def test_all_demos_go_on(tmp_path, monkeypatch, capsys):
    """What is finished is kept, what was interrupted goes on, and the rest is run."""
    commands = []

    class Child:
        returncode = 0

        def __init__(self, command: list[str], **options: Any) -> None:
            commands.append(command[3:])
            folder = Path(command[command.index("--out") + 1] if "--out" in command else command[-1])
            content = {"title": "t", "text": "", "seconds": 1, "claims": {}, "figures": [], "interrupted": False}
            (folder / "results.json").write_text(json.dumps(content), encoding="utf-8")

        def communicate(self) -> tuple[str, None]:
            return f"printed by {commands[-1][0]}", None

    monkeypatch.setattr(gallery, "WORKERS", 1)
    monkeypatch.setattr(gallery.subprocess, "Popen", Child)
    assert gallery.main(["one", "two", "three"], ["--out", str(tmp_path)]) == 0
    (tmp_path / "two" / "results.json").unlink()
    (tmp_path / "two" / "config.toml").write_text("", encoding="utf-8")
    (tmp_path / "three" / "results.json").unlink()
    commands.clear()
    assert gallery.main(["one", "two", "three"], ["--out", str(tmp_path), "--resume"]) == 0
    assert commands == [
        ["two", "--resume", str(tmp_path / "two")],
        ["three", "--out", str(tmp_path / "three"), "--seed", "0"],
    ]
    with pytest.raises(SystemExit):
        gallery.main(["one"], ["--out", str(tmp_path), "--resume", "--seed", "5"])
    assert "was begun with the options" in capsys.readouterr().err
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert all(f"printed by {name}" in page for name in ("one", "two", "three"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_demos_goes_to_the_running_ones(number, tmp_path):
    """Each writes a checkpoint, and there is a page of those that are finished."""
    with subprocess.Popen(
        [sys.executable, "-c", f"import demos.gallery as g; g.WORKERS = 1\n{STARTED}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OUT": str(tmp_path)},
    ) as child:  # fmt: skip
        end = time.monotonic() + 100
        while not list(tmp_path.glob("deep_mlp/checkpoints/001/step-*")):
            assert time.monotonic() < end
            time.sleep(0.05)
        child.send_signal(number)
        printed, _ = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert "1 of 2 demos are finished" in printed
    assert f"to go on: python -m demos all --resume --out {tmp_path}" in printed
    assert "normalize_numbers" in (tmp_path / "index.html").read_text(encoding="utf-8")


ROOT = Path(__file__).parents[2]
STARTED = """
import demos.output, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
demos.output.start(lambda: g.main(['normalize_numbers', 'deep_mlp'], ['--out', g.os.environ['OUT']]))
"""
