"""The attack experiment's data, its bundled model and the model's training."""

import gzip
import os
import pickle
import subprocess
import sys
import tracemalloc
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from experiments.attack import models
from experiments.attack.data import ASSETS, load, read_idx
from experiments.attack.models import (
    CNN,
    apply_cnn,
    load_classifier,
    load_mnist_cnn,
    load_params,
    save_params,
)
from experiments.attack.train import TrainConfig, _shift, accuracy, train

IDX_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
NAMES = {
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("test", "images"): "t10k-images-idx3-ubyte",
    ("test", "labels"): "t10k-labels-idx1-ubyte",
}


def idx_bytes(array, *, shape=None):
    """An IDX file of `array`; `shape` is what the header claims."""
    shape = array.shape if shape is None else shape
    code = IDX_CODES[array.dtype.str[1:]]
    header = bytes([0, 0, code, len(shape)]) + np.asarray(shape, ">u4").tobytes()
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def digits(count, seed=0):
    """Images of uint8 noise, and labels that one can learn: where the bright band lies."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count).astype(np.uint8)
    images = rng.integers(0, 60, (count, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label + 4 : 2 * label + 6] = 255
    return images, labels


def write_folder(folder, *, split="test", zipped=False, images=None, labels=None):
    default = digits(6)
    arrays = {
        "images": default[0] if images is None else images,
        "labels": default[1] if labels is None else labels,
    }
    for kind, array in arrays.items():
        content, name = idx_bytes(array), NAMES[split, kind]
        if zipped:
            content, name = gzip.compress(content), f"{name}.gz"
        (folder / name).write_bytes(content)
    return arrays["images"], arrays["labels"]


# --- the bundled test set and model ---------------------------------------------------------------


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


def test_bundled_model_is_accurate():
    logits_fn, params = load_mnist_cnn()
    images, labels = load("mnist")
    assert accuracy(params, images, labels) >= 0.985
    logits = logits_fn(jnp.asarray(images[:8]))
    assert logits.shape == (8, 10)
    assert logits.dtype == jnp.float32
    direct = CNN().apply({"params": params}, jnp.asarray(images[:8]))
    assert_array_equal(np.asarray(logits), np.asarray(direct))


def test_bundled_model_is_small_and_float16():
    path = ASSETS / "mnist_cnn.npz"
    assert path.stat().st_size < 400_000
    with np.load(path, allow_pickle=False) as file:
        assert {file[name].dtype for name in file.files} == {np.dtype(np.float16)}
    _, params = load_mnist_cnn()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}


def test_accuracy_counts_an_incomplete_last_batch():
    _, params = load_mnist_cnn()
    images, labels = load("mnist")
    images, labels = images[:25], labels[:25].copy()
    whole = accuracy(params, images, labels, batch=25)
    labels[-1] = (labels[-1] + 1) % 10
    assert accuracy(params, images, labels, batch=10) == pytest.approx(whole - 1 / 25)


def test_a_model_of_other_shapes_is_refused(tmp_path, monkeypatch):
    _, params = load_mnist_cnn()
    save_params(tmp_path / "mnist_cnn.npz", {"Dense_0": params["Dense_0"]})
    monkeypatch.setattr(models, "ASSETS", tmp_path)
    with pytest.raises(ValueError, match=r"mnist_cnn\.npz: the weights must have the shapes"):
        load_mnist_cnn()


def test_load_classifier_takes_the_bundled_weights_or_a_file(tmp_path):
    logits_fn, params = load_mnist_cnn()
    images = jnp.asarray(load("mnist")[0][:8])
    assert_array_equal(np.asarray(load_classifier()(images)), np.asarray(logits_fn(images)))
    path = tmp_path / "other.npz"
    save_params(path, jax.tree.map(lambda x: -x, params))
    other = apply_cnn(jax.tree.map(lambda x: -x, params), images)
    assert_array_equal(np.asarray(load_classifier(str(path))(images)), np.asarray(other))
    save_params(path, {"Dense_0": params["Dense_0"]})
    with pytest.raises(ValueError, match=r"other\.npz: the weights must have the shapes"):
        load_classifier(path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_classifier(tmp_path / "nowhere.npz")


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
        (digits(6)[0][:, :27], digits(6)[1], r"28 x 28.*got uint8 of shape \(6, 27, 28, 1\)"),
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
        ({"image": np.zeros((32, 32, 3), np.uint8), "label": 1}, r"shape \(1, 32, 32, 3\)"),
    ],
)
def test_tfds_of_another_kind(monkeypatch, example, message):
    fake_tfds(monkeypatch, lambda name, *, split: [example])
    with pytest.raises(ValueError, match=message):
        load("tfds:other")


# --- weights on disk ------------------------------------------------------------------------------


def test_params_survive_the_disk(tmp_path):
    path = tmp_path / "weights.npz"
    params = {"a": {"kernel": jnp.linspace(-1, 1, 6).reshape(2, 3)}, "b": jnp.float32(0.1)}
    save_params(path, params, dtype=np.float32)
    jax.tree.map(assert_array_equal, load_params(path), params)
    save_params(path, params)  # Replaces the file.
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float16).astype(np.float32), params)
    jax.tree.map(assert_array_equal, load_params(path), rounded)
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.npz"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "at least one array"),
        ({"a/b": np.zeros(1)}, "must not contain '/'"),
        ({"a": {"b": np.array([1.0, 1e5])}}, "a/b is not finite in float16"),
        ({"a": np.array([np.nan])}, "a is not finite"),
    ],
)
def test_params_that_cannot_be_saved(tmp_path, params, message):
    with pytest.raises(ValueError, match=message):
        save_params(tmp_path / "weights.npz", params)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "weights.npz"
    save_params(path, {"a": np.ones(2)})

    def broken(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", broken)
    with pytest.raises(OSError, match="disk full"):
        save_params(path, {"a": np.zeros(2)})
    assert_array_equal(load_params(path)["a"], np.ones(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights.npz"]


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_weights_never_run_code(tmp_path):
    path, trace = tmp_path / "weights.npz", tmp_path / "trace"
    np.savez(path, allow_pickle=True, a=np.array([Trap(trace)], dtype=object))
    with pytest.raises(ValueError, match=r"weights\.npz is not a readable \.npz"):
        load_params(path)
    path.write_bytes(pickle.dumps(Trap(trace)))
    with pytest.raises(ValueError, match=r"weights\.npz is not a readable \.npz"):
        load_params(path)
    assert not trace.exists()


def test_weights_that_are_damaged(tmp_path):
    path = tmp_path / "weights.npz"
    content = (ASSETS / "mnist_cnn.npz").read_bytes()
    middle = len(content) // 2
    for bad in (b"", content[:middle], content[:middle] + bytes(64) + content[middle + 64 :]):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"weights\.npz is not a readable \.npz"):
            load_params(path)
    branches = {"a": np.ones(1), "a/b": np.ones(1)}
    np.savez(path, **branches)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"weights\.npz: .* both a leaf and a branch"):
        load_params(path)
    for array in (np.array([1, 2]), np.array([np.inf]), np.array(["text"])):
        np.savez(path, a=array)
        with pytest.raises(ValueError, match=r"weights\.npz: a must hold finite"):
            load_params(path)


# --- training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("idx")
    for split, count, seed in (("train", 512, 1), ("test", 64, 2)):
        images, labels = digits(count, seed)
        write_folder(folder, split=split, images=images, labels=labels)
    return str(folder)


@jax.numpy_dtype_promotion("standard")  # optax.adam itself mixes int32 and float32.
def test_training_writes_a_loadable_model(tiny_folder, tmp_path):
    output = tmp_path / "new" / "weights.npz"
    config = TrainConfig(tiny_folder, str(output), epochs=1, batch_size=50, progress=False)
    metrics = train(config)
    assert metrics["steps"] == 10  # 512 // 50: the last 12 images are left out.
    assert 0 < metrics["train_loss"] < np.log(10)
    params = load_params(output)
    assert metrics["test_accuracy"] == accuracy(params, *load(tiny_folder))
    assert metrics["test_accuracy"] > 0.2  # Chance is 0.1.
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, load_mnist_cnn()[1])

    again = tmp_path / "again.npz"
    train(TrainConfig(tiny_folder, str(again), epochs=1, batch_size=50, progress=False))
    jax.tree.map(assert_array_equal, load_params(again), params)


def test_images_are_shifted_by_up_to_two_pixels():
    image = np.zeros((28, 28, 1), np.float32)
    image[5, 20] = 1
    shifted = _shift(jnp.asarray(np.broadcast_to(image, (500, 28, 28, 1))), jax.random.key(0))
    index, row, column, _ = np.nonzero(np.asarray(shifted))
    assert_array_equal(index, np.arange(500))  # Each image keeps its one bright pixel.
    moves = set(zip((row - 5).tolist(), (column - 20).tolist(), strict=True))
    assert moves == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}


def test_training_refuses_bad_settings(tiny_folder, tmp_path):
    output = str(tmp_path / "weights.npz")
    with pytest.raises(ValueError, match=r"batch_size must be at most the 512.*got 513"):
        train(TrainConfig(tiny_folder, output, batch_size=513))
    with pytest.raises(ValueError, match="output must name a file, got the folder"):
        train(TrainConfig(tiny_folder, str(tmp_path)))
    with pytest.raises(ValueError, match="split must be 'test'"):
        train(TrainConfig("mnist", output))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("output", ""),
        ("epochs", 0),
        ("batch_size", -1),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("seed", -1),
    ],
)
def test_config_names_the_bad_setting(setting, value):
    settings = {"data": "x", "output": "y", setting: value}
    with pytest.raises(ValueError, match=f"{setting} must .* got {value!r}"):
        TrainConfig(**settings)
