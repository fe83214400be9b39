"""bitsandbytes' 4-bit tensors, as Hugging Face's safetensors hold them: codes here, bit for bit.

    tensors, companions = bitsandbytes.load("Llama-3.2-1B-nf4")
    bitsandbytes.save("trained.safetensors", tensors, companions)

The layout is in `nf4` and `quant_state`. Training moves codes and never scales, so companions are
kept as they are and written back as they were; arrays that were not read from a file get new ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from zoqo_jax.grids import companders
from zoqo_jax.grids.arrays import QuantizedArray, is_quantized
from zoqo_jax.interop import safetensors
from zoqo_jax.interop.formats import nf4, quant_state

__all__ = ["File", "load", "save"]


class File(NamedTuple):
    """What a file or folder holds.

    Attributes:
        tensors: by name: a `QuantizedArray` for each 4-bit tensor, in its own shape (a matrix is
            (outputs, inputs)) and with values in its own dtype; all other arrays as they are.
        companions: by name, what lies beside the 4-bit tensors; `save` writes it back.

    Examples:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from zoqo_jax import nf4
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/a.safetensors", {"w": nf4()(jnp.ones((1, 64))), "b": jnp.ones(2)})
        ...     file = load(f"{folder}/a.safetensors")
        >>> file.tensors["w"].shape, file.tensors["b"].tolist(), file.companions["w.absmax"]
        ((1, 64), [1.0, 1.0], array([1.], dtype=float32))
    """

    tensors: dict[str, Any]
    companions: dict[str, np.ndarray]


def load(path: str | os.PathLike[str]) -> File:
    """Read a safetensors file, or a checkpoint's folder, with 4-bit tensors among its tensors.

    Args:
        path: as `safetensors.load` takes it.

    Returns:
        Tensors and companions. Blocks that go past the end of a row are cut there, so that the
        scales of a matrix whose rows no blocksize divides are those of shorter blocks.

    Raises:
        FileNotFoundError: there is no such file, or a shard is missing; it is named.
        ValueError: a damaged file, or companions that are missing or do not fit; the tensor is
            named.

    Examples:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from zoqo_jax import nf4
        >>> array = nf4(block=64)(jnp.linspace(-1.0, 1.0, 256).reshape(2, 128))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/model.safetensors", {"w": array})
        ...     tensors, companions = load(folder)
        >>> bool((tensors["w"].codes == array.codes).all()), sorted(companions)
        (True, ['w.absmax', 'w.quant_map', 'w.quant_state.bitsandbytes__nf4'])
    """
    arrays: dict[str, Any] = dict(safetensors.load(path))
    try:
        quantized = nf4.owners(arrays)
        found = sorted(name for name in nf4.companions_of(quantized) if name in arrays)
        companions = {name: np.asarray(arrays.pop(name)) for name in found}
        for name in sorted(quantized):  # one after another, in place: the file's bytes are let go
            arrays[name] = nf4.decode(name, {name: np.asarray(arrays[name]), **companions}, {})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return File(arrays, companions)


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    companions: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a safetensors file with 4-bit tensors, all of it or nothing.

    Args:
        path: the file to write.
        tensors: by name. A `QuantizedArray` without companions needs NF4's levels, no offset, and
            scales that 64 neighbours of the flattened array share (or 32, 128 ... 4096, where its
            blocks are so long); its scales are written as float32.
        companions: by name, as `load` gives them. The tensors beside them must have the scales they
            had; only their codes may be others.

    Raises:
        ValueError: a tensor that the format does not hold, or companions of another, named.

    Examples:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from zoqo_jax import nf4
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/a.safetensors", {"w": nf4()(jnp.ones((1, 64)))})
        ...     stored = safetensors.load(folder)
        >>> stored["w"].shape, stored["w.absmax"].tolist()
        ((32, 1), [1.0])
    """
    companions = dict(companions or {})
    quantized = {name for name, array in tensors.items() if is_quantized(array)}
    lost = sorted(set(companions) - nf4.companions_of(quantized))
    if lost:
        raise ValueError(f"companions: {lost[0]!r} belongs to no quantized tensor.")
    stored: dict[str, Any] = {}
    for name, array in tensors.items():
        beside: dict[str, np.ndarray] = {}
        if name in quantized:
            beside = {key: companions[key] for key in nf4.companions_of({name}) & set(companions)}
            beside = beside or _new_companions(name, array)
            array = nf4.encode(name, array, beside, {})[name]
        for key, content in {name: array, **beside}.items():
            if key in stored:
                raise ValueError(f"tensors: {key!r} is another tensor's companion, too.")
            stored[key] = content
    safetensors.save(path, stored, {"format": "pt"})  # loaders for PyTorch look for the format


def _new_companions(name: str, array: QuantizedArray) -> dict[str, np.ndarray]:
    """Companions of an array that was not read from a file."""
    levels = companders.nf4().levels
    if array.grid.levels != levels or array.offset is not None:
        raise ValueError(
            f"tensors: {name!r} must have NF4's levels and no offset, got {array.grid} "
            f"{'without' if array.offset is None else 'with'} offset."
        )
    if not quant_state.is_shape(array.shape):
        raise ValueError(f"tensors: {name!r} must have {quant_state.SHAPE}, got {array.shape}.")
    axis, length = array.block or (-1, 0)
    blocksize = length if axis == -1 and length in quant_state.BLOCKSIZES else 64
    dtype = str(array.value_dtype)
    settings = {
        "quant_type": "nf4",
        "blocksize": blocksize,
        "dtype": dtype,
        "shape": list(array.shape),
    }
    return {
        f"{name}.absmax": nf4.per_block(name, array, blocksize),
        f"{name}.quant_map": np.array(levels, np.float32),
        name + quant_state.STATES["nf4"]: np.frombuffer(json.dumps(settings).encode(), np.uint8),
    }
