"""The settings of demos in a file, and the environment that a run notes."""

import json
import os
import platform
import subprocess
import tomllib

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from demos import bn_backward, common, environment, iris_mlp
from demos.settings import as_toml

OPTIONS = {"epochs": 9, "batch_size": 30, "lr": 0.1, "optimizer": "adam", "data": "mnist5k", "seeds": 30}
OWN = {"--x": {"type": float, "nargs": "+"}}
QUICK = {"epochs": 2, "seeds": 20}

TEXT = st.text(st.characters(blacklist_categories=["Cs"]))
ONE = TEXT | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False)


def example_run(*arguments: str) -> common.Run:
    return common.Run("example", "Title.", list(arguments), check=QUICK, own=OWN, **OPTIONS)


@pytest.fixture
def config(tmp_path):
    """Writes a file of settings, and returns how it is given."""

    def write(text: str) -> list[str]:
        (tmp_path / "some.toml").write_text(text, encoding="utf-8")
        return ["--config", str(tmp_path / "some.toml")]

    return write


@example({"text": '\x7f \x00 " \\ 🙂 \u2028', "numbers": [1e-5, float("inf"), -0.0, 1e22]})
@given(st.dictionaries(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), ONE | st.lists(ONE, min_size=1) | st.none()))
def test_settings_are_read_back_as_they_were(settings):
    settings = {f"x{key}": value for key, value in settings.items()}
    read = tomllib.loads(as_toml({**settings, "out": "left out"}))
    assert repr(read) == repr({key: value for key, value in settings.items() if value is not None})


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(config):
    file = config('epochs = 4\nlr = 1\nbatch-size = 7\noptimizer = "sgd"\nx = [1, -2.5]\nno-plot = true\n')
    args = example_run(*file, "--epochs", "5").args
    assert (args.epochs, args.lr, args.batch_size, args.optimizer, args.x) == (5, 1.0, 7, "sgd", [1.0, -2.5])
    assert isinstance(args.lr, float)
    assert (args.no_plot, args.quiet, args.seeds) == (True, False, 30)
    assert example_run("--x", "3", f"--config={file[1]}").args.x == [3.0]


def test_a_file_may_ask_for_a_quick_run(config):
    for file, given_too in (("check = true\n", []), ("", ["--check"])):
        args = example_run(*config(f"{file}seeds = 14\n"), *given_too).args
        assert (args.check, args.epochs, args.seeds) == (True, 2, 14)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch = 3", "unknown option 'epoch'; the options are epochs, batch_size, lr, seeds, data, device, optimizer"),
        ('out = "x"', "unknown option 'out'"),
        ('config = "x"', "unknown option 'config'"),
        ('epochs = "3"', "epochs: has to be a number; got '3'"),
        ("epochs = 2.5", "epochs: has to be an integer; got 2.5"),
        ("epochs = true", "epochs: has to be one number or text; got True"),
        ("epochs = [3]", "epochs: has to be one number or text; got [3]"),
        ("epochs = 0", "epochs: has to be at least 1; got 0"),
        ("lr = -1.0", "lr: has to be greater than 0"),
        ("data = 3", "data: has to be a text; got 3"),
        ('optimizer = "newton"', "optimizer: has to be one of adam, adamw, sgd, rmsprop; got 'newton'"),
        ("quiet = 1", "quiet: has to be true or false; got 1"),
        ("x = 1.0", "x: has to be a list of values; got 1.0"),
        ("x = []", "x: has to be a list of values; got []"),
        ("[table]\nepochs = 3", "unknown option 'table'"),
        ("epochs = ", "is no TOML file"),
    ],
)
def test_a_file_that_does_not_fit(text, message, config, capsys):
    with pytest.raises(SystemExit) as end:
        example_run(*config(text))
    error = " ".join(capsys.readouterr().err.split())
    assert end.value.code == 2
    assert message in error
    assert "some.toml" in error


def test_a_file_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "latin.toml").write_bytes(b'data = "\xe9"')
    for path, message in ((tmp_path / "none.toml", "No such file"), (tmp_path / "latin.toml", "is no TOML file")):
        with pytest.raises(SystemExit):
            example_run("--config", str(path))
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        example_run("--resume", str(tmp_path))
    assert f"is {tmp_path} the folder of one run, named by its time?" in " ".join(capsys.readouterr().err.split())


def test_a_run_is_repeated_from_its_file(tmp_path):
    options = [
        *("--epochs", "2", "--seeds", "2", "--seed", "5", "--lr", "0.02", "--batch-size", "20"),
        *("--no-plot", "--quiet"),
    ]
    first = iris_mlp.main([*options, "--out", str(tmp_path / "a")])
    again = iris_mlp.main(["--config", str(tmp_path / "a" / "config.toml"), "--out", str(tmp_path / "b")])
    losses = [[history["loss"] for history in run.histories.values()] for run in (first, again)]
    assert losses[0] == losses[1]
    assert len(losses[0]) > 1
    texts = [(tmp_path / name / "config.toml").read_text() for name in "ab"]
    assert texts[0] == texts[1]
    other = iris_mlp.main([*options, "--seed", "6", "--out", str(tmp_path / "c")])
    assert losses[0] != [history["loss"] for history in other.histories.values()], "else this shows nothing"


def test_lists_of_values_are_repeated_too(tmp_path):
    bn_backward.main(["--x", "1", "-2.5", "1e-3", "--no-plot", "--quiet", "--out", str(tmp_path / "a")])
    run = bn_backward.main(["--config", str(tmp_path / "a" / "config.toml"), "--out", str(tmp_path / "b")])
    assert run.args.x == [1.0, -2.5, 0.001]
    assert run.args.no_plot
    assert run.args.quiet


def test_the_environment_is_written_beside_the_results(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    example_run("--x", "1", "-2", "--out", str(tmp_path / "a b")).finish()
    found = json.loads((tmp_path / "a b" / "environment.json").read_text())
    assert found["command"] == f"python -m demos example --x 1 -2 --out '{tmp_path}/a b'"
    assert (found["python"], found["numpy"]) == (platform.python_version(), np.__version__)
    assert found["system"] == platform.platform()
    assert found["cores"] == os.cpu_count()
    assert found["threads"] >= 1
    assert found["processor"] is not None
    assert found["variables"]["OPENBLAS_NUM_THREADS"] == "1"
    assert found["gpu"] is None


def test_the_commit_is_that_of_the_source_and_not_of_a_repository_around(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    try:
        git("init", "-q")
    except FileNotFoundError:
        pytest.skip("needs git")
    (tmp_path / "environment.py").write_text("a")
    (tmp_path / "other.py").write_text("a")
    git("add", "other.py")
    git("commit", "-qm", "x")
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    assert environment._commit() is None, "not a file of that repository"
    git("add", ".")
    git("commit", "-qm", "y")
    assert environment._commit() == git("rev-parse", "HEAD")
    (tmp_path / "other.py").write_text("b")
    assert environment._commit() == git("rev-parse", "HEAD") + "-dirty"
    monkeypatch.setenv("PATH", "")
    assert environment._commit() is None
