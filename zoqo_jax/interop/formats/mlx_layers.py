"""What a config of MLX says of a model's modules: mode, group size and width of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["Layer", "Settings", "layer_of"]

# The group sizes and widths of each mode, the defaults first.
_MODES = {
    "affine": ((64, 32, 128), (4, 2, 3, 5, 6, 8)),
    "mxfp4": ((32,), (4,)),
    "mxfp8": ((32,), (8,)),
    "nvfp4": ((16,), (4,)),
}


class Layer(NamedTuple):
    """How a module's matrix is quantized.

    Attributes:
        mode: "affine", "mxfp4", "mxfp8" or "nvfp4".
        length: how many inputs share a scale.
        bits: width of a code.

    Examples:
        >>> Layer("affine", 64, 4).length
        64
    """

    mode: str
    length: int
    bits: int


class Settings(NamedTuple):
    """What a config says of its modules.

    Attributes:
        default: of modules without an entry of their own.
        layers: of those with one, by the module's name.

    Examples:
        >>> Settings(Layer("affine", 64, 4), {}).default.bits
        4
    """

    default: Layer
    layers: dict[str, Layer]

    def of(self, weight: str) -> Layer:
        """Of the matrix NAME.weight.

        Examples:
            >>> Settings(Layer("affine", 64, 4), {"a": Layer("affine", 32, 8)}).of("a.weight").bits
            8
        """
        return self.layers.get(weight.removesuffix(".weight"), self.default)


def layer_of(name: str, entry: Mapping[str, Any]) -> Layer:
    """What an entry of `quantization` says, with the defaults of its mode.

    Raises:
        ValueError: a mode, width or group size that is not read; `name` is named.

    Examples:
        >>> layer_of("lm_head", {"bits": 8})
        Layer(mode='affine', length=64, bits=8)
    """
    mode = entry.get("mode", "affine")
    if not isinstance(mode, str) or mode not in _MODES:
        raise ValueError(f"{name}: mode must be one of {', '.join(_MODES)}, got {mode!r}.")
    found = []
    for key, legal in zip(("group_size", "bits"), _MODES[mode], strict=True):
        value = legal[0] if entry.get(key) is None else entry[key]
        if type(value) is not int or value not in legal:
            raise ValueError(f"{name}: {key} {value!r} of mode {mode} is not read.")
        found.append(value)
    return Layer(mode, *found)
