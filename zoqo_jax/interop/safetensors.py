"""Hugging Face's safetensors: a file, or a folder with one or with several and an index.

    tensors = safetensors.load("SmolLM2-135M")

Lengths and places are checked by the `safetensors` package; pickled weights are never read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoqo_jax.interop.files import replacing

__all__ = ["load", "save"]

_INDEX = "model.safetensors.index.json"


def load(path: str | os.PathLike[str]) -> dict[str, jax.Array | np.ndarray]:
    """The arrays of a safetensors file, or of all files of a checkpoint's folder.

    Args:
        path: a `.safetensors` file, or a folder with `model.safetensors`, or with shards and
            `model.safetensors.index.json`, or with one other `.safetensors` file.

    Returns:
        Arrays by name, in their own dtypes, and NumPy's where JAX would cut 64 bits to 32.

    Raises:
        FileNotFoundError: there is no such file, or a shard is missing; it is named.
        ValueError: a damaged file or index, or a dtype that is not read, such as 8-bit floats.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/model.safetensors", {"w": jnp.ones(2, jnp.bfloat16)})
        ...     load(folder)["w"].tolist()
        [1.0, 1.0]
    """
    found: dict[str, jax.Array | np.ndarray] = {}
    for file, names in _files(Path(path)):
        tensors = _read(file)
        missing = sorted(set(names) - set(tensors))
        if missing:
            raise ValueError(f"{file}: there is no tensor {missing[0]}.")
        twice = sorted(set(found) & set(tensors))
        if twice:
            raise ValueError(f"{file}: another file has a tensor {twice[0]}, too.")
        found.update(tensors)
    return found


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write arrays to a safetensors file, all of it or nothing.

    Args:
        path: the file to write.
        tensors: arrays by name.
        metadata: what the header says beside the tensors.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/a.safetensors", {"a": np.arange(3)})
        ...     load(f"{folder}/a.safetensors")["a"].tolist()
        [0, 1, 2]
    """
    package = _package()
    arrays = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    content = package.numpy.save(arrays, None if metadata is None else dict(metadata))
    with replacing(path) as file:
        file.write(content)


def _files(path: Path) -> list[tuple[Path, list[str]]]:
    """The files to read, and the tensors that must be in each."""
    if path.is_file():
        return [(path, [])]
    if not path.is_dir():
        raise FileNotFoundError(f"path: there is no file or folder {path}.")
    if (path / "model.safetensors").is_file():
        return [(path / "model.safetensors", [])]
    if (path / _INDEX).is_file():
        return _shards(path)
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return [(others[0], [])]
    raise FileNotFoundError(
        f"path: {path} must hold model.safetensors or {_INDEX}, has {len(others)} other files."
    )


def _shards(folder: Path) -> list[tuple[Path, list[str]]]:
    index = folder / _INDEX
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        by_file: dict[str, list[str]] = {}
        for name, file in places.items():
            by_file.setdefault(file, []).append(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: no index of tensors: {error}.") from error
    for file in by_file:
        if Path(file).name != file:
            raise ValueError(f"{index}: a shard must lie beside the index, got {file!r}.")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{index} names {file}, which is not there.")
    return [(folder / file, names) for file, names in sorted(by_file.items())]


def _read(file: Path) -> dict[str, jax.Array | np.ndarray]:
    package = _package()
    try:
        with package.safe_open(file, framework="np") as opened:
            return {name: _array(opened.get_tensor(name)) for name in opened.keys()}  # noqa: SIM118
    except package.SafetensorError as error:
        raise ValueError(f"{file}: no whole safetensors file: {error}.") from error
    except AttributeError as error:  # a dtype that the package knows and NumPy does not
        raise ValueError(f"{file}: a tensor's dtype is not read: {error}.") from error


def _array(values: np.ndarray) -> jax.Array | np.ndarray:
    """An array of JAX, unless JAX would round it."""
    array = jnp.asarray(values)
    return array if array.dtype == values.dtype else values


def _package() -> Any:
    try:
        import safetensors
        import safetensors.numpy
    except ImportError as error:
        raise ImportError(
            "safetensors files are read by the safetensors package: pip install 'zoqo_jax[interop]'"
        ) from error
    return safetensors
