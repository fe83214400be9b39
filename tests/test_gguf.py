"""GGUF files: beside the gguf package, bit for bit, and against files that lie."""

import os
import tracemalloc
import warnings

import gguf as reference
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from test_ggml import KINDS as TYPES
from test_ggml import legal_bytes

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
    """A file as the gguf package writes it; tensors by name, (values, or bytes of blocks, type)."""
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
        elif array.dtype == np.uint8:
            writer.add_tensor(name, array, raw_dtype=kind)
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


def of_type(name, rows=2, seed=0):
    """Random blocks of a type, as `write` takes them."""
    return legal_bytes(name, rows, seed), reference.GGMLQuantizationType[name]


def tables(rows=2):
    """Random blocks of a type whose numbers are places in a table, as `write` takes them."""
    kind = reference.GGMLQuantizationType.IQ2_XS  # a block of 256 values takes 74 bytes
    return np.random.default_rng(0).integers(0, 60, (rows, 74), np.uint8), kind


def loaded_and_saved(path, change=lambda tensors: None):
    """The bytes of a file that was loaded, changed and saved."""
    tensors, metadata, _ = gguf.load(path)
    change(tensors)
    again = path.with_suffix(".again")
    gguf.save(again, tensors, metadata)
    return again.read_bytes()


def test_every_type_of_codes_comes_back_in_one_file(tmp_path):
    tensors = {name: of_type(name, rows=3, seed=i) for i, name in enumerate(TYPES)}
    path = write(tmp_path / "all.gguf", tensors | {"norm": (values(8), None)})
    found = gguf.load(path).tensors
    assert all(zq.is_quantized(found[name]) for name in TYPES)
    for tensor in reference.GGUFReader(path).tensors[:-1]:
        assert found[tensor.name].shape == tuple(tensor.shape[::-1])
    assert loaded_and_saved(path) == path.read_bytes()


def test_a_changed_code_of_a_mixed_file_changes_its_own_byte(tmp_path):
    path = write(tmp_path / "m.gguf", {name: of_type(name, rows=3) for name in ("Q4_K", "Q6_K")})

    def change(tensors):
        codes = tensors["Q4_K"].codes.at[1, 7].set(15 - tensors["Q4_K"].codes[1, 7])
        tensors["Q4_K"] = tensors["Q4_K"].with_codes(codes)

    old, new = (
        np.frombuffer(x, np.uint8) for x in (path.read_bytes(), loaded_and_saved(path, change))
    )
    start = next(t for t in reference.GGUFReader(path).tensors if t.name == "Q4_K").data_offset
    assert np.flatnonzero(old != new).tolist() == [start + 144 + 16 + 7]  # a block takes 144 bytes
    assert (old ^ new).max() == 0x0F


def test_tensors_without_codes_become_floats_with_a_warning_and_come_back(tmp_path):
    path = write(tmp_path / "t.gguf", {"table": tables(), "k": of_type("Q2_K")})
    told = (
        "1 tensors have no codes .* type IQ2_XS \\('table'\\), because a number of theirs picks 8"
    )
    with pytest.warns(UserWarning, match=told):
        tensors = gguf.load(path).tensors
    np.testing.assert_array_equal(tensors["table"], reference.quants.dequantize(*tables()))
    with pytest.warns(UserWarning, match="no codes"):
        assert loaded_and_saved(path) == path.read_bytes()


def test_tensors_without_codes_that_have_changed_are_saved_as_floats(tmp_path):
    path = write(tmp_path / "t.gguf", {"table": tables(), "k": of_type("Q2_K")})
    with pytest.warns(UserWarning, match="no codes"):
        tensors, metadata, _ = gguf.load(path)
    tensors["table"] = tensors["table"].at[0, 0].add(1)
    gguf.save(path, tensors, metadata)  # over the file that it is read from
    again = gguf.load(path).tensors
    np.testing.assert_array_equal(again["table"], tensors["table"])
    np.testing.assert_array_equal(again["k"].codes, tensors["k"].codes)


def test_minus_zero_comes_back_where_the_code_is_still_zero(tmp_path):
    path = write(tmp_path / "z.gguf", {"w": of_type("MXFP4", rows=8)})
    old = path.read_bytes()
    tensors, metadata, _ = gguf.load(path)
    gguf.save(path, tensors, metadata)  # over the file that it is read from
    assert path.read_bytes() == old
    with pytest.warns(
        UserWarning, match="'w': .*z.gguf is no longer the file .* become plus zeros"
    ):
        gguf.save(tmp_path / "y.gguf", tensors, metadata)
    start = next(iter(reference.GGUFReader(path).tensors)).data_offset
    new = np.frombuffer((tmp_path / "y.gguf").read_bytes(), np.uint8)
    nibbles = [
        np.stack([x & 15, x >> 4]) for x in (np.frombuffer(old, np.uint8)[start:], new[start:])
    ]
    changed = nibbles[0] != nibbles[1]
    assert changed.any()
    assert (nibbles[0][changed] == 8).all()
    assert not nibbles[1][changed].any()
    path.unlink()
    with pytest.warns(UserWarning, match="no longer"):
        gguf.save(path, tensors, metadata)


def test_what_was_never_in_a_file_is_saved_without_a_word(tmp_path):
    path = write(tmp_path / "z.gguf", {"w": of_type("MXFP4", rows=8)})
    tensors, metadata, _ = gguf.load(path)
    gguf.save(tmp_path / "y.gguf", tensors, dict(metadata))
    again = gguf.load(tmp_path / "y.gguf").tensors["w"]
    np.testing.assert_array_equal(again.codes, tensors["w"].codes)


def test_a_model_in_parts_keeps_minus_zeros(tmp_path):
    parts = []
    for number in range(2):
        path = tmp_path / f"m-0000{number + 1}-of-00002.gguf"
        metadata = {
            "general.architecture": "llama", "split.no": np.uint32(number),
            "split.count": np.uint32(2), "split.tensors.count": np.uint32(2),
        }  # fmt: skip
        parts.append(write(path, {f"w{number}": of_type("MXFP4", 4, number)}, metadata))
    tensors, metadata, _ = gguf.load(parts[0])
    gguf.save(tmp_path / "whole.gguf", tensors, metadata)
    for tensor in reference.GGUFReader(tmp_path / "whole.gguf").tensors:
        expected, _ = of_type("MXFP4", 4, int(tensor.name[1]))
        np.testing.assert_array_equal(tensor.data, expected)


def mutated(whole, rng, number):
    """A file with bytes cut off, changed, or repeated, or with a number that lies."""
    content = bytearray(whole)
    place = rng.integers(0, len(whole))
    match number % 5:
        case 0:
            del content[place:]
        case 1:
            content[place : place + 4] = rng.integers(0, 256, 4, np.uint8).tobytes()
        case 2:
            content[place : place + 8] = np.uint64(rng.choice([2**63, 2**40, 40])).tobytes()
        case 3:
            content[place] ^= 1 << rng.integers(0, 8)
        case _:
            content[place:place] = content[place : place + rng.integers(1, 64)]
    return content


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "MXFP4" else pytest.mark.slow)
        for name in (*TYPES, "IQ2_XS")
    ],
)
def test_500_mutated_files_of_each_type_are_read_and_come_back_or_are_refused(tmp_path, name):
    blocks = tables() if name == "IQ2_XS" else of_type(name)
    metadata = {"general.architecture": "llama", "a": np.uint32(7), "b": ["one", "two"]}
    whole = write(tmp_path / "whole.gguf", {"w": blocks}, metadata).read_bytes()
    rng = np.random.default_rng(list(name.encode()))
    path, again = tmp_path / "mutated.gguf", tmp_path / "again.gguf"
    refused = came_back = 0
    for number in range(500):
        content = mutated(whole, rng, number)
        path.write_bytes(content)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                tensors, found, _ = gguf.load(path, tokenizer=False)
            except ValueError as error:
                assert str(path) in str(error)
                refused += 1
                continue
            gguf.save(again, tensors, found)
        assert all("no codes that could be trained" in str(one.message) for one in told)
        assert again.read_bytes() == content
        came_back += 1
    assert refused > 100
    assert came_back > 50


def test_lengths_that_lie_allocate_nothing(tmp_path):
    whole = write(tmp_path / "a.gguf", {"w": of_type("Q4_K"), "t": tables()}).read_bytes()
    path, rng = tmp_path / "mutated.gguf", np.random.default_rng(0)
    with pytest.warns(UserWarning, match="no codes"):
        gguf.load(tmp_path / "a.gguf")  # the first time, much is imported
    tracemalloc.start()
    try:
        for _ in range(100):
            path.write_bytes(mutated(whole, rng, 2))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    gguf.load(path, tokenizer=False)
                except ValueError:
                    continue
        assert tracemalloc.get_traced_memory()[1] < 2e6  # the file has 2 KB
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.skipif("ZOQO_GEMMA" not in os.environ, reason="ZOQO_GEMMA names no file")
def test_a_model_as_people_download_it(tmp_path):
    """Gemma 3 270M Q4_K_M, or another file: every value, and every byte after saving."""
    path = os.environ["ZOQO_GEMMA"]
    tensors, metadata, _ = gguf.load(path, tokenizer=False)
    kinds = set()
    for tensor in reference.GGUFReader(path).tensors:
        kinds.add(tensor.tensor_type.name)
        step = max(2**21 // tensor.data.shape[-1], 1)
        for begin in range(0, len(tensor.data), step):
            rows = slice(begin, begin + step)
            expected = reference.quants.dequantize(tensor.data[rows], tensor.tensor_type)
            found = tensors[tensor.name]
            if zq.is_quantized(found):
                found = found.take_rows(lambda x, rows=rows: x[rows])
                found = np.asarray(zq.dequantize(found))
            else:
                found = np.asarray(found)[rows]
            np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))
    assert {"Q4_K", "Q6_K", "Q5_0", "Q8_0"} <= kinds
    gguf.save(tmp_path / "again.gguf", tensors, metadata)
    old, new = (np.memmap(x, np.uint8, mode="r") for x in (path, tmp_path / "again.gguf"))
    np.testing.assert_array_equal(old, new)


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
