"""Safetensors files and folders of them, whole, in shards, and damaged."""

import json
import struct

import jax.numpy as jnp
import numpy as np
import pytest

from zoqo_jax.interop import safetensors


def write_shards(folder, parts, places=None):
    for name, tensors in parts.items():
        safetensors.save(folder / name, tensors)
    places = places or {tensor: name for name, tensors in parts.items() for tensor in tensors}
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_folder_of_shards_is_one_checkpoint(tmp_path):
    parts = {
        "model-1.safetensors": {"a": jnp.ones((2, 3), jnp.bfloat16)},
        "model-2.safetensors": {"b": np.arange(4, dtype=np.int8), "c": jnp.zeros(1, jnp.float16)},
    }
    write_shards(tmp_path, parts)
    found = safetensors.load(tmp_path)
    assert {name: str(x.dtype) for name, x in found.items()} == {
        "a": "bfloat16",
        "b": "int8",
        "c": "float16",
    }
    np.testing.assert_array_equal(found["b"], np.arange(4))


def test_one_file_of_another_name_is_found(tmp_path):
    safetensors.save(tmp_path / "adapter_model.safetensors", {"a": jnp.ones(2)})
    assert list(safetensors.load(tmp_path)) == ["a"]


def test_64_bits_stay_64_bits(tmp_path):
    tensors = {
        "long": np.array([2**40, -1]),
        "double": np.array([1 / 3]),
        "wide": np.ones((2, 3)).T,
    }
    safetensors.save(tmp_path / "a.safetensors", tensors)
    found = safetensors.load(tmp_path)
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_dtypes_that_are_not_read_are_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    content = struct.pack("<Q", len(header)) + header + b"ab"
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="dtype is not read"):
        safetensors.load(tmp_path)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"a": "model-2.safetensors"}, r"model-2\.safetensors, which is not there"),
        ({"a": "../model-1.safetensors"}, "must lie beside the index"),
        ({"b": "model-1.safetensors"}, "there is no tensor b"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path, places, message):
    write_shards(tmp_path, {"model-1.safetensors": {"a": jnp.ones(2)}}, places)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        safetensors.load(tmp_path)


def test_mutated_files_are_read_or_refused(tmp_path):
    path, rng = tmp_path / "a.safetensors", np.random.default_rng(0)
    safetensors.save(path, {"a": jnp.ones((4, 4)), "b": jnp.ones(7, jnp.bfloat16)})
    whole, refused = path.read_bytes(), 0
    for number in range(100):
        content = bytearray(whole)
        if number % 2:
            del content[rng.integers(0, len(whole)) :]
        else:
            place = rng.integers(0, 120)
            content[place : place + 4] = rng.integers(0, 256, 4, np.uint8).tobytes()
        path.write_bytes(content)
        try:
            safetensors.load(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 60


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        safetensors.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="has 0 other files"):
        safetensors.load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ValueError, match="no index of tensors"):
        safetensors.load(tmp_path)
