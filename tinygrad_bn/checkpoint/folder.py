"""A folder with the last checkpoints of a training and the best one, written by one process at a time."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from weakref import WeakValueDictionary

from tinygrad_bn.arguments import expect_flags, expect_integer, warn_caller
from tinygrad_bn.checkpoint import state
from tinygrad_bn.checkpoint.files import CheckpointError, Contents, read
from tinygrad_bn.nn.module import Module

GENERATION = re.compile(r"step-(\d{8,})\.safetensors")
TEMPORARY = re.compile(r"\.tmp-\d+-[0-9a-f]{8}-.+\.safetensors")
BEST = "best.safetensors"


class _Lock:
    """The lock of a folder, which this process has as long as this object lives; the system frees it when it dies."""

    def __init__(self, folder: Path) -> None:
        self.process, self.writing = os.getpid(), threading.Lock()
        self.descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        with contextlib.suppress(ImportError):  # Windows has no fcntl
            self._lock(folder)

    def _lock(self, folder: Path) -> None:
        import fcntl

        try:
            fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(self.descriptor, 200, 0).decode(errors="replace").strip() or "unknown"
            raise BlockingIOError(
                f"{folder}: another process writes checkpoints into this folder: {owner}; end it, or use another folder"
            ) from None
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


LOCKS: WeakValueDictionary[tuple[int, Path], _Lock] = WeakValueDictionary()  # of this process
LOCKING = threading.Lock()


class Folder:
    """Checkpoints `step-00001234.safetensors`, the last `keep` of them, and `best.safetensors`.

    `lock()` or the first `save` locks the folder, until `close()` or the end of the object or process, even if it is
    killed; a second process that saves gets BlockingIOError. Windows has no such lock: there it is up to the user that
    one process writes. Files of other names are left alone.

    After a power failure each file is whole, or is not there. What `save` returned is there, unless the disk lost what
    it had confirmed. With `keep` of 2 or more, older generations are there as well.

    >>> import tempfile
    >>> from tinygrad_bn import nn
    >>> model = nn.Linear(2, 1)
    >>> with tempfile.TemporaryDirectory() as path, Folder(path, keep=2) as folder:
    ...     for step in range(4):
    ...         _ = folder.save(step, model, best=step == 1)
    ...     sorted(p.name for p in Path(path).glob("*.safetensors"))
    ['best.safetensors', 'step-00000002.safetensors', 'step-00000003.safetensors']
    """

    def __init__(self, path: str | os.PathLike[str], *, keep: int = 3) -> None:
        self.path, self.keep = Path(path), expect_integer("keep", keep, 1)
        self._lock: _Lock | None = None

    def save(self, step: int, model: Module, *, best: bool = False, **others: Any) -> Path:
        """Save generation `step`, as `checkpoint.save` does with `others`; with `best`, as the best one too.

        Old generations are deleted when the new one is safely there. Raises OSError if that fails, BlockingIOError if
        another process writes into the folder.
        """
        step = expect_integer("step", step, 0)
        expect_flags(best=best)
        with self._locked().writing:
            for name in os.listdir(self.path):
                if TEMPORARY.fullmatch(name):  # its writer is dead, since this process has the lock
                    (self.path / name).unlink(missing_ok=True)
            if best:  # first: who goes on from the generation relies on it
                state.save(self.path / BEST, model, **others)
            path = state.save(self.path / f"step-{step:08d}.safetensors", model, **others)
            others_there = [p for p in self.generations() if p != path]
            for old in others_there[: max(0, len(others_there) + 1 - self.keep)]:
                old.unlink(missing_ok=True)
        return path

    def generations(self) -> list[Path]:
        """The generations that are there, the newest last."""
        names = os.listdir(self.path) if self.path.is_dir() else []
        found = [(int(m[1]), name) for name in names if (m := GENERATION.fullmatch(name))]
        return [self.path / name for _, name in sorted(found)]

    def newest(self) -> Path | None:
        """The newest generation, or None."""
        return next(reversed(self.generations()), None)

    def best(self) -> Path | None:
        """The best one, or None."""
        path = self.path / BEST
        return path if path.is_file() else None

    def read_newest(self) -> Contents:
        """The contents of the newest generation; a damaged one is passed over with a warning.

        Raises FileNotFoundError if there is none, CheckpointError if all are damaged.
        """
        found = self.generations()
        if not found:
            raise FileNotFoundError(f"{self.path}: there is no checkpoint in this folder")
        for path in reversed(found):
            try:
                return read(path)
            except CheckpointError as error:
                warn_caller(f"passed over a damaged checkpoint: {error}")
        raise CheckpointError(self.path, f"all {len(found)} checkpoints in this folder are damaged")

    def load_newest(self, model: Module, **others: Any) -> Contents:
        """Load what `read_newest` gives, as `checkpoint.load` does. Raises CheckpointError if it does not fit."""
        return state.apply(self.read_newest(), model, **others)

    def close(self) -> None:
        """Let other processes write into the folder."""
        self._lock = None

    def lock(self) -> None:
        """Lock the folder, as `save` does, and make it if it is missing; errors as of `save`."""
        self._locked()

    def _locked(self) -> _Lock:
        self.path.mkdir(parents=True, exist_ok=True)
        if self._lock is None or self._lock.process != os.getpid():  # a forked child has to ask for itself
            key = os.getpid(), self.path.resolve()
            with LOCKING:
                lock = LOCKS.get(key)
                self._lock = LOCKS[key] = _Lock(self.path) if lock is None else lock
        return self._lock

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
