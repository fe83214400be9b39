"""A GGUF file, written: what it begins with, its tensors, and what lies between them."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from zoqo_jax.interop import ggml
from zoqo_jax.interop.files import replacing
from zoqo_jax.interop.gguf.layout import ARRAY, MAGIC, NUMBERS, STRING, Layout, naming, padded
from zoqo_jax.interop.gguf.sources import Stretch

__all__: list[str] = []  # what gguf.py is made of


def write(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, Any],
    kinds: Mapping[str, int],
    sources: Mapping[str, Stretch | None],
    layout: Layout,
) -> None:
    """Write a file.

    Args:
        path: the file.
        tensors: by name, in the file's order.
        metadata: by key, in the file's order.
        kinds: of tensors, the numbers of their types.
        sources: of tensors, the bytes that they were read from, or None.
        layout: of the file, with the places of these tensors.

    Raises:
        ValueError: a tensor or a value that no GGUF type holds, named.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    first, gaps = header(metadata, shapes, kinds, layout), iter(layout.gaps)
    start = padded(len(first), layout.alignment)
    with replacing(path) as file:
        file.write(first)
        for name, _, offset in sorted(layout.places, key=lambda place: place[2]):
            file.write(filling(start + offset - file.tell(), next(gaps, b"")))
            with naming(f"tensors: {name!r}"):
                for part in ggml.encoded(tensors[name], kinds[name], sources[name]):
                    file.write(np.ascontiguousarray(part).data)
        file.write(filling(start + layout.room - file.tell(), next(gaps, b"")))


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


def filling(count: int, gap: bytes) -> bytes:
    r"""So many bytes between tensors: what was there before, if it was as long, or zeros.

    Examples:
        >>> filling(2, b"ab"), filling(2, b""), filling(-1, b"")
        (b'ab', b'\x00\x00', b'')
    """
    count = max(count, 0)
    return gap if len(gap) == count else bytes(count)


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
