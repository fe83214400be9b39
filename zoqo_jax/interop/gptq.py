"""GPTQ, as AutoGPTQ and GPTQModel store it: 2, 3, 4 or 8 bits, a scale and zero point a group.

Of a matrix NAME.weight, (outputs, inputs), a file holds

- `NAME.qweight`, (inputs * bits / 32, outputs) words: the codes of 32 / bits neighbouring inputs
  share a word, the first in its lowest bits; 32 codes of 3 bits fill three words;
- `NAME.qzeros`, (groups, outputs * bits / 32) words: zero points, laid out so along outputs;
- `NAME.scales`, (groups, outputs) floats;
- `NAME.g_idx`, int32 (inputs,): each input's group. With act-order (`desc_act`) neighbours are not
  of one group. Where it is missing, groups are of neighbours.

The value is scale * (code - zero point). `checkpoint_format` "gptq_v2" stores zero points, "gptq"
(version 1, the default) one less: a one is added to each in whole words, as GPTQModel does, so that
the carry of a zero point that was 0 goes where its borrow came from; at 3 bits, modulo 8. Bits, and
words of 8 or 16 bits (`pack_dtype`), may differ between layers (`dynamic`): they are found by
shapes. Not read: "gptq_p" at 3, 5, 6, 7 bits, Marlin's layout, and embeddings.

Layout: github.com/ModelCloud/GPTQModel, nn_modules/qlinear. Method: Frantar et al., "GPTQ: Accurate
Post-Training Quantization for Generative Pre-trained Transformers", 2022, arXiv:2210.17323.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.interop import words
from zoqo_jax.interop.affine import affine
from zoqo_jax.interop.frames import Frame
from zoqo_jax.interop.protocol import Stored

__all__ = ["Settings", "decode", "encode", "name", "names", "settings"]

name = "gptq"

_BITS = (2, 3, 4, 8)
_WORDS = {"I8": 8, "I16": 16, "I32": 32}
_FLOATS = ("F16", "BF16", "F32")
_MOST_GROUPS = 1 << 16
_EMBEDDINGS = ("embed_tokens", "tok_embeddings", "word_embeddings", "wte", "embed_in")


class Settings(NamedTuple):
    """What a config says.

    Attributes:
        bits: width of codes, where layers do not have their own.
        group_size: inputs in a group, where layers do not have their own; -1 for all.
        is_first_version: whether zero points are stored less one.
        is_dynamic: whether layers may have their own bits and groups.

    Examples:
        >>> settings({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 64}})
        Settings(bits=4, group_size=64, is_first_version=True, is_dynamic=False)
    """

    bits: int
    group_size: int
    is_first_version: bool
    is_dynamic: bool


def settings(config: Mapping[str, Any]) -> Settings | None:
    """What a folder's `config.json` says of GPTQ; see `protocol.Format`."""
    said = config.get("quantization_config")
    if not isinstance(said, Mapping):
        return None
    method = said.get("quant_method", "gptq" if "desc_act" in said else None)
    if method != name:
        return None
    kind = said.get("checkpoint_format") or said.get("format") or "gptq"
    bits, group, dynamic = said.get("bits"), said.get("group_size"), said.get("dynamic") or {}
    if kind not in ("gptq", "gptq_v2", "gptq_p") or said.get("is_marlin_format"):
        raise ValueError(f"checkpoint_format must be gptq or gptq_v2, got {kind!r:.40}.")
    if type(bits) is not int or bits not in _BITS or (kind == "gptq_p" and bits == 3):
        raise ValueError(f"bits must be 2, 3 (not in gptq_p), 4 or 8, got {bits!r:.40} in {kind}.")
    if type(group) is not int or not (group == -1 or 0 < group < 2**31):
        raise ValueError(f"group_size must be -1 or positive, got {group!r:.40}.")
    if not isinstance(dynamic, Mapping) or any(
        isinstance(one, Mapping) and ("format" in one or "checkpoint_format" in one)
        for one in dynamic.values()
    ):
        raise ValueError(f"dynamic must give layers no format of their own, got {dynamic!r:.200}.")
    if dynamic and kind == "gptq_p":
        raise ValueError("dynamic is not read in gptq_p, whose words differ from layer to layer.")
    return Settings(bits, group, kind == "gptq", bool(dynamic))


def names(stored: Mapping[str, Stored], settings: Settings) -> dict[str, tuple[str, ...]]:
    """The stored tensors of each quantized one; see `protocol.Format`."""
    found: dict[str, tuple[str, ...]] = {}
    for module in [key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")]:
        if module.rsplit(".", 1)[-1] in _EMBEDDINGS:
            raise ValueError(f"tensor {module + '.qweight'!r}: quantized embeddings are not read.")
        parts = {end: stored.get(f"{module}.{end}") for end in ("qweight", "qzeros", "scales")}
        for end, part in parts.items():
            if part is None or len(part.shape) != 2 or not all(part.shape):
                got = "none" if part is None else f"{part.dtype} {list(part.shape)}"
                raise ValueError(
                    f"tensor {module}.{end} must be a matrix with elements, got {got}."
                )
        index = [f"{module}.g_idx"] if f"{module}.g_idx" in stored else []
        found[f"{module}.weight"] = (*(f"{module}.{end}" for end in parts), *index)
        _check_shapes(module, stored, settings)
    for key in stored:
        module, _, end = key.rpartition(".")
        if end in ("qzeros", "g_idx") and f"{module}.weight" not in found:
            raise ValueError(f"tensor {key!r}: there is no {module}.qweight beside it.")
    return found


def decode(name: str, parts: Mapping[str, np.ndarray], settings: Settings) -> QuantizedArray:
    """A matrix from its parts; see `protocol.Format`."""
    frame = _frame(name, parts, settings)
    qweight = parts[f"{name.removesuffix('.weight')}.qweight"]

    def codes(begin: int, end: int) -> np.ndarray:
        return words.unpack(qweight[:, begin:end].T, frame.bits, frame.shape[1])

    return frame.array_of(codes)


def encode(
    name: str, array: QuantizedArray, parts: Mapping[str, np.ndarray], settings: Settings
) -> dict[str, np.ndarray]:
    """The words with an array's codes; see `protocol.Format`."""
    frame = _frame(name, parts, settings)
    stored = f"{name.removesuffix('.weight')}.qweight"
    packed = words.pack(frame.codes(name, array), frame.bits, parts[stored].T)
    return {stored: np.ascontiguousarray(packed.T)}


def _frame(name: str, parts: Mapping[str, np.ndarray], settings: Settings) -> Frame:
    """A matrix without its codes."""
    module = name.removesuffix(".weight")
    qweight, qzeros = parts[f"{module}.qweight"], parts[f"{module}.qzeros"]
    scales, index = parts[f"{module}.scales"], parts.get(f"{module}.g_idx")
    groups, outputs = scales.shape
    bits = _bits(qzeros.shape[1], qzeros.itemsize * 8, outputs, settings)
    inputs = qweight.shape[0] * qweight.itemsize * 8 // bits if index is None else len(index)
    length, block_of = _length(inputs, groups, settings), None
    if index is not None:
        most = min(groups, _MOST_GROUPS) - 1
        if index.min() < 0 or index.max() > most:
            raise ValueError(f"tensor {module}.g_idx must be in [0, {most}].")
        length = int(np.argmax(index != index[0])) or inputs
        has_blocks = groups == -(-inputs // length)
        if not has_blocks or not np.array_equal(index, np.arange(inputs) // length):
            block_of = index
    zeros = _zeros(qzeros, bits, outputs, settings.is_first_version)
    return affine(
        f"{module}.scales", (outputs, inputs), scales.T, zeros.T,
        bits=bits, length=length, block_of=block_of,
    )  # fmt: skip


def _zeros(qzeros: np.ndarray, bits: int, count: int, is_first_version: bool) -> np.ndarray:
    """The zero points, uint8, (groups, outputs)."""
    if not is_first_version:
        return words.unpack(qzeros, bits, count)
    if bits == 3:
        return (words.unpack(qzeros, bits, count) + 1) & 7
    unsigned = qzeros.view(f"u{qzeros.itemsize}")
    ones = (2 ** (8 * qzeros.itemsize) - 1) // (2**bits - 1)  # a one for each zero point
    return words.unpack(unsigned + unsigned.dtype.type(ones), bits, count)


def _bits(columns: int, width: int, outputs: int, settings: Settings) -> int:
    """The width of codes: the config's, or that which gives the zero points' columns."""
    fit = [b for b in _BITS if columns == -(-outputs * b // width) and _is_whole(b, width, outputs)]
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


def _check_shapes(module: str, stored: Mapping[str, Stored], settings: Settings) -> None:
    """That the parts of a matrix fit one another."""
    qweight, qzeros = stored[f"{module}.qweight"], stored[f"{module}.qzeros"]
    scales, index = stored[f"{module}.scales"], stored.get(f"{module}.g_idx")
    if qweight.dtype not in _WORDS or qzeros.dtype != qweight.dtype or scales.dtype not in _FLOATS:
        raise ValueError(
            f"tensor {module}: qweight and qzeros must be I32 (or I16, I8), scales F16, BF16 or "
            f"F32, got {qweight.dtype}, {qzeros.dtype} and {scales.dtype}."
        )
    width, (groups, outputs) = _WORDS[qweight.dtype], scales.shape
    try:
        bits = _bits(qzeros.shape[1], width, outputs, settings)
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
        index is not None or _length(inputs, groups, settings)
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


def _length(inputs: int, groups: int, settings: Settings) -> int:
    """How many neighbours are in a group, where nothing else is said; 0: that cannot be known."""
    if settings.is_dynamic:
        return 0 if inputs % groups else inputs // groups
    return inputs if settings.group_size == -1 else settings.group_size
