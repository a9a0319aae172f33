"""Files of every kind of damage: the right result, or the reader's own error, in bounded memory and time."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.__main__ import fuzz
from tests.fuzz.target import check
from tests.fuzz.targets import TARGETS
from tinygrad_bn.datasets import DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files(name, folder):
    @given(files=TARGETS[name].files)
    def run(files):
        check(TARGETS[name], files, folder)

    run()


@pytest.mark.parametrize("name", TARGETS)
def test_both_ends_are_reached(name):
    seen = fuzz(TARGETS[name], 300, start=0)
    assert seen.total() == 300
    assert min(seen["accepted"], seen["refused"]) > 10, seen


def raises(error):
    def read(_):
        raise error

    return read


WRONG = {
    "another error": (raises(KeyError("shape")), KeyError),
    "a plain ValueError": (raises(ValueError("shape")), ValueError),
    "no path": (raises(DataError("it is damaged")), AssertionError),
    "a page of text": (lambda folder: raises(DataError(f"{folder} {'0, ' * 999}"))(folder), AssertionError),
    "memory": (lambda folder: len(bytearray(1 << 24)), AssertionError),
    "a wrong result": (lambda folder: [], AssertionError),
    "time": (lambda folder: time.sleep(0.2), AssertionError),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_readers_are_caught(name, folder, monkeypatch):
    def verify(result, files):
        assert result is None

    monkeypatch.setattr("tests.fuzz.target.SECONDS", 0.1)
    read, error = WRONG[name]
    target = dataclasses.replace(
        TARGETS["idx"], files=st.just({"a": b""}), read=read, verify=verify, error=DataError, memory=1 << 20
    )
    with pytest.raises(error):
        check(target, {"a": b""}, folder)
    right = dataclasses.replace(target, read=lambda folder: None)
    assert Counter([check(right, {"a": b""}, folder)]) == Counter(accepted=1)


HANG = """
import dataclasses, sys
from pathlib import Path
from tests.fuzz import target
from tests.fuzz.targets import TARGETS
target.SECONDS = 0.02
def hangs(folder):
    while True:
        pass
target.check(dataclasses.replace(TARGETS["idx"], read=hangs), {}, Path(sys.argv[1]))
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="timers are POSIX's")
def test_a_case_that_does_not_end_ends_the_process(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])}
    command = [sys.executable, "-c", HANG, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "in hangs" in done.stderr
