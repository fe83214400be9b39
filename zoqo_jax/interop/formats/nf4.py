"""bitsandbytes' 4-bit tensors behind `protocol.Format`: NF4 and FP4.

A quantized tensor NAME lies in a checkpoint as (n / 2, 1) bytes, two codes of the flattened tensor
in each, the first in the upper half; `quant_state` says what lies beside it. The value of a code is
`quant_map[code] * scale`, in float32, then rounded to `dtype`.

NF4 and double quantization are QLoRA's (Dettmers et al., 2023, arXiv:2305.14314). Files are read
without trust: companions that do not fit the tensor and one another are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.interop.formats import quant_state
from zoqo_jax.interop.formats.protocol import Stored

__all__ = [
    "companions_of",
    "decode",
    "encode",
    "names",
    "owners",
    "per_block",
    "settings",
]

name = "bitsandbytes"


def settings(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a folder's `config.json` says of bitsandbytes; see `protocol.Format`.

    Files of 4-bit tensors explain themselves, so they are read without a word of it, too.

    Examples:
        >>> settings({}), settings({"quantization_config": {"quant_method": "gptq"}})
        ({}, None)
    """
    if config.get("quantization") is not None:
        return None
    said = config.get("quantization_config")
    if said is None:
        return {}
    if not isinstance(said, Mapping) or said.get("quant_method") != name:
        return None
    if said.get("load_in_8bit"):
        raise ValueError("load_in_8bit: only 4-bit tensors of bitsandbytes are read.")
    return said


def names(stored: Mapping[str, Stored], settings: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The stored tensors of each quantized one; see `protocol.Format`.

    Examples:
        >>> said = "w.quant_state.bitsandbytes__nf4"
        >>> names({"w": Stored("U8", (32, 1)), said: Stored("U8", (80,))}, {})
        {'w': ('w', 'w.quant_state.bitsandbytes__nf4')}
    """
    return {
        key: (key, *sorted(beside for beside in companions_of({key}) if beside in stored))
        for key in sorted(owners(stored))
    }


def decode(
    name: str, parts: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> QuantizedArray:
    """A tensor from its parts; see `protocol.Format`.

    Examples:
        >>> import tempfile
        >>> from zoqo_jax.interop import bitsandbytes, safetensors
        >>> from zoqo_jax.grids.quantization import nf4
        >>> with tempfile.TemporaryDirectory() as path:
        ...     bitsandbytes.save(f"{path}/a.safetensors", {"w": nf4()(jnp.ones((1, 64)))})
        ...     parts = {key: np.asarray(x) for key, x in safetensors.load(path).items()}
        >>> decode("w", parts, {}).materialise()[0, :3].tolist()
        [1.0, 1.0, 1.0]
    """
    state = quant_state.read(name, parts)
    shape, packed = state.shape, np.asarray(parts[name])
    half = math.prod(shape) // 2
    if packed.dtype != np.uint8 or packed.shape != (half, 1):
        raise ValueError(
            f"tensor {name!r} of shape {shape} must lie in uint8 [{half}, 1], got "
            f"{packed.dtype} {list(packed.shape)}."
        )
    ours = np.argsort(state.order).astype(np.uint8)
    codes = ours[np.concatenate([packed >> 4, packed & 15], axis=1)]
    # A block may go on in the next row: cut where rows end, it is several with the same scale.
    length = math.gcd(shape[-1], state.blocksize)
    rows = (*shape[:-1], shape[-1] // length)
    blocks = np.arange(math.prod(rows)) * length // state.blocksize
    return QuantizedArray.from_codes(
        jnp.asarray(codes.reshape(shape)),
        jnp.asarray(state.scales[blocks].reshape(rows)),
        None,
        state.grid,
        block=(-1, length),
        value_dtype=state.dtype,
    )


def encode(
    name: str,
    array: QuantizedArray,
    parts: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
) -> dict[str, np.ndarray]:
    """The bytes with an array's codes; see `protocol.Format`.

    Examples:
        >>> import tempfile
        >>> from zoqo_jax.interop import bitsandbytes, safetensors
        >>> from zoqo_jax.grids.quantization import nf4
        >>> with tempfile.TemporaryDirectory() as path:
        ...     bitsandbytes.save(f"{path}/a.safetensors", {"w": nf4()(jnp.ones((1, 64)))})
        ...     parts = {key: np.asarray(x) for key, x in safetensors.load(path).items()}
        >>> array = decode("w", parts, {})
        >>> encode("w", array.with_codes(15 - array.codes), parts, {})["w"].max().item()
        0
    """
    return {name: _packed(name, array, quant_state.read(name, parts))}


def _packed(name: str, array: QuantizedArray, state: quant_state.State) -> np.ndarray:
    """An array's codes as they lie in a file, uint8 (n / 2, 1)."""
    if array.shape != state.shape:
        raise ValueError(
            f"tensors: {name!r} must have the shape {state.shape} of its companions, got "
            f"{array.shape}."
        )
    if array.grid.levels != state.grid.levels or array.offset is not None:
        raise ValueError(f"tensors: {name!r} must have its companions' levels and no offset.")
    if (per_block(name, array, state.blocksize) != state.scales).any():
        raise ValueError(f"tensors: {name!r} has other scales than its companions say.")
    theirs = state.order[np.asarray(array.codes)].reshape(-1, 2)
    return theirs[:, :1] << 4 | theirs[:, 1:]


def owners(arrays: Iterable[str]) -> set[str]:
    """The names of the 4-bit tensors among all names: those with a state.

    Examples:
        >>> owners(["w", "w.quant_state.bitsandbytes__nf4", "norm"])
        {'w'}
    """
    ends = tuple(quant_state.STATES.values())
    names = {name[: name.rindex(".quant_state.")] for name in arrays if name.endswith(ends)}
    expected = companions_of(names)
    for name in arrays:
        if name.endswith(quant_state.COMPANIONS) and name not in expected:
            raise ValueError(f"tensor {name!r} has no quant_state beside it that would explain it.")
    for name in sorted(names):
        if name not in arrays or name in expected:
            raise ValueError(f"tensor {name!r} is not there, but what should lie beside it.")
    return names


def companions_of(names: set[str]) -> set[str]:
    """What may lie beside the tensors of these names.

    Examples:
        >>> "w.absmax" in companions_of({"w"})
        True
    """
    return {name + end for name in names for end in quant_state.COMPANIONS}


def per_block(name: str, array: QuantizedArray, blocksize: int) -> np.ndarray:
    """An array's scale for each block of its flattened codes, float32.

    Examples:
        >>> from zoqo_jax import nf4
        >>> per_block("w", nf4(block=64)(jnp.ones((2, 64))), 64).tolist()
        [1.0, 1.0]
    """
    length = math.gcd(array.shape[-1], blocksize)
    scale = np.asarray(array.scale, np.float32)
    if not np.isfinite(scale).all():
        raise ValueError(f"tensors: {name!r}: a scale is NaN or infinite.")
    rows = (*array.shape[:-1], array.shape[-1] // length)
    if array.block == (-1, length) and scale.shape[-1] == rows[-1]:
        each = np.broadcast_to(scale, rows).reshape(-1)
    else:
        spread = np.asarray(array.broadcast_scales(jnp.asarray(scale)))
        each = np.broadcast_to(spread, array.shape).reshape(-1)
        length = 1
    scales = each[:: blocksize // length]
    if (np.repeat(scales, blocksize // length)[: each.size] != each).any():
        raise ValueError(
            f"tensors: {name!r}: {blocksize} neighbours of the flattened array must share a scale."
        )
    return scales
