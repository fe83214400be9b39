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
from typing import Any

import numpy as np

from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.interop.formats import words
from zoqo_jax.interop.formats.affine import affine
from zoqo_jax.interop.formats.frames import Frame
from zoqo_jax.interop.formats.gptq_shapes import BITS, Settings, bits_of, check_shapes, length_of
from zoqo_jax.interop.formats.protocol import Stored

__all__ = ["decode", "encode", "names", "settings"]

name = "gptq"

_MOST_GROUPS = 1 << 16
_EMBEDDINGS = ("embed_tokens", "tok_embeddings", "word_embeddings", "wte", "embed_in")


def settings(config: Mapping[str, Any]) -> Settings | None:
    """What a folder's `config.json` says of GPTQ; see `protocol.Format`.

    Examples:
        >>> said = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}
        >>> settings({"quantization_config": said})
        Settings(bits=4, group_size=64, is_first_version=True, is_dynamic=False)
    """
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
    if type(bits) is not int or bits not in BITS or (kind == "gptq_p" and bits == 3):
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
    """The stored tensors of each quantized one; see `protocol.Format`.

    Examples:
        >>> parts = {"w.qweight": Stored("I32", (8, 8)), "w.qzeros": Stored("I32", (1, 1))}
        >>> names(parts | {"w.scales": Stored("F16", (1, 8))}, Settings(4, -1, True, False))
        {'w.weight': ('w.qweight', 'w.qzeros', 'w.scales')}
    """
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
        check_shapes(module, stored, settings)
    for key in stored:
        module, _, end = key.rpartition(".")
        if end in ("qzeros", "g_idx") and f"{module}.weight" not in found:
            raise ValueError(f"tensor {key!r}: there is no {module}.qweight beside it.")
    return found


def decode(name: str, parts: Mapping[str, np.ndarray], settings: Settings) -> QuantizedArray:
    """A matrix from its parts; see `protocol.Format`.

    Examples:
        >>> parts = {"w.qweight": np.full((1, 8), 0x76543210, np.int32)}
        >>> parts["w.qzeros"] = np.full((1, 1), 0x33333333, np.int32)
        >>> parts["w.scales"] = np.full((1, 8), 0.5, np.float16)
        >>> decode("w.weight", parts, Settings(4, -1, True, False)).materialise()[0].tolist()
        [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]
    """
    frame = _frame(name, parts, settings)
    qweight = parts[f"{name.removesuffix('.weight')}.qweight"]

    def codes(begin: int, end: int) -> np.ndarray:
        return words.unpack(qweight[:, begin:end].T, frame.bits, frame.shape[1])

    return frame.array_of(codes)


def encode(
    name: str, array: QuantizedArray, parts: Mapping[str, np.ndarray], settings: Settings
) -> dict[str, np.ndarray]:
    """The words with an array's codes; see `protocol.Format`.

    Examples:
        >>> parts = {"w.qweight": np.full((1, 8), 0x76543210, np.int32)}
        >>> parts["w.qzeros"] = np.full((1, 1), 0x33333333, np.int32)
        >>> parts["w.scales"] = np.full((1, 8), 0.5, np.float16)
        >>> of_config = Settings(4, -1, True, False)
        >>> array = decode("w.weight", parts, of_config)
        >>> changed = array.with_codes(15 - array.codes)
        >>> hex(encode("w.weight", changed, parts, of_config)["w.qweight"].view(np.uint32)[0, 0])
        '0x89abcdef'
    """
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
    bits = bits_of(qzeros.shape[1], qzeros.itemsize * 8, outputs, settings)
    inputs = qweight.shape[0] * qweight.itemsize * 8 // bits if index is None else len(index)
    length, block_of = length_of(inputs, groups, settings), None
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
