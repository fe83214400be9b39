"""bitsandbytes' 4-bit tensors, as Hugging Face's safetensors hold them: codes here, bit for bit.

    tensors, companions = bitsandbytes.load("Llama-3.2-1B-nf4")
    bitsandbytes.save("trained.safetensors", tensors, companions)

A quantized tensor NAME lies in a checkpoint as (n / 2, 1) bytes, two codes of the flattened tensor
in each, the first in the upper half. Its companions say what the codes stand for:

- `NAME.absmax`: a scale for every `blocksize` neighbours of the flattened tensor, float32; or,
  where scales are quantized, too ("double quantization"), a byte each, which stands for
  `nested_quant_map[byte] * nested_absmax[block of bytes] + nested_offset`;
- `NAME.quant_map`: the 16 levels, float32; `NAME.nested_quant_map`: the 256 of the scales;
- `NAME.nested_absmax`: one for every `nested_blocksize` scales, float32;
- `NAME.quant_state.bitsandbytes__nf4` (or `__fp4`): JSON in bytes, with `quant_type`, `blocksize`,
  `dtype`, `shape`, and `nested_blocksize`, `nested_dtype`, `nested_offset`.

The value of a code is `quant_map[code] * scale`, in float32, then rounded to `dtype`. Training
moves codes and never scales, so companions are kept as they are and written back as they were.

NF4 and double quantization are QLoRA's (Dettmers et al., 2023, arXiv:2305.14314). Files are read
without trust: companions that do not fit the tensor and one another are refused by name.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from zoqo_jax.grids import companders
from zoqo_jax.grids.arrays import Grid, QuantizedArray, is_quantized
from zoqo_jax.interop import safetensors

__all__ = ["File", "load", "save"]

_STATES = {kind: f".quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")}
_NESTED = (".nested_absmax", ".nested_quant_map")
_COMPANIONS = (".absmax", ".quant_map", *_NESTED, *_STATES.values())
_BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_MOST_AXES, _MOST_JSON = 4, 1 << 16


class File(NamedTuple):
    """What a file or folder holds.

    Attributes:
        tensors: by name: a `QuantizedArray` for each 4-bit tensor, in its own shape (a matrix is
            (outputs, inputs)) and with values in its own dtype; all other arrays as they are.
        companions: by name, what lies beside the 4-bit tensors; `save` writes it back.

    Examples:
        >>> import tempfile
        >>> from zoqo_jax import nf4
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/a.safetensors", {"w": nf4()(jnp.ones((1, 64))), "b": jnp.ones(2)})
        ...     file = load(f"{folder}/a.safetensors")
        >>> file.tensors["w"].shape, file.tensors["b"].tolist(), file.companions["w.absmax"]
        ((1, 64), [1.0, 1.0], array([1.], dtype=float32))
    """

    tensors: dict[str, Any]
    companions: dict[str, np.ndarray]


class _State(NamedTuple):
    """What the companions of a tensor say, checked.

    Attributes:
        shape: of the tensor.
        dtype: of its values.
        blocksize: how many neighbours of the flattened tensor share a scale.
        levels: of the 16 codes in the file, of which `order` makes increasing ones.
        scales: float32, one for each block.
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
        return Grid(tuple(map(float, self.levels[self.order])), 0, 15)


def load(path: str | os.PathLike[str]) -> File:
    """Read a safetensors file, or a checkpoint's folder, with 4-bit tensors among its tensors.

    Args:
        path: as `safetensors.load` takes it.

    Returns:
        Tensors and companions. Blocks that go past the end of a row are cut there, so that the
        scales of a matrix whose rows no blocksize divides are those of shorter blocks.

    Raises:
        FileNotFoundError: there is no such file, or a shard is missing; it is named.
        ValueError: a damaged file, or companions that are missing or do not fit; the tensor is
            named.

    Examples:
        >>> import tempfile
        >>> from zoqo_jax import nf4
        >>> array = nf4(block=64)(jnp.linspace(-1.0, 1.0, 256).reshape(2, 128))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/model.safetensors", {"w": array})
        ...     tensors, companions = load(folder)
        >>> bool((tensors["w"].codes == array.codes).all()), sorted(companions)
        (True, ['w.absmax', 'w.quant_map', 'w.quant_state.bitsandbytes__nf4'])
    """
    arrays: dict[str, Any] = dict(safetensors.load(path))
    try:
        names = _names(arrays)
        found = sorted(name for name in _companion_names(names) if name in arrays)
        companions = {name: np.asarray(arrays.pop(name)) for name in found}
        for name in sorted(names):  # one after another, in place: the file's bytes are let go
            arrays[name] = _decoded(name, arrays[name], companions)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return File(arrays, companions)


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Any],
    companions: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Write a safetensors file with 4-bit tensors, all of it or nothing.

    Args:
        path: the file to write.
        tensors: by name. A `QuantizedArray` without companions needs NF4's levels, no offset, and
            scales that 64 neighbours of the flattened array share (or 32, 128 ... 4096, where its
            blocks are so long); its scales are written as float32.
        companions: by name, as `load` gives them. The tensors beside them must have the scales they
            had; only their codes may be others.

    Raises:
        ValueError: a tensor that the format does not hold, or companions of another, named.

    Examples:
        >>> import tempfile
        >>> from zoqo_jax import nf4
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/a.safetensors", {"w": nf4()(jnp.ones((1, 64)))})
        ...     stored = safetensors.load(folder)
        >>> stored["w"].shape, stored["w.absmax"].tolist()
        ((32, 1), [1.0])
    """
    companions = dict(companions or {})
    quantized = {name for name, array in tensors.items() if is_quantized(array)}
    lost = sorted(set(companions) - _companion_names(quantized))
    if lost:
        raise ValueError(f"companions: {lost[0]!r} belongs to no quantized tensor.")
    stored: dict[str, Any] = {}
    for name, array in tensors.items():
        beside: dict[str, np.ndarray] = {}
        if name in quantized:
            beside = {key: companions[key] for key in _companion_names({name}) & set(companions)}
            beside = beside or _new_companions(name, array)
            array = _packed(name, array, _state(name, beside))
        for key, content in {name: array, **beside}.items():
            if key in stored:
                raise ValueError(f"tensors: {key!r} is another tensor's companion, too.")
            stored[key] = content
    safetensors.save(path, stored, {"format": "pt"})  # loaders for PyTorch look for the format


def _companion_names(names: set[str]) -> set[str]:
    """What may lie beside the tensors of these names."""
    return {name + end for name in names for end in _COMPANIONS}


def _names(arrays: Mapping[str, Any]) -> set[str]:
    """The names of the 4-bit tensors: those with a state."""
    ends = tuple(_STATES.values())
    names = {name[: name.rindex(".quant_state.")] for name in arrays if name.endswith(ends)}
    expected = _companion_names(names)
    for name in arrays:
        if name.endswith(_COMPANIONS) and name not in expected:
            raise ValueError(f"tensor {name!r} has no quant_state beside it that would explain it.")
    for name in sorted(names):
        if name not in arrays or name in expected:
            raise ValueError(f"tensor {name!r} is not there, but what should lie beside it.")
    return names


def _state(name: str, companions: Mapping[str, np.ndarray]) -> _State:
    """What the companions of a tensor say."""
    settings = _settings(name, companions)
    levels = _companion(name, ".quant_map", companions, np.float32, 16)
    if not (np.abs(levels) <= 1).all() or levels.min() == levels.max():
        raise ValueError(
            f"tensor {name!r}: quant_map must hold different numbers in [-1, 1], got "
            f"{levels.tolist()}."
        )
    scales = _scales(name, companions, settings)
    shape, blocksize = tuple(settings["shape"]), settings["blocksize"]
    return _State(shape, settings["dtype"], blocksize, levels, scales)


def _settings(name: str, companions: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The JSON beside a tensor, checked."""
    kinds = [kind for kind, end in _STATES.items() if name + end in companions]
    if len(kinds) != 1:
        raise ValueError(f"tensor {name!r} must have one quant_state, got {kinds}.")
    raw = companions[name + _STATES[kinds[0]]]
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


def _is_shape(shape: Any) -> bool:
    is_list = isinstance(shape, list | tuple) and 1 <= len(shape) <= _MOST_AXES
    numbers = is_list and all(type(n) is int and 0 < n < 2**48 for n in shape)
    return numbers and math.prod(shape) % 2 == 0


def _is_blocksize(number: Any) -> bool:
    return type(number) is int and number in _BLOCKSIZES


def _is_float32(number: Any) -> bool:
    return type(number) is float and abs(number) <= float(np.finfo(np.float32).max)


def _one_of(*choices: str) -> tuple[Callable[[Any], bool], str]:
    return lambda value: value in choices, " or ".join(choices)


_SHAPE = f"1 to {_MOST_AXES} positive numbers with an even product"
_SIZES = f"one of {_BLOCKSIZES}"
_TESTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "quant_type": _one_of(*_STATES),
    "blocksize": (_is_blocksize, _SIZES),
    "dtype": _one_of("float16", "bfloat16", "float32"),
    "shape": (_is_shape, _SHAPE),
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


def _decoded(name: str, array: Any, companions: Mapping[str, np.ndarray]) -> QuantizedArray:
    state = _state(name, companions)
    shape, packed = state.shape, np.asarray(array)
    half = math.prod(shape) // 2
    if packed.dtype != np.uint8 or packed.shape != (half, 1):
        raise ValueError(
            f"tensor {name!r} of shape {shape} must lie in uint8 [{half}, 1], got "
            f"{packed.dtype} {list(packed.shape)}."
        )
    ours = np.argsort(state.order).astype(np.uint8)
    codes = ours[np.concatenate([packed >> 4, packed & 15], axis=1)]
    # A block may go on in the next row: cut where rows end, it is several with the same scale.
    length = math.gcd(shape[-1], state.blocksize)
    rows = (*shape[:-1], shape[-1] // length)
    blocks = np.arange(math.prod(rows)) * length // state.blocksize
    return QuantizedArray.from_codes(
        jnp.asarray(codes.reshape(shape)),
        jnp.asarray(state.scales[blocks].reshape(rows)),
        None,
        state.grid,
        block=(-1, length),
        value_dtype=state.dtype,
    )


def _packed(name: str, array: QuantizedArray, state: _State) -> np.ndarray:
    """An array's codes as they lie in a file, uint8 (n / 2, 1)."""
    if array.shape != state.shape:
        raise ValueError(
            f"tensors: {name!r} must have the shape {state.shape} of its companions, got "
            f"{array.shape}."
        )
    if array.grid.levels != state.grid.levels or array.offset is not None:
        raise ValueError(f"tensors: {name!r} must have its companions' levels and no offset.")
    if (_per_block(name, array, state.blocksize) != state.scales).any():
        raise ValueError(f"tensors: {name!r} has other scales than its companions say.")
    theirs = state.order[np.asarray(array.codes)].reshape(-1, 2)
    return theirs[:, :1] << 4 | theirs[:, 1:]


def _new_companions(name: str, array: QuantizedArray) -> dict[str, np.ndarray]:
    """Companions of an array that was not read from a file."""
    levels = companders.nf4().levels
    if array.grid.levels != levels or array.offset is not None:
        raise ValueError(
            f"tensors: {name!r} must have NF4's levels and no offset, got {array.grid} "
            f"{'without' if array.offset is None else 'with'} offset."
        )
    if not _is_shape(array.shape):
        raise ValueError(f"tensors: {name!r} must have {_SHAPE}, got {array.shape}.")
    axis, length = array.block or (-1, 0)
    blocksize = length if axis == -1 and length in _BLOCKSIZES else 64
    dtype = str(array.value_dtype)
    settings = {
        "quant_type": "nf4",
        "blocksize": blocksize,
        "dtype": dtype,
        "shape": list(array.shape),
    }
    return {
        f"{name}.absmax": _per_block(name, array, blocksize),
        f"{name}.quant_map": np.array(levels, np.float32),
        name + _STATES["nf4"]: np.frombuffer(json.dumps(settings).encode(), np.uint8),
    }


def _per_block(name: str, array: QuantizedArray, blocksize: int) -> np.ndarray:
    """An array's scale for each block of its flattened codes, float32."""
    length = math.gcd(array.shape[-1], blocksize)
    scale = np.asarray(array.scale, np.float32)
    if not np.isfinite(scale).all():
        raise ValueError(f"tensors: {name!r}: a scale is NaN or infinite.")
    rows = (*array.shape[:-1], array.shape[-1] // length)
    if array.block == (-1, length) and scale.shape[-1] == rows[-1]:
        each = np.broadcast_to(scale, rows).reshape(-1)
    else:
        spread = np.asarray(array.broadcast_scales(jnp.asarray(scale)))
        each = np.broadcast_to(spread, array.shape).reshape(-1)
        length = 1
    scales = each[:: blocksize // length]
    if (np.repeat(scales, blocksize // length)[: each.size] != each).any():
        raise ValueError(
            f"tensors: {name!r}: {blocksize} neighbours of the flattened array must share a scale."
        )
    return scales
