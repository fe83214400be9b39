"""One GGUF file, read without trust: its header, where tensors lie, and the tensors."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np

from zoqo_jax.interop import ggml
from zoqo_jax.interop.ggml.types import TYPES
from zoqo_jax.interop.gguf.header import Cursor, header
from zoqo_jax.interop.gguf.layout import Info, Layout, alignment_of, naming, padded
from zoqo_jax.interop.gguf.sources import Stretch

__all__: list[str] = []  # what gguf.py is made of


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any], Layout, dict[str, int]]:
    """Tensors, metadata, layout, and the types of tensors that were decoded to floats.

    Raises:
        ValueError: it is no whole GGUF file, or of a kind that is not read.
    """
    metadata, layout, places = _places(path)
    tensors, decoded = {}, {}
    for name, (info, stretch) in places.items():
        with naming(f"tensor {name!r}"):
            tensors[name] = ggml.decode(info.kind, info.shape, stretch)
        if not ggml.is_exact(info.kind):
            decoded[name] = info.kind
    return tensors, metadata, layout, decoded


def _places(path: Path) -> tuple[dict[str, Any], Layout, dict[str, tuple[Info, Stretch]]]:
    """Metadata, layout, and what and where tensors are."""
    if not path.stat().st_size:
        raise ValueError("the file is empty.")
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data, cursor = np.frombuffer(mapped, np.uint8), Cursor(mapped)
    version, metadata, infos = header(cursor)
    alignment = alignment_of(metadata)
    for info in infos:
        if info.offset % alignment:
            raise ValueError(f"tensor {info.name!r}: offset {info.offset} is not aligned.")
    start = padded(cursor.place, alignment)
    _check_places(infos, len(data) - start)
    places = tuple((info.name, info.size, info.offset) for info in infos)
    gaps = _gaps(data, cursor.place, infos, start)
    tensors = {
        info.name: (info, Stretch(path, start + info.offset, info.size, info.kind))
        for info in infos
    }
    sources = {
        name: stretch
        for name, (info, stretch) in tensors.items()
        if not ggml.is_exact(info.kind) or (info.kind in TYPES and TYPES[info.kind].has_aliases)
    }
    return metadata, Layout(version, alignment, places, len(data) - start, gaps, sources), tensors


def _gaps(data: np.ndarray, begin: int, infos: list[Info], start: int) -> tuple[bytes, ...]:
    """What lies between the header's end, the tensors and the file's end, if it is not all zero."""
    found = []
    for info in sorted(infos, key=lambda info: info.offset):
        found.append(data[begin : start + info.offset])
        begin = start + info.offset + info.size
    found.append(data[begin:])
    return tuple(gap.tobytes() for gap in found) if any(gap.any() for gap in found) else ()


def _check_places(infos: list[Info], room: int) -> None:
    """That tensors have names of their own, lie in the file, and share no byte."""
    if len({info.name for info in infos}) < len(infos):
        raise ValueError("two tensors have the same name.")
    end = 0
    for info in sorted(infos, key=lambda info: info.offset):
        if info.offset < end:
            raise ValueError(f"tensor {info.name!r} overlaps another.")
        end = info.offset + info.size
        if end > room:
            raise ValueError(
                f"the file ends too early: tensor {info.name!r} of shape {info.shape} wants bytes "
                f"up to {end}, there are {max(room, 0)}."
            )
