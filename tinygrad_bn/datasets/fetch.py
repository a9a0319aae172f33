"""Where the files of a data set come from: your own copy, the cache, an installed copy, or a mirror."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tinygrad_bn.datasets.catalogue import OWN, Known
from tinygrad_bn.datasets.files import DataError, File, MissingError, read_samples
from tinygrad_bn.tensor import Array

EMBEDDED = Path(__file__).parent / "data"
TIMEOUT = 10.0  # seconds to wait for a mirror's answer, and between pieces of it


def cache_folder(name: str) -> Path:
    """Where downloads are kept: below XDG_CACHE_HOME, or the folder that the operating system has for caches."""
    import pooch

    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) / "tinygrad_bn" if base else pooch.os_cache("tinygrad_bn")) / "datasets" / name


def installed_folders(known: Known) -> list[Path]:
    """Where a Linux distribution would have put the data set."""
    if not known.installed:
        return []
    shares = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    return [Path(share) / "datasets" / known.installed for share in shares.split(":")]


def find(name: str, known: Known, part: str, source: str | Path | None) -> tuple[Array, Array, str]:
    """The samples and classes in the first place that has the files, and a description of that place.

    That is `source` if it is given, and the package for what comes with it. Otherwise, in this order:
    `$TINYGRAD_BN_DATA/name`, the cache, an installed copy, and the mirrors, whose files are then in the cache. A
    damaged file in the cache is fetched again.

    Raises:
        DataError: the files are nowhere, or those in a folder of the user's are damaged or others.
    """
    files = known.parts[part]

    def read(folder: Path, place: str) -> tuple[Array, Array, str]:
        return *read_samples(folder, files, known.classes), place

    if source is not None:
        try:
            return read(Path(source), str(source))
        except DataError as error:
            if known is OWN:
                raise
            raise DataError(f"{error}; if these are data of your own, give them another name than {name!r}") from error
    if not known.mirrors:
        return read(EMBEDDED, "embedded in the package")
    tried = []
    if root := os.environ.get("TINYGRAD_BN_DATA"):
        folder = Path(root) / name
        try:
            return read(folder, str(folder))
        except MissingError as error:  # other data sets may well be there
            tried.append(str(error))
    cache = cache_folder(name)
    for folder in (cache, *installed_folders(known)):
        try:
            return read(folder, str(folder))
        except DataError as error:
            tried.append(str(error))
    with _writable(cache) as folder:
        mirrors = _download(name, known, files, folder, tried)
        return read(folder, f"downloaded from {mirrors}")


@contextmanager
def _writable(cache: Path) -> Iterator[Path]:
    """The cache, or a temporary folder where that cannot be written to."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        warnings.warn(
            f"{cache} cannot be written to ({error}): the download will not be kept; set XDG_CACHE_HOME to a folder "
            "that can be written to",
            stacklevel=5,  # whoever called datasets.load
        )
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        yield cache


def _download(name: str, known: Known, files: Sequence[File], folder: Path, tried: list[str]) -> str:
    """Fetch `.gz` files that `folder` has not, each from the first mirror that has it, and tell which were needed.

    A file appears in the folder when it is complete and its hash is right: several processes may do this at once.
    """
    import pooch

    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=1 << 16, timeout=TIMEOUT)
    used = {}
    for file in files:
        archive = f"{file.name}.gz"
        for mirror in known.mirrors:
            try:
                pooch.retrieve(mirror + archive, f"sha256:{file.archive}", archive, folder, downloader=downloader)
            except (OSError, ValueError) as error:  # of the connection, of HTTP, or another hash
                tried.append(f"{mirror}{archive}: {error}")
            else:
                used[mirror] = True
                break
        else:
            places, archives = "\n  ".join(tried), " and ".join(f"{file.name}.gz" for file in files)
            raise DataError(
                f"{name} is not on this machine and could not be downloaded:\n  {places}\n"
                f"Connect to the network; or {known.offline}; or get {archives} elsewhere, and give their folder as "
                f"source= or put them into $TINYGRAD_BN_DATA/{name}"
            )
    return ", ".join(used)
