"""Files that are replaced whole."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. At the end it replaces `path`; an error, as of a full disk, leaves `path`.

    After a power failure at any moment there is the file of before, or the new one, whole. Once the block is left it is
    the new one; on Windows, and where folders cannot be synced, it may still be that of before. If only the last step
    fails, the fsync of the folder, OSError is raised although the new file is there.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "there is something that is no file, and is not replaced", str(path))
    beside = path.with_name(f".tmp-{os.getpid()}-{secrets.token_hex(4)}-{path.name}")  # of the same suffix
    try:
        yield beside
        with beside.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # there folders cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot do this
            raise
    finally:
        os.close(descriptor)
