"""GGUF, llama.cpp's files: their blocks of 4, 5 and 8 bits are codes here, bit for bit.

    tensors, metadata, tokenizer = gguf.load("model.gguf")
    gguf.save("trained.gguf", tensors, metadata)

What is loaded and saved again unchanged is the identical file. Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 hold
32 codes a block, with a float16 scale (and minimum) each, and become a `QuantizedArray`; F32, F16
and BF16 become float arrays. All other types (K-quants and more) are decoded to float32 by the
`gguf` package, with a warning, and saved as such. A model in parts, NAME-00001-of-00003.gguf and so
on, is read whole, and saved as one file, as `llama-gguf-split --merge` makes it.

A file is read without trust: every length is checked against what is left of the file before
anything is made of it. Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import os
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax
import numpy as np

from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.interop import ggml, tokenizing
from zoqo_jax.interop.files import replacing

__all__ = ["File", "Metadata", "load", "parts", "save"]

_MAGIC, _VERSION, _ALIGNMENT = b"GGUF", 3, 32
_STRING, _ARRAY = 8, 9
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_NUMBERS = {
    number: np.dtype(kind)
    for number, kind in {
        0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
        10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip


class File(NamedTuple):
    """What a GGUF file holds.

    Attributes:
        tensors: by name, in the file's order: `QuantizedArray`, or float (or integer) arrays. The
            last axis is the one that lies contiguous in the file: a matrix is (outputs, inputs).
        metadata: by key, in the file's order: `str`, `bool`, numpy scalars and arrays of the
            file's types, lists of strings (`bytes` where they are not UTF-8). Of a model in parts,
            the first part's, without "split.count" and the like.
        tokenizer: a `tokenizers.Tokenizer` made of the metadata; None where they describe none.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/a.gguf", {"norm": np.ones(3, np.float32)}, {"general.name": "one"})
        ...     file = load(f"{folder}/a.gguf")
        >>> list(file.tensors), file.metadata, file.tokenizer
        (['norm'], {'general.name': 'one'}, None)
    """

    tensors: dict[str, QuantizedArray | jax.Array]
    metadata: Metadata
    tokenizer: Any


class Metadata(dict[str, Any]):
    """A dictionary of a file's metadata that also knows how the file was laid out.

    `save` writes the same version again and, where tensors take the bytes that they took, puts them
    in the same places. A copy, as `dict(metadata)`, does not know, and is saved as version 3 with
    tensors in order.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/a.gguf", {"norm": np.ones(3, np.float32)}, {"general.name": "one"})
        ...     metadata = load(f"{folder}/a.gguf").metadata
        >>> metadata, metadata.layout.version
        ({'general.name': 'one'}, 3)
    """

    layout: _Layout


class _Layout(NamedTuple):
    """What a file has beyond tensors and metadata."""

    version: int = _VERSION
    alignment: int = 0  # 0: no layout but the usual one
    places: tuple[tuple[str, int, int], ...] = ()  # name, bytes and offset of each tensor
    room: int = 0  # bytes from the padded header to the end; negative: the header is not padded
    gaps: tuple[bytes, ...] = ()  # bytes before, between and after tensors, where they are not 0


class _Info(NamedTuple):
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def load(path: str | os.PathLike[str], *, tokenizer: bool = True) -> File:
    """Read a GGUF file, or all files of a model in parts.

    Args:
        path: the file, version 2 or 3, little-endian; or one of the parts, which lie beside it.
        tokenizer: whether to make the tokenizer, too (needs the `tokenizers` package).

    Raises:
        FileNotFoundError: there is no such file, or a part is missing; it is named.
        ValueError: it is not a whole GGUF file, or of a kind that is not read; the message says
            where.

    Warns:
        UserWarning: tensors were decoded to floats.

    Examples:
        >>> import tempfile, jax.numpy as jnp
        >>> from zoqo_jax import Quantizer
        >>> codes = Quantizer(4, block=32, scale_dtype=jnp.float16)(jnp.ones((2, 64)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/a.gguf", {"w": codes}, {"general.name": "ones"})
        ...     tensors, metadata, _ = load(f"{folder}/a.gguf")
        >>> bool((tensors["w"].codes == codes.codes).all()), metadata
        (True, {'general.name': 'ones'})
    """
    paths = parts(path)
    for one in paths:
        if not one.is_file():
            raise FileNotFoundError(f"path: there is no file {one}.")
    tensors: dict[str, QuantizedArray | jax.Array] = {}
    of_parts, decoded = [], []
    for number, one in enumerate(paths):
        with _naming(one):
            found, metadata, other = _read(one)
            _check_part(metadata, number, len(paths))
            if twice := sorted(set(found) & set(tensors)):
                raise ValueError(f"another part has a tensor {twice[0]!r}, too.")
        tensors |= found
        of_parts.append(metadata)
        decoded += other
    path, metadata = paths[0], of_parts[0]
    if len(paths) > 1:
        expected = metadata.get("split.tensors.count", len(tensors))
        if expected != len(tensors):
            raise ValueError(
                f"{path}: the parts have {len(tensors)} tensors instead of {expected}."
            )
        version = metadata.layout.version
        metadata = Metadata({k: x for k, x in metadata.items() if not k.startswith("split.")})
        metadata.layout = _Layout(version)
    words = None
    if tokenizer:
        try:
            words = tokenizing.from_gguf(metadata)
        except ValueError as error:
            raise ValueError(
                f"{path}: {error} With tokenizer=False, all else of the file is read."
            ) from error
    if decoded:
        warnings.warn(
            f"{path}: {len(decoded)} tensors of type {', '.join(sorted(set(decoded)))} were "
            "decoded to float32: they have no codes of their own, and are saved as floats.",
            stacklevel=2,
        )
    return File(tensors, metadata, words)


def parts(path: str | os.PathLike[str]) -> list[Path]:
    """The files of a model in parts, by the name of one of them, as llama.cpp names them.

    Args:
        path: of a part, or of a file that is a whole model, which alone is given back.

    Examples:
        >>> [one.name for one in parts("model-00002-of-00002.gguf")]
        ['model-00001-of-00002.gguf', 'model-00002-of-00002.gguf']
        >>> [one.name for one in parts("model.gguf")]
        ['model.gguf']
    """
    path = Path(path)
    found = _PART.fullmatch(path.name)
    if not found or not 1 <= int(found[2]) <= int(found[3]) != 1:
        return [path]
    count = int(found[3])
    return [path.with_name(f"{found[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, QuantizedArray | jax.Array | np.ndarray],
    metadata: Mapping[str, Any],
) -> None:
    """Write a GGUF file, all of it or nothing: a file that was there stays till then.

    Args:
        path: the file to write.
        tensors: by name, written in this order. A `QuantizedArray` needs a uniform grid with levels
            as in Q4_0 (-8..7), Q4_1 (0..15, with an offset), Q5_0, Q5_1 or Q8_0, scales that
            32 neighbours of the last axis share, and scales and offsets that float16 holds.
        metadata: by key, written in this order, as `load` gives it; see `Metadata` for the version
            and the places of tensors. Python integers become uint32 or int64, floats float32.

    Raises:
        ValueError: a tensor or a value that no GGUF type holds, named.

    Examples:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/a.gguf", {"norm": jnp.ones(3)}, {"general.alignment": 64})
        ...     load(f"{folder}/a.gguf").tensors["norm"].tolist()
        [1.0, 1.0, 1.0]
    """
    alignment = _alignment(metadata)
    kinds = {name: _named(name, ggml.kind_of, tensor) for name, tensor in tensors.items()}
    sizes = {name: ggml.bytes_of(kinds[name], tuple(x.shape)) for name, x in tensors.items()}
    layout = _layout_of(sizes, alignment, getattr(metadata, "layout", _Layout()))
    header = bytearray(struct.pack("<4sIQQ", _MAGIC, layout.version, len(tensors), len(metadata)))
    for key, value in metadata.items():
        header += _string_bytes(key) + _value_bytes(key, value)
    for name, _, offset in layout.places:
        shape = tuple(reversed(tensors[name].shape))
        header += _string_bytes(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        header += struct.pack("<IQ", kinds[name], offset)
    start, gaps = _padded(len(header), alignment), iter(layout.gaps)
    with replacing(path) as file:
        file.write(header)
        for name, _, offset in sorted(layout.places, key=lambda place: place[2]):
            _fill(file, start + offset, next(gaps, b""))
            file.write(_named(name, ggml.encode, tensors[name], kinds[name]))
        _fill(file, start + layout.room, next(gaps, b""))


def _read(path: Path) -> tuple[dict[str, QuantizedArray | jax.Array], Metadata, list[str]]:
    """Tensors and metadata of one file, and the types that were decoded to floats."""
    if not path.stat().st_size:
        raise ValueError("the file is empty.")
    data = np.memmap(path, np.uint8, mode="r")
    cursor = _Cursor(data)
    version, entries, infos = _header(cursor)
    alignment = _alignment(entries)
    for info in infos:
        if info.offset % alignment:
            raise ValueError(f"tensor {info.name!r}: offset {info.offset} is not aligned.")
    start = _padded(cursor.place, alignment)
    _check_places(infos, len(data) - start)
    sizes = [ggml.bytes_of(info.kind, info.shape) for info in infos]
    metadata = Metadata(entries)
    places = tuple((x.name, size, x.offset) for x, size in zip(infos, sizes, strict=True))
    gaps = _gaps(data, cursor.place, infos, start)
    metadata.layout = _Layout(version, alignment, places, len(data) - start, gaps)
    tensors = {info.name: _tensor(info, data[start + info.offset :]) for info in infos}
    return tensors, metadata, [ggml.type_name(i.kind) for i in infos if not ggml.is_exact(i.kind)]


def _gaps(data: np.ndarray, begin: int, infos: list[_Info], start: int) -> tuple[bytes, ...]:
    """What lies between the header's end, the tensors and the file's end, if it is not all zero."""
    found = []
    for info in sorted(infos, key=lambda info: info.offset):
        found.append(data[begin : start + info.offset])
        begin = start + info.offset + ggml.bytes_of(info.kind, info.shape)
    found.append(data[begin:])
    return tuple(gap.tobytes() for gap in found) if any(gap.any() for gap in found) else ()


def _layout_of(sizes: dict[str, int], alignment: int, known: _Layout) -> _Layout:
    """Where tensors go: to the places that they had, or one after another, padded."""
    same = list(sizes.items()) == [(name, size) for name, size, _ in known.places]
    if same and known.alignment == alignment:
        return known
    places, end = [], 0
    for name, size in sizes.items():
        places.append((name, size, end))
        end += _padded(size, alignment)
    return _Layout(known.version, alignment, tuple(places), end)


def _check_part(metadata: Metadata, number: int, count: int) -> None:
    """That a file is the part that its name says, or a whole model."""
    said = metadata.get("split.count", 0), metadata.get("split.no", 0)
    if not all(isinstance(x, int | np.integer) for x in said):
        raise ValueError(f"split.count and split.no must be whole numbers, got {said!r:.60}.")
    if count == 1 and said[0] > 1:
        raise ValueError(
            f"split.count says that this is one of {said[0]} parts, and then its name must end in "
            f"-{said[1] + 1:05}-of-{said[0]:05}.gguf, with the others beside it."
        )
    if count > 1 and said != (count, number):
        raise ValueError(
            f"its name says that it is part {number + 1} of {count}, but split.count is {said[0]} "
            f"and split.no {said[1]}."
        )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """With the file's name in errors."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


class _Cursor:
    """Reads one thing after another, and never past the end."""

    def __init__(self, data: np.ndarray) -> None:
        self._data, self.place = data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self.place

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise ValueError(
                f"the file ends too early: {count} bytes wanted at {self.place}, {self.left} left."
            )
        self.place += count
        return self._data[self.place - count : self.place].tobytes()

    def number(self, kind: str | np.dtype) -> Any:
        kind = np.dtype(kind)
        return np.frombuffer(self.take(kind.itemsize), kind)[0]

    def count(self, least: int) -> int:
        """How many things of at least so many bytes follow."""
        count = int(self.number("<u8"))
        if count * least > self.left:
            raise ValueError(
                f"the file ends too early: {count} items at {self.place}, {self.left} bytes left."
            )
        return count

    def string(self) -> str | bytes:
        raw = self.take(self.count(1))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return raw

    def name(self) -> str:
        name = self.string()
        if isinstance(name, bytes) or not name:
            raise ValueError(f"a name must be UTF-8 and not empty, got {name[:40]!r}.")
        return name

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            number = self.number("<u1" if kind == 7 else _NUMBERS[kind])
            return _bool(number) if kind == 7 else number
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            raise ValueError(f"there is no value type {kind} (at {self.place}).")
        kind = int(self.number("<u4"))
        if kind in _NUMBERS:
            count = self.count(_NUMBERS[kind].itemsize)
            return np.frombuffer(self.take(count * _NUMBERS[kind].itemsize), _NUMBERS[kind])
        if kind != _STRING:
            raise ValueError(f"arrays of value type {kind} are not read (at {self.place}).")
        return [self.string() for _ in range(self.count(8))]


def _bool(number: Any) -> bool:
    if number > 1:
        raise ValueError(f"a bool must be 0 or 1, got {number}.")
    return bool(number)


def _header(cursor: _Cursor) -> tuple[int, dict[str, Any], list[_Info]]:
    """The version, metadata, and what tensors there are."""
    if cursor.take(min(4, cursor.left)) != _MAGIC:
        raise ValueError("this is no GGUF file: it does not begin with 'GGUF'.")
    version = int(cursor.number("<u4"))
    if version not in (2, 3):
        raise ValueError(f"version must be 2 or 3, and little-endian, got {version}.")
    tensor_count, pair_count = cursor.count(24), cursor.count(13)
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.name()
        if key in metadata:
            raise ValueError(f"the key {key!r} is there twice.")
        metadata[key] = cursor.value(int(cursor.number("<u4")))
    return version, metadata, [_info(cursor) for _ in range(tensor_count)]


def _alignment(metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int | np.integer):
        raise ValueError(f"general.alignment must be a whole number, got {alignment!r:.40}.")
    if not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two from 8 on, got {alignment}.")
    return int(alignment)


def _info(cursor: _Cursor) -> _Info:
    name = cursor.name()
    axes = int(cursor.number("<u4"))
    if not 1 <= axes <= ggml.MOST_AXES:
        raise ValueError(f"tensor {name!r} must have 1 to {ggml.MOST_AXES} axes, got {axes}.")
    shape = tuple(int(cursor.number("<u8")) for _ in range(axes))[::-1]
    if not all(shape):
        raise ValueError(f"tensor {name!r} must not be empty, got the shape {shape}.")
    kind, offset = int(cursor.number("<u4")), int(cursor.number("<u8"))
    try:
        ggml.bytes_of(kind, shape)
    except ValueError as error:
        raise ValueError(f"tensor {name!r}: {error}") from error
    return _Info(name, shape, kind, offset)


def _check_places(infos: list[_Info], room: int) -> None:
    """That tensors have names of their own, lie in the file, and share no byte."""
    if len({info.name for info in infos}) < len(infos):
        raise ValueError("two tensors have the same name.")
    end = 0
    for info in sorted(infos, key=lambda info: info.offset):
        if info.offset < end:
            raise ValueError(f"tensor {info.name!r} overlaps another.")
        end = info.offset + ggml.bytes_of(info.kind, info.shape)
        if end > room:
            raise ValueError(
                f"the file ends too early: tensor {info.name!r} of shape {info.shape} wants bytes "
                f"up to {end}, there are {max(room, 0)}."
            )


def _tensor(info: _Info, data: np.ndarray) -> QuantizedArray | jax.Array:
    try:
        return ggml.decode(info.kind, info.shape, data[: ggml.bytes_of(info.kind, info.shape)])
    except ValueError as error:
        raise ValueError(f"tensor {info.name!r}: {error}") from error


def _named(name: str, fn: Callable[..., Any], *arguments: Any) -> Any:
    """What a function says of a tensor, with the tensor's name in its errors."""
    try:
        return fn(*arguments)
    except ValueError as error:
        raise ValueError(f"tensors: {name!r}: {error}") from error


def _padded(count: int, alignment: int) -> int:
    return -(-count // alignment) * alignment


def _string_bytes(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value_bytes(key: str, value: Any) -> bytes:
    """A value with its type before it."""
    if isinstance(value, str | bytes):
        return struct.pack("<I", _STRING) + _string_bytes(value)
    if isinstance(value, list | tuple) and all(isinstance(x, str | bytes) for x in value):
        strings = b"".join(map(_string_bytes, value))
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + strings
    if type(value) is int:
        value = np.uint32(value) if 0 <= value < 2**32 else np.int64(value)
    array = np.asarray(np.float32(value) if type(value) is float else value)
    numbers = [number for number, dtype in _NUMBERS.items() if array.dtype == dtype]
    if not numbers or array.ndim > 1:
        raise ValueError(f"metadata: {key!r} has a value without GGUF type, {value!r:.60}.")
    if array.ndim == 0:
        return struct.pack("<I", numbers[0]) + array.tobytes()
    return struct.pack("<IIQ", _ARRAY, numbers[0], len(array)) + array.tobytes()


def _fill(file: BinaryIO, place: int, gap: bytes) -> None:
    """Write up to a place what was there before, or zeros."""
    count = max(place - file.tell(), 0)
    file.write(gap if len(gap) == count else bytes(count))
