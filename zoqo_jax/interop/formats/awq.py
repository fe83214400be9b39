"""AWQ, as AutoAWQ and GPTQModel store it ("gemm"): 4 bits, a scale and zero point a group.

Of a matrix NAME.weight, (outputs, inputs), a file holds

- `NAME.qweight`, int32 (inputs, outputs / 8): the codes of eight neighbouring outputs share a word;
  from the lowest bits on they are those of outputs 0, 2, 4, 6, 1, 3, 5, 7;
- `NAME.qzeros`, int32 (groups, outputs / 8): zero points, laid out likewise;
- `NAME.scales`, (groups, outputs) floats.

The value is scale * (code - zero point); groups are of neighbouring inputs. Modules that the config
names in `modules_to_not_convert` are stored as floats, and are found so. Not read: the layouts
"gemv", "gemv_fast", "marlin", "exllama" and "llm-awq", which differ by their words.

Layout: github.com/casper-hansen/AutoAWQ, modules/linear/gemm.py. Method: Lin et al., "AWQ:
Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023, arXiv:2306.00978.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.interop.formats import words
from zoqo_jax.interop.formats.affine import affine
from zoqo_jax.interop.formats.frames import Frame
from zoqo_jax.interop.formats.protocol import Stored

__all__ = ["Settings", "decode", "encode", "names", "settings"]

name = "awq"

_BITS = 4
_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # the output, of each eight, that a word's nibbles are for
_PLACE = np.argsort(_ORDER)  # the nibble of each output
_FLOATS = ("F16", "BF16", "F32")


class Settings(NamedTuple):
    """What a config says.

    Attributes:
        group_size: inputs in a group; -1 for all.

    Examples:
        >>> settings({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 64}})
        Settings(group_size=64)
    """

    group_size: int


def settings(config: Mapping[str, Any]) -> Settings | None:
    """What a folder's `config.json` says of AWQ; see `protocol.Format`.

    Examples:
        >>> settings({"quantization_config": {"quant_method": "fp8"}}) is None
        True
    """
    said = config.get("quantization_config")
    if not isinstance(said, Mapping):
        return None
    method = said.get("quant_method", "awq" if "w_bit" in said else None)
    if method != name:
        return None
    bits = said.get("bits", said.get("w_bit"))
    group = said.get("group_size", said.get("q_group_size"))
    kinds = [said.get(key) for key in ("version", "format", "checkpoint_format")]
    kind = next((kind for kind in kinds if kind is not None), "gemm")
    if not isinstance(kind, str) or kind.lower() != "gemm" or said.get("backend") == "llm-awq":
        raise ValueError(f"version must be gemm, got {kind!r:.40}.")
    if bits != _BITS or type(bits) is not int:
        raise ValueError(f"bits must be {_BITS}, got {bits!r:.40}.")
    if type(group) is not int or not (group == -1 or 0 < group < 2**31):
        raise ValueError(f"group_size must be -1 or positive, got {group!r:.40}.")
    return Settings(group)


def names(stored: Mapping[str, Stored], settings: Settings) -> dict[str, tuple[str, ...]]:
    """The stored tensors of each quantized one; see `protocol.Format`.

    Examples:
        >>> parts = {"w.qweight": Stored("I32", (64, 1)), "w.qzeros": Stored("I32", (1, 1))}
        >>> names(parts | {"w.scales": Stored("F16", (1, 8))}, Settings(64))
        {'w.weight': ('w.qweight', 'w.qzeros', 'w.scales')}
    """
    found: dict[str, tuple[str, ...]] = {}
    for module in [key.removesuffix(".qweight") for key in stored if key.endswith(".qweight")]:
        parts = tuple(f"{module}.{end}" for end in ("qweight", "qzeros", "scales"))
        for part in parts:
            if part not in stored:
                raise ValueError(f"tensor {part!r} is not there, but {module}.qweight is.")
        qweight, qzeros, scales = (stored[part] for part in parts)
        _check_shapes(module, qweight, qzeros, scales, settings.group_size)
        found[f"{module}.weight"] = parts
    for key in stored:
        module, _, end = key.rpartition(".")
        if end == "qzeros" and f"{module}.weight" not in found:
            raise ValueError(f"tensor {key!r}: there is no {module}.qweight beside it.")
    return found


def decode(name: str, parts: Mapping[str, np.ndarray], settings: Settings) -> QuantizedArray:
    """A matrix from its parts; see `protocol.Format`.

    Examples:
        >>> parts = {"w.qweight": np.full((2, 1), 0x75316420, np.int32)}
        >>> parts["w.qzeros"] = np.full((1, 1), 0x44444444, np.int32)
        >>> parts["w.scales"] = np.full((1, 8), 0.5, np.float16)
        >>> decode("w.weight", parts, Settings(2)).materialise()[:, 0].tolist()
        [-2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5]
    """
    qweight = parts[f"{name.removesuffix('.weight')}.qweight"]

    def codes(begin: int, end: int) -> np.ndarray:
        return _unpack(qweight[:, begin // 8 : end // 8]).T

    return _frame(name, parts).array_of(codes, step=8)


def encode(
    name: str, array: QuantizedArray, parts: Mapping[str, np.ndarray], settings: Settings
) -> dict[str, np.ndarray]:
    """The words with an array's codes; see `protocol.Format`.

    Examples:
        >>> parts = {"w.qweight": np.full((2, 1), 0x75316420, np.int32)}
        >>> parts["w.qzeros"] = np.full((1, 1), 0x44444444, np.int32)
        >>> parts["w.scales"] = np.full((1, 8), 0.5, np.float16)
        >>> array = decode("w.weight", parts, Settings(2))
        >>> changed = array.with_codes(15 - array.codes)
        >>> hex(encode("w.weight", changed, parts, Settings(2))["w.qweight"].view(np.uint32)[0, 0])
        '0x8ace9bdf'
    """
    stored = f"{name.removesuffix('.weight')}.qweight"
    codes = _frame(name, parts).codes(name, array).T
    eights = codes.reshape(len(codes), -1, 8)[..., _ORDER]
    return {stored: words.pack(eights.reshape(codes.shape), _BITS, parts[stored])}


def _frame(name: str, parts: Mapping[str, np.ndarray]) -> Frame:
    """A matrix without its codes."""
    module = name.removesuffix(".weight")
    scales, zeros = parts[f"{module}.scales"], _unpack(parts[f"{module}.qzeros"])
    shape = scales.shape[1], len(parts[f"{module}.qweight"])
    length = shape[1] // len(scales)
    return affine(f"{module}.scales", shape, scales.T, zeros.T, bits=_BITS, length=length)


def _unpack(packed: np.ndarray) -> np.ndarray:
    """The codes of words, uint8, (rows, outputs)."""
    codes = words.unpack(packed, _BITS)
    return codes.reshape(len(codes), -1, 8)[..., _PLACE].reshape(codes.shape)


def _check_shapes(
    module: str, qweight: Stored, qzeros: Stored, scales: Stored, group_size: int
) -> None:
    """That the parts of a matrix fit one another."""
    if qweight.dtype != "I32" or qzeros.dtype != "I32" or scales.dtype not in _FLOATS:
        raise ValueError(
            f"tensor {module}: qweight and qzeros must be I32, scales F16, BF16 or F32, got "
            f"{qweight.dtype}, {qzeros.dtype} and {scales.dtype}."
        )
    inputs, columns = qweight.shape if len(qweight.shape) == 2 else (0, 0)
    size = inputs if group_size == -1 else group_size
    groups = inputs // size if size else 0
    fit = qzeros.shape == (groups, columns) and scales.shape == (groups, columns * 8)
    if not (groups and columns and fit and groups * size == inputs):
        raise ValueError(
            f"tensor {module}: qweight {list(qweight.shape)}, qzeros {list(qzeros.shape)} and "
            f"scales {list(scales.shape)} do not fit one another in groups of {group_size} inputs."
        )
