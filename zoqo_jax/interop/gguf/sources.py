"""What codes and floats alone do not bring back of a GGUF file, and is read from it once more.

Two kinds of tensors need it: those of types in which plus and minus zero are one code, and those
that were decoded to floats. Their bytes are not kept in memory, only where they lie.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.interop import ggml
from zoqo_jax.interop.ggml import as_floats

__all__: list[str] = []  # what gguf.py is made of


class Stretch:
    """Some bytes of a file, read from it only when a slice is taken, and never kept.

    Args:
        path: the file.
        begin: the first byte.
        count: how many bytes.
        kind: the type of the tensor that lies there.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a")
        ...     _ = path.write_bytes(bytes(range(10)))
        ...     Stretch(path, 3, 5, kind=0)[1:3]
        array([4, 5], dtype=uint8)
    """

    def __init__(self, path: Path, begin: int, count: int, kind: int) -> None:
        self.path, self.kind = path, kind
        self._begin, self._count = begin, count
        self._stamp = _stamp(path)

    @property
    def is_there(self) -> bool:
        """Whether the file is still the one that it was."""
        return self.path.is_file() and _stamp(self.path) == self._stamp

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, where: slice) -> np.ndarray:
        begin, end, _ = where.indices(self._count)
        part = np.fromfile(self.path, np.uint8, end - begin, offset=self._begin + begin)
        if len(part) < end - begin:
            raise ValueError(
                f"the file ends too early: {self.path} has been cut while it was read."
            )
        return part


def why_floats(path: Path, decoded: dict[str, int]) -> str:
    """The warning that tensors became floats: which, of which types, and why."""
    reasons = []
    for kind in sorted(set(decoded.values())):
        names = [repr(name) for name, other in decoded.items() if other == kind]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        listed = ", ".join(names[:3]) + more
        reasons.append(f"{ggml.type_name(kind)} ({listed}), because {as_floats.why(kind)}")
    return (
        f"{path}: {len(decoded)} tensors have no codes that could be trained and were decoded to "
        f"float32: those of type {'; of type '.join(reasons)}. `save` writes them as they were if "
        "they have not changed, and otherwise as floats."
    )


def source_of(name: str, tensor: Any, sources: Mapping[str, Stretch]) -> Stretch | None:
    """The bytes that a tensor was read from, if they are needed to write it, and still there.

    Warns:
        UserWarning: they are needed, and the file has changed since.
    """
    source = sources.get(name)
    if source is None:
        return None
    quantized = isinstance(tensor, QuantizedArray)
    if quantized != ggml.is_exact(source.kind):
        return None  # it has become another kind of tensor
    if tensor.size == 0 or len(source) != _size(source.kind, tensor):
        return None
    if not source.is_there:
        what = "minus zeros become plus zeros" if quantized else "it is written as floats"
        warnings.warn(
            f"tensors: {name!r}: {source.path} is no longer the file that it was read from, so "
            f"{what}.",
            stacklevel=3,
        )
        return None
    if quantized or (tensor.dtype == np.float32 and as_floats.is_same(source.kind, source, tensor)):
        return source
    return None


def kept_kind(source: Stretch | None) -> int | None:
    """The type in which a tensor without codes stays, because it has not changed."""
    return None if source is None or ggml.is_exact(source.kind) else source.kind


def _size(kind: int, tensor: Any) -> int | None:
    """How many bytes a tensor has in a type, or None if it cannot be of this type."""
    try:
        return ggml.bytes_of(kind, tuple(tensor.shape))
    except ValueError:
        return None


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when somebody writes a file."""
    about = path.stat()
    return about.st_size, about.st_mtime_ns
