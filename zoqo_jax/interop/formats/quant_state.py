"""What lies beside bitsandbytes' 4-bit tensors, checked: blocks, levels and scales.

The companions of a tensor NAME say what its codes stand for:

- `NAME.absmax`: a scale for every `blocksize` neighbours of the flattened tensor, float32; or,
  where scales are quantized, too ("double quantization"), a byte each, which stands for
  `nested_quant_map[byte] * nested_absmax[block of bytes] + nested_offset`;
- `NAME.quant_map`: the 16 levels, float32; `NAME.nested_quant_map`: the 256 of the scales;
- `NAME.nested_absmax`: one for every `nested_blocksize` scales, float32;
- `NAME.quant_state.bitsandbytes__nf4` (or `__fp4`): JSON in bytes, with `quant_type`, `blocksize`,
  `dtype`, `shape`, and `nested_blocksize`, `nested_dtype`, `nested_offset`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from zoqo_jax.grids.arrays import Grid

__all__ = ["State", "is_shape", "read"]

STATES = {kind: f".quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")}
_NESTED = (".nested_absmax", ".nested_quant_map")
COMPANIONS = (".absmax", ".quant_map", *_NESTED, *STATES.values())
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_MOST_AXES, _MOST_JSON = 4, 1 << 16


class State(NamedTuple):
    """What the companions of a tensor say, checked.

    Attributes:
        shape: of the tensor.
        dtype: of its values.
        blocksize: how many neighbours of the flattened tensor share a scale.
        levels: of the 16 codes in the file, of which `order` makes increasing ones.
        scales: float32, one for each block.

    Examples:
        >>> levels, scales = np.array([0, 2, 1], np.float32), np.ones(1, np.float32)
        >>> State((1, 64), "float32", 64, levels, scales).order.tolist()
        [0, 2, 1]
    """

    shape: tuple[int, ...]
    dtype: str
    blocksize: int
    levels: np.ndarray
    scales: np.ndarray

    @property
    def order(self) -> np.ndarray:
        """The file's code for each of ours: NF4's own order, but not FP4's."""
        return np.argsort(self.levels, kind="stable").astype(np.uint8)

    @property
    def grid(self) -> Grid:
        """The levels in increasing order."""
        return Grid(tuple(map(float, self.levels[self.order])), 0, 15)


def read(name: str, companions: Mapping[str, np.ndarray]) -> State:
    """What the companions of a tensor say.

    Args:
        name: of the tensor.
        companions: by name; others are left aside.

    Raises:
        ValueError: a companion is missing or does not fit; the tensor is named.

    Examples:
        >>> said = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [1, 64]}
        >>> levels = np.linspace(-1, 1, 16, dtype=np.float32)
        >>> beside = {"w.absmax": np.ones(1, np.float32), "w.quant_map": levels}
        >>> raw = np.frombuffer(json.dumps(said).encode(), np.uint8)
        >>> read("w", beside | {"w.quant_state.bitsandbytes__nf4": raw}).scales.tolist()
        [1.0]
    """
    settings = _settings(name, companions)
    levels = _companion(name, ".quant_map", companions, np.float32, 16)
    if not (np.abs(levels) <= 1).all() or levels.min() == levels.max():
        raise ValueError(
            f"tensor {name!r}: quant_map must hold different numbers in [-1, 1], got "
            f"{levels.tolist()}."
        )
    scales = _scales(name, companions, settings)
    shape, blocksize = tuple(settings["shape"]), settings["blocksize"]
    return State(shape, settings["dtype"], blocksize, levels, scales)


def _settings(name: str, companions: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The JSON beside a tensor, checked."""
    kinds = [kind for kind, end in STATES.items() if name + end in companions]
    if len(kinds) != 1:
        raise ValueError(f"tensor {name!r} must have one quant_state, got {kinds}.")
    raw = companions[name + STATES[kinds[0]]]
    if raw.dtype != np.uint8 or raw.ndim != 1 or raw.size > _MOST_JSON:
        raise ValueError(
            f"tensor {name!r}: quant_state must be at most {_MOST_JSON} bytes, got "
            f"{raw.dtype} {list(raw.shape)}."
        )
    try:
        settings = json.loads(raw.tobytes().decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"tensor {name!r}: quant_state is no JSON: {error}") from error
    tests = _TESTS | (_NESTED_TESTS if _is_nested(name, companions) else {})
    if not isinstance(settings, dict) or set(settings) != set(tests):
        raise ValueError(
            f"tensor {name!r}: quant_state must say {', '.join(tests)}, got {settings!s:.200}."
        )
    for key, (is_right, expected) in tests.items():
        if not is_right(settings[key]):
            raise ValueError(
                f"tensor {name!r}: {key} must be {expected}, got {settings[key]!r:.60}."
            )
    if settings["quant_type"] != kinds[0]:
        raise ValueError(
            f"tensor {name!r}: quant_type must be {kinds[0]}, got {settings['quant_type']}."
        )
    return settings


def _is_nested(name: str, companions: Mapping[str, np.ndarray]) -> bool:
    """Whether a tensor's scales are quantized, too."""
    return any(name + end in companions for end in _NESTED)


def is_shape(shape: Any) -> bool:
    """Whether a 4-bit tensor can have a shape.

    Examples:
        >>> is_shape([3, 4]), is_shape([3, 3])
        (True, False)
    """
    is_list = isinstance(shape, list | tuple) and 1 <= len(shape) <= _MOST_AXES
    numbers = is_list and all(type(n) is int and 0 < n < 2**48 for n in shape)
    return numbers and math.prod(shape) % 2 == 0


def _is_blocksize(number: Any) -> bool:
    return type(number) is int and number in BLOCKSIZES


def _is_float32(number: Any) -> bool:
    return type(number) is float and abs(number) <= float(np.finfo(np.float32).max)


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in choices, " or ".join(choices)


SHAPE = f"1 to {_MOST_AXES} positive numbers with an even product"
_SIZES = f"one of {BLOCKSIZES}"
_TESTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "quant_type": _one_of(*STATES),
    "blocksize": (_is_blocksize, _SIZES),
    "dtype": _one_of("float16", "bfloat16", "float32"),
    "shape": (is_shape, SHAPE),
}
_NESTED_TESTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "nested_blocksize": (_is_blocksize, _SIZES),
    "nested_dtype": _one_of("float32"),
    "nested_offset": (_is_float32, "a float that float32 holds"),
}


def _companion(
    name: str, end: str, companions: Mapping[str, np.ndarray], dtype: Any, count: int
) -> np.ndarray:
    """A companion, of one axis as long as it must be."""
    array = companions.get(name + end)
    if array is None:
        raise ValueError(f"tensor {name!r}: there is no {name}{end}.")
    if array.dtype != dtype or array.shape != (count,):
        raise ValueError(
            f"tensor {name!r}: {end[1:]} must be {np.dtype(dtype)} [{count}], got "
            f"{array.dtype} {list(array.shape)}."
        )
    return array


def _scales(
    name: str, companions: Mapping[str, np.ndarray], settings: Mapping[str, Any]
) -> np.ndarray:
    """The scales of a tensor's blocks, float32."""
    count = -(-math.prod(settings["shape"]) // settings["blocksize"])
    if not _is_nested(name, companions):
        scales = _companion(name, ".absmax", companions, np.float32, count)
    else:
        codes = _companion(name, ".absmax", companions, np.uint8, count)
        levels = _companion(name, ".nested_quant_map", companions, np.float32, 256)
        size = settings["nested_blocksize"]
        outer = _companion(name, ".nested_absmax", companions, np.float32, -(-count // size))
        with np.errstate(over="ignore", invalid="ignore"):
            scales = levels[codes] * np.repeat(outer, size)[:count]
            scales += np.float32(settings["nested_offset"])
    if not np.isfinite(scales).all():
        raise ValueError(f"tensor {name!r}: a scale is NaN or infinite.")
    return scales
