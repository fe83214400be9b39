"""`diagnose`: what a radius in weight space becomes on a model's grids.

A method that probes x + u and x - u with |u| a fixed radius, and leaves it to the engine to round,
meets cells of every width: in wide ones both ends round back and the query compares a loss with
itself, in narrow ones an end jumps over codes (Shu & Zhu, "CAQ-ZO", 2026, arXiv:2605.10673).
`zoqo` and `caq_zo` probe by whole codes and have neither trouble; this table tells what it saves.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, PyTree

from zoqo_jax import directions
from zoqo_jax.grids.arrays import Grid, QuantizedArray, trained_leaves
from zoqo_jax.implicit.arrays import sum_over_rows
from zoqo_jax.transforms.auto import Auto
from zoqo_jax.transforms.sizing import Sizing

__all__ = ["Diagnosis", "LeafDiagnosis", "Spans", "diagnose"]

Unit = Literal["values", "half_range"]


class Spans(NamedTuple):
    """Numbers of codes, by where the ends of their probes round to, nearest level; they add up.

    An end midway between two levels is rounded to the one nearer to where it came from.

    Attributes:
        collapsed: both ends round back to the code.
        one_sided: one end moves by a code, the other rounds back, as beyond the grid's edges.
        clean: each end moves by exactly one code.
        wide: an end moves by more than one.
    """

    collapsed: int
    one_sided: int
    clean: int
    wide: int

    @property
    def shares(self) -> tuple[float, ...]:
        """The numbers as fractions of their sum."""
        return tuple(count / max(sum(self), 1) for count in self)


class LeafDiagnosis(NamedTuple):
    """What a radius does to one leaf.

    Attributes:
        label: path of the leaf.
        shape: its shape.
        codes: of every legal code of every block, once each: what the grids are like.
        weights: of the codes that the weights are at.
        at_edge: weights at the least or greatest legal code; there a step of one code is clipped
            on one side, and boundary="mask" leaves it out.
    """

    label: str
    shape: tuple[int, ...]
    codes: Spans
    weights: Spans
    at_edge: int


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What a radius does to each trained leaf; print it for a table.

    Attributes:
        leaves: in the order of the tree.
        radius: as given.
        unit: of the radius.

    Examples:
        >>> import zoqo_jax as zq
        >>> w = zq.nf4(block=16)(jnp.linspace(-1.0, 1.0, 64).reshape(4, 16))
        >>> found = diagnose({"w": w}, 0.05, unit="half_range")
        >>> found.leaves[0].codes.shares[0]  # of NF4's 16 codes 8 collapse
        0.5
    """

    leaves: tuple[LeafDiagnosis, ...]
    radius: float | Auto
    unit: Unit

    def __str__(self) -> str:
        header = ("leaf", "shape", "of", "collapsed", "one-sided", "clean", "wide", "at edge")
        lines = []
        for leaf in self.leaves:
            edge = leaf.at_edge / max(sum(leaf.weights), 1)
            shape = "x".join(map(str, leaf.shape))
            lines.append((leaf.label, shape, "codes", *map(_percent, leaf.codes.shares), ""))
            lines.append(("", "", "weights", *map(_percent, (*leaf.weights.shares, edge))))
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        rows = []
        for line in (header, *lines):
            words = [cell.ljust(width) for cell, width in zip(line[:3], widths[:3], strict=True)]
            figures = [cell.rjust(width) for cell, width in zip(line[3:], widths[3:], strict=True)]
            rows.append("  ".join(words + figures).rstrip())
        return "\n".join(rows)


def diagnose(
    params: PyTree, radius: float | Auto, *, unit: Unit = "values", size: float | None = None
) -> Diagnosis:
    """Count the codes that a radius in weight space collapses, moves by one, or takes too far.

    Args:
        params: tree with quantized leaves; frozen ones are left out.
        radius: of the probes, positive; or "auto" for those of a run that sizes its own steps.
            They are whole codes in a few places, drawn at random, so the counts are expectations:
            the rest, which no end of a probe moves, has "collapsed".
        unit: of the radius: "values", or "half_range" for fractions of half the distance between a
            block's least and greatest level, which is the block's absmax where levels run from -1
            to 1.
        size: of the step, with "auto": `state.info.size`, or None for that of the first step.

    Raises:
        ValueError: a radius or size that is not positive, a size where the radius is a number, an
            unknown unit, or no quantized leaf that is not frozen.

    Examples:
        >>> import zoqo_jax as zq
        >>> params = {"w": zq.nf4(block=16)(jnp.linspace(-1.0, 1.0, 64).reshape(4, 16))}
        >>> print(zq.diagnose(params, 0.1, unit="half_range"))
        leaf   shape  of       collapsed  one-sided   clean   wide  at edge
        ['w']  4x16   codes       12.5 %     12.5 %  75.0 %  0.0 %
                      weights     25.0 %     34.4 %  40.6 %  0.0 %   25.0 %

        Without a number, 4 of 64 weights are probed, each by one code:

        >>> zq.diagnose(params, "auto").leaves[0].weights
        Spans(collapsed=60, one_sided=1, clean=3, wide=0)
    """
    if isinstance(radius, str):
        directions.check_choice("radius", radius, ("auto",))
        return _of_sized(params, unit, size)
    if size is not None:
        raise ValueError(f"size={size} needs radius='auto', got radius={radius}.")
    if not 0.0 < radius < math.inf:
        raise ValueError(f"radius must be positive and finite, got {radius}.")
    directions.check_choice("unit", unit, get_args(Unit))
    leaves = trained_leaves(params).items()
    found = tuple(_diagnose(label, array, jnp.float32(radius), unit) for label, array in leaves)
    return Diagnosis(found, radius, unit)


def _of_sized(params: PyTree, unit: Unit, size: float | None) -> Diagnosis:
    """What the probes of a step that sizes itself do; see `Sizing.describe`."""
    leaves = trained_leaves(params)
    sizing, arrays = Sizing("signs", "sparse"), list(leaves.values())
    if size is not None and not 0.0 < size < math.inf:
        raise ValueError(f"size must be positive and finite, got {size}.")
    own = sizing.first(arrays, 1).size if size is None else jnp.float32(size)
    probed = sizing.probed(own, arrays)
    found = []
    for label, array in leaves.items():
        lengths = sizing.describe(probed, array)
        density, is_wide = float(lengths["density"]), float(lengths["radius"]) > 1
        at_edge = int(_count(array, jnp.float32(1.0), "values")[-1])
        blocks, legal = array.scale.size, array.grid.high - array.grid.low + 1
        counts = (blocks * legal, 2 * blocks), (array.size, at_edge)
        codes, weights = (_expected(*pair, density, is_wide) for pair in counts)
        found.append(LeafDiagnosis(label, array.shape, codes, weights, at_edge))
    return Diagnosis(tuple(found), "auto", unit)


def _expected(total: int, at_edge: int, density: float, is_wide: bool) -> Spans:
    """What becomes of codes of which a share is probed, by one code or by more."""
    moved = round(density * total)
    one_sided = 0 if is_wide else round(density * at_edge)
    rest = moved - one_sided
    return Spans(total - moved, one_sided, 0 if is_wide else rest, rest if is_wide else 0)


def _diagnose(
    label: str, array: QuantizedArray, radius: Float32[Array, ""], unit: Unit
) -> LeafDiagnosis:
    first, both, wide = _bounds(array.grid)
    widths = np.sort(np.asarray(_widths(array, radius, unit)), axis=None)

    def within(bounds: np.ndarray) -> int:
        return int(np.searchsorted(widths, bounds, side="right").sum())

    clean = within(wide) - within(np.minimum(both, wide))
    codes = _spans(widths.size * first.size, within(first), clean, within(wide))
    *weights, at_edge = map(int, _count(array, radius, unit))
    return LeafDiagnosis(label, array.shape, codes, _spans(array.size, *weights), at_edge)


def _spans(total: int, collapsed: int, clean: int, not_wide: int) -> Spans:
    return Spans(collapsed, not_wide - collapsed - clean, clean, total - not_wide)


def _bounds(grid: Grid) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Up to which width, in units of the levels, which ends of a legal code's probe stay.

    Returns:
        For each code the greatest width at which both ends round back, at which one does, and at
        which none moves by more than one code.
    """
    levels = np.asarray(grid.levels[grid.low : grid.high + 1], np.float64)
    beyond = np.full(2, np.inf)
    borders = np.concatenate([-beyond, (levels[1:] + levels[:-1]) / 2, beyond])
    up, twice_up = borders[2:-1] - levels, borders[3:] - levels
    down, twice_down = levels - borders[1:-2], levels - borders[:-3]
    bounds = (np.minimum(up, down), np.maximum(up, down), np.minimum(twice_up, twice_down))
    first, both, wide = (bound.astype(np.float32) for bound in bounds)
    return first, both, wide


def _widths(array: QuantizedArray, radius: Float32[Array, ""], unit: Unit) -> Float32[Array, "..."]:
    """The radius in units of the levels, in the shape of the scale; 0 where all values are one."""
    scale = jnp.abs(array.scale.astype(jnp.float32))
    levels, low, high = array.grid.levels, array.grid.low, array.grid.high
    if unit == "half_range":
        return jnp.where(scale > 0, radius * ((levels[high] - levels[low]) / 2), 0.0)
    return jnp.where(scale > 0, radius / jnp.where(scale > 0, scale, 1.0), 0.0)


@jax.jit(static_argnames="unit")
def _count(array: QuantizedArray, radius: Float32[Array, ""], unit: Unit) -> Int32[Array, "4"]:
    """How many weights collapse, are clean, are not wide, and lie at an edge."""
    bounds = _bounds(array.grid)
    top = array.grid.high - array.grid.low

    def count(piece: QuantizedArray, chosen: Array) -> Array:
        counts = jnp.zeros(4, jnp.int32)
        for part in piece.parts:
            code = part.packed.astype(jnp.int32) - array.grid.low
            width = part.broadcast_scales(_widths(part, radius, unit))
            first, both, wide = (
                jnp.asarray(bound).at[code].get(mode="promise_in_bounds") for bound in bounds
            )
            clean, at_edge = (width > both) & (width <= wide), (code == 0) | (code == top)
            those = (width <= first, clean, width <= wide, at_edge)
            sums = [(which & chosen).sum(dtype=jnp.int32) for which in those]
            counts = counts + jnp.stack(sums)
        return counts

    return sum_over_rows(count, array)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
