"""Codes and the values they stand for: `Grid` and `QuantizedArray`.

A code `n` is an unsigned integer; its value is `scale * levels[n] + offset` with one scale (and
offset) for a tensor, a channel or a block. Optimizers move codes and never leave
`grid.low .. grid.high`. How a scale is found is the business of `quantization.py`.

Codes of few levels share bytes (`packing.py`). Scales may have two levels (`scales.py`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from typing import Any, Literal, get_args

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import quax
from jax.core import ShapedArray
from jaxtyping import Array, Float, Int16, Integer, PyTree, UInt8

from zoqo_jax.grids import packing
from zoqo_jax.grids.packing import cut
from zoqo_jax.grids.scales import Scale, TwoLevel, multiplied_out

__all__ = [
    "Grid",
    "QuantizedArray",
    "dequantize",
    "freeze",
    "is_float_array",
    "is_quantized",
    "is_trained",
    "no_update",
    "trained_leaves",
    "with_products",
]

Products = Literal["float", "integer"]
"""How an array is multiplied: decoded to floats, or its codes as integers with rounded vectors."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """The levels that codes index, at scale 1, and which codes are legal.

    Attributes:
        levels: value of each code at scale 1, increasing over the legal codes. Whole numbers one
            apart make a uniform grid.
        low: least legal code.
        high: greatest legal code.

    Examples:
        >>> Grid((-2.0, -1.0, 0.0, 1.0), 1, 3).spacing
        1.0
    """

    levels: tuple[float, ...]
    low: int
    high: int

    def __repr__(self) -> str:
        spaced = "uniform" if self.is_uniform else "nonuniform"
        return f"Grid({len(self.levels)} {spaced} levels, legal {self.low}..{self.high})"

    def __hash__(self) -> int:  # every jitted call compares grids: hash 256 floats once only
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.levels, self.low, self.high))

    @functools.cached_property
    def spacing(self) -> float:
        """Mean distance between neighbouring legal levels; 1 for a uniform grid."""
        return (self.levels[self.high] - self.levels[self.low]) / (self.high - self.low)

    @functools.cached_property
    def largest(self) -> float:
        """The largest magnitude of a legal level."""
        return max(-self.levels[self.low], self.levels[self.high])

    @functools.cached_property
    def is_uniform(self) -> bool:
        """Whether a level is its code plus a whole number, so that no table need be read."""
        return all(b - a == 1.0 for a, b in zip(self.levels, self.levels[1:], strict=False))

    def at(self, codes: Array) -> Float[Array, "..."]:
        """The levels of legal codes, float32."""
        if self.is_uniform:
            # By way of int32: XLA's CPU backend (jax 0.10.2) may fuse an update's sum of bytes with
            # their conversion and a reduction, and then the sum does not wrap.
            return codes.astype(jnp.int32).astype(jnp.float32) + self.levels[0]
        levels = np.asarray(self.levels, np.float32)
        if len(levels) <= 16:
            return _select(levels, codes)
        return jnp.asarray(levels).at[codes.astype(jnp.int32)].get(mode="promise_in_bounds")

    def nearest(self, values: Float[Array, "..."]) -> Int16[Array, "..."]:
        """The legal codes whose levels are nearest to some values, scale being 1.

        Examples:
            >>> Grid((-1.0, 0.0, 0.25, 1.0), 0, 3).nearest(jnp.array([-9.0, 0.12, 0.13])).tolist()
            [0, 1, 2]
        """
        if self.is_uniform:
            codes = jnp.round(values - self.levels[0])
            return jnp.clip(codes, self.low, self.high).astype(jnp.int16)
        legal = np.asarray(self.levels[self.low : self.high + 1], np.float32)
        borders = (legal[1:] + legal[:-1]) / 2
        return (self.low + jnp.searchsorted(borders, values)).astype(jnp.int16)


def _select(levels: np.ndarray, codes: Array) -> Float[Array, "..."]:
    """Look up few levels by a tree of selections, one digit of the code at a time.

    Vector instructions do this; a gather they do not. On a CPU it takes two thirds of the time.
    """
    digits = max(len(levels) - 1, 1).bit_length()
    branches: list[Any] = [*levels, *[levels[-1]] * (2**digits - len(levels))]
    for digit in range(digits):
        odd = (codes >> digit) & 1 != 0
        pairs = zip(branches[::2], branches[1::2], strict=True)
        branches = [jnp.where(odd, above, below) for below, above in pairs]
    return branches[0]


class QuantizedArray(quax.ArrayValue):
    """An array stored as integer codes; to JAX code under `quaxify` an ordinary float array.

    Invariants:

    - `packed` holds codes of `bits` bits as `packing.py` lays them out: the last axis is cut into
      `per_byte` equal parts, whose j-th codes share byte j;
    - every code lies in `grid.low .. grid.high`;
    - `scale`, and `offset` unless it is None, have as many axes as `codes`. Along each axis they
      are 1 long (shared), as long as `codes` (one each), or, along `block[0]` (counted from the
      end), one for each `block[1]` neighbours with the last block cut short, or, with `block_of`,
      one for each group of columns;
    - the value is `scale * levels[codes] + offset`, computed in float32 and rounded once to
      `value_dtype`;
    - where `offset` is the zero point of a uniform grid, `scale` has at most 16 significant bits,
      so the product is exact in float32 and zero stays exactly a level, fused multiply-add or not.

    As a pytree its leaves are `packed`, `scale`, `offset` and `block_of`; the rest is static. Make
    one with `from_codes`, or from floats with a `Quantizer`.

    Attributes:
        packed: bytes; `codes` unpacks them.
        scale: value units per level unit; zero where a whole block was zero, and of either sign.
            An array, or a `TwoLevel`.
        offset: value units, as `scale`, or None for 0.
        grid: levels and legal codes.
        block: (negative axis, length) or None.
        value_dtype: dtype of the values, float16, bfloat16, float32 or (where JAX has it) float64.
        bits: width of a code in `packed`.
        has_copies: whether `scale` and `offset` are copies of one number each, made for a scan.
        label: what `explain` calls it, while it looks.
        block_of: the group of each column, where neighbours do not share one, (1, columns) for a
            matrix: GPTQ orders groups by activation.
        products: how it is multiplied, "float" or "integer"; see `with_products`.
        is_frozen: whether transformations leave it alone, as they do floats; see `freeze`.

    Examples:
        >>> import zoqo_jax as zq
        >>> array = zq.Quantizer(bits=4, range=1.0)(jnp.array([[-1.0, 0.0], [0.4, 0.9]]))
        >>> array.shape, array.codes.tolist(), array.packed.tolist()
        ((2, 2), [[1, 8], [11, 15]], [[129], [251]])
        >>> dequantize(array).round(3).tolist()
        [[-0.933, 0.0], [0.4, 0.933]]
    """

    packed: UInt8[Array, "..."]
    scale: Scale
    offset: Scale | None
    grid: Grid = eqx.field(static=True)
    block: tuple[int, int] | None = eqx.field(static=True)
    value_dtype: Any = eqx.field(static=True)
    bits: int = eqx.field(static=True, default=8)
    has_copies: bool = eqx.field(static=True, default=False)
    label: str = eqx.field(static=True, default="")
    products: Products = eqx.field(static=True, default="float")
    block_of: Integer[Array, "..."] | None = None
    is_frozen: bool = eqx.field(static=True, default=False)

    @classmethod
    def from_codes(
        cls,
        codes: Integer[Array, "..."],
        scale: Scale,
        offset: Scale | None,
        grid: Grid,
        block: tuple[int, int] | None = None,
        value_dtype: Any = jnp.float32,
        bits: int | None = None,
        block_of: Integer[Array, "..."] | None = None,
    ) -> QuantizedArray:
        """An array of the given codes, which must be legal, in the logical shape.

        Args:
            codes: of any integer dtype.
            scale: as the attribute.
            offset: as the attribute.
            grid: levels and legal codes.
            block: as the attribute.
            value_dtype: of the values.
            bits: width of a code in memory, 2 to 8, or more where the last axis does not divide so;
                by default 2, 4 or 8, as fits the grid.
            block_of: as the attribute.

        Examples:
            >>> grid = Grid((-1.0, 0.0, 1.0, 2.0), 0, 3)
            >>> QuantizedArray.from_codes(jnp.array([[3, 0]]), jnp.ones((1, 1)), None, grid).codes
            Array([[3, 0]], dtype=uint8)
        """
        least = 8 if bits is None else bits
        if bits is None:
            least = next((n for n in (2, 4) if len(grid.levels) <= 2**n), 8)
            widths: tuple[int, ...] = (2, 4, 8)
        elif not 2 <= bits <= 8 or len(grid.levels) > 2**bits:
            raise ValueError(f"bits must be in [2, 8] and hold {grid}, got {bits}.")
        else:
            widths = packing.WIDTHS
        width = packing.width(codes.shape, least, widths)
        packed = packing.pack(codes, width)
        return cls.from_packed(packed, scale, offset, grid, block, value_dtype, width, block_of)

    @classmethod
    def from_packed(
        cls,
        packed: UInt8[Array, "..."],
        scale: Scale,
        offset: Scale | None,
        grid: Grid,
        block: tuple[int, int] | None,
        value_dtype: Any,
        bits: int,
        block_of: Integer[Any, "..."] | None = None,
    ) -> QuantizedArray:
        """An array of codes that are packed already, as readers of large files do it.

        Args:
            packed: legal codes of `bits` bits, as `packing.pack` lays them out.
            scale: as the attribute.
            offset: as the attribute.
            grid: levels and legal codes.
            block: as the attribute.
            value_dtype: of the values.
            bits: width of a code in `packed`.
            block_of: as the attribute, of any integer dtype, JAX's or NumPy's.

        Examples:
            >>> grid = Grid((-1.0, 0.0, 1.0, 2.0), 0, 3)
            >>> packed, scale = jnp.array([[0b11_10_01_00]], jnp.uint8), jnp.ones((1, 1))
            >>> QuantizedArray.from_packed(packed, scale, None, grid, None, jnp.float32, 2).codes
            Array([[0, 1, 2, 3]], dtype=uint8)
        """
        register_with_flax()
        if block_of is not None:
            groups = max(x.shape[-1] for x in (scale, offset) if x is not None)
            least_dtype = jnp.uint8 if groups <= 2**8 else jnp.uint16
            block_of = jnp.asarray(block_of.astype(least_dtype if groups <= 2**16 else jnp.int32))
        dtype = jnp.dtype(value_dtype)
        return cls(packed, scale, offset, grid, block, dtype, bits, block_of=block_of)

    def __repr__(self) -> str:
        def kind(x: Any) -> str:
            if isinstance(x, TwoLevel):
                return f"{kind(x.outer)} {'/' if x.divides else '*'} {kind(x.inner)}"
            return f"{x.dtype}{list(x.shape)}" if hasattr(x, "dtype") else repr(x)

        block = "" if self.block is None else f", block={self.block}"
        offset = "" if self.offset is None else f", offset={kind(self.offset)}"
        scale = f"scale={kind(self.scale)}{offset}{block}"
        packed = f"uint{self.bits}{list(self.shape)}"
        return f"QuantizedArray({packed}, {self.grid}, {scale})"

    def aval(self) -> ShapedArray:
        """The shape and dtype that JAX code sees."""
        *leading, last = self.packed.shape or (None,)
        shape = () if last is None else (*leading, last * 8 // self.bits)
        return ShapedArray(shape, self.value_dtype)

    @property
    def per_byte(self) -> int:
        """How many parts of the last axis share bytes."""
        return packing.parts(self.bits)

    @property
    def part_length(self) -> int:
        """How long a part is."""
        return self.shape[-1] // self.per_byte

    @property
    def codes(self) -> UInt8[Array, "..."]:
        """The codes, one a byte, in the logical shape."""
        return packing.unpack(self.packed, self.bits)

    @property
    def parts(self) -> list[QuantizedArray]:
        """The parts of the last axis that share bytes, each with a byte for every code."""
        return [self.part(i) for i in range(self.per_byte)]

    def part(self, i: Array | int) -> QuantizedArray:
        """One of `parts`, whose number may be traced."""
        if self.per_byte == 1:
            return self
        offset = None if self.offset is None else self.part_of(self.offset, i)
        block = None if self.block is None else (self.block[0], self.length_in_parts)
        scale = self.part_of(self.scale, i)
        codes = packing.part(self.packed, self.bits, i)
        block_of = None if self.block_of is None else cut(self.block_of, i, self.per_byte)
        return QuantizedArray(
            codes,
            scale,
            offset,
            self.grid,
            block,
            self.value_dtype,
            products=self.products,
            block_of=block_of,
        )

    def part_of(self, per_block: Array | TwoLevel, i: Array | int) -> Array:
        """What `part(i)` has of something in `scale`'s shape."""
        per_block = multiplied_out(per_block)
        if per_block.shape[-1] == 1 or self.block_of is not None:
            return per_block
        axis, length = self.block or (0, 1)
        if axis == -1:
            shorter = self.length_in_parts
            per_block = jnp.repeat(per_block, length // shorter, axis=-1)
            per_block = per_block[..., : self.shape[-1] // shorter]
        return cut(per_block, i, self.per_byte)

    @property
    def length_in_parts(self) -> int:
        """How long blocks are in `parts`: cut further where one would lie in two of them."""
        axis, length = self.block or (0, 1)
        cuts = axis == -1 and self.scale.shape[-1] > 1
        return math.gcd(length, self.part_length) if cuts else length

    def materialise(self) -> Array:
        """The values."""
        return self.decode(self.codes)

    @property
    def has_one_scale(self) -> bool:
        """Whether one scale serves the whole array."""
        return self.has_copies or self.scale.size == 1

    @property
    def step(self) -> Float[Array, "..."]:
        """Mean distance between neighbouring levels: value units, float32, shape of `scale`.

        It is positive even where a scale is not, as files of other programs have it.
        """
        return jnp.abs(self.scale.astype(jnp.float32)) * self.grid.spacing

    def decode(self, codes: Array) -> Float[Array, "..."]:
        """Values of other codes of the same shape, under this array's scale, in `value_dtype`."""
        scale = self.broadcast_scales(self.scale).astype(jnp.float32)
        values = scale * self.grid.at(codes)
        if self.offset is not None:
            values = values + self.broadcast_scales(self.offset).astype(jnp.float32)
        return values.astype(self.value_dtype)

    def broadcast_scales(self, per_block: Array | TwoLevel) -> Array:
        """Repeat something in `scale`'s shape, or shorter, so that it broadcasts with `codes`."""
        per_block = multiplied_out(per_block)
        if self.block_of is not None and per_block.shape[-1] > 1:
            return _of_groups(per_block, self.block_of)
        if self.block is None:
            return per_block
        axis, length = self.block
        axis %= self.ndim
        if per_block.shape[axis] == 1:
            return per_block
        return _repeated(per_block, axis, length, self.shape[axis])

    def take_rows(self, fn: Callable[[Array], Array]) -> QuantizedArray:
        """The array of rearranged, picked or repeated rows, the last axis staying as it is.

        Args:
            fn: maps (*rows, k) to (*new_rows, k) for any k, the same rows for every k.
        """

        def per_block(x: Array | None) -> Array | None:
            if x is None or x.ndim == 0:
                return x
            if all(n == 1 for n in x.shape[:-1]) and self._has_whole_rows:
                like = jax.ShapeDtypeStruct((*self.shape[:-1], x.shape[-1]), x.dtype)
                new = jax.eval_shape(fn, like)  # shared rows stay shared
                return x.reshape((1,) * (len(new.shape) - 1) + x.shape[-1:])
            is_short = (self._has_whole_rows and self.block) or self.block_of is not None
            spread = x if is_short else self.broadcast_scales(x)
            return fn(jnp.broadcast_to(spread, (*self.shape[:-1], spread.shape[-1])))

        scale, offset = self.scale, self.offset
        if not self._has_whole_rows:  # of two levels, each row gets products of its own
            scale, offset = (
                multiplied_out(scale),
                None if offset is None else multiplied_out(offset),
            )
        return dataclasses.replace(
            self,
            packed=fn(self.packed),
            scale=jax.tree.map(per_block, scale),
            offset=jax.tree.map(per_block, offset),
            block=self.block if self._has_whole_rows else None,
            block_of=per_block(self.block_of),
        )

    @property
    def _has_whole_rows(self) -> bool:
        """Whether no block reaches over several rows."""
        return self.block is None or self.block[0] == -1

    def take_columns(self, places: Integer[Array, " k"]) -> QuantizedArray:
        """The array of picked columns, each code in a byte of its own."""
        codes = packing.take(self.packed, self.bits, places)

        def per_block(x: Scale) -> Array:
            if x.shape[-1] == 1:
                return multiplied_out(x)
            return jnp.take(self.broadcast_scales(x), places, axis=-1)

        block = None if self._has_whole_rows else self.block
        offset = None if self.offset is None else per_block(self.offset)
        scale = per_block(self.scale)
        return QuantizedArray(
            codes, scale, offset, self.grid, block, self.value_dtype, products=self.products
        )

    def with_codes(self, codes: Integer[Array, "..."]) -> QuantizedArray:
        """The same array at other codes, which must be legal."""
        return dataclasses.replace(self, packed=packing.pack(codes, self.bits))

    def stepped(self, steps: list[Integer[Array, "..."]]) -> QuantizedArray:
        """The same array a number of codes on, kept on the grid; a step for each of `parts`."""
        low, high = self.grid.low, self.grid.high
        pairs = zip(self.parts, steps, strict=True)
        moved = [part.packed.astype(jnp.int16) + step.astype(jnp.int16) for part, step in pairs]
        parts = [jnp.clip(n, low, high) for n in moved]
        return dataclasses.replace(self, packed=packing.pack_parts(parts, self.bits))


@functools.partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def _repeated(per_block: Array, axis: int, length: int, size: int) -> Array:
    shape = list(per_block.shape)
    shape.insert(axis + 1, length)
    longer = jnp.broadcast_to(jnp.expand_dims(per_block, axis + 1), shape)
    shape[axis : axis + 2] = [shape[axis] * length]
    return jax.lax.slice_in_dim(longer.reshape(shape), 0, size, axis=axis)


def _of_groups(per_group: Array, group: Array) -> Array:
    """Of numbers (*rows, groups), for each column that of its group; `group` is (*rows, columns).

    One scale of a row that is NaN or infinite makes all of the row NaN.
    """
    ndim = max(per_group.ndim, group.ndim)
    group, per_group = (x.reshape((1,) * (ndim - x.ndim) + x.shape) for x in (group, per_group))
    if ndim > 1 and group.shape[-2] == 1 and jnp.issubdtype(per_group.dtype, jnp.floating):
        # A product of finite numbers with ones and zeros is exact, and takes half the time of
        # a look-up.
        per_group = per_group.astype(jnp.float32)
        numbers = jnp.arange(per_group.shape[-1], dtype=group.dtype)
        is_its = (group == numbers[:, None]).astype(jnp.float32)
        return jnp.matmul(per_group, is_its, precision=jax.lax.Precision.HIGHEST)
    rows = jnp.broadcast_shapes(group.shape[:-1], per_group.shape[:-1])
    group = jnp.broadcast_to(group, (*rows, group.shape[-1]))
    per_group = jnp.broadcast_to(per_group, (*rows, per_group.shape[-1]))
    # Legal by what made it: a check for each column would cost as much as the look-up.
    return jnp.take_along_axis(
        per_group, group.astype(jnp.int32), axis=-1, mode="promise_in_bounds"
    )


class _WholeOrNothing:
    """The field `is_frozen`, the last that is set when a tree is put together again.

    Codes and their changes are bytes. Where optax (or another map over a tree) put floats in their
    place, it scaled, averaged or decayed codes, which have no such thing: adamw behind `spsa` moved
    509 of 512 frozen codes by the truncation of floats to bytes. What became of a frozen array is
    then zeros, the update that leaves it as it is; of another array it is refused.
    """

    def __get__(self, array: Any, of: type | None = None) -> Any:
        return self if array is None else array.__dict__["is_frozen"]

    def __set__(self, array: Any, is_frozen: bool) -> None:
        fields = array.__dict__
        fields["is_frozen"] = is_frozen
        packed, scale = fields.get("packed"), fields.get("scale")
        if _is_masked(packed) != _is_masked(scale):
            raise ValueError(
                "mask must choose a QuantizedArray as a whole, got one that splits codes and "
                "scale: make it by jax.tree.map(f, params, is_leaf=zoqo_jax.is_quantized)."
            )
        if not isinstance(packed, jax.Array | np.ndarray) or not packed.ndim:
            return
        if not jnp.issubdtype(packed.dtype, jnp.floating):
            return
        if not is_frozen:
            raise ValueError(
                f"codes must stay uint8, got {packed.dtype}{list(packed.shape)}: changes of codes "
                "cannot be scaled, clipped, averaged or decayed. Let it see the other leaves "
                "alone (zoqo_jax.on_floats), or freeze the codes (zoqo_jax.freeze)."
            )
        fields["packed"] = jnp.zeros(packed.shape, jnp.uint8)
        for name in ("scale", "offset", "block_of"):
            fields[name] = jax.tree.map(_zeros, fields.get(name))


def _zeros(x: Any) -> Any:
    return _zero_update(x) if isinstance(x, jax.Array | np.ndarray) else x


def _zero_update(x: Any) -> Array:
    """What leaves an array as it is when it is added to it, bit for bit.

    It is -0.0 for floats: -0.0 + 0.0 is 0.0, and files have scales, minimums and weights of -0.0.
    """
    is_float = jnp.issubdtype(jnp.result_type(x), jnp.floating)
    return jnp.full_like(x, -0.0) if is_float else jnp.zeros_like(x)


def _is_masked(child: Any) -> bool:
    """Whether a mask of optax has taken a child of an array away."""
    if isinstance(child, TwoLevel):
        return _is_masked(child.outer) and _is_masked(child.inner)
    return isinstance(child, optax.MaskedNode)


QuantizedArray.is_frozen = _WholeOrNothing()


def register_with_flax() -> None:
    """Let `flax.serialization` take quantized arrays apart, once somebody has imported Flax.

    Codes, scales and offsets are serialized; grid and block come from the array restored to.
    """
    flax = sys.modules.get("flax.serialization")
    if flax is None or flax.is_serializable(QuantizedArray):
        return

    def to_state(array: QuantizedArray) -> dict[str, Any]:
        named: dict[str, Any] = {}
        for name in ("packed", "scale", "offset", "block_of"):
            x = getattr(array, name)
            if isinstance(x, TwoLevel):
                named |= {f"{name}.outer": x.outer, f"{name}.inner": x.inner}
            elif x is not None:
                named[name] = x
        return named

    def from_state(array: QuantizedArray, state: dict[str, Any]) -> QuantizedArray:
        here = to_state(array)
        for name, own in here.items():
            if name not in state or np.shape(state[name]) != np.shape(own):
                got = f"shape {np.shape(state[name])}" if name in state else "none"
                raise ValueError(f"{name} must have shape {np.shape(own)}, got {got}.")
        extra = sorted(set(state) - set(here))
        if extra:
            raise ValueError(f"state must hold {sorted(here)}, got {extra[0]!r} as well.")
        new = {name: jnp.asarray(state[name], own.dtype) for name, own in here.items()}
        for name in ("scale", "offset"):
            if isinstance(getattr(array, name), TwoLevel):
                levels = {level: new.pop(f"{name}.{level}") for level in ("outer", "inner")}
                new[name] = dataclasses.replace(getattr(array, name), **levels)
        return dataclasses.replace(array, **new)

    flax.register_serialization_state(QuantizedArray, to_state, from_state)


register_with_flax()


def is_quantized(leaf: Any) -> bool:
    """Whether a leaf is a `QuantizedArray`; the `is_leaf` for maps over quantized trees.

    Examples:
        >>> import zoqo_jax as zq
        >>> params = {"w": zq.nf4()(jnp.ones((1, 64))), "b": jnp.ones(3)}
        >>> jax.tree.map(is_quantized, params, is_leaf=is_quantized)
        {'b': False, 'w': True}
    """
    return isinstance(leaf, QuantizedArray)


def is_trained(leaf: Any) -> bool:
    """Whether a leaf is a `QuantizedArray` whose codes transformations move."""
    return is_quantized(leaf) and not leaf.is_frozen


def is_float_array(leaf: Any) -> bool:
    """Whether a leaf is an array of floats, and neither quantized nor a Python number.

    Examples:
        >>> [is_float_array(leaf) for leaf in (jnp.ones(2), jnp.arange(2), 0.5, jnp.tanh)]
        [True, False, False, False]
    """
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    return is_array and jnp.issubdtype(leaf.dtype, jnp.floating)


def no_update(leaf: Any) -> Any:
    """The update of a leaf that is to stay: zeros, or None where there is nothing to add to.

    Keys, functions and strings have no sum; `zoqo_jax.apply_updates` (and that of Equinox) leaves
    what has None as it is.

    Examples:
        >>> [no_update(leaf) for leaf in (np.ones(1), 2, jax.random.key(0), "relu")]
        [Array([-0.], dtype=float32), Array(0, dtype=int32, weak_type=True), None, None]
    """
    if is_quantized(leaf):
        return jax.tree.map(_zero_update, leaf)
    if isinstance(leaf, bool | int | float | complex):
        return _zero_update(leaf)
    dtype = getattr(leaf, "dtype", None)
    has_sum = dtype is not None and not jax.dtypes.issubdtype(dtype, jax.dtypes.extended)
    return _zero_update(leaf) if has_sum else None


def trained_leaves(params: PyTree | None) -> dict[str, QuantizedArray]:
    """The leaves whose codes transformations move, in the order of the tree, by their paths.

    Raises:
        ValueError: there is none, or no tree.

    Examples:
        >>> import zoqo_jax as zq
        >>> params = zq.quantize({"w": jnp.ones((2, 2)), "b": jnp.ones(2)}, zq.Quantizer())
        >>> list(trained_leaves(params))
        ["['w']"]
    """
    register_with_flax()
    if params is None:
        raise ValueError("params must be given: codes move from where they are.")
    paths = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)[0]
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in paths if is_trained(leaf)}
    if not leaves:
        raise ValueError(
            "params must hold a QuantizedArray that is not frozen, got none: call "
            "zoqo_jax.quantize first."
        )
    return leaves


def freeze(tree: PyTree, where: Callable[[tuple[Any, ...], Any], bool] | None = None) -> PyTree:
    """Mark quantized leaves as not to be trained: they are neither probed nor moved.

    Args:
        tree: any pytree.
        where: `where(path, leaf) -> bool` with the path as `jax.tree_util` gives it; asked of the
            quantized leaves. By default all are frozen.

    Returns:
        The tree with the leaves that `where` chooses frozen, and its other quantized leaves not.

    Examples:
        >>> import zoqo_jax as zq
        >>> params = zq.quantize({"a": jnp.ones((2, 2)), "b": jnp.ones((2, 2))}, zq.Quantizer())
        >>> params = freeze(params, lambda path, leaf: path[-1].key == "a")
        >>> is_trained(params["a"]), is_trained(params["b"])
        (False, True)
    """

    def one(leaf: Any, is_chosen: bool) -> Any:
        return dataclasses.replace(leaf, is_frozen=is_chosen)

    return _map_quantized(one, tree, where)


def _map_quantized(
    fn: Callable[[Any, bool], Any],
    tree: PyTree,
    where: Callable[[tuple[Any, ...], Any], bool] | None,
) -> PyTree:
    """Apply a function of a leaf, and of whether `where` chooses it, to the quantized leaves."""

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        return fn(leaf, where is None or bool(where(path, leaf)))

    return jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_quantized)


def with_products(
    tree: PyTree,
    products: str,
    where: Callable[[tuple[Any, ...], Any], bool] | None = None,
) -> PyTree:
    """Choose how quantized leaves are multiplied, in training and in plain forward passes alike.

    With "integer" the vectors that multiply an array are rounded to int8, each with a step of its
    own, and multiplied with codes as integers; sums are exact. A product then differs from that of
    floats by at most half a step of the vector times the L1 norm of the matrix's row,
    `max |x| / 254 * sum |w|` (`zoqo_jax.directions.integers`). A sum over blocks is one of
    integers block by block, which pays for long blocks alone. Where a product cannot be one of
    integers (a grid that is not uniform, short blocks, ...), it is one of floats, and
    `zoqo_jax.explain` says so.

    Args:
        tree: any pytree.
        products: "float" or "integer".
        where: `where(path, leaf) -> bool` with the path as `jax.tree_util` gives it; asked of the
            quantized leaves. By default all are chosen; others stay as they are.

    Raises:
        ValueError: other `products`.

    Examples:
        >>> import zoqo_jax as zq
        >>> params = {"w": zq.Quantizer(range=1.27)(jnp.array([[1.0, 0.5], [0.25, -1.0]]))}
        >>> params = with_products(params, "integer")
        >>> model = zq.quaxify(lambda params, x: x @ params["w"])
        >>> model(params, jnp.array([[1.0, 0.126]])).round(4).tolist()  # 0.126 becomes 16 / 127
        [[1.0275, 0.3725]]
    """
    if products not in get_args(Products):
        raise ValueError(f"products must be one of {get_args(Products)}, got {products!r}.")

    def one(leaf: Any, is_chosen: bool) -> Any:
        return dataclasses.replace(leaf, products=products) if is_chosen else leaf

    return _map_quantized(one, tree, where)


def dequantize(tree: PyTree) -> PyTree:
    """Replace every `QuantizedArray` of a tree by its values.

    Examples:
        >>> import zoqo_jax as zq
        >>> dequantize({"w": zq.Quantizer(range=1.0)(jnp.zeros(2))})["w"].tolist()
        [0.0, 0.0]
    """
    return jax.tree.map(
        lambda leaf: leaf.materialise() if is_quantized(leaf) else leaf, tree, is_leaf=is_quantized
    )
