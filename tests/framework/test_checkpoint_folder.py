"""Writing checkpoints: every error leaves what was there before, and one process at a time writes into a folder."""

import errno
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tinygrad_bn import nn
from tinygrad_bn.checkpoint import CheckpointError, Folder, files, read, save

CALLS = ("open", "write", "fsync", "close", "replace")
FOLDER_SYNC = 3  # open, fsync and close of the folder are the last calls


class Disk:
    """Calls of the system that write at most 500 bytes each, and of which the n-th fails."""

    def __init__(self, monkeypatch, fails, number=errno.EIO):
        self.calls = []
        for name in CALLS:
            monkeypatch.setattr(files.os, name, self.wrapped(name, getattr(os, name), fails, number))

    def wrapped(self, name, call, fails, number):
        def wrapper(*args, **options):
            self.calls.append(name)
            failed = len(self.calls) == fails
            if name == "close" or not failed:
                args = (args[0], args[1][:500]) if name == "write" else args
                result = call(*args, **options)
            if failed:
                raise OSError(number, os.strerror(number))
            return result

        return wrapper


def calls_of_a_save(folder, monkeypatch):
    with monkeypatch.context() as patch:
        disk = Disk(patch, fails=0)
        save(folder / "b.safetensors", nn.Linear(9, 9))
    (folder / "b.safetensors").unlink()
    return disk.calls


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_an_error_in_any_call_leaves_a_whole_file(tmp_path, monkeypatch, number):
    calls = calls_of_a_save(tmp_path, monkeypatch)
    assert Counter(calls) == {"open": 2, "write": calls.count("write"), "fsync": 2, "close": 2, "replace": 1}
    assert calls.count("write") > 1
    assert calls[-FOLDER_SYNC:] == ["open", "fsync", "close"]
    for fails in range(1, len(calls) + 1):
        path = save(tmp_path / "a.safetensors", nn.Linear(9, 9))
        before = path.read_bytes()
        with monkeypatch.context() as patch:
            Disk(patch, fails, number)
            with pytest.raises(OSError, match="not saved") as caught:
                save(path, nn.Linear(9, 9), extra="new")
        assert (caught.value.errno, caught.value.filename) == (number, str(path))
        assert os.listdir(tmp_path) == [path.name]
        if fails <= len(calls) - FOLDER_SYNC:
            assert path.read_bytes() == before
        else:
            assert read(path).extra == "new"


def test_a_file_system_that_cannot_sync_folders(tmp_path, monkeypatch):
    calls = calls_of_a_save(tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        Disk(patch, len(calls) - 1, errno.EINVAL)
        path = save(tmp_path / "a.safetensors", nn.Linear(9, 9), extra="new")
    assert read(path).extra == "new"


def test_what_is_written_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    calls = calls_of_a_save(tmp_path, monkeypatch)
    assert calls[-3 - FOLDER_SYNC : -FOLDER_SYNC] == ["close", "fsync", "replace"]


def test_a_limit_of_the_system_on_the_size_of_files(tmp_path):
    """A real error of a write, after a part was written."""
    path = save(tmp_path / "a.safetensors", nn.Linear(1, 1))
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="not saved: File too large"):
            save(path, nn.Linear(99, 99))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (os.listdir(tmp_path), path.read_bytes()) == ([path.name], before)


def test_a_folder_that_is_read_only():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = save(folder / "a.safetensors", nn.Linear(1, 1))
        before = path.read_bytes()
        folder.chmod(0o555)
        path.chmod(0o444)
        user = os.geteuid()
        try:
            if user == 0:  # root may write everywhere
                os.seteuid(65534)
            for write in (lambda: save(path, nn.Linear(1, 1)), lambda: Folder(folder).save(1, nn.Linear(1, 1))):
                with pytest.raises(PermissionError, match="Permission denied"):
                    write()
            assert read(path).model.keys() == {"weight", "bias"}
        finally:
            os.seteuid(user)
            folder.chmod(0o755)
        assert (os.listdir(folder), path.read_bytes()) == ([path.name], before)


def test_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="not saved"):
        save(tmp_path / "no" / "a.safetensors", nn.Linear(1, 1))
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        Folder(tmp_path / "no").read_newest()
    assert not list(tmp_path.iterdir())


# ---- two processes ---------------------------------------------------------------------------------------

HOLDER = """
import sys
from tinygrad_bn import nn
from tinygrad_bn.checkpoint import Folder
folder = Folder(sys.argv[1])
folder.save(1, nn.Linear(1, 1))
print("locked", flush=True)
sys.stdin.read()
"""


def holder(folder):
    """A process that has locked the folder."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert child.stdout.readline() == "locked\n"
    return child


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    child = holder(tmp_path)
    try:
        folder = Folder(tmp_path)
        for _ in range(2):  # a try that failed does not take away the name
            with pytest.raises(BlockingIOError, match=f"another process.*process {child.pid} on "):
                folder.save(2, nn.Linear(1, 1))
        assert [p.name for p in folder.generations()] == ["step-00000001.safetensors"]
        assert read(folder.newest()).model, "reading needs no lock"
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
    folder.save(2, nn.Linear(1, 1))
    assert len(folder.generations()) == 2


def test_objects_of_one_process_share_the_lock(tmp_path):
    first, second = Folder(tmp_path), Folder(tmp_path)
    first.save(1, nn.Linear(1, 1))
    second.save(2, nn.Linear(1, 1))
    first.close()
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, input="")
    assert f"BlockingIOError: {tmp_path}: another process writes" in done.stderr
    second.close()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, input="")
    assert (done.stdout, done.stderr) == ("locked\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process.*is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_to_ask_for_itself(tmp_path):
    folder = Folder(tmp_path)
    folder.save(1, nn.Linear(1, 1))
    child = os.fork()
    if child == 0:
        try:
            folder.save(2, nn.Linear(1, 1))
        except BlockingIOError:
            os._exit(3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    folder.save(3, nn.Linear(1, 1))


def test_without_locks_of_the_system(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    Folder(tmp_path).save(1, nn.Linear(1, 1))
    assert Folder(tmp_path).newest().name == "step-00000001.safetensors"


# ---- what is kept ----------------------------------------------------------------------------------------


def test_files_that_killed_processes_left_are_removed_and_others_stay(tmp_path):
    left = [
        ".tmp-12-0123abcd-step-00000001.safetensors",
        ".tmp-1-89abcdef-best.safetensors",
        ".tmp-7-89abcdef-epoch-start.safetensors",
    ]
    others = ["a.tmp", "step-1.safetensors", "step-00000009.safetensors.bak", ".tmp-step-00000001.safetensors"]
    for name in (*left, *others):
        (tmp_path / name).write_bytes(b"")
    Folder(tmp_path, keep=1).save(1, nn.Linear(1, 1))
    assert sorted(os.listdir(tmp_path)) == sorted([".lock", "step-00000001.safetensors", *others])


def test_the_newest_are_kept_also_when_an_older_step_is_saved(tmp_path):
    with Folder(tmp_path, keep=2) as folder:
        for step in (5, 7, 6, 100_000_000):
            path = folder.save(step, nn.Linear(1, 1), best=step == 7, extra=step)
            assert path.exists()
        assert [read(p).extra for p in folder.generations()] == [7, 100_000_000]
        assert read(folder.best()).extra == 7
        assert folder.newest() == path


def test_an_error_deletes_no_generation(tmp_path, monkeypatch):
    with Folder(tmp_path, keep=1) as folder:
        first = folder.save(1, nn.Linear(9, 9))
        with monkeypatch.context() as patch:
            Disk(patch, fails=3, number=errno.ENOSPC)
            with pytest.raises(OSError, match="No space left"):
                folder.save(2, nn.Linear(9, 9))
        assert folder.generations() == [first]
        read(first)


def test_damaged_generations_are_passed_over(tmp_path):
    model = nn.Linear(1, 1)
    with Folder(tmp_path, keep=3) as folder:
        for step in range(3):
            folder.save(step, model, extra=step)
        folder.newest().write_bytes(b"damaged")
        with pytest.warns(UserWarning, match="step-00000002"):
            assert folder.load_newest(model).extra == 1
        for path in folder.generations():
            path.write_bytes(b"")
        with (
            pytest.warns(UserWarning, match="passed over"),
            pytest.raises(CheckpointError, match="all 3 checkpoints"),
        ):
            folder.load_newest(model)


@pytest.mark.skipif(os.name == "nt", reason="links and devices are POSIX's")
def test_what_is_no_file_is_not_replaced(tmp_path):
    """A link leads to the file that is written; a pipe or a folder stays."""
    target, link, pipe = tmp_path / "a.safetensors", tmp_path / "link.safetensors", tmp_path / "pipe"
    link.symlink_to(target)
    os.mkfifo(pipe)
    model = nn.Linear(2, 1)
    model.save(link)
    assert link.is_symlink()
    assert target.is_file()
    for path in (pipe, tmp_path):
        with pytest.raises(OSError, match="is not replaced"):
            model.save(path)
    assert pipe.is_fifo()
