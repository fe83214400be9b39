"""compressed-tensors: folders of vLLM's llm-compressor, as codes.

A matrix NAME.weight of a module NAME, (outputs, inputs) or a stack of them, lies in a checkpoint as
its format says, with b the scheme's `num_bits`, G the scales of a row, z the zero points:

- "pack-quantized": `weight_packed`, words of 32 bits (outputs, ceil(inputs b / 32)), holds q +
  2**(b-1) as a stream along inputs; `weight_shape`; `weight_scale` (outputs, G), (outputs, 1) or
  (1,); if asymmetric `weight_zero_point`, words (ceil(outputs b / 32), G), z + 2**(b-1) as a stream
  along outputs; from older releases `weight_g_idx`, the group of each input (-1: none is given);
- "int-quantized", "naive-quantized": `weight`, signed bytes; `weight_scale`; if asymmetric
  `weight_zero_point`, signed bytes of the scale's shape;
- "nvfp4-pack-quantized", "mxfp4-pack-quantized": `weight_packed`, bytes of two codes of e2m1, the
  first in the lower half; `weight_scale`, e4m3 for each 16 inputs, over the one number of
  `weight_global_scale`; or bytes n for 2**(n - 127), for each 32 inputs.

The layouts are those of vllm-project/compressed-tensors, `compressors/`. Values are bit for bit
those of its decompression: scale * (q - z) rounded once to the scale's dtype, bfloat16 for 4-bit
floats. One case differs: with float32 scales and zero points, scale * q and scale * z are rounded
before they are subtracted, so that values differ by up to an ulp of the larger of the two.

Which scheme of `config_groups` a matrix has is found by its stored shapes: targets may be regular
expressions, and a hostile one takes for ever. Older releases let no code go from one word to the
next, which makes words of 3, 5, 6 and 7 bits longer; these are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.interop.formats import words
from zoqo_jax.interop.formats.compressed_frames import frame_of
from zoqo_jax.interop.formats.compressed_schemes import Scheme, scheme_of
from zoqo_jax.interop.formats.frames import Frame
from zoqo_jax.interop.formats.protocol import Stored
from zoqo_jax.interop.formats.small_floats import E2M1

__all__ = ["decode", "encode", "names", "settings"]

name = "compressed-tensors"

_INTS, _FLOATS = ("BF16", "F16", "F32"), ("F8_E4M3", "U8", "F8_E8M0")
# By the dtype of a matrix' codes: its parts, with their dtypes, and whether they must be there.
_PARTS = {
    "I32": {
        "_packed": (("I32",), True), "_scale": (_INTS, True), "_shape": (("I64", "I32"), True),
        "_zero_point": (("I32",), False), "_g_idx": (("I32", "I64"), False),
    },
    "U8": {
        "_packed": (("U8",), True), "_scale": (_FLOATS, True), "_global_scale": (("F32",), False),
    },
    "I8": {"": (("I8",), True), "_scale": (_INTS, True), "_zero_point": (("I8",), False)},
}  # fmt: skip


def settings(config: Mapping[str, Any]) -> tuple[Scheme, ...] | None:
    """The schemes of a folder's `quantization_config`, or None if it is another method's.

    Raises:
        ValueError: a format, width or strategy that is not read.

    Examples:
        >>> weights = {"num_bits": 4, "type": "int", "group_size": 32, "strategy": "group"}
        >>> found = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
        >>> found["config_groups"] = {"group_0": {"targets": ["Linear"], "weights": weights}}
        >>> settings({"quantization_config": found})
        (Scheme(dtype='I32', bits=4, length=32, symmetric=True),)
    """
    found = config.get("quantization_config")
    if not isinstance(found, Mapping) or found.get("quant_method") != name:
        return None
    groups = found.get("config_groups")
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()):
        raise ValueError(f"config_groups must be a table of schemes, got {groups!r}.")
    sparse = found.get("sparsity_config") or {}
    if not isinstance(sparse, Mapping) or sparse.get("format", "dense") != "dense":
        raise ValueError(f"sparsity_config: sparse formats are not read, got {sparse!r}.")
    chosen = [g for g in groups.values() if g.get("weights")]  # others quantize activations alone
    return tuple(scheme_of(g["weights"], g.get("format") or found.get("format")) for g in chosen)


def names(stored: Mapping[str, Stored], settings: Any) -> dict[str, tuple[str, ...]]:
    """The quantized matrices by name, each with the stored tensors that it is made of.

    Raises:
        ValueError: a part is missing, or has a dtype that is not read.

    Examples:
        >>> stored = {"a.weight": Stored("I8", (2, 8)), "a.weight_scale": Stored("F16", (2, 1))}
        >>> names(stored, (Scheme("I8", 8, None, True),))
        {'a.weight': ('a.weight', 'a.weight_scale')}
    """
    ends = (".weight_packed", ".weight_scale")
    bases = {x[: x.rindex(".weight") + 7] for x in stored if x.endswith(ends)}
    found: dict[str, tuple[str, ...]] = {}
    for base in sorted(bases):
        main = f"{base}_packed" if f"{base}_packed" in stored else base
        if main not in stored:
            raise ValueError(f"{base}_packed or {base} is missing: {base}_scale needs it.")
        if main != base and base in stored:
            raise ValueError(f"{base} is there twice: as it is, and as {main}.")
        parts = _PARTS.get(stored[main].dtype, {})
        if stored[main].dtype not in {scheme.dtype for scheme in settings} or (
            main.removeprefix(base) not in parts
        ):
            raise ValueError(f"{main}: dtype {stored[main].dtype} fits no format of the config.")
        for end, (dtypes, is_needed) in parts.items():
            part = base + end
            if part in stored and stored[part].dtype not in dtypes:
                raise ValueError(f"{part} must be {' or '.join(dtypes)}, got {stored[part].dtype}.")
            if part not in stored and is_needed:
                raise ValueError(f"{part} is missing: {main} needs it.")
        found[base] = tuple(base + end for end in parts if base + end in stored)
        shape = stored[main].shape
        if len(shape) not in (2, 3) or 0 in shape:
            raise ValueError(f"{main} must have 2 or 3 axes, none empty, got shape {shape}.")
    return found


def decode(name: str, parts: Mapping[str, np.ndarray], settings: Any) -> QuantizedArray:
    """A matrix, or a stack of them, from what is stored of it.

    Raises:
        ValueError: a part has a wrong shape, or holds something that is not read; it is named.

    Examples:
        >>> parts = {"a.weight": np.array([[-3, 5]], np.int8)}
        >>> parts["a.weight_scale"] = np.array([[0.5]], np.float16)
        >>> decode("a.weight", parts, (Scheme("I8", 8, None, True),)).materialise().tolist()
        [[-1.5, 2.5]]
    """
    frame, stored = frame_of(name, parts, settings), parts.get(f"{name}_packed", parts.get(name))
    assert stored is not None  # `names` has found it
    rows = stored.reshape(-1, stored.shape[-1])
    return frame.array_of(lambda begin, end: _codes(name, rows[begin:end], frame))


def encode(
    name: str, array: QuantizedArray, parts: Mapping[str, np.ndarray], settings: Any
) -> dict[str, np.ndarray]:
    """The one stored tensor with codes, with an array's; padding and minus zeros stay.

    Raises:
        ValueError: the array is not of the stored shape and scales.

    Examples:
        >>> parts = {"a.weight": np.array([[-3, 5]], np.int8)}
        >>> parts["a.weight_scale"] = np.array([[0.5]], np.float16)
        >>> schemes = (Scheme("I8", 8, None, True),)
        >>> encode("a.weight", decode("a.weight", parts, schemes), parts, schemes)
        {'a.weight': array([[-3,  5]], dtype=int8)}
    """
    frame = frame_of(name, parts, settings)
    codes = frame.codes(name, array)
    if name in parts:
        return {name: (codes - np.uint8(2 ** (frame.bits - 1))).view(np.int8)}
    packed = parts[f"{name}_packed"]
    if frame.grid == E2M1.grid:
        codes = E2M1.encode(codes, words.unpack(packed, 4))
    return {f"{name}_packed": words.pack(codes, frame.bits, packed)}


def _codes(name: str, stored: np.ndarray, frame: Frame) -> np.ndarray:
    """The codes of stored rows."""
    if stored.dtype != np.int8:
        codes = words.unpack(stored, frame.bits, frame.shape[-1])
        return E2M1.decode(name, codes) if frame.grid == E2M1.grid else codes
    codes = stored.view(np.uint8) + np.uint8(2 ** (frame.bits - 1))
    if codes.max() >= 2**frame.bits:
        raise ValueError(f"{name}: a code has more than {frame.bits} bits.")
    return codes
