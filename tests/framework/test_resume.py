"""Trainings that go on from a checkpoint end as if they had not been interrupted."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tools.training import QUIET, samples, state, timeless
from tinygrad_bn import manual_seed, nn, optim, random
from tinygrad_bn.checkpoint import CheckpointError, Folder, read
from tinygrad_bn.checkpoint import folder as folder_module
from tinygrad_bn.train import Callback, History, ModelCheckpoint, Training, fit

OPTIMIZERS: dict[str, Callable[..., optim.Optimizer]] = {
    "adam": lambda p: optim.Adam(p, lr=0.01),
    "sgd": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1),
}


class Crash(Exception):
    """What ends a training without a warning."""


class Crashing(Callback):
    """Ends the process, so to speak, after so many batches."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step(self, training: Training) -> None:
        if training.step == self.after:
            raise Crash


class Counting(Callback):
    """Keeps something of its own."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.array = np.zeros(3)

    def on_step(self, training: Training) -> None:
        self.losses.append(training.loss)
        self.array = self.array * 0.5 + training.loss

    def state_dict(self) -> dict[str, Any]:
        return {"losses": self.losses, "array": self.array}

    def load_state_dict(self, state: Any) -> None:
        self.losses, self.array = list(state["losses"]), state["array"]


def training(
    folder: Path | None, *, optimizer: str = "adam", seed: Any = None, crash: int = -1, schedule: bool = True,
    epochs: int = 3, every: int | None = 2, **options: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Everything that a training leaves. With a shared generator as seed, dropout draws from the same one."""
    manual_seed(5)
    rng = np.random.default_rng(7)
    own = rng if seed == "shared" else None
    model = nn.Sequential(
        nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3, rng=own), nn.Dropout(0.1), nn.Linear(8, 3)
    )
    steps = OPTIMIZERS[optimizer](model.parameters())
    counting = Counting()
    x, y = samples(22)
    options |= {
        "seed": rng if seed in ("own", "shared") else seed,
        "epochs": epochs,
        "batch_size": 5,
        "optimizer": steps,
    }
    if folder is not None:
        options |= {"checkpoint": folder, "every": every, "resume": True}
    history = fit(
        model, (x, y), validation=(x, y), callbacks=[counting, Crashing(crash)],
        schedule=optim.CosineAnnealingLR(steps, 4) if schedule else None, **options, **QUIET,
    )  # fmt: skip
    left = repr(steps.state_dict()), rng.bit_generator.state, random.generator().bit_generator.state
    kept = {k: v for k, v in asdict(history).items() if k != "epochs"}
    return state(model), repr(timeless(history)), repr(kept), counting.losses, counting.array.tolist(), *left


@given(
    crashes=st.lists(st.integers(0, 15), min_size=1, max_size=3),
    every=st.sampled_from([None, 1, 2, 7]),
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    seed=st.sampled_from([None, 3, "own", "shared"]),
    schedule=st.booleans(),
    capture=st.booleans(),
    nonfinite=st.sampled_from(["raise", "restore"]),
    clip_norm=st.sampled_from([None, 0.5]),
)
def test_a_training_that_crashed_ends_as_if_it_had_not(crashes, every, tmp_path_factory, **options):
    folder = tmp_path_factory.mktemp("run")
    for crash in crashes:
        try:
            training(folder, crash=crash, every=every, **options)
        except Crash:
            continue
    assert training(folder, every=every, **options) == training(None, **options)
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert training(folder, every=every, **options) == training(None, **options), "the training was over"
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


def test_more_epochs_than_before(tmp_path):
    training(tmp_path, epochs=2)
    assert training(tmp_path, epochs=5) == training(None, epochs=5)


def test_the_epoch_that_is_restored_is_that_before_the_crash(tmp_path):
    """`nonfinite="restore"` after a resume in the middle of an epoch."""

    class Poison(Callback):
        def on_step(self, training: Training) -> None:
            if training.step == 10:
                training.optimizer.param_groups[0]["lr"] = 1e300

    def run(folder: Path | None, crash: int = -1) -> Any:
        manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        options = {"checkpoint": folder, "every": 1, "resume": True} if folder else {}
        history = fit(
            model, samples(20), epochs=4, batch_size=5, optimizer=optimizer, nonfinite="restore", seed=0,
            callbacks=[Crashing(crash), Poison()], **options, **QUIET,
        )  # fmt: skip
        return state(model), repr(timeless(history)), history.diverged, repr(optimizer.state_dict())

    for crash in (6, 10):
        with pytest.raises(Crash):
            run(tmp_path, crash)
    whole = run(None)
    assert "epoch 3, step 3" in whole[2]
    assert run(tmp_path) == whole
    assert run(tmp_path) == whole, "it is over"


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"batch_size": 7}, "batch_size=5, and this one has batch_size=7"),
        ({"seed": 4}, "seed=3, and this one has seed=4"),
        ({"drop_last": True}, "drop_last=False, and this one has drop_last=True"),
        ({"data": samples(23)}, r"samples=\[22, 4, 'float32'\]"),
        ({"callbacks": [Counting()]}, r"callbacks=\[\], and this one has callbacks=\['Counting'\]"),
    ],
)
def test_the_arguments_have_to_be_those_of_before(changed, words, tmp_path):
    def run(**options: Any) -> nn.Module:
        manual_seed(0)
        model = nn.Linear(4, 3)
        given = {"data": samples(22), "batch_size": 5, "seed": 3, **options}
        before = state(model)
        try:
            fit(model, epochs=1, checkpoint=tmp_path, **given, **QUIET)
        except CheckpointError:
            assert state(model) == before
            raise
        return model

    run()
    with pytest.raises(CheckpointError, match=words):
        run(resume=True, **changed)


def test_a_folder_of_another_training_is_not_overwritten(tmp_path):
    training(tmp_path, epochs=1)
    before = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    with pytest.raises(ValueError, match=r"has checkpoints.*resume=True.*another folder"):
        fit(nn.Linear(4, 3), samples(8), checkpoint=tmp_path, **QUIET)
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}


def test_which_checkpoints_are_kept(tmp_path):
    accuracies: list[float] = []

    def run(monitor: str, folder: Path) -> History:
        manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        return fit(
            model, samples(40), validation=samples(40, seed=1), epochs=8, batch_size=10, seed=0,
            optimizer=optim.Adam(model.parameters(), lr=0.05),
            checkpoint=ModelCheckpoint(folder, every=3, keep=2, monitor=monitor), **QUIET,
        )  # fmt: skip

    for monitor, best in (("val_loss", np.argmin), ("val_accuracy", np.argmax)):
        history = run(monitor, folder := tmp_path / monitor)
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        assert names == ["best.safetensors", "step-00000030.safetensors", "step-00000032.safetensors"]
        assert len(read(folder / "best.safetensors").extra["history"]["epochs"]) == best(history[monitor]) + 1
        accuracies.append(max(history["val_accuracy"]))
    assert len(set(accuracies)) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"every": 3}, {"resume": True}, {"checkpoint": 3}, {"checkpoint": "x", "every": 0},
        {"checkpoint": "x", "resume": 1}, {"checkpoint": ModelCheckpoint("x"), "every": 2},
        {"callbacks": ModelCheckpoint("x")},
    ],
)  # fmt: skip
def test_options_that_do_not_fit(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError), match=r"every|resume|folder|callback"):
        fit(nn.Linear(4, 3), samples(8), **options, **QUIET)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_full_disk(on_error, tmp_path, monkeypatch):
    """The third checkpoint cannot be written."""
    calls = [0]
    save = Folder.save

    def failing(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise OSError(28, "No space left on device")
        return save(*args, **options)

    monkeypatch.setattr(Folder, "save", failing)
    model = nn.Linear(4, 3)

    def run() -> History:
        settings = ModelCheckpoint(tmp_path, every=2, on_error=on_error)
        return fit(model, samples(40), epochs=1, batch_size=5, checkpoint=settings, **QUIET)

    if on_error == "raise":
        with pytest.raises(OSError, match="No space left"):
            run()
        assert sorted(p.name for p in tmp_path.glob("step-*")) == [f"step-{i:08}.safetensors" for i in (0, 2)]
    else:
        with pytest.warns(RuntimeWarning, match="no checkpoint of step 4, training goes on:.*No space left"):
            assert len(run()) == 1
        assert Folder(tmp_path).newest() == tmp_path / "step-00000008.safetensors"


SCRIPT = """
import hashlib, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background ignores
import numpy as np
from tinygrad_bn import manual_seed, nn, optim, train
class Slow(train.Callback):
    def on_step(self, training):
        print("step", training.step, flush=True)
        time.sleep({pause})
manual_seed(0)
model = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
rng = np.random.default_rng(0)
data = rng.normal(size=(60, 4)).astype(np.float32), rng.integers(0, 3, 60)
history = train.fit(model, data, epochs=3, batch_size=6, checkpoint=sys.argv[1], every=1, resume=True, progress=False,
                    callbacks=Slow())
print("interrupted" if history.interrupted else hashlib.sha256(repr((
    [a.tobytes() for a in model.state_dict().values()], history["loss"])).encode()).hexdigest())
"""


def started(folder: Path, pause: float) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(pause=pause), str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_write_a_checkpoint_and_say_how_to_go_on(number, tmp_path):
    whole = started(tmp_path / "whole", 0)
    child = started(tmp_path / "cut", 0.2)
    assert child.stdout is not None
    while child.stdout.readline() != "step 4\n":
        assert child.poll() is None
    child.send_signal(number)
    out, err = child.communicate(timeout=60)
    assert child.returncode == (0 if number == signal.SIGINT else -signal.SIGTERM)
    last = int(re.findall(r"step (\d+)", out)[-1]) if "step" in out else 4
    assert f"interrupted after step {last}: the newest checkpoint is {tmp_path / 'cut'}" in err
    assert "give resume=True to go on" in err
    assert ("interrupted" in out) == (number == signal.SIGINT), "SIGTERM ends the process"
    again = started(tmp_path / "cut", 0)
    out, _ = again.communicate(timeout=60)
    assert f"step {last + 1}\n" in out
    assert f"step {last}\n" not in out
    assert out.splitlines()[-1] == whole.communicate(timeout=60)[0].splitlines()[-1]


KILLS = int(os.environ.get("TINYGRAD_BN_KILLS", "25"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_at_random_moments(tmp_path):
    """Also inside of a write. Children are forked, so that they need not import."""
    want = training(None, epochs=4)
    rng = np.random.default_rng(0)
    killed = 0
    for number in range(10 * KILLS):
        folder = tmp_path / str(number)
        while killed < KILLS:
            child = os.fork()
            if child == 0:
                try:
                    training(folder, epochs=4, every=1)
                    os._exit(0)
                finally:
                    os._exit(1)
            time.sleep(rng.uniform(0, 0.25))
            os.kill(child, signal.SIGKILL)
            if (status := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) == 0:
                break
            assert status == -signal.SIGKILL
            killed += 1
        assert training(folder, epochs=4, every=1) == want
        if killed >= KILLS:
            return
    pytest.fail("the children were too fast")


def test_a_folder_that_does_not_exist_yet(tmp_path):
    run = {"nonfinite": "restore", "checkpoint": tmp_path / "new" / "run", **QUIET}
    fit(nn.Linear(4, 3), samples(8), epochs=1, **run)
    assert (tmp_path / "new" / "run" / "epoch-start.safetensors").is_file()


@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_second_training_in_the_same_folder_shows_before_its_first_step(on_error, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    model, counting = nn.Linear(4, 3), Counting()
    other = os.open(tmp_path / ".lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    os.write(other, b"process 7 on a machine\n")
    try:
        settings = ModelCheckpoint(tmp_path, on_error=on_error)
        options = {"epochs": 1, "nonfinite": "restore", "callbacks": counting, "checkpoint": settings, **QUIET}
        with pytest.raises(BlockingIOError, match=r"another process.*process 7 on a machine"):
            fit(model, samples(8), **options)
        assert not counting.losses
        assert os.listdir(tmp_path) == [".lock"], "nothing of the other training is overwritten"
    finally:
        os.close(other)


def test_a_second_training_of_this_process_in_the_same_folder(tmp_path):
    class Second(Callback):
        def on_step(self, training: Training) -> None:
            with pytest.raises(BlockingIOError, match="another training of this process"):
                fit(nn.Linear(4, 3), samples(8), checkpoint=tmp_path, resume=True, **QUIET)

    fit(nn.Linear(4, 3), samples(8), epochs=1, callbacks=Second(), checkpoint=tmp_path, **QUIET)
    fit(nn.Linear(4, 3), samples(8), epochs=1, callbacks=Second(), checkpoint=tmp_path, resume=True, **QUIET)


def test_what_cannot_be_saved_shows_before_the_first_step(tmp_path):
    class Odd(Counting):
        def state_dict(self) -> dict[str, Any]:
            return {"odd": {1, 2}}

    odd = Odd()
    with pytest.raises(TypeError, match=r"callbacks/0/odd is .*set"):
        fit(nn.Linear(4, 3), samples(8), callbacks=odd, checkpoint=tmp_path / "a", **QUIET)
    assert not odd.losses
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        fit(nn.Linear(4, 3), samples(8), callbacks=odd, checkpoint=tmp_path / "file", **QUIET)


def test_what_a_callback_changes_in_modules_is_restored(tmp_path):
    """Gradual unfreezing, and a probability of dropout that falls."""

    class Unfreezing(Callback):
        def on_step(self, training: Training) -> None:
            if training.step == 3:
                training.model[0].weight.requires_grad = True
                training.model[2].p = 0.1

    def run(folder: Path | None, crash: int = -1) -> Any:
        manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
        model[0].weight.requires_grad = False
        options = {"checkpoint": folder, "every": 1, "resume": True} if folder else {}
        fit(model, samples(20), epochs=2, batch_size=5, callbacks=[Unfreezing(), Crashing(crash)], **options, **QUIET)
        return state(model)

    with pytest.raises(Crash):
        run(tmp_path, 5)
    assert run(tmp_path) == run(None)


def test_a_training_that_a_callback_ended_says_so(tmp_path):
    def stop(history: History, model: nn.Module) -> bool:
        return len(history) == 2

    options = {"callbacks": stop, "checkpoint": tmp_path, "resume": True, "epochs": 5, **QUIET}
    assert len(history := fit(nn.Linear(4, 3), samples(8), **options)) == 2
    assert "stop returned True" in history.stopped
    with pytest.warns(UserWarning, match=r"has ended, and does not go on: .*stop returned True"):
        assert len(fit(nn.Linear(4, 3), samples(8), **options)) == 2


def test_a_callback_whose_state_does_not_fit_changes_nothing(tmp_path):
    class Old(Counting):
        pass

    model = nn.Linear(4, 3)
    fit(model, samples(8), epochs=1, callbacks=Old(), checkpoint=tmp_path, **QUIET)
    Old.load_state_dict = lambda self, state: state["missing"]
    other = nn.Linear(4, 3)
    before = state(other)
    with pytest.raises(CheckpointError, match=r"state of the callback .*Old does not fit: 'missing'"):
        fit(other, samples(8), epochs=1, callbacks=Old(), checkpoint=tmp_path, resume=True, **QUIET)
    assert state(other) == before


def test_the_best_is_kept_whatever_the_time_and_the_kill(tmp_path, monkeypatch):
    def run(folder: Path) -> None:
        manual_seed(2)
        model = nn.Linear(4, 3)
        settings = ModelCheckpoint(folder, min_seconds=1000)
        optimizer = optim.Adam(model.parameters(), lr=0.05)
        fit(model, samples(40), epochs=6, seed=0, optimizer=optimizer, checkpoint=settings, resume=True, **QUIET)

    run(tmp_path / "whole")
    assert (tmp_path / "whole" / "best.safetensors").exists(), "although the time has not come"
    names: list[str] = []
    save = folder_module.state.save

    def killed(path: Path, *args: Any, **options: Any) -> Any:
        names.append(path.name)
        if len(names) == 4:
            raise Crash
        return save(path, *args, **options)

    monkeypatch.setattr(folder_module.state, "save", killed)
    with pytest.raises(Crash):
        run(tmp_path / "cut")
    monkeypatch.undo()
    run(tmp_path / "cut")
    best = [read(tmp_path / name / "best.safetensors") for name in ("whole", "cut")]
    assert len({len(b.extra["history"]["epochs"]) for b in best}) == 1


@pytest.mark.parametrize("handler", ["ignored", "own"])
def test_handlers_of_signals_stay(handler, tmp_path):
    """An ignored signal is ignored; a handler of the program's own is called at the end."""
    seen: list[int] = []
    former = signal.signal(signal.SIGTERM, signal.SIG_IGN if handler == "ignored" else lambda n, _: seen.append(n))

    class Sent(Callback):
        def on_step(self, training: Training) -> None:
            if training.step == 2:
                signal.raise_signal(signal.SIGTERM)
                assert not seen

    try:
        history = fit(
            nn.Linear(4, 3), samples(8), epochs=2, batch_size=4, callbacks=Sent(), checkpoint=tmp_path, **QUIET
        )
        assert history.interrupted == (handler == "own")
        assert seen == ([signal.SIGTERM] if handler == "own" else [])
    finally:
        signal.signal(signal.SIGTERM, former)
