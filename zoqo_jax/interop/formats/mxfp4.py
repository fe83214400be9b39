"""gpt-oss' MXFP4: experts' matrices as blocks of 32 4-bit floats and an exponent for each.

A matrix NAME (a stack of them, one for each expert) lies in a checkpoint as

- `NAME_blocks`: bytes (experts, outputs, G, 16), two codes of e2m1 in each, the first in the lower
  half;
- `NAME_scales`: bytes (experts, outputs, G), which stand for 2**(byte - 127) and serve 32 inputs.

The layout is that of gpt-oss' own reader (openai/gpt-oss, gpt_oss/torch/weights.py). The tensor
here is (experts, outputs, inputs) in bfloat16, as stored; transformers turns it to (experts,
inputs, outputs) when it decodes. Values are exact products: an e2m1 value has 2 significant bits.
But XLA takes subnormal floats for zero on a CPU, so that all of byte 0 and the halves of byte 1
are zeros here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.interop.formats import words
from zoqo_jax.interop.formats.frames import Frame, exponents
from zoqo_jax.interop.formats.protocol import Stored
from zoqo_jax.interop.formats.small_floats import E2M1

__all__ = ["decode", "encode", "names", "settings"]

name = "mxfp4"
_BLOCK = 32


def settings(config: Mapping[str, Any]) -> bool | None:
    """Whether a folder's quantization method is "mxfp4".

    Examples:
        >>> settings({"quantization_config": {"quant_method": "mxfp4"}}), settings({})
        (True, None)
    """
    found = config.get("quantization_config")
    return True if isinstance(found, Mapping) and found.get("quant_method") == name else None


def names(stored: Mapping[str, Stored], settings: Any) -> dict[str, tuple[str, ...]]:
    """The matrices by name, each with its blocks and scales.

    Raises:
        ValueError: one is without the other, or of a wrong dtype or shape.

    Examples:
        >>> names({"w_blocks": Stored("U8", (2, 8, 1, 16)), "w_scales": Stored("U8", (2, 8, 1))}, 1)
        {'w': ('w_blocks', 'w_scales')}
    """
    found: dict[str, tuple[str, ...]] = {}
    bases = {
        x.removesuffix(end) for x in stored for end in ("_blocks", "_scales") if x.endswith(end)
    }
    for base in sorted(bases):
        parts = (f"{base}_blocks", f"{base}_scales")
        for part in parts:
            if part not in stored:
                raise ValueError(f"{part} is missing: {base} needs it.")
            if stored[part].dtype != "U8":
                raise ValueError(f"{part} must have dtype U8, got {stored[part].dtype}.")
        if base in stored:
            raise ValueError(f"{base} is there twice: as it is, and as {parts[0]}.")
        blocks, scales = (stored[part].shape for part in parts)
        if len(blocks) not in (3, 4) or blocks[-1] * 2 != _BLOCK or 0 in blocks:
            raise ValueError(f"{parts[0]} must be (experts, outputs, groups, 16), got {blocks}.")
        if blocks[:-1] != scales:
            raise ValueError(f"{parts[1]} must have shape {blocks[:-1]}, got {scales}.")
        found[base] = parts
    return found


def decode(name: str, parts: Mapping[str, np.ndarray], settings: Any) -> QuantizedArray:
    """A stack of matrices, (experts, outputs, inputs), bfloat16.

    Raises:
        ValueError: a scale is NaN, which byte 255 stands for.

    Examples:
        >>> parts = {"w_blocks": np.full((1, 1, 16), 0x21, np.uint8)}
        >>> parts["w_scales"] = np.array([[128]], np.uint8)
        >>> decode("w", parts, True).materialise()[0, :4].tolist()
        [1.0, 2.0, 1.0, 2.0]
    """
    frame, blocks = _frame(name, parts), parts[f"{name}_blocks"]
    rows = blocks.reshape(-1, frame.shape[-1] // 2)
    return frame.array_of(lambda begin, end: E2M1.decode(name, words.unpack(rows[begin:end], 4)))


def encode(
    name: str, array: QuantizedArray, parts: Mapping[str, np.ndarray], settings: Any
) -> dict[str, np.ndarray]:
    """The blocks with an array's codes; zeros that were zeros keep their sign.

    Raises:
        ValueError: the array is not of the stored shape and scales.

    Examples:
        >>> parts = {"w_blocks": np.full((1, 1, 16), 0x80, np.uint8)}
        >>> parts["w_scales"] = np.array([[127]], np.uint8)
        >>> blocks = encode("w", decode("w", parts, True), parts, True)["w_blocks"]
        >>> bool((blocks == parts["w_blocks"]).all())
        True
    """
    blocks = parts[f"{name}_blocks"]
    nibbles = words.unpack(blocks, 4)
    ranks = _frame(name, parts).codes(name, array).reshape(nibbles.shape)
    return {f"{name}_blocks": words.pack(E2M1.encode(ranks, nibbles), 4, blocks)}


def _frame(name: str, parts: Mapping[str, np.ndarray]) -> Frame:
    scales = parts[f"{name}_scales"]
    shape = (*scales.shape[:-1], scales.shape[-1] * _BLOCK)
    return Frame(shape, 4, E2M1.grid, exponents(f"{name}_scales", scales), jnp.bfloat16, _BLOCK)
