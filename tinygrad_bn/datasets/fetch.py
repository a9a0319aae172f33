"""Find the files of a data set: in the user's folder, the cache, an installed copy, or on a mirror."""

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
TIMEOUT = 10.0  # seconds, for the first byte from a mirror and between reads


def cache_folder(name: str) -> Path:
    """The folder of downloads, below XDG_CACHE_HOME or the cache folder of the operating system."""
    import pooch

    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) / "tinygrad_bn" if base else pooch.os_cache("tinygrad_bn")) / "datasets" / name


def installed_folders(known: Known) -> list[Path]:
    """Folders in which a Linux distribution installs the data set."""
    if not known.installed:
        return []
    shares = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    return [Path(share) / "datasets" / known.installed for share in shares.split(":")]


def find(name: str, known: Known, part: str, source: str | Path | None) -> tuple[Array, Array, str]:
    """Samples and labels from the first place that has the files, and a description of that place.

    The place is `source`, if given, or the package, for embedded data. Otherwise they are tried in this order:
    `$TINYGRAD_BN_DATA/name`, the cache, an installed copy, and the mirrors. Downloads are stored in the cache. A
    damaged file in the cache is downloaded again.

    Raises:
        DataError: no place has the files, or a file in the user's folder is damaged or a different one.
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
            raise DataError(f"{error}; if these are your own data, use another name than {name!r}") from error
    if not known.mirrors:
        return read(EMBEDDED, "embedded in the package")
    tried = []
    if root := os.environ.get("TINYGRAD_BN_DATA"):
        folder = Path(root) / name
        try:
            return read(folder, str(folder))
        except MissingError as error:  # the folder may hold other data sets only
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
    """The cache folder, or a temporary one if the cache is not writable."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=cache).close()
    except OSError as error:
        warnings.warn(
            f"{cache} is not writable ({error}): the download will not be kept; "
            "set XDG_CACHE_HOME to a writable folder",
            stacklevel=5,  # the caller of datasets.load
        )
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        yield cache


def _download(name: str, known: Known, files: Sequence[File], folder: Path, tried: list[str]) -> str:
    """Download the `.gz` files missing in `folder`, each from the first mirror that works; return the mirrors used.

    A file appears in the folder only when complete and with the right hash, so several processes can run this at once.
    """
    import pooch

    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=1 << 16, timeout=TIMEOUT)
    used = {}
    for file in files:
        archive = f"{file.name}.gz"
        for mirror in known.mirrors:
            try:
                pooch.retrieve(mirror + archive, f"sha256:{file.archive}", archive, folder, downloader=downloader)
            except (OSError, ValueError) as error:  # connection, HTTP, or wrong hash
                tried.append(f"{mirror}{archive}: {error}")
            else:
                used[mirror] = True
                break
        else:
            places, archives = "\n  ".join(tried), " and ".join(f"{file.name}.gz" for file in files)
            raise DataError(
                f"{name} is not on this machine and could not be downloaded:\n  {places}\n"
                f"Connect to the network; or {known.offline}; or copy {archives} to a folder and pass it as source=, "
                f"or to $TINYGRAD_BN_DATA/{name}"
            )
    return ", ".join(used)
