"""How a GGUF file is laid out: its constants, and the places of its tensors.

Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from zoqo_jax.interop import ggml
from zoqo_jax.interop.gguf.sources import Stretch

__all__: list[str] = []  # what gguf.py is made of

MAGIC, VERSION = b"GGUF", 3
STRING, ARRAY = 8, 9
"""The types of values that are no numbers."""

NUMBERS = {
    number: np.dtype(kind)
    for number, kind in {
        0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?",
        10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip
"""The types of values that are numbers."""

_ALIGNMENT = 32


class Info(NamedTuple):
    """What a header says of a tensor.

    Attributes:
        name: of the tensor.
        shape: of the tensor, the contiguous axis last.
        kind: the number of its type.
        offset: bytes from where tensors begin.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return ggml.bytes_of(self.kind, self.shape)


class Layout(NamedTuple):
    """What a file has beyond tensors and metadata.

    Attributes:
        version: of the format.
        alignment: of tensors; 0 for no layout but the usual one.
        places: name, bytes and offset of each tensor.
        room: bytes from the padded header to the end; negative: the header is not padded.
        gaps: bytes before, between and after tensors, where they are not all 0.
        sources: of the tensors that codes (or floats) alone do not bring back, where they were.
    """

    version: int = VERSION
    alignment: int = 0
    places: tuple[tuple[str, int, int], ...] = ()
    room: int = 0
    gaps: tuple[bytes, ...] = ()
    sources: Mapping[str, Stretch] = {}

    def placing(self, sizes: dict[str, int], alignment: int) -> Layout:
        """Tensors of these sizes at the places that they had, or one after another, padded."""
        same = list(sizes.items()) == [(name, size) for name, size, _ in self.places]
        if same and self.alignment == alignment:
            return self
        places, end = [], 0
        for name, size in sizes.items():
            places.append((name, size, end))
            end += padded(size, alignment)
        return Layout(self.version, alignment, tuple(places), end)


def alignment_of(metadata: Mapping[str, Any]) -> int:
    """The alignment of tensors that a file's metadata ask for.

    Raises:
        ValueError: it is no power of two, or out of bounds.

    Examples:
        >>> alignment_of({}), alignment_of({"general.alignment": 64})
        (32, 64)
    """
    alignment = metadata.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int | np.integer):
        raise ValueError(f"general.alignment must be a whole number, got {alignment!r:.40}.")
    if not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise ValueError(f"general.alignment must be a power of two from 8 on, got {alignment}.")
    return int(alignment)


def padded(count: int, alignment: int) -> int:
    """The least multiple of the alignment that is not below a count.

    Examples:
        >>> padded(33, 32)
        64
    """
    return -(-count // alignment) * alignment


@contextmanager
def naming(what: Any) -> Iterator[None]:
    """With what it is about at the beginning of a ValueError.

    Examples:
        >>> with naming("tensor 'w'"):
        ...     raise ValueError("it is too long.")
        Traceback (most recent call last):
        ValueError: tensor 'w': it is too long.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error
