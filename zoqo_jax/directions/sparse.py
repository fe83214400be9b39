"""Sparse directions: independent entries on a random support.

A known density draws a few words for each entry of the support, and none for the others: a row is
cut into cells of neighbours, of which at most one is in the support.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int16

from zoqo_jax.directions import entries
from zoqo_jax.directions.base import Direction, one_number
from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.xla import compiler, random_bits

__all__ = ["Sparse"]

_LONGEST_CELL = 2**16
_LONG_CELL = 8  # from here on random words, a few for each cell, are kept in memory
_CELLS_FILLED = 0.75  # about this share of cells is in a support


class Sparse(Direction):
    """A direction of independent entries, most of them zero.

    Attributes:
        share: chance of an entry, or of a cell's one entry, to be in the support, one number or
            copies of it for a scan, or None for 1.
        digits: binary digits that represent the share, at most 24.
        cell: neighbours in a row of whom at most one is in the support; 1 for no limit.

    Examples:
        >>> import jax
        >>> from zoqo_jax import Quantizer
        >>> array = Quantizer()(jnp.ones((10, 1000)))
        >>> direction = Sparse.describe(jax.random.key(0), array, 3.0, density=1 / 4)
        >>> direction.cell, round((direction.draw(array) != 0).mean().item(), 2)  # 1/4 x 6/7
        (3, 0.21)
    """

    numbers = ("radius", "off_grid", "share")
    takes_density = True

    share: Float[Array, ""] | Float[Array, " layers"] | None = None
    digits: int = eqx.field(static=True, default=random_bits.RESOLUTION)
    cell: int = eqx.field(static=True, default=1)

    @classmethod
    def describe(
        cls,
        *args: Any,
        density: Float[Array, ""] | float = 1.0,
        densest: float | None = None,
        dithered: bool = False,
        **choices: Any,
    ) -> Direction:
        """Describe a direction, as `Direction.describe` does.

        Args:
            args: as there.
            density: expected fraction of the support, in (0, 1]. A number costs draws by its size;
                a traced array draws for every entry, or by the size of `densest`.
            densest: what a traced density never exceeds.
            dithered: as there.
            choices: as there.
        """
        cell, share = _cells(density, densest)
        digits = random_bits.RESOLUTION if share is None or dithered else _digits(share)
        share = None if share is None else jnp.asarray(share, jnp.float32)
        own = {"share": share, "cell": cell, "digits": digits}
        return super().describe(*args, dithered=dithered, **own, **choices)

    def probability(self, array: QuantizedArray) -> Float[Array, "..."] | None:
        """Chance of an entry, or of a cell's one entry, to be in the support; None for 1."""
        wide_enough = super().probability(array)
        if self.share is None:
            return wide_enough
        share = one_number(self.share, array.ndim)
        return share if wide_enough is None else wide_enough * share

    def _support(self, chance: Array, columns: int) -> Bool[Array, "*rows columns"]:
        kept = self.cell >= _LONG_CELL
        return random_bits.bernoulli(self.rows, chance, columns, entries.SUPPORT, self.digits, kept)

    def entries(self, array: QuantizedArray) -> Int16[Array, "*rows columns"]:
        """The entries for the + side, before the boundary, of an array with a code to a byte.

        At most one in a cell of neighbours is drawn; past the end of a row it is lost.
        """
        if self.cell == 1:
            return super().entries(array)
        cell = self.cell
        columns = array.shape[-1] if array.ndim else 1
        cells, kept = -(-columns // cell), cell >= _LONG_CELL
        if kept:
            self = dataclasses.replace(self, rows=self._drawn(array, cells))
        rows = self.rows

        def entry_and_place() -> Array:
            place = random_bits.below(rows, cell, cells, entries.PLACE, kept)
            first = cell * jnp.arange(cells, dtype=jnp.int32)
            first = first.reshape((1,) * (place.ndim - 1) + (cells,))
            column = jnp.minimum(place + first, columns - 1)

            def at_places(per_code: Array) -> Array:
                if per_code.ndim == 0 or per_code.shape[-1] == 1:
                    return per_code
                whole = jnp.broadcast_to(per_code, (*column.shape[:-1], columns))
                return jnp.take_along_axis(whole, column, axis=-1)

            u = self._independent(array, cells, at_places, kept)
            return u.astype(jnp.int32) * 2 * _LONGEST_CELL + place

        drawn = compiler.materialized(entry_and_place, rows.key0)[..., None]
        places = jnp.arange(cell, dtype=jnp.int32).reshape((1,) * (drawn.ndim - 1) + (cell,))
        is_place = (drawn & (2 * _LONGEST_CELL - 1)) == places
        u = jnp.where(is_place, drawn >> (2 * _LONGEST_CELL).bit_length() - 1, 0)
        u = u.astype(jnp.int16).reshape(*rows.index.shape, cells * cell)
        return u[..., :columns]

    def _drawn(self, array: QuantizedArray, cells: int) -> random_bits.Drawn:
        """The rows with all words that the entries of so many cells are made of."""
        asked = {
            entries.PLACE: (1, cells),
            **entries.asked(self.distribution, self.rounding, cells),
        }
        chance = self.probability(array)
        if chance is not None:
            shape = array.broadcast_scales(chance).shape
            asked[entries.SUPPORT] = random_bits.of_bernoulli(shape, cells, self.digits)
        return random_bits.ahead(self.rows, asked)


def _cells(
    density: Array | float, densest: float | None = None
) -> tuple[int, Array | float | None]:
    """The length of a cell, and the share of cells in the support or None for all of them.

    Were every cell in the support of every direction, parities between cells would never change.
    """
    if densest is not None:
        cell, _ = _cells(densest)
        return cell, jnp.clip(density * cell, 0.0, 1.0)
    if isinstance(density, Array | Tracer):
        return 1, density
    cell = min(max(int(_CELLS_FILLED / density), 1), _LONGEST_CELL)
    share = density * cell
    return cell, None if share == 1.0 else share


def _digits(density: Array | float) -> int:
    """The fewest binary digits that hold a known density exactly, or all of them."""
    if isinstance(density, Array | Tracer):
        return random_bits.RESOLUTION
    exact = (k for k in range(1, random_bits.RESOLUTION) if float(density * 2.0**k).is_integer())
    return next(exact, random_bits.RESOLUTION)
