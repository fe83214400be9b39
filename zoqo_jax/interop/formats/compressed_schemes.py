"""compressed-tensors' schemes: what a config says of a group of matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Scheme", "scheme_of"]

_FORMATS = {
    "pack-quantized": "I32",
    "int-quantized": "I8",
    "naive-quantized": "I8",
    "nvfp4-pack-quantized": "U8",
    "mxfp4-pack-quantized": "U8",
}


class Scheme(NamedTuple):
    """How a group of matrices is quantized.

    Attributes:
        dtype: of the stored codes, as safetensors spells it.
        bits: width of a code.
        length: how many inputs share a scale; None: all of a row.
        symmetric: whether there are no zero points.

    Examples:
        >>> Scheme("I32", 4, 128, True).bits
        4
    """

    dtype: str
    bits: int
    length: int | None
    symmetric: bool


def scheme_of(weights: Any, form: Any) -> Scheme:
    """The scheme that a group's `weights` and `format` describe.

    Raises:
        ValueError: a format, type, width, strategy or group size that is not read.

    Examples:
        >>> scheme_of({"num_bits": 8, "type": "int", "strategy": "channel"}, "int-quantized")
        Scheme(dtype='I8', bits=8, length=None, symmetric=True)
    """
    if not isinstance(form, str) or form not in _FORMATS:
        raise ValueError(f"format must be one of {', '.join(_FORMATS)}, got {form!r}.")
    if not isinstance(weights, Mapping):
        raise ValueError(f"weights of a scheme must be a table, got {weights!r}.")
    dtype, kind, bits = _FORMATS[form], weights.get("type", "int"), weights.get("num_bits", 8)
    legal = (4,) if dtype == "U8" else range(2, 9)
    if kind != ("float" if dtype == "U8" else "int") or type(bits) is not int or bits not in legal:
        raise ValueError(f"{form} of num_bits {bits!r} and type {kind!r} is not read.")
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy not in (None, "tensor", "channel", "group", "tensor_group"):
        raise ValueError(f"strategy {strategy!r} of {form} is not read.")
    if size is not None and (type(size) is not int or size < -1 or size == 0):
        raise ValueError(f"group_size must be -1 or positive, got {size!r}.")
    if strategy in ("tensor", "channel") or size == -1:
        size = None
    return Scheme(dtype, bits, size, weights.get("symmetric", True) is not False)
