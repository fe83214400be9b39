"""GGUF files as they lie on disks: versions, padding, parts, and tokenizers that are not read.

Reported of kindred projects: ggml-org/llama.cpp 6187, huggingface/transformers 32266 (split files).
"""

import struct

import gguf as reference
import numpy as np
import pytest

from zoqo_jax.interop import gguf


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def file_bytes(version=3, tensors=(("a", 3), ("b", 8)), end=None, places=None, filler=0):
    """A file of float vectors; where they begin, and where the file ends, as one likes."""
    content = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), 1)
    content += text("general.name") + struct.pack("<I", 8) + text("tiny")
    sizes = [4 * count for _, count in tensors]
    starts = places or [sum(-(-size // 32) * 32 for size in sizes[:i]) for i in range(len(sizes))]
    for (name, count), start in zip(tensors, starts, strict=True):
        content += text(name) + struct.pack("<IQIQ", 1, count, 0, start)
    header = content
    content += bytes([filler]) * (-len(content) % 32)
    data = bytearray([filler]) * max(s + n for s, n in zip(starts, sizes, strict=True))
    for number, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        data[start : start + size] = np.full(size // 4, number + 1, np.float32).tobytes()
    data += bytes([filler]) * ((len(data) + -len(data) % 32 if end is None else end) - len(data))
    return bytes(content + data) if tensors else bytes(header)


# llama.cpp and gguf-py read files whose last tensor is not padded, and ollama #7844 such with bytes
# after it.
@pytest.mark.parametrize(
    "content",
    [
        file_bytes(),
        file_bytes(version=2),
        file_bytes(end=64),  # nothing after the last tensor
        file_bytes(version=2, end=160),  # more after it than padding
        file_bytes(places=[32, 0]),  # the last tensor comes first
        file_bytes(places=[0, 128]),  # room between them
        file_bytes(filler=7),
        file_bytes(end=100, places=[64, 0], filler=255),
    ],
    ids=["usual", "2", "unpadded", "long", "turned", "apart", "not-zero", "all"],
)
def test_what_is_saved_again_is_the_identical_file(tmp_path, content):
    (tmp_path / "a.gguf").write_bytes(content)
    tensors, metadata, _ = gguf.load(tmp_path / "a.gguf")
    assert [x.tolist() for x in tensors.values()] == [[1.0] * 3, [2.0] * 8]
    gguf.save(tmp_path / "b.gguf", tensors, metadata)
    assert (tmp_path / "b.gguf").read_bytes() == content


def test_a_file_without_tensors_is_saved_as_it_was(tmp_path):
    content = struct.pack("<4sIQQ", b"GGUF", 2, 0, 1) + text("a") + struct.pack("<II", 4, 7)
    for padding in (0, 3, 19, 64):
        (tmp_path / "a.gguf").write_bytes(content + bytes(padding))
        tensors, metadata, _ = gguf.load(tmp_path / "a.gguf")
        gguf.save(tmp_path / "b.gguf", tensors, metadata)
        assert (tmp_path / "b.gguf").read_bytes() == content + bytes(padding)


def test_changed_tensors_and_metadata_are_laid_out_anew(tmp_path):
    (tmp_path / "a.gguf").write_bytes(file_bytes(version=2, places=[32, 0], filler=7))
    tensors, metadata, _ = gguf.load(tmp_path / "a.gguf")
    metadata["a key"] = "more"
    tensors["a"] = np.arange(40, dtype=np.float32)
    gguf.save(tmp_path / "b.gguf", tensors, metadata)
    again = gguf.load(tmp_path / "b.gguf")
    assert again.metadata == metadata and again.metadata.layout.version == 2
    assert [x.tolist() for x in again.tensors.values()] == [list(range(40)), [2.0] * 8]
    gguf.save(tmp_path / "c.gguf", tensors, dict(metadata))
    assert gguf.load(tmp_path / "c.gguf").metadata.layout.version == 3


def write_parts(folder, count=3, name="model"):
    """As gguf-py, and llama-gguf-split, write a model in parts."""
    writer = reference.GGUFWriter(folder / f"{name}.gguf", "llama", split_max_tensors=1)
    writer.add_string("general.name", "in parts")
    for i in range(count):
        writer.add_tensor(f"tensor {i}", np.full(5, i, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob(f"{name}-*.gguf"))


# llama.cpp #6187 reads all parts; transformers #32266 and sglang #28209 asked for it elsewhere.
def test_a_model_in_parts_is_read_whole_and_saved_as_one_file(tmp_path):
    parts = write_parts(tmp_path)
    assert len(parts) == 3 and gguf.parts(parts[1]) == parts
    for part in parts:
        tensors, metadata, _ = gguf.load(part)
        assert {name: x.tolist() for name, x in tensors.items()} == {
            f"tensor {i}": [float(i)] * 5 for i in range(3)
        }
        assert metadata == {"general.architecture": "llama", "general.name": "in parts"}
    gguf.save(tmp_path / "whole.gguf", tensors, metadata)
    again = gguf.load(tmp_path / "whole.gguf")
    assert list(again.tensors) == list(tensors) and again.metadata == metadata
    read = reference.GGUFReader(tmp_path / "whole.gguf")
    assert [one.name for one in read.tensors] == list(tensors)


def test_a_missing_part_is_named(tmp_path):
    parts = write_parts(tmp_path)
    parts[2].unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00003-of-00003\.gguf"):
        gguf.load(parts[0])


def test_parts_that_are_not_what_their_names_say_are_refused(tmp_path):
    parts = write_parts(tmp_path)
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(parts[0].read_bytes())
    with pytest.raises(ValueError, match=r"alone\.gguf: split\.count .* one of 3 parts.*-00001-of"):
        gguf.load(alone)
    content = parts[1].read_bytes()
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(ValueError, match=r"part 2 of 3, but split\.count is 3 and split\.no 2"):
        gguf.load(parts[0])
    parts[1].write_bytes(content)
    gguf.save(parts[2], {"other": np.ones(2, np.float32)}, {})
    with pytest.raises(ValueError, match=r"part 3 of 3, but split\.count is 0"):
        gguf.load(parts[0])
    marks = {"split.no": np.uint16(2), "split.count": np.uint16(3)}
    gguf.save(parts[2], {"tensor 0": np.ones(2, np.float32)}, marks)
    with pytest.raises(ValueError, match="another part has a tensor 'tensor 0'"):
        gguf.load(parts[0])
    two = {f"tensor {i}": np.ones(2, np.float32) for i in (2, 3)}
    gguf.save(parts[2], two, marks)
    with pytest.raises(ValueError, match="the parts have 4 tensors instead of 3"):
        gguf.load(parts[0])


def test_a_tokenizer_that_is_not_read_can_be_left_out(tmp_path):
    path = tmp_path / "a.gguf"
    words = {"tokenizer.ggml.model": "rwkv", "tokenizer.ggml.tokens": ["a"]}
    gguf.save(path, {"w": np.ones(2, np.float32)}, words)
    with pytest.raises(ValueError, match=r"a\.gguf: .*'rwkv'\. With tokenizer=False, all else"):
        gguf.load(path)
    assert gguf.load(path, tokenizer=False).tensors["w"].tolist() == [1.0, 1.0]
