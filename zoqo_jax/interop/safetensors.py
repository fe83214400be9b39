"""Hugging Face's safetensors: a file, or a folder with one or with several and an index.

    tensors = safetensors.load("SmolLM2-135M")

Headers are checked by the `safetensors` package and by `shards`; pickled weights are never read.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from zoqo_jax.interop.files import replacing
from zoqo_jax.interop.folder import shards

__all__ = ["as_jax", "load", "save"]


def load(path: str | os.PathLike[str]) -> dict[str, jax.Array | np.ndarray]:
    """The arrays of a safetensors file, or of all files of a checkpoint's folder.

    Args:
        path: a `.safetensors` file, or a folder with `model.safetensors`, or with shards and
            `model.safetensors.index.json`, or with one other `.safetensors` file.

    Returns:
        Arrays by name, in their own dtypes, and NumPy's where JAX would cut 64 bits to 32.

    Raises:
        FileNotFoundError: there is no such file, or a shard is missing; it is named.
        ValueError: a damaged file or index, or a dtype that is not read, such as 4-bit floats.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/model.safetensors", {"w": jnp.ones(2, jnp.bfloat16)})
        ...     load(folder)["w"].tolist()
        [1.0, 1.0]
    """
    places = shards.places(Path(path))
    return {name: as_jax(shards.read(place)) for name, place in places.items()}


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
    package = shards.package()
    arrays = {name: np.asarray(x, order="C") for name, x in tensors.items()}
    content = package.numpy.save(arrays, None if metadata is None else dict(metadata))
    with replacing(path) as file:
        file.write(content)


def as_jax(values: np.ndarray) -> jax.Array | np.ndarray:
    """An array of JAX, unless JAX would round it.

    Examples:
        >>> as_jax(np.array([2**40])).dtype
        dtype('int64')
    """
    array = jnp.asarray(values)
    return array if array.dtype == values.dtype else values
