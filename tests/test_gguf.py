"""GGUF files: beside the gguf package, bit for bit, and against files that lie."""

import gguf as reference
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import zoqo_jax as zq
from zoqo_jax.interop import gguf

KINDS = {
    name: reference.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
}
METADATA = {
    "general.architecture": "llama",
    "a.bool": True,
    "a.number": np.uint32(7),
    "a.small": np.int8(-3),
    "a.long": np.int64(-(2**40)),
    "a.float": np.float32(0.1),
    "a.double": np.float64(0.1),
    "a.text": "größer",
    "a.numbers": np.arange(5, dtype=np.int32),
    "a.texts": ["one", "", "drei"],
}


def values(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def write(path, tensors, metadata=METADATA):
    """A file as the gguf package writes it; tensors by name, (values, type)."""
    writer = reference.GGUFWriter(path, metadata["general.architecture"])
    adders = {
        bool: writer.add_bool, np.uint32: writer.add_uint32, np.int8: writer.add_int8,
        np.int64: writer.add_int64, np.float32: writer.add_float32, np.float64: writer.add_float64,
        str: writer.add_string, list: writer.add_array,
    }  # fmt: skip
    for key, value in list(metadata.items())[1:]:
        if isinstance(value, np.ndarray):
            writer.add_array(key, value.tolist())
        else:
            plain = value.item() if isinstance(value, np.generic) else value
            adders[type(value)](key, plain)
    for name, (array, kind) in tensors.items():
        if kind is None:
            writer.add_tensor(name, array)
        else:
            writer.add_tensor(name, reference.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def mixed(tmp_path):
    """A file with every type that has codes, and plain ones."""
    tensors = {name: (values(4, 64, seed=i), kind) for i, (name, kind) in enumerate(KINDS.items())}
    tensors["vector"] = (values(7), None)
    tensors["halves"] = (values(3, 5).astype(np.float16), None)
    tensors["rank3"] = (values(2, 3, 32), KINDS["Q4_1"])
    return write(tmp_path / "mixed.gguf", tensors)


@pytest.mark.parametrize("name", KINDS)
def test_values_are_those_of_the_gguf_package(mixed, name):
    array = gguf.load(mixed).tensors[name]
    for tensor in reference.GGUFReader(mixed).tensors:
        if tensor.name == name:
            expected = reference.quants.dequantize(tensor.data, tensor.tensor_type)
    assert isinstance(array, zq.QuantizedArray)
    np.testing.assert_array_equal(zq.dequantize(array), expected)


def test_what_is_loaded_and_saved_is_the_identical_file(mixed, tmp_path):
    tensors, metadata, tokenizer = gguf.load(mixed)
    gguf.save(tmp_path / "again.gguf", tensors, metadata)
    assert (tmp_path / "again.gguf").read_bytes() == mixed.read_bytes()
    assert tokenizer is None


def test_metadata_keep_their_types_and_order(mixed):
    found = gguf.load(mixed).metadata
    assert list(found) == list(METADATA)
    for key, value in METADATA.items():
        np.testing.assert_array_equal(found[key], value)
        assert type(found[key]) is type(value)
        assert getattr(found[key], "dtype", None) == getattr(value, "dtype", None)


def test_files_of_ours_are_read_by_the_gguf_package(tmp_path):
    path = tmp_path / "ours.gguf"
    block = {"block": 32, "scale_dtype": jnp.float16}
    tensors = {
        "four": zq.Quantizer(4, **block)(jnp.asarray(values(2, 96))),
        "eight": zq.Quantizer(8, axis=0, scale_dtype=jnp.float16)(jnp.asarray(values(2, 96))),
        "brain": jnp.asarray(values(3), jnp.bfloat16),
    }
    metadata = {"general.architecture": "llama", "none": [], "alignment?": 3, "share": 0.5}
    gguf.save(path, tensors, metadata)
    found = {tensor.name: tensor for tensor in reference.GGUFReader(path).tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in found.items()}
    assert kinds == {"four": "Q4_0", "eight": "Q8_0", "brain": "BF16"}
    for name in ("four", "eight"):
        expected = reference.quants.dequantize(found[name].data, found[name].tensor_type)
        np.testing.assert_array_equal(zq.dequantize(tensors[name]), expected)
    again = gguf.load(path)
    assert again.metadata == metadata
    assert again.tensors["brain"].dtype == ml_dtypes.bfloat16


def test_moved_codes_come_back(mixed, tmp_path):
    tensors, metadata, _ = gguf.load(mixed)
    codes = (tensors["Q5_1"].codes + 1) % 32
    tensors["Q5_1"] = tensors["Q5_1"].with_codes(codes)
    gguf.save(tmp_path / "moved.gguf", tensors, metadata)
    found = gguf.load(tmp_path / "moved.gguf").tensors["Q5_1"].codes
    np.testing.assert_array_equal(found, codes)


def test_k_quants_become_floats_with_a_warning(tmp_path):
    rng = np.random.default_rng(0)
    kind = reference.GGMLQuantizationType.Q6_K
    raw = rng.integers(0, 60, (2, 210), np.uint8)  # a block of 256 codes takes 210 bytes
    writer = reference.GGUFWriter(tmp_path / "k.gguf", "llama")
    writer.add_tensor("k", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.warns(UserWarning, match="1 tensors of type Q6_K were decoded to float32"):
        tensors = gguf.load(tmp_path / "k.gguf").tensors
    np.testing.assert_array_equal(tensors["k"], reference.quants.dequantize(raw, kind))


def test_mutated_files_are_read_or_refused_with_a_clear_error(mixed, tmp_path):
    """500 files with random bytes changed, cut off or repeated."""
    whole, rng = bytearray(mixed.read_bytes()), np.random.default_rng(0)
    header = 600  # nearly all mutations go where the lengths are
    refused = 0
    for number in range(500):
        content = bytearray(whole)
        match number % 5:
            case 0:
                del content[rng.integers(0, len(whole)) :]
            case 1:
                place = rng.integers(0, header)
                content[place : place + 8] = rng.integers(0, 256, 8, np.uint8).tobytes()
            case 2:
                place = rng.integers(0, header)
                content[place : place + 8] = np.uint64(rng.choice([2**63, 2**40, 2**32])).tobytes()
            case 3:
                content[rng.integers(0, len(whole))] ^= 1 << rng.integers(0, 8)
            case _:
                place = rng.integers(0, header)
                content[place:place] = content[place : place + rng.integers(1, 64)]
        path = tmp_path / "mutated.gguf"
        path.write_bytes(content)
        try:
            gguf.load(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 300


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"GG", "no GGUF file"),
        (b"ZIP!" + bytes(100), "no GGUF file"),
        (b"GGUF" + b"\0\0\0\3" + bytes(16), "little-endian"),
        (b"GGUF\3\0\0\0", "ends too early"),
        (b"GGUF\3\0\0\0" + b"\xff" * 16, "ends too early"),
    ],
)
def test_what_is_no_gguf_file_is_refused(tmp_path, content, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        gguf.load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        gguf.load(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (zq.nf4()(jnp.ones((2, 64))), "no GGUF type"),
        (zq.Quantizer(4, block=32)(jnp.full((1, 32), 0.1)), "float16 does not hold"),
        (
            zq.Quantizer(4, block=16, scale_dtype=jnp.float16)(jnp.asarray(values(1, 32))),
            "must share a scale",
        ),
        (zq.Quantizer(4, scale_dtype=jnp.float16)(jnp.ones((2, 48))), "multiple of 32"),
        (np.ones((2, 2), np.complex64), "complex64"),
        (jnp.ones(()), "axes"),
    ],
)
def test_what_no_type_holds_is_refused_and_the_old_file_stays(tmp_path, tensor, message):
    path = tmp_path / "a.gguf"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        gguf.save(path, {"w": tensor}, {})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def tokenizer_metadata(**changes):
    words = ["<eos>", "a", "b", "Ġ", "Ġa", "ab"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": words,
        "tokenizer.ggml.token_type": np.array([3, 1, 1, 1, 1, 1], np.int32),
        "tokenizer.ggml.merges": ["Ġ a", "a b"],
        **changes,
    }


def test_a_byte_level_tokenizer_is_made_of_the_metadata(tmp_path):
    path = tmp_path / "words.gguf"
    gguf.save(path, {}, tokenizer_metadata())
    tokenizer = gguf.load(path).tokenizer
    assert tokenizer.encode("ab a<eos>").ids == [5, 4, 0]
    assert tokenizer.decode([5, 4]) == "ab a"
    assert gguf.load(path, tokenizer=False).tokenizer is None


def test_a_sentence_piece_tokenizer_is_made_of_the_metadata(tmp_path):
    path = tmp_path / "pieces.gguf"
    tokens = ["<unk>", "<s>", "▁", "a", "b", "▁a", "ab", "<0xC3>", "<0xA4>"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0, 0, -3, -4, -5, -1, -2, 0, 0], np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 1, 1, 1, 1, 1, 6, 6], np.int32),
        "tokenizer.ggml.bos_token_id": np.uint32(1),
    }
    gguf.save(path, {}, metadata)
    tokenizer = gguf.load(path).tokenizer
    assert tokenizer.encode("ab").ids == [1, 5, 4]
    assert tokenizer.encode("bä", add_special_tokens=False).ids == [2, 4, 7, 8]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "rwkv"),
        ({"tokenizer.ggml.pre": "mystery"}, "mystery"),
        ({"tokenizer.ggml.tokens": "a"}, "list of UTF-8 strings"),
        ({"tokenizer.ggml.merges": ["a c"]}, "do not fit"),
        ({"tokenizer.ggml.token_type": np.zeros(2, np.int32)}, "6 numbers"),
    ],
)
def test_metadata_that_make_no_tokenizer_are_refused(tmp_path, changes, message):
    path = tmp_path / "words.gguf"
    gguf.save(path, {}, tokenizer_metadata(**changes))
    with pytest.raises(ValueError, match=message):
        gguf.load(path)
