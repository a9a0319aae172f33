"""The embedded data, files from outside (damaged ones are named), splitting, and mini-batches."""

import gzip
import math
import os
import re
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from tinygrad_bn import datasets, manual_seed
from tinygrad_bn.datasets import Batches, DataError, Dataset, fetch, files, load, read_csv, read_idx

IDX_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
EMBEDDED = Path(datasets.__file__).parent / "data"


def idx(array: np.ndarray) -> bytes:
    """An IDX file, written after its specification."""
    header = bytes([0, 0, IDX_CODES[array.dtype.str[1:]], array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("idx")


def test_mnist5k():
    data = load("mnist5k")
    assert data.x.shape == (5000, 28, 28)
    assert data.x.dtype == np.uint8
    assert (data.x.min(), data.x.max()) == (0, 255)
    assert data.y.dtype == np.int64
    assert data.classes == tuple("0123456789")
    assert np.bincount(data.y).tolist() == [500] * 10
    assert np.bincount(data.y[:1000]).min() > 50, "in random order, not sorted by label"
    assert len(np.unique(data.x, axis=0)) == 5000
    assert "5000, 28, 28" in repr(data)


def test_iris():
    data = load("iris")
    assert (data.x.shape, data.x.dtype, data.y.dtype) == ((150, 4), np.float32, np.int64)
    assert data.classes == ("setosa", "versicolor", "virginica")
    assert np.bincount(data.y).tolist() == [50, 50, 50]
    with pytest.raises(DataError, match=r"no data set or folder 'nope'.*mnist5k.*titanic"):
        load("nope")
    with pytest.raises(ValueError, match=r"iris has only one part.*load\('iris'\)\.split"):
        load("iris", part="test")
    assert data.x[0].tolist() == np.array([5.1, 3.5, 1.4, 0.2], np.float32).tolist()


def test_digits():
    data = load("digits")
    assert (data.x.shape, data.x.dtype, data.y.dtype) == ((1797, 8, 8), np.uint8, np.int64)
    assert np.bincount(data.y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (data.x.min(), data.x.max()) == (0, 16)
    assert (data.scaled().x.min(), data.scaled().x.max()) == (0, 1)
    assert data.x[0, 0].tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    assert data.y[:3].tolist() == [0, 1, 2]


def test_titanic():
    """The figures are the published ones of the 891 passengers."""
    data = load("titanic")
    assert (data.x.shape, data.x.dtype, data.classes) == ((891, 3), np.float32, ("died", "survived"))
    assert np.bincount(data.y).tolist() == [549, 342]
    pclass, age, fare = data.x.astype(np.float64).T
    assert np.bincount(pclass.astype(int)).tolist() == [0, 216, 184, 491]
    assert np.isnan(age).sum() == 177
    assert (np.nanmin(age), np.nanmax(age)) == (np.float32(0.42), 80)
    assert np.nanmean(age) == pytest.approx(29.699118, abs=1e-6)
    assert fare.mean() == pytest.approx(32.204208, abs=1e-6)
    assert [round(data.y[pclass == c].mean(), 4) for c in (1, 2, 3)] == [0.6296, 0.4728, 0.2424]
    known = data.complete()
    assert len(known) == 714
    assert not np.isnan(known.x).any()
    assert known.y.sum() == 290
    assert len(load("digits").complete()) == 1797


@pytest.mark.parametrize(
    "name",
    [
        "mnist5k-images-idx3-ubyte.gz",
        "mnist5k-labels-idx1-ubyte.gz",
        "digits-labels-idx1-ubyte.gz",
        "iris.csv",
        "titanic.csv",
    ],
)
def test_a_changed_byte_of_the_embedded_data_is_noticed(name, tmp_path, monkeypatch):
    for path in EMBEDDED.iterdir():
        shutil.copyfile(path, tmp_path / path.name)  # without its mode: the package may be read-only
    monkeypatch.setattr(fetch, "EMBEDDED", tmp_path)
    dataset = re.split(r"[-.]", name)[0]
    assert load(dataset).name == dataset
    content = (tmp_path / name).read_bytes()
    content = bytearray(gzip.decompress(content) if name.endswith(".gz") else content)
    content[-3] ^= 1  # still a well-formed file
    (tmp_path / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    with pytest.raises(DataError, match=f"{name}.*SHA-256"):
        load(dataset)


@given(st.data(), st.sampled_from(sorted(IDX_CODES)), st.booleans())
def test_idx_round_trip(folder, data, dtype, compressed):
    array = data.draw(arrays(dtype, array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)))
    content = idx(array)
    (folder / "round").write_bytes(gzip.compress(content) if compressed else content)
    read = read_idx(folder / "round")
    assert (read.dtype, read.shape) == (array.dtype, array.shape)
    assert read.tobytes() == array.tobytes()  # also NaN and -0.0
    assert read.flags.writeable
    assert read.dtype.isnative


@pytest.mark.parametrize("compressed", [False, True])
def test_idx_cut_anywhere_or_too_long(tmp_path, compressed):
    path = tmp_path / "cut"
    content = idx(np.arange(6, dtype=np.int16).reshape(2, 3))
    for wrong in [*(content[:n] for n in range(len(content))), content + b"\0"]:
        path.write_bytes(gzip.compress(wrong) if compressed else wrong)
        with pytest.raises(DataError) as error:
            read_idx(path)
        assert str(path) in str(error.value)


def test_gzip_cut_or_changed_anywhere(tmp_path):
    path = tmp_path / "damaged.gz"
    content = gzip.compress(idx(np.arange(20, dtype=np.uint8)))
    cut = [content[:n] for n in range(len(content))]
    changed = [content[:n] + bytes([content[n] ^ 0x55]) + content[n + 1 :] for n in range(10, len(content))]
    for wrong in cut + changed:
        path.write_bytes(wrong)
        with pytest.raises(DataError) as error:
            read_idx(path)
        assert str(path) in str(error.value)


@given(content=st.binary(max_size=40))
def test_arbitrary_bytes_are_refused_as_idx(folder, content):
    assume(content[:2] != b"\0\0")
    (folder / "noise").write_bytes(content)
    with pytest.raises(DataError, match="noise"):
        read_idx(folder / "noise")


@pytest.mark.parametrize("magic", [b"\0\0\x0a\1", b"\0\1\x08\1", b"\0\0\0\0"])
def test_wrong_magic(tmp_path, magic):
    (tmp_path / "magic").write_bytes(magic + b"\0\0\0\1x")
    with pytest.raises(DataError, match=f"magic is not an IDX file: it starts with {magic.hex(' ')}"):
        read_idx(tmp_path / "magic")


def test_a_file_without_magic_of_any_length(tmp_path):
    (tmp_path / "long").write_bytes(b"\1" * 5000)
    with pytest.raises(DataError, match="long is not an IDX file: it starts with 01 01 01 01"):
        read_idx(tmp_path / "long")


def header(*shape):
    return b"\0\0\x08" + bytes([len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)


@pytest.mark.parametrize("announced", [(10,), (1020 - 4,), (1020 - 8,), (3, 5), (2000,)])
@pytest.mark.parametrize("excess", [1, 1 << 26])
def test_no_more_is_decompressed_than_the_header_announces(tmp_path, announced, excess):
    content = header(*announced) + bytes(int(np.prod(announced)))
    bomb = tmp_path / "bomb.gz"
    bomb.write_bytes(gzip.compress(content))
    assert read_idx(bomb).shape == announced
    bomb.write_bytes(gzip.compress(content + bytes(excess)))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=rf"bomb\.gz is damaged: it has more than the {len(content)} bytes"):
            read_idx(bomb)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("written", [bytes, gzip.compress])
def test_a_header_may_announce_what_is_not_there(tmp_path, written):
    (tmp_path / "short").write_bytes(written(header(*[1 << 31] * 3) + bytes(100)))
    with pytest.raises(DataError, match=r"short is damaged: it has 116 bytes, an array of shape .* needs"):
        read_idx(tmp_path / "short")


def test_a_table_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CSV_LIMIT", 1 << 20)
    path = tmp_path / "bomb.csv"
    path.write_bytes(gzip.compress(b"a,b\n" + b"1,2\n" * (1 << 19)))
    with pytest.raises(DataError, match=r"bomb\.csv is damaged: it has more than the 1048576 bytes"):
        read_csv(path)


def test_an_archive_is_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "GZIP_LIMIT", 1 << 20)
    content = header(1 << 21) + bytes(1 << 21)
    (tmp_path / "zeros").write_bytes(content)
    assert read_idx(tmp_path / "zeros").shape == (1 << 21,), "what is there without gzip is no surprise"
    (tmp_path / "zeros.gz").write_bytes(gzip.compress(content))
    with pytest.raises(DataError, match=r"zeros\.gz has more than 1048576 bytes in gzip; if you trust it, decompress"):
        read_idx(tmp_path / "zeros.gz")


@pytest.mark.parametrize("read", [read_idx, read_csv])
def test_nothing_is_allocated_for_what_may_come(tmp_path, read):
    path = tmp_path / "small.gz"
    path.write_bytes(gzip.compress(header(1 << 30) + os.urandom(100_000)))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"small\.gz"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("unit", [b",", b"\n", b"\r", b"1,"])
def test_cells_of_a_table_are_limited(tmp_path, monkeypatch, unit):
    monkeypatch.setattr(files, "CSV_CELLS", 100)
    (tmp_path / "wide.csv").write_bytes(b"a,b\n" + unit * 101)
    with pytest.raises(DataError, match=r"wide\.csv is too large a table: it has more than 100 commas and line breaks"):
        read_csv(tmp_path / "wide.csv")


@pytest.mark.parametrize("read", [read_idx, read_csv])
@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_names_that_no_file_can_have(tmp_path, read, name):
    with pytest.raises(DataError, match="cannot read '") as raised:
        read(tmp_path / name)
    assert str(raised.value).isprintable()


@pytest.mark.parametrize("axes", [9, 64, 65, 255])
def test_a_header_of_many_axes_is_not_printed(tmp_path, axes):
    (tmp_path / "axes").write_bytes(header(*[(1 << 32) - 1] * axes))
    with pytest.raises(DataError, match=rf"an array of {axes} axes needs more than any memory has$"):
        read_idx(tmp_path / "axes")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are POSIX's")
def test_endless_files_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        for read in (read_idx, read_csv):
            with pytest.raises(DataError, match=f"{path} is not a regular file"):
                read(path)


def test_missing_files_and_folders_in_their_place(tmp_path):
    for read in (read_idx, read_csv):
        for path in (tmp_path / "absent", tmp_path):
            with pytest.raises(DataError) as error:
                read(path)
            assert str(path) in str(error.value)


def test_csv(tmp_path):
    path = tmp_path / "table.csv"
    for content in (b'name,size\n"a,b",1\nc,2\n', b'name,size\r\n"a,b",1\r\nc,2'):
        for written in (content, gzip.compress(content)):
            path.write_bytes(written)
            assert read_csv(path) == (["name", "size"], [["a,b", "1"], ["c", "2"]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a,b\n1,2\n3\n", "line 3: 1 fields, but the header has 2"),
        (b"a,b\n1,2,3\n", "line 2: 3 fields, but the header has 2"),
        (b"a,b\n1,2\n\n3,4\n", "line 3: 0 fields"),
        (b"", "not a CSV file with a header: it is empty"),
        (b"\n\n\n", "not a CSV file with a header: its first line is empty"),
        (b"a,b\n1,2\n" + b"x" * 200_000 + b",2\n", "not a CSV file in UTF-8, after line 3: field larger"),
        (b'a,b\n"1,2\n', "not a CSV file"),
        (b"a,b\n\xff,2\n", "not a CSV file"),
    ],
)
def test_csv_errors(tmp_path, content, message):
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.csv.*{message}"):
        read_csv(tmp_path / "bad.csv")


def test_folder_of_idx_files(tmp_path):
    rng = np.random.default_rng(0)
    for prefix, n in (("train", 6), ("t10k", 4)):
        images, labels = rng.integers(0, 256, (n, 3, 2), np.uint8), np.arange(n, dtype=np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (tmp_path / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))
        data = load("letters", source=str(tmp_path), part="train" if prefix == "train" else "test")
        assert (data.name, data.source, len(data)) == ("letters", str(tmp_path), n)
        assert np.array_equal(data.x, images)
        assert (data.y.tolist(), data.y.dtype, data.classes) == (list(range(n)), np.int64, tuple("012345")[:n])
    with pytest.raises(ValueError, match="'train' or 'test'; got 'valid'"):
        load(source=tmp_path, part="valid")
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(idx(np.zeros(7, np.uint8)))
    with pytest.raises(DataError, match="6 samples, but 7 labels") as error:
        load(source=tmp_path)
    assert str(tmp_path) in str(error.value)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(idx(np.zeros((6, 1), np.uint8)))
    with pytest.raises(DataError, match=r"train-labels.* has shape \(6, 1\)"):
        load(source=tmp_path)
    for wrong in (np.array([0, 1, -1, 0, 0, 0], np.int8), np.zeros(6, np.float32), np.full(6, 999, np.int16)):
        (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(idx(wrong))
        with pytest.raises(DataError, match=r"labels in .* are .* not integers from 0 to 255"):
            load(source=tmp_path)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(np.zeros((6, 3, 2), np.float32)))
    with pytest.raises(DataError, match=r"images in .* are float32, not uint8"):
        load(source=tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(DataError, match=r"neither t10k-images-idx3-ubyte\.gz nor") as error:
        load(source=tmp_path, part="test")
    assert str(tmp_path) in str(error.value)
    assert "another name" not in str(error.value), "that is advice for the names of the catalogue"


@given(y=arrays(np.int64, st.integers(2, 60), elements=st.integers(0, 3)), seed=st.integers(0, 9), data=st.data())
def test_split(y, seed, data):
    held_out = data.draw(st.integers(1, len(y) - 1))
    whole = Dataset("d", np.arange(len(y)), y, tuple("0123"), "here")
    first, second = whole.split(held_out, seed)
    assert (len(first), len(second)) == (len(y) - held_out, held_out)
    assert sorted([*first.x, *second.x]) == whole.x.tolist(), "disjoint, and nothing is lost"
    assert np.array_equal(y[first.x], first.y)
    for c in np.unique(y):
        exact = held_out * np.mean(y == c)
        assert abs(np.sum(second.y == c) - exact) <= len(np.unique(y)) / 2 + 1, "the classes keep their proportions"
    again = whole.split(held_out, seed)
    assert np.array_equal(again[1].x, second.x)


def test_split_of_balanced_classes_is_exact_and_depends_on_the_seed():
    data = load("iris")
    parts = [data.split(30, seed)[1] for seed in (0, 1)]
    assert [np.bincount(part.y).tolist() for part in parts] == [[10, 10, 10]] * 2
    assert not np.array_equal(parts[0].x, parts[1].x)
    for wrong in (0, 150, -1):
        with pytest.raises(ValueError, match=f"hold out {wrong} of 150"):
            data.split(wrong)


def test_scaled():
    pixels = Dataset("p", np.array([[0, 51, 255]], np.uint8), np.zeros(1, np.int64), ("0",), "here")
    assert pixels.scaled().x.dtype == np.float32
    assert pixels.scaled().x.tolist() == [[0.0, np.float32(0.2), 1.0]]
    assert pixels.x.dtype == np.uint8
    with pytest.raises(TypeError, match="p is float32"):
        pixels.scaled().scaled()


@given(n=st.integers(1, 40), batch_size=st.integers(1, 45), seed=st.integers(0, 9), drop_last=st.booleans())
def test_an_epoch(n, batch_size, seed, drop_last):
    batches = Batches(np.arange(n), np.arange(n) * 10, batch_size, seed=seed, drop_last=drop_last)
    epochs = [list(batches) for _ in range(3)]
    for epoch in epochs:
        seen = [i for x, _ in epoch for i in x.tolist()]
        assert len(set(seen)) == len(seen)
        assert len(seen) == (n - n % batch_size if drop_last else n)
        assert all(np.array_equal(y, x * 10) for x, y in epoch)
        assert len(epoch) == len(batches) == (math.floor if drop_last else math.ceil)(n / batch_size)
        assert {len(x) for x, _ in epoch[:-1]} <= {batch_size}
        assert not epoch or min(len(x) for x, _ in epoch) == batches.smallest
    resumed = Batches(np.arange(n), np.arange(n) * 10, batch_size, seed=seed, drop_last=drop_last)
    resumed.epoch = 2
    assert [x.tolist() for x, _ in resumed] == [x.tolist() for x, _ in epochs[2]]


def test_orders():
    def order(seed: int, epoch: int, **options: bool) -> list[int]:
        batches = Batches(np.arange(50), np.arange(50), 50, seed=seed, **options)
        batches.epoch = epoch
        return next(iter(batches))[0].tolist()

    orders = [order(seed, epoch) for seed in range(4) for epoch in range(4)]
    assert len(set(map(tuple, orders))) == 16, "every seed and every epoch has an order of its own"
    assert order(3, 2) == orders[3 * 4 + 2]
    assert order(0, 0, shuffle=False) == order(7, 3, shuffle=False) == list(range(50))


def test_batches_errors():
    with pytest.raises(ValueError, match="3 samples, but 2 targets"):
        Batches(np.zeros(3), np.zeros(2), 1)
    with pytest.raises(ValueError, match="at least 1; got 0"):
        Batches(np.zeros(3), np.zeros(3), 0)
    x = np.zeros(3)
    for option, wrong in (
        ("batch_size", [2.5, "2", True, None, math.nan]), ("shuffle", ["no", 1, None]), ("drop_last", ["no", 0, None]),
        ("seed", [-1, "0", 1.5, True, np.random.RandomState(0)]),
    ):  # fmt: skip
        for value in wrong:
            with pytest.raises((TypeError, ValueError), match=option):
                Batches(x, x, **{"batch_size": 2, option: value})
    for pair in (([1, 2], [1, 2]), (x, 3), (np.zeros(()), x), (None, x)):
        with pytest.raises(TypeError, match=r"arrays of shape \(N, \.\.\.\)"):
            Batches(*pair, 2)
        with pytest.raises(TypeError, match=r"arrays of shape \(N, \.\.\.\)"):
            Dataset("own", *pair, (), "memory")


def test_a_generator_and_the_default_one_go_on():
    def orders(seed: int | np.random.Generator | None) -> list[list[int]]:
        return [next(iter(Batches(np.arange(50), np.arange(50), 50, seed=seed)))[0].tolist() for _ in range(3)]

    manual_seed(3)
    first = orders(None)
    manual_seed(3)
    assert orders(None) == first
    assert orders(np.random.default_rng(3)) == first
    assert len(set(map(tuple, first))) == 3
    assert len(set(map(tuple, orders(0)))) == 1, "a number is a fixed order"


def test_options_of_loading_and_splitting_are_checked():
    flowers = load("iris")
    for seed in (-1, None, "0", 1.5):
        with pytest.raises((TypeError, ValueError), match="seed has to be"):
            flowers.split(30, seed)
    for held_out in ("30", None, math.nan, True):
        with pytest.raises(ValueError, match="cannot hold out"):
            flowers.split(held_out)
    for name in (3, ["iris"], b"iris"):
        with pytest.raises(TypeError, match="name has to be a name or a path"):
            load(name)
        with pytest.raises(TypeError, match="source has to be a name or a path"):
            load("iris", name)
    for part in (3, ["train"], None):
        with pytest.raises(ValueError, match="iris has only one part"):
            load("iris", part=part)
        with pytest.raises(ValueError, match="part is 'train' or 'test'"):
            load("mnist", part=part)
    with pytest.raises((TypeError, ValueError), match="white has to be"):
        Dataset("own", np.zeros(2), np.zeros(2), (), "memory", white=0)


@pytest.mark.parametrize("header", [bytes([0, 0, 8, 255]) + b"\0\0\0\1" * 255 + b"x", bytes(4) + b"\xff" * 12])
def test_an_idx_header_of_impossible_size(tmp_path, header):
    path = tmp_path / "impossible"
    path.write_bytes(header[:2] + b"\x08" + header[3:])
    with pytest.raises(DataError, match="impossible"):
        read_idx(path)


def test_csv_with_quotes_a_byte_order_mark_and_odd_line_breaks(tmp_path):
    path = tmp_path / "odd.csv"
    path.write_text('\ufeffa,b\r\n"x\ny","1\u20282"\r\n', encoding="utf-8", newline="")
    assert read_csv(path) == (["a", "b"], [["x\ny", "1\u20282"]])
    path.write_text('a,b\n"x\ny",2\n1\n')
    with pytest.raises(DataError, match="line 4"):
        read_csv(path)


@pytest.mark.parametrize("name", ["a" * 5000, "a/" * 5000, "a\0b"])
def test_names_that_can_be_no_path_are_unknown_names(name):
    with pytest.raises(DataError, match=r"no data set or folder 'a.*; the data sets are mnist5k") as raised:
        load(name)
    assert len(str(raised.value)) < 400
