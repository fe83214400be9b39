"""A GPU kernel that decodes, displaces and multiplies: each tile of codes is read once.

Where XLA does not fuse decoding into a product, it writes a matrix of floats and reads it again,
two to sixteen times the bytes of the codes, once for each side of a query. `rank_one_product`
decodes a tile of codes in registers, once for either side of a rank-one direction, and multiplies
at once; `decoded_product` is the same without a direction. Values are those of
`matmul.dequantize`, under every boundary. The kernel is our own; that a rank-one population may
share its reads of the weights is the economy of EGGROLL (Sarkar et al., arXiv:2511.16652).

Pallas compiles the kernel for NVIDIA GPUs by way of Triton, and interprets it elsewhere, slowly,
with `interpret=True`. Import this module where it is used: JAX 0.11 deprecates Pallas' Triton
backend.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int8, Integer

from zoqo_jax.directions import Boundary, check_choice, displace
from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.grids.scales import multiplied_out

__all__ = ["Tiles", "decoded_product", "rank_one_product", "supports"]

_LEAST_TILE = 16  # of a Triton dot, along each of its three axes
_MOST_LEVELS = 16  # that are looked up by selections; Triton has no gather from registers
_MOST_BYTES = 2**31  # that Triton's 32-bit offsets reach
_ANY_TILE = 2**16  # longer than any tile
_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


class Tiles(NamedTuple):
    """Lengths of a tile: powers of two, at least 16 each.

    Attributes:
        tokens: rows of the other operand and of the result.
        rows: rows of the matrix.
        columns: columns of bytes of the matrix, each of `per_byte` codes.
    """

    tokens: int
    rows: int
    columns: int


def supports(array: QuantizedArray) -> bool:
    """Whether the kernels take an array: a matrix without tables to look up or stray blocks.

    Its grid is uniform or has at most 16 levels; where it has several blocks along an axis, their
    length is a power of two or a multiple of 16, and no block lies in two parts of the last axis.

    Examples:
        >>> import zoqo_jax as zq
        >>> supports(zq.Quantizer(4, block=16)(jnp.ones((2, 64))))
        True
        >>> supports(zq.Quantizer(4, block=5)(jnp.ones((2, 64))))
        False
    """
    return _obstacle(array) is None


def rank_one_product(
    x: Float[Array, "sides tokens contracted"],
    array: QuantizedArray,
    a: Int8[Array, " rows"],
    b: Int8[Array, " columns"],
    m: Integer[Array, "..."] | int,
    boundary: Boundary,
    *,
    transposed: bool = False,
    precision: Any = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "sides tokens free"]:
    """The products `x[s] @ value(boundary(codes +- m a b^T))` of the two sides of a query.

    Args:
        x: for one side or two, the first of them +, in `array.value_dtype`: (sides, tokens, rows).
        array: the matrix, (rows, columns), such that `supports(array)`.
        a: signs of the rows, -1 or 1.
        b: signs of the columns, -1 or 1, in the order of `array.codes`.
        m: reach in codes, one number, or one for each block in the shape of `array.scale`.
        boundary: what happens at the grid's edges: "clamp", "mask" or "reflect".
        transposed: multiply by the transposed matrix: `x` is (sides, tokens, columns), and the
            result (sides, tokens, rows).
        precision: of the products, as for `jax.lax.dot_general`; by default a GPU rounds float32
            factors to TF32, and `jax.lax.Precision.HIGHEST` does without its tensor cores.
        tiles: lengths of a tile, cut shorter where blocks demand it; by default some that keep the
            sums in registers, not tuned. Codes are read once for every `tiles.tokens` tokens.
        interpret: run on any device, slowly, to test.

    Returns:
        (sides, tokens, columns), summed in float32 and rounded once to the dtype of `x`.

    Raises:
        ValueError: an argument that does not fit, naming it and its value.

    Examples:
        >>> from zoqo_jax import Grid
        >>> grid = Grid((-2.0, -1.0, 0.0, 1.0), 0, 3)
        >>> array = QuantizedArray.from_codes(
        ...     jnp.array([[3, 0], [2, 1]]), jnp.ones((1, 1)), None, grid
        ... )
        >>> a, b = jnp.array([1, -1], jnp.int8), jnp.array([1, 1], jnp.int8)
        >>> x = jnp.ones((2, 1, 2))
        >>> rank_one_product(x, array, a, b, 1, "clamp", interpret=True).tolist()
        [[[0.0, -3.0]], [[1.0, -2.0]]]
    """
    check_choice("boundary", boundary, get_args(Boundary))
    _check(x, array, transposed, tiles)
    if x.ndim != 3 or x.shape[0] not in (1, 2):
        raise ValueError(f"x must have 3 axes, the first for 1 or 2 sides, got shape {x.shape}.")
    for name, signs, length in zip("ab", (a, b), array.shape, strict=True):
        if signs.shape != (length,):
            raise ValueError(f"{name} must have shape {(length,)}, got {signs.shape}.")
    m = jnp.asarray(m, jnp.int16)
    if m.size == 1:
        m = m.reshape(1, 1)
    elif m.shape != array.scale.shape:
        raise ValueError(f"m must be one number or have shape {array.scale.shape}, got {m.shape}.")
    direction = (a, b, m, boundary)
    return _product(x, array, direction, transposed, precision, tiles, interpret)


def decoded_product(
    x: Float[Array, "tokens contracted"],
    array: QuantizedArray,
    *,
    transposed: bool = False,
    precision: Any = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "tokens free"]:
    """The product `x @ array` without a matrix of floats; arguments as of `rank_one_product`.

    Raises:
        ValueError: an argument that does not fit, naming it and its value.

    Examples:
        >>> from zoqo_jax import Grid
        >>> grid = Grid((-2.0, -1.0, 0.0, 1.0), 0, 3)
        >>> codes = jnp.array([[3, 0], [2, 1]])
        >>> array = QuantizedArray.from_codes(codes, jnp.ones((1, 1)), None, grid)
        >>> decoded_product(jnp.ones((1, 2)), array, interpret=True).tolist()
        [[1.0, -3.0]]
    """
    _check(x, array, transposed, tiles)
    if x.ndim != 2:
        raise ValueError(f"x must have 2 axes, got shape {x.shape}.")
    return _product(x[None], array, None, transposed, precision, tiles, interpret)[0]


def _check(x: Array, array: QuantizedArray, transposed: bool, tiles: Tiles | None) -> None:
    obstacle = _obstacle(array)
    if obstacle is not None:
        raise ValueError(f"array must be one that the kernel supports, got {array}: {obstacle}.")
    if x.dtype != array.value_dtype:
        raise ValueError(f"x must have the array's dtype {array.value_dtype}, got {x.dtype}.")
    contracted = array.shape[1 if transposed else 0]
    if x.shape[-1:] != (contracted,):
        raise ValueError(f"x must have a last axis {contracted} long, got shape {x.shape}.")
    for name, tile in () if tiles is None else tiles._asdict().items():
        if tile < _LEAST_TILE or tile & (tile - 1):
            raise ValueError(f"tiles.{name} must be a power of two, 16 or more, got {tile}.")


def _obstacle(array: QuantizedArray) -> str | None:
    """Why the kernel does not take an array, or None."""
    if array.bits not in (2, 4, 8):
        return f"its codes of {array.bits} bits lie in several planes"
    if array.block_of is not None:
        return "neighbouring columns do not share scales"
    if array.ndim != 2 or array.size == 0:
        return "it is no matrix, or an empty one"
    if array.packed.size >= _MOST_BYTES:
        return "it has 2^31 bytes or more"
    if array.value_dtype not in _DTYPES:
        return f"its values are {array.value_dtype}"
    if not array.grid.is_uniform and len(array.grid.levels) > _MOST_LEVELS:
        return f"its {len(array.grid.levels)} levels are more than {_MOST_LEVELS}"
    for axis in range(2):
        length = _block_length(array, axis)
        if _largest_tile(length) < _LEAST_TILE:
            return f"no tile fits its blocks of {length}"
        if axis == 1 and array.packed.shape[1] % length:
            return (
                f"its blocks of {length} do not divide the {array.packed.shape[1]} bytes of a row"
            )
    return None


def _block_length(array: QuantizedArray, axis: int) -> int:
    """How many neighbours share a scale along an axis that has several."""
    if array.block is None or array.block[0] % 2 != axis or array.shape[axis] <= array.block[1]:
        return 1
    return array.block[1]


def _largest_tile(length: int) -> int:
    """The longest tile that holds whole blocks or lies in one; a power of two."""
    divisor = length & -length
    return _ANY_TILE if divisor == length else divisor


def _default_tiles(tokens: int, array: QuantizedArray) -> Tiles:
    """Tiles whose sums, two sides of 32 x 128 numbers, take a quarter of four warps' registers."""
    few = min(32, max(_LEAST_TILE, pl.next_power_of_2(tokens)))
    return Tiles(few, 32, 128 // array.per_byte)


@dataclasses.dataclass(frozen=True)
class _Axis:
    """An axis that is cut into tiles, one for each step of the grid or of the kernel's loop."""

    size: int
    tile: int
    grid: int | None = None  # which axis of the grid, None for the loop

    def cut(self, length: int = 1) -> _Cut:
        """The axis of an operand along this one, with an entry for every `length` neighbours."""
        entries = pl.cdiv(self.size, length)
        return _Cut(self, entries, max(self.tile // length, 1), max(length // self.tile, 1))

    def shared(self) -> _Cut:
        """The axis of an operand along this one, with one entry for all."""
        return _Cut(self, 1, 1, pl.cdiv(self.size, self.tile))


@dataclasses.dataclass(frozen=True)
class _Cut:
    """How an operand's axis is cut: `entries` in all, `extent` a tile, `sharing` tiles a cut."""

    axis: _Axis
    entries: int
    extent: int
    sharing: int

    @property
    def block(self) -> int:
        """What one step of the grid sees: a cut, or, where the kernel loops, all of them."""
        whole = pl.cdiv(self.entries, self.extent) * self.extent
        return whole if self.axis.grid is None else self.extent

    def index(self, step: Any) -> Any:
        """Which cut a step takes."""
        if self.entries <= self.extent:
            return 0
        return step if self.sharing == 1 else jax.lax.div(step, jnp.int32(self.sharing))

    def in_block(self, step: Any) -> Any:
        """Where a step's cut starts in its block."""
        return self.index(step) * self.extent if self.axis.grid is None else 0

    def inside(self, step: Any) -> Array | None:
        """Which entries of a step's cut lie inside the operand, or None for all."""
        if self.entries % self.extent == 0:
            return None
        return self.index(step) * self.extent + jnp.arange(self.extent) < self.entries


Cuts = tuple[_Cut | int, ...]  # an axis of an operand is cut, or whole and so long


def _spec(cuts: Cuts) -> pl.BlockSpec:
    def index(*steps: Any) -> tuple[Any, ...]:
        return tuple(
            cut.index(steps[cut.axis.grid])
            if isinstance(cut, _Cut) and cut.axis.grid is not None
            else 0
            for cut in cuts
        )

    return pl.BlockSpec(tuple(cut.block if isinstance(cut, _Cut) else cut for cut in cuts), index)


def _window(
    ref: Any, cuts: Cuts, whole: Sequence[int], steps: dict[_Axis, Any]
) -> tuple[Any, Array | None]:
    """A tile of an operand, at the given places of its whole axes, and what of it is inside."""
    remaining = iter(whole)
    starts = [
        cut.in_block(steps[cut.axis]) if isinstance(cut, _Cut) else next(remaining) for cut in cuts
    ]
    shape = [cut.extent if isinstance(cut, _Cut) else 1 for cut in cuts]
    mask = None
    for i, cut in enumerate(cuts):
        inside = cut.inside(steps[cut.axis]) if isinstance(cut, _Cut) else None
        if inside is None:
            continue
        others = tuple(j for j in range(len(cuts)) if j != i)
        inside = jnp.broadcast_to(jnp.expand_dims(inside, others), shape)
        mask = inside if mask is None else mask & inside
    return ref.at[tuple(map(pl.ds, starts, shape))], mask


def _load(ref: Any, cuts: Cuts, whole: Sequence[int], steps: dict[_Axis, Any]) -> Array:
    """A tile of an operand, zero outside it, without the operand's whole axes."""
    window, mask = _window(ref, cuts, whole, steps)
    other = None if mask is None else jnp.zeros((), ref.dtype)
    tile = plgpu.load(window, mask=mask, other=other)
    return tile.reshape([cut.extent for cut in cuts if isinstance(cut, _Cut)])


def _spread(per_block: Array, tile: tuple[int, int]) -> Array:
    """Repeat a tile's blocks so that they broadcast against its codes."""
    for axis in range(2):
        entries, length = per_block.shape[axis], tile[axis]
        if entries in (1, length):
            continue
        shape = list(per_block.shape)
        shape.insert(axis + 1, length // entries)
        longer = jnp.broadcast_to(jnp.expand_dims(per_block, axis + 1), shape)
        shape[axis : axis + 2] = [length]
        per_block = longer.reshape(shape)
    return per_block


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """What of a product is known when it is compiled, and one step of its grid.

    The grid's first axis runs over tiles of the free axis of the matrix, its second over tiles of
    tokens; the kernel loops over the contracted axis. A tile of bytes holds a tile of codes of
    each part of the last axis, so operands along it have an axis for the part before it.
    """

    array: QuantizedArray  # asked for what is static in it
    sides: int
    boundary: Boundary | None  # None for no direction
    transposed: bool
    precision: Any
    tokens: _Axis
    rows: _Axis
    columns: _Axis
    cuts: dict[str, Cuts]

    def run(self, *refs: Any) -> None:
        """Compute a tile of the result; an operand's reference for each of `cuts`."""
        operands = dict(zip(self.cuts, refs, strict=True))
        steps = {axis: pl.program_id(axis.grid) for axis in self._axes if axis.grid is not None}
        [looped] = [axis for axis in self._axes if axis.grid is None]
        parts = range(1 if self.transposed else self.array.per_byte)
        free = self.rows if self.transposed else self.columns
        zeros = jnp.zeros((self.tokens.tile, free.tile), jnp.float32)

        def add(step: Array, sums: list[list[Array]]) -> list[list[Array]]:
            @functools.cache
            def load(name: str, *whole: int) -> Array:
                return _load(operands[name], self.cuts[name], whole, {**steps, looped: step})

            sums = [list(of_side) for of_side in sums]
            codes = load("codes")
            for part in range(self.array.per_byte):
                values = self._values(codes, part, load)
                inner, outer = (part, 0) if self.transposed else (0, part)
                for side in range(self.sides):
                    product = jax.lax.dot_general(
                        load("x", side, inner),
                        values[side],
                        (((1,), (1 if self.transposed else 0,)), ((), ())),
                        precision=self.precision,
                        preferred_element_type=jnp.float32,
                    )
                    sums[side][outer] = sums[side][outer] + product
            return sums

        sums = [[zeros for _ in parts] for _ in range(self.sides)]
        sums = jax.lax.fori_loop(0, pl.cdiv(looped.size, looped.tile), add, sums)
        for side in range(self.sides):
            for part in parts:
                window, mask = _window(operands["out"], self.cuts["out"], (side, part), steps)
                out = sums[side][part].astype(operands["out"].dtype)
                plgpu.store(window, out[None, :, None, :], mask=mask)

    @property
    def _axes(self) -> tuple[_Axis, ...]:
        return self.tokens, self.rows, self.columns

    def _values(self, packed: Array, part: int, load: Any) -> list[Array]:
        """A tile's values on each side, exactly as `QuantizedArray.decode` has them."""
        array, tile = self.array, (self.rows.tile, self.columns.tile)
        width = 8 // array.per_byte
        codes = packed.astype(jnp.int16)
        if array.per_byte > 1:
            codes = (codes >> (part * width)) & (2**width - 1)

        def per_block(name: str) -> Array:
            parts = self.cuts[name][1]
            return _spread(load(name, 0 if parts == 1 else part), tile)

        def decode(codes: Array) -> Array:
            values = scale * array.grid.at(codes)
            return (values if offset is None else values + offset).astype(array.value_dtype)

        scale = per_block("scale").astype(jnp.float32)
        offset = None if array.offset is None else per_block("offset").astype(jnp.float32)
        if self.boundary is None:
            return [decode(codes)]
        signs = load("a").astype(jnp.int16)[:, None] * load("b", part).astype(jnp.int16)[None, :]
        u = per_block("m") * signs
        return [
            decode(displace(codes, sign * u, array.grid, self.boundary))
            for sign in (1, -1)[: self.sides]
        ]


def _product(
    x: Array,
    array: QuantizedArray,
    direction: tuple[Array, Array, Array, Boundary] | None,
    transposed: bool,
    precision: Any,
    tiles: Tiles | None,
    interpret: bool,
) -> Array:
    """Lay the operands out, and run the kernel on every tile of the result."""
    sides, tokens, _ = x.shape
    (rows, columns), parts = array.packed.shape, array.per_byte
    if tokens == 0:
        return jnp.zeros((sides, 0, array.shape[0 if transposed else 1]), x.dtype)
    tiles = _default_tiles(tokens, array) if tiles is None else tiles
    lengths = [_block_length(array, axis) for axis in range(2)]
    row_tile, column_tile = map(min, tiles[1:], map(_largest_tile, lengths))
    t = _Axis(tokens, tiles.tokens, 1)
    r = _Axis(rows, row_tile, 0 if transposed else None)
    c = _Axis(columns, column_tile, None if transposed else 0)

    def per_block(values: Array) -> tuple[Array, Cuts]:
        split = parts if values.shape[1] > 1 else 1
        along_rows, along_columns = (
            axis.cut(length) if entries > 1 else axis.shared()
            for axis, entries, length in zip((r, c), values.shape, lengths, strict=True)
        )
        return values.reshape(values.shape[0], split, -1), (along_rows, split, along_columns)

    of_rows, of_columns = (sides, t.cut(), 1, r.cut()), (sides, t.cut(), parts, c.cut())
    inner, outer = (of_columns, of_rows) if transposed else (of_rows, of_columns)
    operands: dict[str, tuple[Array, Cuts]] = {
        "x": (x.reshape(sides, tokens, parts if transposed else 1, -1), inner),
        "codes": (array.packed, (r.cut(), c.cut())),
        "scale": per_block(multiplied_out(array.scale)),
    }
    if array.offset is not None:
        operands["offset"] = per_block(multiplied_out(array.offset))
    if direction is not None:
        a, b, m, _ = direction
        operands |= {
            "a": (a, (r.cut(),)),
            "b": (b.reshape(parts, columns), (parts, c.cut())),
            "m": per_block(m),
        }
    cuts = {name: cuts for name, (_, cuts) in operands.items()} | {"out": outer}
    boundary = None if direction is None else direction[3]
    kernel = _Kernel(array, sides, boundary, transposed, precision, t, r, c, cuts)
    free = r if transposed else c
    out = pl.pallas_call(
        kernel.run,
        out_shape=jax.ShapeDtypeStruct(
            (sides, tokens, 1 if transposed else parts, free.size), x.dtype
        ),
        grid=(pl.cdiv(free.size, free.tile), pl.cdiv(tokens, t.tile)),
        in_specs=[_spec(cuts[name]) for name in operands],
        out_specs=_spec(outer),
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name="rank_one_product" if direction is not None else "decoded_product",
    )(*(operand for operand, _ in operands.values()))
    return out.reshape(sides, tokens, -1)
