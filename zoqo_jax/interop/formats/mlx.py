"""MLX's quantized folders (mlx_lm, mlx_vlm), as codes.

A matrix NAME.weight, (outputs, inputs) or a stack of them, lies in a checkpoint as words of 32 bits
(outputs, inputs bits / 32), a stream of codes along inputs, with `NAME.scales`, one for each
`group_size` inputs. The `mode` of the config's `quantization`, and of a module's own entry in it,
says what codes mean:

- "affine", 2 to 8 bits but 7: scale * q + bias, with `NAME.biases`; both are floats of the
  matrix' dtype, and a scale may be negative;
- "mxfp4", "mxfp8": an e2m1 or e4m3 value times 2**(scale - 127), a scale being a byte;
- "nvfp4": an e2m1 value times a scale in e4m3.

The layout is that of ml-explore/mlx (mlx/ops.cpp, `quantize` and `dequantize`). Values of the float
modes are bit for bit those of `mx.dequantize` (0.32, CPU), in bfloat16. Affine ones are computed in
float32 and rounded once to the scale's dtype; MLX on a CPU rounds scale * q to that dtype and then
the sum. So bfloat16 and float16 values differ by up to 1.5 ulp of the larger of scale * q and the
value (1 in the files of the tests), and float32 ones do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from zoqo_jax.grids.arrays import Grid, QuantizedArray
from zoqo_jax.interop.formats import words
from zoqo_jax.interop.formats.frames import Frame, exponents, require_finite
from zoqo_jax.interop.formats.mlx_layers import Settings, layer_of
from zoqo_jax.interop.formats.protocol import Stored
from zoqo_jax.interop.formats.small_floats import E2M1, E4M3

__all__ = ["decode", "encode", "names", "settings"]

name = "mlx"
_FLOATS = {"mxfp4": E2M1, "nvfp4": E2M1, "mxfp8": E4M3}


def settings(config: Mapping[str, Any]) -> Settings | None:
    """What a folder's `quantization` says, or None if it has none of MLX's.

    Raises:
        ValueError: a mode, width or group size that is not read.

    Examples:
        >>> settings({"quantization": {"group_size": 64, "bits": 4, "lm_head": {"bits": 8}}})
        Settings(default=Layer(mode='affine', length=64, bits=4),
                 layers={'lm_head': Layer(mode='affine', length=64, bits=8)})
    """
    found = config.get("quantization")
    if not isinstance(found, Mapping) or "group_size" not in found or "bits" not in found:
        return None
    own = {key: entry for key, entry in found.items() if isinstance(entry, Mapping)}
    return Settings(
        layer_of("quantization", found), {key: layer_of(key, entry) for key, entry in own.items()}
    )


def names(stored: Mapping[str, Stored], settings: Settings) -> dict[str, tuple[str, ...]]:
    """The quantized matrices by name, each with its scales and biases.

    Raises:
        ValueError: a companion is missing, or of a wrong dtype or shape.

    Examples:
        >>> from zoqo_jax.interop.formats.mlx_layers import Layer
        >>> stored = {"a.weight": Stored("U32", (2, 8)), "a.scales": Stored("U8", (2, 2))}
        >>> names(stored, Settings(Layer("mxfp4", 32, 4), {}))
        {'a.weight': ('a.weight', 'a.scales')}
    """
    found: dict[str, tuple[str, ...]] = {}
    for base in sorted(x.removesuffix(".scales") for x in stored if x.endswith(".scales")):
        if stored.get(f"{base}.weight", Stored("", ())).dtype != "U32":
            raise ValueError(f"{base}.weight is missing, or not U32: {base}.scales needs it.")
    for weight in sorted(x for x in stored if x.endswith(".weight") and stored[x].dtype == "U32"):
        layer, base = settings.of(weight), weight.removesuffix(".weight")
        is_affine = layer.mode == "affine"
        parts = (weight, f"{base}.scales", *([f"{base}.biases"] if is_affine else []))
        *rows, length = stored[weight].shape or (0,)
        if len(rows) not in (1, 2) or 0 in (*rows, length) or length * 32 % layer.bits:
            raise ValueError(f"{weight} must be a matrix or stack, got {stored[weight].shape}.")
        due = (*rows, length * 32 // layer.bits // layer.length)
        for part in parts[1:]:
            if part not in stored:
                raise ValueError(f"{part} is missing: {weight} needs it.")
            if stored[part].dtype not in (("BF16", "F16", "F32") if is_affine else ("U8",)):
                raise ValueError(f"{part} of mode {layer.mode} got dtype {stored[part].dtype}.")
            if stored[part].shape != due or due[-1] * layer.length * layer.bits != length * 32:
                raise ValueError(
                    f"{part} must have a number for each {layer.length} codes of {layer.bits} bits "
                    f"in {stored[weight].shape} words, got shape {stored[part].shape}."
                )
        if stored[parts[1]].dtype != stored[parts[-1]].dtype:
            raise ValueError(f"{parts[-1]} must have the dtype of {parts[1]}.")
        if not is_affine and f"{base}.biases" in stored:
            raise ValueError(f"{base}.biases: mode {layer.mode} has none.")
        found[weight] = parts
    return found


def decode(name: str, parts: Mapping[str, np.ndarray], settings: Settings) -> QuantizedArray:
    """A matrix, or a stack of them, from what is stored of it.

    Raises:
        ValueError: a scale, a bias or an 8-bit float is NaN or infinite.

    Examples:
        >>> from zoqo_jax.interop.formats.mlx_layers import Layer
        >>> parts = {"a.weight": np.array([[0x87654321] * 4], np.uint32)}
        >>> parts |= {"a.scales": np.ones((1, 1), np.float16)}
        >>> parts |= {"a.biases": np.full((1, 1), -4, np.float16)}
        >>> array = decode("a.weight", parts, Settings(Layer("affine", 32, 4), {}))
        >>> array.materialise()[0, :4].tolist()
        [-3.0, -2.0, -1.0, 0.0]
    """
    frame, stored = _frame(name, parts, settings), parts[name]
    rows, small = stored.reshape(-1, stored.shape[-1]), _FLOATS.get(settings.of(name).mode)

    def codes(begin: int, end: int) -> np.ndarray:
        found = words.unpack(rows[begin:end], frame.bits)
        return found if small is None else small.decode(name, found)

    return frame.array_of(codes)


def encode(
    name: str, array: QuantizedArray, parts: Mapping[str, np.ndarray], settings: Settings
) -> dict[str, np.ndarray]:
    """The words with an array's codes; minus zeros stay where the code is zero still.

    Raises:
        ValueError: the array is not of the stored shape and scales.

    Examples:
        >>> from zoqo_jax.interop.formats.mlx_layers import Layer
        >>> parts = {"a.weight": np.array([[0x87654321] * 4], np.uint32)}
        >>> parts |= {"a.scales": np.array([[127]], np.uint8)}
        >>> found = Settings(Layer("mxfp4", 32, 4), {})
        >>> [hex(x) for x in encode("a.weight", decode("a.weight", parts, found), parts, found)[
        ...     "a.weight"][0, :1]]
        ['0x87654321']
    """
    codes = _frame(name, parts, settings).codes(name, array)
    layer = settings.of(name)
    if layer.mode in _FLOATS:
        codes = _FLOATS[layer.mode].encode(codes, words.unpack(parts[name], layer.bits))
    return {name: words.pack(codes, layer.bits, parts[name])}


def _frame(name: str, parts: Mapping[str, np.ndarray], settings: Settings) -> Frame:
    mode, length, bits = settings.of(name)
    base = name.removesuffix(".weight")
    scales = parts[f"{base}.scales"]
    shape = (*scales.shape[:-1], scales.shape[-1] * length)
    if mode == "affine":
        biases = parts[f"{base}.biases"]
        require_finite(f"{base}.scales", scales)
        require_finite(f"{base}.biases", biases)
        grid = Grid(tuple(map(float, range(2**bits))), 0, 2**bits - 1)
        return Frame(shape, bits, grid, scales, scales.dtype, length, biases)
    if mode == "nvfp4":
        small = scales.view(ml_dtypes.float8_e4m3fn)
        require_finite(f"{base}.scales", small)
        numbers = (np.ones((1,) * scales.ndim, np.float32), small)
    else:
        numbers = exponents(f"{base}.scales", scales)
    return Frame(shape, bits, _FLOATS[mode].grid, numbers, jnp.bfloat16, length)
