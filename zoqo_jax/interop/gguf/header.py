"""What a GGUF file begins with, read without trust.

Every length is checked against what is left of the file before anything is made of it.
"""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np

from zoqo_jax.interop import ggml
from zoqo_jax.interop.gguf.layout import ARRAY, MAGIC, NUMBERS, STRING, Info, naming

__all__: list[str] = []  # what gguf.py is made of


class Cursor:
    """Reads one thing after another, and never past the end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.place = data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self.place

    def take(self, count: int) -> bytes:
        place, end = self.place, self.place + count
        if end > len(self._data):
            raise ValueError(
                f"the file ends too early: {count} bytes wanted at {place}, {self.left} left."
            )
        self.place = end
        return self._data[place:end]

    def number(self, kind: str | np.dtype) -> Any:
        kind = np.dtype(kind)
        return np.frombuffer(self.take(kind.itemsize), kind)[0]

    def count(self, least: int) -> int:
        """How many things of at least so many bytes follow."""
        count = int.from_bytes(self.take(8), "little")
        if count * least > self.left:
            raise ValueError(
                f"the file ends too early: {count} items at {self.place}, {self.left} bytes left."
            )
        return count

    def strings(self, count: int) -> list[str | bytes]:
        """Strings one after another, in one loop: a tokenizer has a quarter of a million.

        They are `bytes` where they are not UTF-8.
        """
        found: list[str | bytes] = []
        data, place, end = self._data, self.place, len(self._data)
        for _ in range(count):
            begin = place + 8
            length = int.from_bytes(data[place:begin], "little")
            place = begin + length
            if place > end:
                break
            try:
                found.append(data[begin:place].decode())
            except UnicodeDecodeError:
                found.append(data[begin:place])
        if len(found) < count:
            raise ValueError(
                f"the file ends too early: {length} bytes wanted at {begin}, {end - begin} left."
            )
        self.place = place
        return found

    def name(self) -> str:
        name = self.strings(1)[0]
        if isinstance(name, bytes) or not name:
            raise ValueError(f"a name must be UTF-8 and not empty, got {name[:40]!r}.")
        return name

    def value(self, kind: int) -> Any:
        if kind in NUMBERS:
            number = self.number("<u1" if kind == 7 else NUMBERS[kind])
            return _bool(number) if kind == 7 else number
        if kind == STRING:
            return self.strings(1)[0]
        if kind != ARRAY:
            raise ValueError(f"there is no value type {kind} (at {self.place}).")
        kind = int(self.number("<u4"))
        if kind in NUMBERS:
            count = self.count(NUMBERS[kind].itemsize)
            return np.frombuffer(self.take(count * NUMBERS[kind].itemsize), NUMBERS[kind])
        if kind != STRING:
            raise ValueError(f"arrays of value type {kind} are not read (at {self.place}).")
        return self.strings(self.count(8))


def _bool(number: Any) -> bool:
    if number > 1:
        raise ValueError(f"a bool must be 0 or 1, got {number}.")
    return bool(number)


def header(cursor: Cursor) -> tuple[int, dict[str, Any], list[Info]]:
    """The version, metadata, and what tensors there are."""
    if cursor.take(min(4, cursor.left)) != MAGIC:
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


def _info(cursor: Cursor) -> Info:
    name = cursor.name()
    axes = int(cursor.number("<u4"))
    if not 1 <= axes <= ggml.MOST_AXES:
        raise ValueError(f"tensor {name!r} must have 1 to {ggml.MOST_AXES} axes, got {axes}.")
    shape = tuple(int(cursor.number("<u8")) for _ in range(axes))[::-1]
    if not all(shape):
        raise ValueError(f"tensor {name!r} must not be empty, got the shape {shape}.")
    info = Info(name, shape, int(cursor.number("<u4")), int(cursor.number("<u8")))
    with naming(f"tensor {name!r}"):
        ggml.bytes_of(info.kind, shape)
    return info
