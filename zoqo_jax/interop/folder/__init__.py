"""A model as Hugging Face's hub has it, quantized or not: a folder, or one safetensors file.

    loaded = folder.load("Llama-3.2-1B-GPTQ")
    folder.save("trained", loaded.tensors, loaded)

The folder's own `config.json` says which of the `formats` it is in. Quantized tensors become codes;
every other tensor, and every other file, is kept as it is: saving copies the source and writes
only the stored tensors whose codes or floats have changed.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from zoqo_jax.grids.arrays import QuantizedArray, is_quantized
from zoqo_jax.interop.folder import shards
from zoqo_jax.interop.folder.contents import Contents, contents_of
from zoqo_jax.interop.folder.staging import Stage

__all__ = ["Folder", "load", "save"]


class Folder(NamedTuple):
    """What a folder or file holds.

    Attributes:
        tensors: by name: a `QuantizedArray` for each quantized tensor, in its logical shape (a
            matrix is (outputs, inputs)); all other arrays as they are, of JAX, or of NumPy where
            JAX would cut 64 bits to 32.
        config: the content of `config.json`; {} where there is none.
        format: the format's name, such as "gptq"; None where nothing is quantized.
        path: of the folder or file.
        stamps: size and time of change of each file that was read; `save` renews it.

    Examples:
        >>> import tempfile
        >>> from zoqo_jax.interop import safetensors
        >>> with tempfile.TemporaryDirectory() as path:
        ...     safetensors.save(f"{path}/model.safetensors", {"w": np.ones(2, np.float32)})
        ...     found = load(path)
        >>> found.tensors["w"].tolist(), found.config, found.format, list(found.stamps)
        ([1.0, 1.0], {}, None, ['model.safetensors'])
    """

    tensors: dict[str, Any]
    config: dict[str, Any]
    format: str | None
    path: Path
    stamps: dict[str, tuple[int, int]]


def load(path: str | os.PathLike[str]) -> Folder:
    """Read a safetensors file or a folder with one or several, quantized or not.

    Args:
        path: as `safetensors.load` takes it. The config of a file is that of its folder.

    Raises:
        FileNotFoundError: there is no such file, or a shard is missing; it is named.
        ValueError: a damaged file, index or config, a quantization that is not read, or tensors
            that do not fit one another; the path and the tensor are named.

    Examples:
        >>> import tempfile
        >>> from zoqo_jax.interop import safetensors
        >>> with tempfile.TemporaryDirectory() as path:
        ...     safetensors.save(f"{path}/model.safetensors", {"w": np.arange(3, dtype=np.int8)})
        ...     load(path).tensors["w"].tolist()
        [0, 1, 2]
    """
    path = Path(path)
    try:
        contents = contents_of(path)
        stamps = _stamps(path, contents)
        # The largest first: what is needed beside a tensor while it is read is then least where
        # most has been read.
        largest_first = sorted(contents.names, key=contents.size, reverse=True)
        found = {name: contents.read(name) for name in largest_first}
        tensors = {name: found[name] for name in contents.names}
    except ValueError as error:
        raise ValueError(_with(path, error)) from error
    name = contents.format.name if contents.format and contents.parts else None
    return Folder(tensors, contents.config, name, path.absolute(), stamps)


def save(path: str | os.PathLike[str], tensors: Mapping[str, Any], loaded: Folder) -> None:
    """Write what was loaded with other codes or floats: all of it, or nothing.

    Args:
        path: a file where a file was loaded, else a folder: a new or empty one, one that holds no
            other files than the loaded one does, or the loaded one itself.
        tensors: by name; those that are not given stay as they are. Only the codes of a
            `QuantizedArray` may be others than those that were loaded; other arrays must have their
            shape and dtype.
        loaded: as `load` gives it. The files are read again: they must still be there, as they
            were.

    Raises:
        FileNotFoundError: a file that was loaded, or the folder to save in, is not there.
        ValueError: the source has changed, a tensor does not fit it, or the path is taken.

    Examples:
        >>> import tempfile
        >>> from zoqo_jax.interop import safetensors
        >>> with tempfile.TemporaryDirectory() as path:
        ...     safetensors.save(f"{path}/a.safetensors", {"w": np.zeros(2, np.float32)})
        ...     save(f"{path}/b.safetensors", {"w": np.ones(2, np.float32)}, load(path))
        Traceback (most recent call last):
        ValueError: ...b.safetensors: a folder was loaded, a path to save it in must not end so.
    """
    _check_unchanged(loaded)
    contents = contents_of(loaded.path)
    for name, array in tensors.items():
        _check_kind(name, array, contents)
    with Stage(Path(path), loaded.path) as stage:
        for name, array in tensors.items():
            for part, values in _changed(name, array, contents).items():
                stage.write(contents.places[part].file, contents.places[part].begin, values)
        _check_unchanged(loaded)
    if stage.is_in_place:
        loaded.stamps.update(_stamps(loaded.path, contents))


def _stamps(path: Path, contents: Contents) -> dict[str, tuple[int, int]]:
    """Size and time of change of the files with tensors, by their names."""
    folder = path if path.is_dir() else path.parent
    found = {}
    for name in sorted({place.file.name for place in contents.places.values()}):
        status = (folder / name).stat()
        found[name] = (status.st_size, status.st_mtime_ns)
    return found


def _check_unchanged(loaded: Folder) -> None:
    folder = loaded.path if loaded.path.is_dir() else loaded.path.parent
    for name, stamp in loaded.stamps.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{file}: it was loaded, and is not there any more.")
        status = file.stat()
        if (status.st_size, status.st_mtime_ns) != stamp:
            raise ValueError(f"{file}: it has changed since it was loaded; load it again.")


def _check_kind(name: str, array: Any, contents: Contents) -> None:
    """That a tensor is there, and is quantized or not as it was."""
    if name in contents.parts:
        if not is_quantized(array):
            raise ValueError(f"tensors: {name!r} must be a QuantizedArray, got {type(array)}.")
        return
    if name not in contents.plain:
        raise ValueError(f"tensors: there was no {name!r} in what was loaded.")
    place = contents.places[name]
    dtype = shards.DTYPES[place.dtype]
    if is_quantized(array) or np.shape(array) != place.shape or array.dtype != dtype:
        raise ValueError(
            f"tensors: {name!r} must be {dtype} {list(place.shape)} as it was, got "
            f"{getattr(array, 'dtype', type(array))} {list(np.shape(array))}."
        )


def _changed(name: str, array: Any, contents: Contents) -> dict[str, np.ndarray]:
    """The stored tensors that a tensor changes."""
    if name not in contents.parts or contents.format is None:
        stored = {name: shards.read(contents.places[name])}
        new = {name: np.asarray(array)}
    else:
        stored = contents.stored(name)
        old = contents.format.decode(name, stored, contents.settings)
        _check_same(name, array, old)
        if np.array_equal(array.packed, old.packed):
            return {}
        new = contents.format.encode(name, array, stored, contents.settings)
    return {part: x for part, x in new.items() if x.tobytes() != stored[part].tobytes()}


def _check_same(name: str, array: QuantizedArray, old: QuantizedArray) -> None:
    """That nothing but codes is other than in the file."""
    mark, theirs = jnp.zeros(0, jnp.uint8), jax.tree.structure(old)
    ours = dataclasses.replace(
        array, label=old.label, products=old.products, is_frozen=old.is_frozen
    )
    if jax.tree.structure(ours) != theirs or array.shape != old.shape:
        raise ValueError(f"tensors: {name!r} must be {old!r} as in the file, got {array!r}.")
    pairs = [jax.tree.leaves(dataclasses.replace(x, packed=mark)) for x in (ours, old)]
    for a, b in zip(*pairs, strict=True):
        if a.dtype != b.dtype or not np.array_equal(a, b, equal_nan=True):
            raise ValueError(f"tensors: {name!r} must have the scales and offsets of the file.")
    low, high, codes = array.grid.low, array.grid.high, np.asarray(array.codes)
    if codes.size and (codes.min() < low or codes.max() > high):
        raise ValueError(f"tensors: {name!r} must have codes in [{low}, {high}].")


def _with(path: Path, error: ValueError) -> str:
    """The message of an error, with the path."""
    return str(error) if str(path) in str(error) else f"{path}: {error}"
