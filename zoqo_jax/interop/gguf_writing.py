"""What a GGUF file begins with, and what lies between its tensors, written."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np

from zoqo_jax.interop.gguf_layout import ARRAY, MAGIC, NUMBERS, STRING, Layout

__all__ = ["fill", "header"]


def header(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    kinds: Mapping[str, int],
    layout: Layout,
) -> bytes:
    r"""All bytes before the tensors, without padding.

    Args:
        metadata: by key, in the file's order.
        shapes: of tensors by name.
        kinds: of the same tensors, the numbers of their types.
        layout: the places of the same tensors, in the file's order.

    Raises:
        ValueError: a value that no GGUF type holds, named.

    Examples:
        >>> header({}, {}, {}, Layout())[:8]
        b'GGUF\x03\x00\x00\x00'
    """
    raw = bytearray(struct.pack("<4sIQQ", MAGIC, layout.version, len(shapes), len(metadata)))
    for key, value in metadata.items():
        raw += _string_bytes(key) + _value_bytes(key, value)
    for name, _, offset in layout.places:
        shape = tuple(reversed(shapes[name]))
        raw += _string_bytes(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        raw += struct.pack("<IQ", kinds[name], offset)
    return bytes(raw)


def fill(file: BinaryIO, place: int, gap: bytes) -> None:
    r"""Write up to a place what was there before, or zeros.

    Examples:
        >>> import io
        >>> file = io.BytesIO()
        >>> fill(file, 3, b"")
        >>> file.getvalue()
        b'\x00\x00\x00'
    """
    count = max(place - file.tell(), 0)
    file.write(gap if len(gap) == count else bytes(count))


def _string_bytes(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value_bytes(key: str, value: Any) -> bytes:
    """A value with its type before it."""
    if isinstance(value, str | bytes):
        return struct.pack("<I", STRING) + _string_bytes(value)
    if isinstance(value, list | tuple) and all(isinstance(x, str | bytes) for x in value):
        strings = b"".join(map(_string_bytes, value))
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + strings
    if type(value) is int:
        value = np.uint32(value) if 0 <= value < 2**32 else np.int64(value)
    array = np.asarray(np.float32(value) if type(value) is float else value)
    numbers = [number for number, dtype in NUMBERS.items() if array.dtype == dtype]
    if not numbers or array.ndim > 1:
        raise ValueError(f"metadata: {key!r} has a value without GGUF type, {value!r:.60}.")
    if array.ndim == 0:
        return struct.pack("<I", numbers[0]) + array.tobytes()
    return struct.pack("<IIQ", ARRAY, numbers[0], len(array)) + array.tobytes()
