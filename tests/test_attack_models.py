"""The attacked networks: their weights on disk, quantized and bundled, and their training."""

import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from pictures import digits, write_folder, write_pictures

import zoqo_jax as zq
from experiments.attack import models
from experiments.attack import train as training
from experiments.attack.data import ASSETS, load
from experiments.attack.models import (
    BUNDLED,
    CNN,
    MLP,
    ResNet,
    apply,
    fold,
    load_classifier,
    load_params,
    load_weights,
    network,
    save_params,
)
from experiments.attack.train import TrainConfig, _adversarial, _shift, accuracy, train

# --- the networks ---------------------------------------------------------------------------------


def test_bundled_model_is_accurate():
    logits_fn, params = load_classifier("mnist"), load_weights("mnist")
    images, labels = load("mnist")
    assert accuracy(logits_fn, images, labels) >= 0.985
    logits = logits_fn(jnp.asarray(images[:8]))
    assert logits.shape == (8, 10)
    assert logits.dtype == jnp.float32
    direct = CNN().apply({"params": params}, jnp.asarray(images[:8]))
    assert_array_equal(np.asarray(logits), np.asarray(direct))


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_models_are_small_and_float16(name):
    path = ASSETS / f"{name}.npz"
    assert path.stat().st_size < 3_000_000
    with np.load(path, allow_pickle=False) as file:
        assert {file[name].dtype for name in file.files} == {np.dtype(np.float16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(load_weights(name))} == {jnp.dtype(jnp.float32)}


def test_accuracy_counts_an_incomplete_last_batch():
    logits_fn = load_classifier("mnist")
    images, labels = load("mnist")
    images, labels = images[:25], labels[:25].copy()
    whole = accuracy(logits_fn, images, labels, batch=25)
    labels[-1] = (labels[-1] + 1) % 10
    assert accuracy(logits_fn, images, labels, batch=10) == pytest.approx(whole - 1 / 25)


@pytest.mark.parametrize(
    "module",
    [
        CNN((8, 4), 7),
        CNN((4, 2), 5, kernel=5),
        MLP((6, 5), num_classes=3),
        ResNet(2, num_classes=3),
        *(pytest.param(module, marks=pytest.mark.slow) for module in (CNN(), ResNet(4))),
    ],
)
def test_a_network_is_known_by_its_weights(module):
    images = jax.random.uniform(jax.random.key(0), (2, *module.image_shape))
    params = jax.jit(module.init)(jax.random.key(1), images)["params"]
    assert network(params) == module
    computed = jax.jit(apply)(params, images)
    assert_array_equal(computed, jax.jit(module.apply)({"params": params}, images))


def test_folding_keeps_what_the_network_computes():
    images = jax.random.uniform(jax.random.key(0), (4, 32, 32, 3))
    module = ResNet(4, normalised=True)
    noise = lambda x: x + 0.3 * jax.random.uniform(jax.random.key(2), x.shape)  # noqa: E731
    made = jax.jit(lambda key: jax.tree.map(noise, module.init(key, images)))
    variables = made(jax.random.key(1))
    folded = jax.jit(apply)(fold(variables), images)
    expected = jax.jit(module.apply)(variables, images)
    np.testing.assert_allclose(folded, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("bits", [pytest.param(8, marks=pytest.mark.slow), 4])
def test_quantized_networks_compute_with_their_codes(bits):
    images, labels = load("mnist")
    logits_fn = load_classifier("mnist", bits)
    assert accuracy(logits_fn, images[:1000], labels[:1000]) > 0.97
    params = zq.quantize(
        load_weights("mnist"), zq.Quantizer(bits, axis=-1), where=lambda _, leaf: leaf.ndim >= 2
    )
    floats = apply(zq.dequantize(params), jnp.asarray(images[:8]))
    np.testing.assert_allclose(logits_fn(jnp.asarray(images[:8])), floats, rtol=1e-4, atol=1e-4)


def test_weights_of_other_shapes_are_refused(tmp_path, monkeypatch):
    params = load_weights("mnist")
    save_params(tmp_path / "mnist.npz", {"Dense_0": params["Dense_0"]})
    monkeypatch.setattr(models, "ASSETS", tmp_path)
    with pytest.raises(ValueError, match=r"mnist\.npz: params must be those of a CNN"):
        load_classifier("mnist")
    params["Dense_1"]["bias"] = np.zeros(3)
    save_params(tmp_path / "other.npz", params)
    with pytest.raises(ValueError, match=r"other\.npz: params must have the shapes"):
        load_classifier(tmp_path / "other.npz")


def test_load_classifier_takes_a_bundled_name_or_a_file(tmp_path):
    params = load_weights("mnist")
    images = jnp.asarray(load("mnist")[0][:8])
    path = tmp_path / "other.npz"
    save_params(path, jax.tree.map(lambda x: -x, params))
    other = apply(jax.tree.map(lambda x: -x, params), images)
    assert_array_equal(np.asarray(load_classifier(str(path))(images)), np.asarray(other))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_classifier(tmp_path / "nowhere.npz")


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
    content = (ASSETS / "mnist.npz").read_bytes()
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
    assert metrics["test_accuracy"] == accuracy(load_classifier(output), *load(tiny_folder))
    assert metrics["test_accuracy"] > 0.2  # Chance is 0.1.
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, load_weights("mnist"))


def test_images_are_shifted_by_up_to_two_pixels():
    image = np.zeros((28, 28, 1), np.float32)
    image[5, 20] = 1
    shifted = _shift(jnp.asarray(np.broadcast_to(image, (500, 28, 28, 1))), jax.random.key(0), 2)
    index, row, column, _ = np.nonzero(np.asarray(shifted))
    assert_array_equal(index, np.arange(500))  # Each image keeps its one bright pixel.
    moves = set(zip((row - 5).tolist(), (column - 20).tolist(), strict=True))
    assert moves == {(i, j) for i in range(-2, 3) for j in range(-2, 3)}


def test_a_network_with_batch_normalisation_is_trained_and_folded(tmp_path):
    for split in ("train", "test"):
        write_pictures(tmp_path / "set", split=split, count=12)
    output = tmp_path / "weights.npz"
    config = TrainConfig(
        str(tmp_path / "set"), str(output), "resnet", epochs=2, batch_size=8, progress=False
    )
    metrics = train(config)
    assert metrics["steps"] == 2  # 12 // 8: the last four images are left out.
    assert isinstance(network(load_params(output)), ResNet)
    with pytest.raises(ValueError, match=r"data: cnn does not read images of \(32, 32, 3\)"):
        train(TrainConfig(str(tmp_path / "set"), str(output), batch_size=8))


def test_training_is_the_same_again_and_an_interrupted_one_goes_on_bit_for_bit(
    tiny_folder, tmp_path, monkeypatch
):
    whole, parts = tmp_path / "whole.npz", tmp_path / "parts.npz"
    settings = {"data": tiny_folder, "epochs": 2, "batch_size": 128, "progress": False}
    with jax.numpy_dtype_promotion("standard"):
        train(TrainConfig(output=str(whole), **settings))
        keep = training._keep

        def killed(config, epochs, state):
            keep(config, epochs, state)
            if epochs == 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(training, "_keep", killed)
        with pytest.raises(KeyboardInterrupt):
            train(TrainConfig(output=str(parts), **settings))
        assert not parts.exists()
        with pytest.raises(ValueError, match="of a training with other settings"):
            train(TrainConfig(output=str(parts), **{**settings, "epochs": 3}))
        monkeypatch.setattr(training, "_keep", keep)
        train(TrainConfig(output=str(parts), **settings))
    jax.tree.map(assert_array_equal, load_params(parts), load_params(whole))
    assert not list(tmp_path.glob("*unfinished*"))


def test_adversarial_examples_stay_in_the_ball_and_raise_the_loss():
    weights = jax.random.normal(jax.random.key(0), (28, 28, 1))
    images = jax.random.uniform(jax.random.key(1), (4, 28, 28, 1))
    loss_of = lambda x: (weights * x).sum()  # noqa: E731
    found = _adversarial(loss_of, images, jax.random.key(2), jnp.float32(0.2))
    best = jnp.clip(images + 0.2 * jnp.sign(weights), 0.0, 1.0)
    np.testing.assert_allclose(found, best, atol=1e-6)


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
        ("network", "vit"),
        ("epochs", -1),
        ("batch_size", -1),
        ("learning_rate", -0.5),
        ("learning_rate", float("nan")),
        ("seed", -1),
    ],
)
def test_config_names_the_bad_setting(setting, value):
    settings = {"data": "x", "output": "y", setting: value}
    with pytest.raises(ValueError, match=f"{setting} must .* got {value!r}"):
        TrainConfig(**settings)
