"""Where the tensors of safetensors files lie: headers, shards and their index, read without trust.

A header is checked by the `safetensors` package, and then here: each tensor takes as many bytes as
its shape and dtype need, one begins where another ends, and together they fill the file. Tensors
are read one at a time, so that a file is never in memory as a whole.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

__all__ = ["Place", "is_inside", "package", "places", "read", "unique"]

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4",
        "I32": "<i4", "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
        "C64": "<c8", "BF16": jnp.bfloat16, "F8_E4M3": jnp.float8_e4m3fn,
        "F8_E5M2": jnp.float8_e5m2, "F8_E8M0": jnp.float8_e8m0fnu,
    }.items()
}  # fmt: skip
_INDEX = "model.safetensors.index.json"
_MOST_HEADER, _MOST_AXES = 100_000_000, 32


class Place(NamedTuple):
    """Where a tensor lies.

    Attributes:
        file: the safetensors file.
        dtype: as the file has it, a key of `DTYPES`.
        shape: of the tensor.
        begin: offset of its first byte in the file.

    Examples:
        >>> Place(Path("a.safetensors"), "F16", (3, 4), 80).size
        24
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def size(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def places(path: Path) -> dict[str, Place]:
    """The places of all tensors of a file, or of all files of a checkpoint's folder.

    Args:
        path: a `.safetensors` file, or a folder with `model.safetensors`, or with shards and
            `model.safetensors.index.json`, or with one other `.safetensors` file.

    Returns:
        By name, file by file, in the order in which they lie there.

    Raises:
        FileNotFoundError: there is no such file, or a shard is missing; it is named.
        ValueError: a damaged file or index, or a dtype that is not read.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "model.safetensors")
        ...     package().numpy.save_file({"w": np.ones((2, 3), np.float16)}, file)
        ...     places(Path(folder))["w"].shape
        (2, 3)
    """
    found: dict[str, Place] = {}
    for file, names in _files(path):
        here = _header(file)
        missing = sorted(set(names) - set(here))
        if missing:
            raise ValueError(f"{file}: there is no tensor {missing[0]}.")
        twice = sorted(set(found) & set(here))
        if twice:
            raise ValueError(f"{file}: another file has a tensor {twice[0]}, too.")
        found.update(here)
    return found


def read(place: Place) -> np.ndarray:
    """A tensor, in memory that JAX can use without a copy (it must begin at a multiple of 64).

    Raises:
        ValueError: the file is shorter than it was.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "a.safetensors")
        ...     package().numpy.save_file({"w": np.arange(3, dtype=np.int8)}, file)
        ...     read(places(file)["w"])
        array([0, 1, 2], dtype=int8)
    """
    memory = np.empty(place.size + 64, np.uint8)
    raw = memory[-memory.ctypes.data % 64 :][: place.size]
    with open(place.file, "rb") as file:
        file.seek(place.begin)
        if file.readinto(raw.data) != place.size:
            raise ValueError(f"{place.file}: it has become shorter since its header was read.")
    return raw.view(DTYPES[place.dtype]).reshape(place.shape)


def is_inside(file: Path, folder: Path) -> bool:
    """Whether a file lies in a folder, or is a link to a file of Hugging Face's cache.

    Examples:
        >>> is_inside(Path("model/config.json"), Path("model"))
        True
        >>> is_inside(Path("model/../secret"), Path("model"))
        False
    """
    target, folder = file.resolve(), folder.resolve()
    cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return cache or target.is_relative_to(folder)


def unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The object that JSON describes, each key once; for `json.loads(object_pairs_hook=...)`.

    Raises:
        ValueError: a key stands twice.

    Examples:
        >>> json.loads('{"a": 1, "a": 2}', object_pairs_hook=unique)
        Traceback (most recent call last):
        ValueError: the key 'a' stands twice
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r:.80} stands twice")
    return found


def package() -> Any:
    """The `safetensors` package, with its module for NumPy.

    Raises:
        ImportError: it is not installed.

    Examples:
        >>> package().__name__
        'safetensors'
    """
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "safetensors files are read by the safetensors package: pip install 'zoqo_jax[interop]'"
        ) from error
    return safetensors


def _files(path: Path) -> list[tuple[Path, list[str]]]:
    """The files to read, and the tensors that must be in each."""
    if path.is_file():
        return [(path, [])]
    if not path.is_dir():
        raise FileNotFoundError(f"path: there is no file or folder {path}.")
    if (path / "model.safetensors").is_file():
        return [(_own(path / "model.safetensors"), [])]
    if (path / _INDEX).is_file():
        return _shards(path)
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return [(_own(others[0]), [])]
    raise FileNotFoundError(
        f"path: {path} must hold model.safetensors or {_INDEX}, has {len(others)} other files."
    )


def _shards(folder: Path) -> list[tuple[Path, list[str]]]:
    index = _own(folder / _INDEX)
    try:
        text = index.read_text(encoding="utf-8")
        weight_map = json.loads(text, object_pairs_hook=unique)["weight_map"]
        by_file: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            by_file.setdefault(file, []).append(name)
        shards = [
            (file, file not in ("", "..") and Path(file).name == file and "\0" not in file)
            for file in by_file
        ]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index}: no index of tensors: {error}.") from error
    for file, is_name in shards:
        if not is_name:
            raise ValueError(f"{index}: a shard must lie beside the index, got {file!r}.")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{index} names {file}, which is not there.")
    return [(_own(folder / file), names) for file, names in sorted(by_file.items())]


def _own(file: Path) -> Path:
    """A file that is no link to elsewhere."""
    if not is_inside(file, file.parent):
        raise ValueError(f"{file}: it is a link out of its folder, to {file.resolve()}.")
    return file


def _header(file: Path) -> dict[str, Place]:
    """The places of a file's tensors, in their order."""
    outer = package()
    try:
        with outer.safe_open(file, framework="np"):
            pass  # The package has checked the header.
        size = os.path.getsize(file)
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > min(size - 8, _MOST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            entries = json.loads(opened.read(length), object_pairs_hook=unique)
        entries.pop("__metadata__", None)
        start = 8 + length
        found = {name: _place(file, name, entry, size, start) for name, entry in entries.items()}
    except (outer.SafetensorError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file}: no whole safetensors file: {error}.") from error
    in_order = sorted(found.items(), key=lambda item: (item[1].begin, item[1].size))
    end = start
    for name, place in in_order:
        if place.begin != end:
            raise ValueError(f"{file}: tensor {name!r} begins at {place.begin} instead of {end}.")
        end += place.size
    if end != size:
        raise ValueError(f"{file}: its tensors end at {end}, the file at {size}.")
    return dict(in_order)


def _place(file: Path, name: str, entry: dict[str, Any], size: int, start: int) -> Place:
    """What a header says of a tensor."""
    dtype, shape, offsets = (entry.get(key, []) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"tensor {name!r}: its dtype is not read: {dtype!r:.40}")
    if not (_are_counts(shape, size) and _are_counts(offsets, size)) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r}: shape {shape!r:.80} or offsets {offsets!r:.80}")
    place = Place(file, dtype, tuple(shape), start + offsets[0])
    if place.size != offsets[1] - offsets[0]:
        raise ValueError(
            f"tensor {name!r}: {dtype} {shape} takes {place.size} bytes, its offsets are {offsets}"
        )
    return place


def _are_counts(numbers: Any, most: int) -> bool:
    """Whether a header's list holds numbers that a file of so many bytes can have."""
    is_list = isinstance(numbers, list) and len(numbers) <= _MOST_AXES
    return is_list and all(type(n) is int and 0 <= n <= most for n in numbers)
