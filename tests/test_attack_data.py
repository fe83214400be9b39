"""The attack experiments' images: what is bundled, folders, tar files, tensorflow-datasets."""

import gzip
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from pictures import IDX_CODES, NAMES, digits, idx_bytes, packed, write_folder, write_pictures
from PIL import Image

from experiments.attack.data import load, read_idx

# --- the bundled test set -------------------------------------------------------------------------


def test_bundled_test_set_is_mnist():
    images, labels = load("mnist")
    assert images.shape == (10000, 28, 28, 1)
    assert images.dtype == np.float32
    assert (images.min(), images.max()) == (0.0, 1.0)
    assert labels.shape == (10000,)
    assert labels.dtype == np.int32
    # The known class sizes of the MNIST test set, and its known mean pixel.
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(labels).tolist() == counts
    assert images.mean(dtype=np.float64) == pytest.approx(0.13251, abs=1e-5)


def test_only_the_test_split_is_bundled():
    with pytest.raises(ValueError, match=r"got 'train'.*IDX files or 'tfds:mnist'"):
        load("mnist", split="train")


def test_import_reads_nothing():
    # A fresh interpreter, in which opening anything in the assets folder would fail.
    code = (
        "import sys\n"
        "def hook(event, args):\n"
        "    if event == 'open' and 'assets' in str(args[0]): raise RuntimeError(args[0])\n"
        "sys.addaudithook(hook)\n"
        "import experiments.attack.data\n"
        "assert 'tensorflow_datasets' not in sys.modules and 'jax' not in sys.modules\n"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


# --- read_idx -------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("dtype", IDX_CODES)
def test_read_idx_returns_what_was_written(tmp_path, dtype, zipped):
    array = np.arange(-5, 7).astype(dtype).reshape(2, 3, 2)
    content = idx_bytes(array)
    path = tmp_path / "file"  # gzip is told by content: the name says nothing.
    path.write_bytes(gzip.compress(content) if zipped else content)
    result = read_idx(str(path))
    assert result.dtype == np.dtype(dtype)
    assert result.dtype.isnative
    assert_array_equal(result, array)


GOOD = idx_bytes(np.arange(12, dtype=np.uint8).reshape(3, 4))
BAD_FILES = {
    "empty": (b"", "not an IDX file"),
    "magic": (b"\x89PNG" + GOOD[4:], "not an IDX file.*89 50 4e 47"),
    "type code": (b"\0\0\x0a" + GOOD[3:], "not an IDX file"),
    "rank 0": (b"\0\0\x08\0" + b"\1", r"rank must be in \[1, 8\], got 0"),
    "rank 255": (b"\0\0\x08\xff" + bytes(2000), r"rank must be in \[1, 8\], got 255"),
    "cut in the header": (GOOD[:7], "ends inside its header"),
    "cut in the data": (GOOD[:-1], "truncated: shape .* needs 12 bytes, got 11"),
    "too long": (GOOD + b"\0", "more than the 12 bytes"),
    "empty dimension": (idx_bytes(np.zeros((0, 4), np.uint8)), r"header of shape \(0, 4\)"),
    "huge header": (idx_bytes(np.zeros(4, np.uint8), shape=(2**32 - 1,) * 3), "the data must have"),
    "lying header": (idx_bytes(np.zeros(4, np.uint8), shape=(2**31,)), "needs .* bytes, got 4"),
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", BAD_FILES)
def test_read_idx_refuses_bad_files(tmp_path, name, zipped):
    content, message = BAD_FILES[name]
    path = tmp_path / "bad-idx"
    path.write_bytes(gzip.compress(content) if zipped else content)
    with pytest.raises(ValueError, match=f"bad-idx.*{message}"):
        read_idx(path)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda b: b[:5], id="cut in the gzip header"),
        pytest.param(lambda b: b[:-12], id="cut in the data"),
        pytest.param(lambda b: b[:-8] + bytes(4) + b[-4:], id="checksum"),
        pytest.param(lambda b: b[:-4] + bytes(4), id="length"),
    ],
)
def test_read_idx_refuses_damaged_gzip(tmp_path, damage):
    path = tmp_path / "bad-idx"
    path.write_bytes(damage(gzip.compress(GOOD)))
    with pytest.raises(ValueError, match=r"bad-idx.*(gzip|truncated|not an IDX)"):
        read_idx(path)


def test_a_lying_header_reserves_no_memory(tmp_path):
    path = tmp_path / "bad-idx"
    path.write_bytes(gzip.compress(idx_bytes(np.zeros(4, np.uint8), shape=(2**31,))))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="truncated"):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_data_that_inflate_beyond_the_header_are_not_read_to_the_end(tmp_path):
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(GOOD + bytes(64 * 2**20)))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than the 12 bytes"):
            read_idx(path)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


def test_read_idx_of_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        read_idx(tmp_path / "nothing-here")


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("split", ["train", "test"])
def test_load_reads_a_folder(tmp_path, split, zipped):
    images, labels = write_folder(tmp_path, split=split, zipped=zipped)
    loaded, classes = load(str(tmp_path), split=split)
    assert (loaded.dtype, classes.dtype) == (np.float32, np.int32)
    assert_array_equal(loaded, images[..., None].astype(np.float32) / np.float32(255))
    assert_array_equal(classes, labels)


def test_folder_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder.*nowhere"):
        load(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="neither t10k-images-idx3-ubyte nor"):
        load(str(tmp_path))
    write_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="neither train-images-idx3-ubyte nor"):
        load(str(tmp_path), split="train")
    (tmp_path / NAMES["test", "labels"]).unlink()
    with pytest.raises(FileNotFoundError, match="neither t10k-labels-idx1-ubyte nor"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (digits(6)[0], digits(5)[1], "6 images but 5 labels"),
        (digits(6)[0].reshape(6, -1), digits(6)[1], r"rank 3.*got shape \(6, 784\)"),
        (digits(6)[0], digits(6)[1][:, None], r"labels must have rank 1, got shape \(6, 1\)"),
        (
            digits(6)[0][:, :27],
            digits(6)[1],
            r"28 x 28.*32 x 32.*got uint8 of shape \(6, 27, 28, 1\)",
        ),
        (digits(6)[0].astype(np.float32), digits(6)[1], "must be uint8.*got float32"),
        (digits(6)[0], digits(6)[1].astype(np.float32), "labels must be integers, got float32"),
        (digits(6)[0], np.arange(5, 11, dtype=np.uint8), r"\[0, 9\], got \[5, 10\]"),
        (digits(6)[0], np.arange(-1, 5).astype(np.int8), r"\[0, 9\], got \[-1, 4\]"),
    ],
)
def test_folders_of_the_wrong_kind(tmp_path, images, labels, message):
    write_folder(tmp_path, images=images, labels=labels)
    with pytest.raises(ValueError, match=message):
        load(str(tmp_path))


@pytest.mark.parametrize("dataset", ["", "tfds:"])
def test_a_dataset_without_a_name(dataset):
    with pytest.raises(ValueError, match="dataset must be 'mnist', 'tfds:NAME' or a folder"):
        load(dataset)


def test_an_unknown_split():
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got 'validation'"):
        load("mnist", split="validation")


# --- pictures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "mode"), [((32, 32), "RGB"), ((28, 28), "L")])
def test_pictures_come_from_a_folder_or_a_tar_file(tmp_path, size, mode):
    pixels, labels = write_pictures(tmp_path / "set", size=size, mode=mode, count=5)
    assert labels.tolist() == [0, 1, 0, 1, 0]
    (tmp_path / "set" / "test" / "cat" / "notes.txt").write_text("no picture")
    tar = packed(tmp_path / "set", tmp_path / "set.tar")
    zipped = packed(tmp_path / "set", tmp_path / "set.tar.gz", "w:gz")
    for source in (str(tmp_path / "set"), tar, zipped):
        images, classes = load(source)
        assert_array_equal(images, pixels.astype(np.float32) / np.float32(255))
        assert_array_equal(classes, labels)
    with pytest.raises(FileNotFoundError, match=r"no pictures train/CLASS"):
        load(tar, split="train")


def test_bad_pictures_are_named(tmp_path):
    write_pictures(tmp_path / "large", size=(64, 64))
    with pytest.raises(ValueError, match=r"test/boat/00\.png: .*\(64, 64\) pixels"):
        load(str(tmp_path / "large"))
    write_pictures(tmp_path / "broken")
    (tmp_path / "broken" / "test" / "cat" / "00.png").write_bytes(b"\x89PNG\r\n\x1a\n half")
    with pytest.raises(ValueError, match=r"test/cat/00\.png is not a readable picture"):
        load(str(tmp_path / "broken"))
    write_pictures(tmp_path / "mixed")
    Image.new("RGB", (28, 28)).save(tmp_path / "mixed" / "test" / "cat" / "00.png")
    with pytest.raises(ValueError, match="must have one size"):
        load(str(tmp_path / "mixed"))
    whole = Path(packed(tmp_path / "mixed", tmp_path / "whole.tar"))
    (tmp_path / "torn.tar").write_bytes(whole.read_bytes()[:700])
    with pytest.raises(ValueError, match=r"torn\.tar is not a readable tar file"):
        load(str(tmp_path / "torn.tar"))


# --- tensorflow-datasets (a stand-in: the real one downloads) -------------------------------------


def fake_tfds(monkeypatch, data_source):
    module = types.SimpleNamespace(data_source=data_source)
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", module)


def test_load_reads_tfds(monkeypatch):
    images, labels = digits(6)
    asked = []

    def data_source(name, *, split):
        asked.append((name, split))
        pairs = zip(images[..., None], labels, strict=True)
        return [{"image": image, "label": np.int64(label)} for image, label in pairs]

    fake_tfds(monkeypatch, data_source)
    loaded, classes = load("tfds:fashion_mnist", split="train")
    assert asked == [("fashion_mnist", "train")]
    assert_array_equal(loaded[..., 0], images.astype(np.float32) / np.float32(255))
    assert_array_equal(classes, labels)


def test_tfds_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(
        ImportError, match=r"tfds:mnist.*pip install tensorflow-datasets array_record"
    ):
        load("tfds:mnist")


def test_tfds_cannot_download(monkeypatch):
    def data_source(name, *, split):
        raise ConnectionError("no route")

    fake_tfds(monkeypatch, data_source)
    with pytest.raises(
        RuntimeError,
        match=r"tfds:mnist.*ConnectionError: no route.*pip install tensorflow.*IDX files",
    ):
        load("tfds:mnist")


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"text": "a", "label": 1}, "no feature 'image'"),
        ({"image": np.zeros((64, 64, 3), np.uint8), "label": 1}, r"shape \(1, 64, 64, 3\)"),
    ],
)
def test_tfds_of_another_kind(monkeypatch, example, message):
    fake_tfds(monkeypatch, lambda name, *, split: [example])
    with pytest.raises(ValueError, match=message):
        load("tfds:other")
