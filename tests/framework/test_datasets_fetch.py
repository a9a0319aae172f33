"""The order in which data are searched for, and downloads from mirrors with every fault."""

import gzip
import hashlib
import itertools
import json
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from tinygrad_bn.datasets import DataError, catalogue, fetch, load
from tinygrad_bn.datasets.catalogue import KNOWN, File, Known

RNG = np.random.default_rng(0)
CONTENTS = {}  # of the files of a small data set under MNIST's names
for prefix, n in (("train", 60), ("t10k", 10)):
    for stem, shape in ((f"{prefix}-images-idx3-ubyte", (n, 28, 28)), (f"{prefix}-labels-idx1-ubyte", (n,))):
        header = bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes()
        CONTENTS[stem] = header + RNG.integers(0, 10, shape, np.uint8).tobytes()
ARCHIVES = {f"{stem}.gz": gzip.compress(content, mtime=0) for stem, content in CONTENTS.items()}
TRAIN = [name for name in ARCHIVES if "train" in name]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Mirrors:
    """A local server: `answers` maps paths to contents or statuses; `requests` lists the paths requested."""

    def __init__(self) -> None:
        self.answers: dict[str, bytes | int] = {f"/{m}/{name}": a for name, a in ARCHIVES.items() for m in "ab"}
        self.announced: dict[str, int] = {}  # wrong Content-Length headers, by path
        self.requests: list[str] = []
        self.together = threading.Barrier(1)  # how many requests for a file wait for each other
        mirrors = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirrors.requests.append(self.path)
                mirrors.together.wait(timeout=20)
                answer = mirrors.answers.get(self.path, 404)
                if isinstance(answer, int):
                    self.send_error(answer)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(mirrors.announced.get(self.path, len(answer))))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                """Nothing: tests are quiet."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.urls = tuple(f"http://127.0.0.1:{self.server.server_port}/{m}/" for m in "ab")

    def fail(self, fault: str, mirror: str = "a") -> None:
        """One mirror answers every request with this fault."""
        for path in [path for path in self.answers if path.startswith(f"/{mirror}/")]:
            answer = ARCHIVES[path[3:]]
            self.answers[path] = {
                "not found": 404,
                "out of order": 503,
                "interrupted": answer[: len(answer) // 2],
                "cut without notice": answer[: len(answer) // 2],
                "empty": b"",
                "a page": b"<html>Please log in to this network</html>",
                "other data": gzip.compress(bytes([*CONTENTS[path[3:-3]][:-1], 11]), mtime=0),
            }[fault]
            if fault == "interrupted":
                self.announced[path] = len(answer)


FAULTS = ["not found", "out of order", "interrupted", "cut without notice", "empty", "a page", "other data"]


@pytest.fixture
def mirrors() -> Iterator[Mirrors]:
    mirrors = Mirrors()
    thread = threading.Thread(target=mirrors.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield mirrors
    mirrors.server.shutdown()
    mirrors.server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def places(tmp_path: Path, mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """Folders of this test, in the order of search, and its mirrors, under mnist's name."""
    files = [File(stem, sha256(content), sha256(ARCHIVES[f"{stem}.gz"])) for stem, content in CONTENTS.items()]
    small = Known(
        {"train": tuple(files[:2]), "test": tuple(files[2:])}, tuple("0123456789"), mirrors.urls, "small", "do without"
    )
    monkeypatch.setitem(KNOWN, "mnist", small)
    monkeypatch.setenv("TINYGRAD_BN_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_DATA_DIRS", f"{tmp_path / 'none'}:{tmp_path / 'share'}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return {
        "data": tmp_path / "data" / "mnist",
        "cache": tmp_path / "cache" / "tinygrad_bn" / "datasets" / "mnist",
        "installed": tmp_path / "share" / "datasets" / "small",
    }


@pytest.fixture
def no_network(mirrors: Mirrors, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setitem(KNOWN, "mnist", Known(**{**vars(KNOWN["mnist"]), "mirrors": (f"http://127.0.0.1:{port}/c/",)}))


def put(folder: Path, *names: str) -> Path:
    """Place archives into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or ARCHIVES:
        (folder / name).write_bytes(ARCHIVES[name])
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def check(data, part: str = "train") -> None:
    prefix = "train" if part == "train" else "t10k"
    assert data.x.tobytes() == CONTENTS[f"{prefix}-images-idx3-ubyte"][16:]
    assert data.y.astype(np.uint8).tobytes() == CONTENTS[f"{prefix}-labels-idx1-ubyte"][8:]


def test_a_download_and_the_cache(mirrors, places, caplog):
    caplog.set_level("INFO", "tinygrad_bn.datasets")
    first = load("mnist")
    check(first)
    assert first.source == f"downloaded from {mirrors.urls[0]}"
    assert first.source in caplog.text
    assert mirrors.requests == [f"/a/{name}" for name in TRAIN], "the asked part alone"
    assert names(places["cache"]) == sorted(TRAIN)
    again = load("mnist")
    check(again)
    assert again.source == str(places["cache"])
    assert len(mirrors.requests) == 2, "no request for what is in the cache"
    check(load("mnist", part="test"), "test")
    assert len(mirrors.requests) == 4


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_mirror_is_passed_over(fault, mirrors, places):
    mirrors.fail(fault)
    data = load("mnist")
    check(data)
    assert data.source == f"downloaded from {mirrors.urls[1]}"
    assert names(places["cache"]) == sorted(TRAIN), "nothing half-finished stays"


@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_but_bad_mirrors(fault, mirrors, places):
    for mirror in "ab":
        mirrors.fail(fault, mirror)
    with pytest.raises(DataError, match="mnist is not on this machine and could not be downloaded") as error:
        load("mnist")
    for told in (
        *mirrors.urls,
        *map(str, places.values()),
        "do without",
        "source=",
        "$TINYGRAD_BN_DATA/mnist",
        TRAIN[1],
    ):
        assert told in str(error.value)
    assert names(places["cache"]) == []
    mirrors.answers |= {f"/a/{name}": archive for name, archive in ARCHIVES.items()}
    mirrors.announced.clear()
    check(load("mnist"))


def test_each_file_from_the_mirror_that_has_it(mirrors):
    del mirrors.answers[f"/a/{TRAIN[1]}"]
    data = load("mnist")
    check(data)
    assert data.source == f"downloaded from {', '.join(mirrors.urls)}"


@pytest.mark.usefixtures("no_network")
def test_no_network(places):
    with pytest.raises(DataError, match=r"/c/train-images.*refused"):
        load("mnist")
    put(places["cache"])
    check(load("mnist"))


@pytest.mark.parametrize("have", list(itertools.product([False, True], repeat=3)), ids=str)
def test_the_order_of_places(have, mirrors, places):
    held = [folder for folder, there in zip(places.values(), have, strict=True) if there]
    for folder in held:
        put(folder)
    data = load("mnist", part="test")
    check(data, "test")
    assert data.source == (str(held[0]) if held else f"downloaded from {mirrors.urls[0]}")
    assert len(mirrors.requests) == (0 if held else 2)


def test_a_folder_with_one_file_of_two_is_incomplete(mirrors, places):
    for folder in places.values():
        put(folder, TRAIN[0])
    check(load("mnist"))
    assert mirrors.requests == [f"/a/{TRAIN[1]}"], "what the cache has is not fetched again"
    assert names(places["data"]) == TRAIN[:1], "a folder of the user's is left as it was"


def damaged(name: str) -> list[bytes]:
    """Contents that may stand in place of an archive; the last is a valid archive of other data."""
    archive, content = ARCHIVES[name], CONTENTS[name.removesuffix(".gz")]
    return [archive[:-9], b"", archive[:40] + b"\0" + archive[41:], gzip.compress(content[:-1] + b"\x0b", mtime=0)]


@pytest.mark.parametrize("name", TRAIN)
@pytest.mark.parametrize("kind", range(4))
def test_a_damaged_file(kind, name, mirrors, places, monkeypatch):
    for place in ("cache", "installed"):
        (put(places[place]) / name).write_bytes(damaged(name)[kind])
    data = load("mnist")
    check(data)
    assert "downloaded" in data.source
    assert mirrors.requests == [f"/a/{name}"]
    check(load("mnist"))
    assert len(mirrors.requests) == 1, "the cache has been mended"

    (put(places["data"]) / name).write_bytes(damaged(name)[kind])
    with pytest.raises(DataError, match=str(places["data"] / name)):
        load("mnist")
    assert (places["data"] / name).read_bytes() == damaged(name)[kind], "a file of the user's is never replaced"
    with pytest.raises(DataError, match=rf"{places['data'] / name}.*another name than 'mnist'"):
        load("mnist", source=places["data"])
    assert len(mirrors.requests) == 1


def test_a_damaged_plain_file_is_replaced_by_the_archive(mirrors, places):
    stem = TRAIN[0].removesuffix(".gz")
    (put(places["cache"], TRAIN[1]) / stem).write_bytes(CONTENTS[stem][:-1])
    check(load("mnist"))
    check(load("mnist"))
    assert mirrors.requests == [f"/a/{TRAIN[0]}"]


@pytest.mark.usefixtures("no_network")
def test_a_damaged_file_without_a_network_is_named(places):
    (put(places["cache"]) / TRAIN[0]).write_bytes(b"")
    with pytest.raises(DataError, match=f"{places['cache'] / TRAIN[0]} is not the expected file"):
        load("mnist")


def test_a_source_is_the_only_place(mirrors, places, tmp_path):
    put(places["cache"])
    with pytest.raises(DataError, match=f"neither .* in {tmp_path / 'mine'}"):
        load("mnist", source=tmp_path / "mine")
    mine = put(tmp_path / "mine", *TRAIN)
    data = load("mnist", source=mine)
    check(data)
    assert data.source == str(mine)
    for stem, content in CONTENTS.items():
        (tmp_path / "mine" / stem).write_bytes(content)
    check(load("mnist", source=mine, part="test"), "test")
    assert mirrors.requests == []


def test_a_folder_instead_of_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "letters")
    for folder in ("letters", Path("letters"), tmp_path / "letters"):
        data = load(folder, part="test")
        check(data, "test")
        assert (data.name, data.source) == ("letters", str(folder))
    put(tmp_path / "iris")
    assert load("iris").name == "iris"
    assert len(load("iris")) == 150, "a name is not taken for a folder"


@pytest.mark.parametrize("how", ["a file in its place", "read-only"])
def test_a_cache_that_cannot_be_written_to(how, places, tmp_path, monkeypatch):
    if how == "a file in its place":
        (tmp_path / "cache").write_bytes(b"")
    else:
        places["cache"] = Path("/proc/self")  # not even root can write here
        if not places["cache"].is_dir():
            pytest.skip("needs Linux")
        monkeypatch.setattr(fetch, "cache_folder", lambda name: places["cache"])
    with pytest.warns(UserWarning, match=f"{places['cache']} is not writable.*set XDG_CACHE_HOME") as warned:
        check(load("mnist"))
    assert warned[0].filename == __file__
    assert names(tmp_path / "temporary") == []


PROCESS = """
import json, sys
from tinygrad_bn import datasets
from tinygrad_bn.datasets.catalogue import KNOWN, File, Known
files, mirrors = json.loads(sys.argv[1])
KNOWN["mnist"] = Known({"train": [File(*file) for file in files]}, tuple("0123456789"), mirrors)
print(len(datasets.load("mnist")))
"""


def test_processes_at_once(mirrors, places):
    mirrors.together = threading.Barrier(3)  # all of them are in the midst of a download
    files = [(file.name, file.sha256, file.archive) for file in KNOWN["mnist"].parts["train"]]
    program = [sys.executable, "-W", "error", "-c", PROCESS, json.dumps([files, mirrors.urls])]
    running = [subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    for out, err in [process.communicate(timeout=60) for process in running]:
        assert out == "60\n", err
    assert names(places["cache"]) == sorted(TRAIN)
    assert mirrors.requests == [f"/a/{name}" for name in TRAIN for _ in range(3)]
    check(load("mnist"))


def test_the_cache_folder_without_a_variable(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert fetch.cache_folder("mnist").is_relative_to(Path.home())
    assert fetch.cache_folder("mnist").parts[-3:] == ("tinygrad_bn", "datasets", "mnist")


def test_the_catalogue():
    everything = {**KNOWN, "mnist": REAL_MNIST}
    assert set(everything) == {"mnist5k", "mnist", "fashion_mnist", "digits", "iris", "titanic"}
    hashes = []
    for known in everything.values():
        for file in itertools.chain(*known.parts.values()):
            hashes += [file.sha256, file.archive] if known.mirrors else [file.sha256]
        assert all(mirror.startswith("http") and mirror.endswith("/") for mirror in known.mirrors)
        assert bool(known.mirrors) == bool(known.offline)
    assert len(set(hashes)) == len(hashes)
    assert all(len(h) == 64 and set(h) <= set("0123456789abcdef") for h in hashes)
    assert [f.name for f in REAL_MNIST.parts["test"]] == ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
    assert not any(file.sha256 for part in catalogue.OWN.parts.values() for file in part)


REAL_MNIST = KNOWN["mnist"]
DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_debians_copy_of_fashion_mnist(monkeypatch):
    monkeypatch.delenv("XDG_DATA_DIRS")
    for part, n in (("train", 60000), ("test", 10000)):
        data = load("fashion_mnist", part=part)
        assert (data.x.shape, data.source) == ((n, 28, 28), str(DEBIAN))
        assert np.bincount(data.y).tolist() == [n // 10] * 10
        assert data.classes[9] == "Ankle boot"
