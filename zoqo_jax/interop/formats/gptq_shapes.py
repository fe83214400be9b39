"""What a GPTQ folder's config and the shapes of a matrix's parts say of one another.

A config names bits and group size; layers may have their own by regular expressions (`dynamic`),
which are not evaluated: the shapes say the same, and a hostile expression could take for ever.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from zoqo_jax.interop.formats.protocol import Stored

__all__ = ["Settings", "bits_of", "check_shapes", "length_of"]

BITS = (2, 3, 4, 8)
_WORDS = {"I8": 8, "I16": 16, "I32": 32}
_FLOATS = ("F16", "BF16", "F32")


class Settings(NamedTuple):
    """What a config says.

    Attributes:
        bits: width of codes, where layers do not have their own.
        group_size: inputs in a group, where layers do not have their own; -1 for all.
        is_first_version: whether zero points are stored less one.
        is_dynamic: whether layers may have their own bits and groups.

    Examples:
        >>> Settings(4, -1, is_first_version=True, is_dynamic=False).bits
        4
    """

    bits: int
    group_size: int
    is_first_version: bool
    is_dynamic: bool


def bits_of(columns: int, width: int, outputs: int, settings: Settings) -> int:
    """The width of codes: the config's, or that which gives the zero points' columns.

    Args:
        columns: of words with zero points.
        width: bits of a word.
        outputs: how many zero points the columns hold.
        settings: of the config.

    Raises:
        ValueError: no width fits.

    Examples:
        >>> bits_of(8, 32, 32, Settings(4, 64, is_first_version=True, is_dynamic=True))
        8
    """
    fit = [b for b in BITS if columns == -(-outputs * b // width) and _is_whole(b, width, outputs)]
    if settings.bits in fit:
        return settings.bits
    if settings.is_dynamic and len(fit) == 1:
        return fit[0]
    raise ValueError(
        f"qzeros has {columns} columns of {width} bits for {outputs} outputs, which is not "
        f"{settings.bits} bits each."
    )


def _is_whole(bits: int, width: int, count: int) -> bool:
    """Whether so many codes can lie in words: those of 3 bits only by 32, in words of 32."""
    return bits != 3 or (width == 32 and count % 32 == 0)


def check_shapes(module: str, stored: Mapping[str, Stored], settings: Settings) -> None:
    """Refuse parts of a matrix that do not fit one another.

    Args:
        module: the matrix's name without ".weight".
        stored: what headers say, by name; qweight, qzeros and scales are matrices with elements.
        settings: of the config.

    Raises:
        ValueError: a dtype or shape is wrong; the module is named.

    Examples:
        >>> parts = {"w.qweight": Stored("I32", (8, 8)), "w.qzeros": Stored("I32", (1, 1))}
        >>> parts["w.scales"] = Stored("F16", (1, 8))
        >>> check_shapes("w", parts, Settings(4, 64, is_first_version=True, is_dynamic=False))
    """
    qweight, qzeros = stored[f"{module}.qweight"], stored[f"{module}.qzeros"]
    scales, index = stored[f"{module}.scales"], stored.get(f"{module}.g_idx")
    if qweight.dtype not in _WORDS or qzeros.dtype != qweight.dtype or scales.dtype not in _FLOATS:
        raise ValueError(
            f"tensor {module}: qweight and qzeros must be I32 (or I16, I8), scales F16, BF16 or "
            f"F32, got {qweight.dtype}, {qzeros.dtype} and {scales.dtype}."
        )
    width, (groups, outputs) = _WORDS[qweight.dtype], scales.shape
    try:
        bits = bits_of(qzeros.shape[1], width, outputs, settings)
    except ValueError as error:
        raise ValueError(f"tensor {module}: {error}") from error
    inputs = qweight.shape[0] * width // bits
    if index is not None:
        if index.dtype != "I32" or len(index.shape) != 1:
            raise ValueError(f"tensor {module}.g_idx must be I32 of one axis, got {index}.")
        inputs = index.shape[0]
    size = inputs if settings.group_size == -1 else settings.group_size
    expected = groups if settings.is_dynamic and 0 < groups <= inputs else -(-inputs // size)
    rows = -(-inputs * bits // width)
    is_whole = _is_whole(bits, width, inputs) and (
        index is not None or length_of(inputs, groups, settings)
    )
    if (
        qweight.shape != (rows, outputs)
        or qzeros.shape[0] != groups
        or groups != expected
        or not is_whole
    ):
        raise ValueError(
            f"tensor {module}: qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and "
            f"scales {list(scales.shape)} do not fit {inputs} inputs of {bits} bits in groups of "
            f"{settings.group_size}."
        )


def length_of(inputs: int, groups: int, settings: Settings) -> int:
    """How many neighbours are in a group, where nothing else is said; 0: that cannot be known.

    Examples:
        >>> length_of(128, 2, Settings(4, 32, is_first_version=True, is_dynamic=True))
        64
    """
    if settings.is_dynamic:
        return 0 if inputs % groups else inputs // groups
    return inputs if settings.group_size == -1 else settings.group_size
