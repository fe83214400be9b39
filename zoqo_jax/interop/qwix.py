"""qwix's QArrays as codes, and back, bit for bit.

    params = qwix.from_qwix(quantized_params)   # every QArray of a tree becomes a `QuantizedArray`
    quantized_params = qwix.to_qwix(params)     # and back

A QArray holds `qvalue`, and a `scale` and perhaps a `zero_point` of as many axes, along each of
which they are 1 long (shared) or divide it into tiles of equal length. Its value is
`(qvalue - zero_point) * scale`, or `nf4[qvalue] * scale`, in the dtype of `scale`. Its `qtype` may
say less than the dtype of `qvalue`: "int3" lies in int4.

What is converted has the same values on both sides. A QArray that comes back is identical; codes
that come back are the same codes with equal scales and values. What has no equal on the other
side is refused by name. Only `to_qwix` needs the package qwix (github.com/google/qwix): a QArray is
known by its fields.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import PyTree

from zoqo_jax.grids import companders
from zoqo_jax.grids.arrays import Grid, QuantizedArray, is_quantized

__all__ = ["from_qwix", "to_qwix"]


class _Fields(NamedTuple):
    """What a QArray holds."""

    qvalue: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray | None
    qtype: Any


class _Type(NamedTuple):
    """A qtype: the dtype that its numbers lie in, the least of them, and how many there are."""

    name: str
    storage: np.dtype
    least: int
    count: int


def _signed(bits: int) -> _Type:
    storage = np.dtype(ml_dtypes.int4 if bits <= 4 else np.int8)
    return _Type(f"int{bits}", storage, -(2 ** (bits - 1)), 2**bits)


_UNIFORM = (
    *map(_signed, range(2, 9)),
    _Type("uint4", np.dtype(ml_dtypes.uint4), 0, 16),
    _Type("uint8", np.dtype(np.uint8), 0, 256),
)
_NF4 = _Type("nf4", np.dtype(ml_dtypes.uint4), 0, 16)
_TYPES = {kind.name: kind for kind in (*_UNIFORM, _NF4)}
_SCALES = [np.dtype(dtype) for dtype in (np.float16, ml_dtypes.bfloat16, np.float32)]


def from_qwix(tree: PyTree) -> PyTree:
    """Replace every QArray of a tree by a `QuantizedArray`.

    Args:
        tree: any pytree; what has `qvalue`, `scale`, `zero_point` and `qtype` is a QArray.

    Raises:
        ValueError: a QArray of another qtype than int2 to int8, uint4, uint8 and nf4; of scales
            that are tiled along several axes, not finite or in another dtype than float16, bfloat16
            and float32; or of zero points that differ among scales of more than 16 significant
            bits, so that no sum of two products is exact. The leaf is named.

    Examples:
        >>> from collections import namedtuple
        >>> from zoqo_jax import dequantize
        >>> QArray = namedtuple("QArray", "qvalue scale zero_point qtype")
        >>> array = QArray(jnp.array([[-7, 3]], jnp.int4), jnp.full((1, 1), 0.5), None, "int4")
        >>> dequantize(from_qwix({"w": array}))["w"].tolist()
        [[-3.5, 1.5]]
    """
    return _mapped(_from_fields, tree, _is_qarray)


def to_qwix(tree: PyTree, make: Callable[..., Any] | None = None) -> PyTree:
    """Replace every `QuantizedArray` of a tree by a QArray.

    A QArray has no legal codes of its own and is not frozen: it says neither.

    Args:
        tree: any pytree.
        make: what makes a QArray of its four fields, given by name; by default `qwix.QArray`.

    Raises:
        ValueError: levels that no qtype has, scales wider than the values (quantize with
            `scale_dtype`), a block that is cut short, or an offset that is no whole number of
            scales. The leaf is named.
        ImportError: qwix is not installed.

    Examples:
        >>> from zoqo_jax import Quantizer
        >>> array = Quantizer(bits=8, range=1.0)(jnp.array([[-1.0, 0.0, 0.5]]))
        >>> fields = to_qwix(array, make=dict)
        >>> fields["qvalue"].tolist(), fields["zero_point"], fields["qtype"]
        ([[-127, 0, 64]], None, dtype('int8'))
    """
    build = make or _package().QArray

    def one(array: QuantizedArray) -> Any:
        qvalue, scale, zero_point, qtype = _fields(array)
        return build(
            qvalue=jnp.asarray(qvalue),
            scale=jnp.asarray(scale),
            zero_point=None if zero_point is None else jnp.asarray(zero_point),
            qtype=qtype,
        )

    return _mapped(one, tree, is_quantized)


def _mapped(one: Callable[[Any], Any], tree: PyTree, chosen: Callable[[Any], bool]) -> PyTree:
    """A tree with the leaves that are chosen replaced, and named where that fails."""

    def named(path: tuple[Any, ...], leaf: Any) -> Any:
        if not chosen(leaf):
            return leaf
        try:
            return one(leaf)
        except ValueError as error:
            raise ValueError(f"leaf {jax.tree_util.keystr(path) or 'itself'}: {error}") from error

    return jax.tree_util.tree_map_with_path(named, tree, is_leaf=chosen)


def _is_qarray(leaf: Any) -> bool:
    return all(hasattr(leaf, name) for name in _Fields._fields)


def _package() -> Any:
    try:
        import qwix
    except ImportError as error:
        raise ImportError(
            "QArrays are made by the qwix package: pip install 'zoqo_jax[interop]'."
        ) from error
    return qwix


def _from_fields(array: Any) -> QuantizedArray:
    qvalue, scale = np.asarray(array.qvalue), np.asarray(array.scale)
    zero_point = None if array.zero_point is None else np.asarray(array.zero_point)
    kind = _type_of(qvalue.dtype if array.qtype is None else array.qtype)
    if qvalue.dtype != kind.storage:
        raise ValueError(f"qvalue must be {kind.storage} for {kind.name}, got {qvalue.dtype}.")
    codes = qvalue.astype(np.int16) - kind.least
    if codes.size and not 0 <= codes.min() <= codes.max() < kind.count:
        raise ValueError(f"qvalue must hold {kind.name}, got numbers out of its range.")
    block = _block(qvalue.shape, scale)

    def coded(grid: Grid, offset: np.ndarray | None = None) -> QuantizedArray:
        return QuantizedArray.from_codes(
            jnp.asarray(codes, jnp.uint8),
            jnp.asarray(scale),
            None if offset is None else jnp.asarray(offset),
            grid,
            block,
            scale.dtype,
        )

    if zero_point is None:
        return coded(_grid(kind, scale.dtype))
    _check_zero_point(kind, scale, zero_point)
    # Either moves all levels, which is exact for any scale, or is an offset in whole scales. One
    # is right if it says the same of the QArray.
    wanted = _Fields(qvalue, scale, zero_point, array.qtype)
    if (zero_point == zero_point.flat[0]).all():
        moved = coded(_grid(kind, scale.dtype, int(zero_point.flat[0])))
        if _says(moved, wanted):
            return moved
    with np.errstate(over="ignore"):
        offset = -zero_point.astype(np.float32) * scale.astype(np.float32)
    array = coded(_grid(kind, scale.dtype), offset)
    if not _says(array, wanted):
        raise ValueError(
            "zero_point must be the same everywhere where scale has more than 16 significant bits, "
            f"got {len(np.unique(zero_point))} different ones."
        )
    return array


def _type_of(qtype: Any) -> _Type:
    name = qtype if isinstance(qtype, str) else np.dtype(qtype).name
    if name not in _TYPES:
        raise ValueError(f"qtype must be one of {', '.join(_TYPES)}, got {name}.")
    return _TYPES[name]


def _grid(kind: _Type, dtype: np.dtype, zero: int = 0) -> Grid:
    """The levels of a qtype whose scales have a dtype."""
    if kind is _NF4:  # qwix rounds the levels before it scales them
        levels = np.array(companders.nf4().levels, np.float32).astype(dtype).tolist()
    else:
        levels = map(float, range(kind.least - zero, kind.least - zero + kind.count))
    return Grid(tuple(levels), 0, kind.count - 1)


def _block(shape: tuple[int, ...], scale: np.ndarray) -> tuple[int, int] | None:
    """The axis with tiles, and how long they are."""
    if scale.dtype not in _SCALES:
        raise ValueError(f"scale must be float16, bfloat16 or float32, got {scale.dtype}.")
    if not np.isfinite(scale.astype(np.float32)).all():
        raise ValueError("scale must be finite, got NaN or inf.")
    fits = len(shape) == scale.ndim and all(
        tiles and not n % tiles for n, tiles in zip(shape, scale.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"scale must divide qvalue's shape {shape}, got {scale.shape}.")
    tiled = [axis for axis, n in enumerate(shape) if 1 < scale.shape[axis] < n]
    if len(tiled) > 1:
        raise ValueError(
            f"scale must have tiles along one axis, got {scale.shape} for qvalue's {shape}."
        )
    return (tiled[0] - len(shape), shape[tiled[0]] // scale.shape[tiled[0]]) if tiled else None


def _check_zero_point(kind: _Type, scale: np.ndarray, zero_point: np.ndarray) -> None:
    if kind is _NF4:
        raise ValueError("zero_point must be None for nf4.")
    if zero_point.dtype != kind.storage or zero_point.shape != scale.shape:
        raise ValueError(
            f"zero_point must be {kind.storage} {list(scale.shape)}, as qvalue and scale are, got "
            f"{zero_point.dtype} {list(zero_point.shape)}."
        )


def _says(array: QuantizedArray, wanted: _Fields) -> bool:
    """Whether an array would become the QArray that it was made of."""
    try:
        found = _fields(array)
    except ValueError:
        return False
    return (
        found.zero_point is not None
        and found.qvalue.dtype == wanted.qvalue.dtype
        and bool((found.qvalue == wanted.qvalue).all())
        and bool((found.zero_point == wanted.zero_point).all())
    )


def _fields(array: QuantizedArray) -> _Fields:
    """What the QArray of an array holds."""
    scale, shape = np.asarray(array.scale), array.shape
    if array.value_dtype not in (scale.dtype, np.float32):
        raise ValueError(
            f"scale must be in the dtype of the values, {jnp.dtype(array.value_dtype)}, got "
            f"{scale.dtype}."
        )
    scale = scale.astype(array.value_dtype)
    axis, length = array.block or (0, 1)
    if array.block and scale.shape[axis] > 1 and scale.shape[axis] * length != shape[axis]:
        raise ValueError(f"blocks of {length} must divide the axis {axis} of {shape}.")
    codes = np.asarray(array.codes)
    if array.grid.levels == _grid(_NF4, scale.dtype).levels and array.offset is None:
        return _Fields(codes.astype(_NF4.storage), scale, None, _NF4.name)
    kind, moved = _uniform_type(array.grid)
    qvalue = (codes.astype(np.int16) + kind.least).astype(kind.storage)
    zero_point = None
    if array.offset is not None:
        zero_point = moved - _whole_scales(scale, np.asarray(array.offset, np.float32))
    elif moved:
        zero_point = np.full(scale.shape, moved)
    if zero_point is not None:
        bounds = ml_dtypes.iinfo(kind.storage)
        if zero_point.size and not bounds.min <= zero_point.min() <= zero_point.max() <= bounds.max:
            raise ValueError(
                f"zero points must be {kind.storage}, got {zero_point.min()} to {zero_point.max()}."
            )
        zero_point = zero_point.astype(kind.storage)
    plain = kind.storage.name == kind.name
    return _Fields(qvalue, scale, zero_point, kind.storage if plain else kind.name)


def _uniform_type(grid: Grid) -> tuple[_Type, int]:
    """A qtype with as many levels, one apart, and what is to be taken from its numbers."""
    first, count = grid.levels[0], len(grid.levels)
    kinds = [kind for kind in _UNIFORM if kind.count == count]
    if not kinds or not grid.is_uniform or not first.is_integer():
        raise ValueError(f"grid must have the levels of a qtype of qwix, got {grid}.")
    kind = next((kind for kind in kinds if kind.least == first), kinds[0])
    return kind, kind.least - int(first)


def _whole_scales(scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Offsets in units of their scales, whole numbers."""
    wide = scale.astype(np.float64)
    if offset.shape != scale.shape or not wide.all() or not np.isfinite(offset).all():
        raise ValueError("offset must be finite and have a scale that is not 0 for each number.")
    is_long = (scale.astype(np.float32).view(np.uint32) & 0xFF) != 0
    if (is_long & (offset != 0)).any():
        raise ValueError("scale must have at most 16 significant bits beside an offset.")
    whole = np.rint(offset / wide)
    if (whole * wide != offset).any():
        raise ValueError("offset must be a whole number of scales.")
    return whole.astype(np.int64)
