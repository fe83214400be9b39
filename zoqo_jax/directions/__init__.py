"""Integer directions for quantized arrays: one structure a file, `base` the protocol of all.

`structure=` of a method is a name of `STRUCTURES`, a `Direction` of one's own, or either with
options, by `with_options`. To add a structure, write its file and a line in `STRUCTURES`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Int16, Key

from zoqo_jax.directions.base import FLOOR_TOLERANCE
from zoqo_jax.directions.base import Boundary as Boundary
from zoqo_jax.directions.base import Contribution as Contribution
from zoqo_jax.directions.base import Direction as Direction
from zoqo_jax.directions.base import Distribution as Distribution
from zoqo_jax.directions.base import Unit as Unit
from zoqo_jax.directions.base import displace as displace
from zoqo_jax.directions.base import radius_in_codes as radius_in_codes
from zoqo_jax.directions.columns import Columns as Columns
from zoqo_jax.directions.columns import Guide as Guide
from zoqo_jax.directions.dense import Dense as Dense
from zoqo_jax.directions.paired import Paired as Paired
from zoqo_jax.directions.per_example import PerExample as PerExample
from zoqo_jax.directions.rank_one import RankOne as RankOne
from zoqo_jax.directions.sparse import Sparse as Sparse
from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.xla import random_bits

__all__ = [
    "STRUCTURES",
    "Columns",
    "Dense",
    "Direction",
    "Guide",
    "Paired",
    "PerExample",
    "RankOne",
    "Sparse",
    "Structure",
    "check",
    "check_choice",
    "describe",
    "displace",
    "dithered_steps",
    "radius_in_codes",
    "with_options",
]

STRUCTURES = {
    "dense": Dense,
    "rank_one": RankOne,
    "sparse": Sparse,
    "paired": Paired,
    "columns": Columns,
    "per_example": PerExample,
}
"""How the entries of a direction hang together, by name."""

Structure = str | type[Direction] | functools.partial
"""A name of `STRUCTURES`, a class, or what `with_options` makes of either."""


def with_options(structure: Structure, **options: Any) -> functools.partial:
    """A structure with arguments of its own.

    Examples:
        >>> few = with_options("sparse", density=0.25)
        >>> few.func.__name__, few.keywords
        ('Sparse', {'density': 0.25})
    """
    cls, earlier = resolve(structure)
    return functools.partial(cls, **{**earlier, **options})


def resolve(structure: Structure) -> tuple[type[Direction], dict[str, Any]]:
    """The class of a structure, and its options.

    Raises:
        ValueError: it is none.
    """
    if isinstance(structure, functools.partial):
        return structure.func, dict(structure.keywords)  # type: ignore[return-value]
    if isinstance(structure, type) and issubclass(structure, Direction):
        return structure, {}
    check_choice("structure", structure, tuple(STRUCTURES))
    return STRUCTURES[structure], {}


def describe(
    key: Key[Array, ""],
    array: QuantizedArray,
    radius: Float[Array, ""] | float,
    *,
    structure: Structure = "dense",
    density: Any = None,
    densest: float | None = None,
    **choices: Any,
) -> Direction:
    """Describe a direction for `array`; the arguments are those of `Direction.describe`.

    Args:
        key: a key of this array, this step and this query alone.
        array: the array to be probed.
        radius: mu.
        structure: how the entries hang together.
        density: for a structure that takes one, as for `Sparse.describe`.
        densest: likewise.
        choices: as for `Direction.describe`.

    Examples:
        >>> from zoqo_jax import Quantizer
        >>> array = Quantizer(range=1.0)(jnp.zeros((2, 3)))
        >>> describe(jax.random.key(0), array, 2.0).draw(array).shape
        (2, 3)
    """
    cls, options = resolve(structure)
    if cls.takes_density and density is not None:
        options = {"density": density, "densest": densest, **options}
    return cls.describe(key, array, radius, **options, **choices)


def check(distribution: str, structure: Structure, boundary: str, density: Any) -> None:
    """Refuse choices that no direction can have.

    Raises:
        ValueError: an unknown name, a density outside (0, 1], or one for a structure that has none.

    Examples:
        >>> check("uniform", "dense", "clamp", 0.5)
        Traceback (most recent call last):
        ValueError: density=0.5 needs structure='sparse', got structure='dense'.
    """
    check_choice("noise", distribution, get_args(Distribution))
    cls, _ = resolve(structure)
    check_choice("boundary", boundary, get_args(Boundary))
    cls.check(distribution)
    if isinstance(density, Array | Tracer):
        return
    if callable(density):
        density = _densest(density)
    if not 0.0 < density <= 1.0:
        raise ValueError(f"density must be in (0, 1], got {density}.")
    if density != 1.0 and not cls.takes_density:
        raise ValueError(
            f"density={density} needs structure='sparse', got structure={structure!r}."
        )


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a name that is not among the choices.

    Examples:
        >>> check_choice("vote", "most", ("mean", "majority"))
        Traceback (most recent call last):
        ValueError: vote must be one of ('mean', 'majority'), got 'most'.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")


def scheduled(density: Any, count: Array) -> dict[str, Any]:
    """What `describe` is to know of a density, or of a schedule of densities, at a step."""
    if not callable(density):
        return {"density": density}
    return {"density": jnp.asarray(density(count), jnp.float32), "densest": _densest(density)}


def _densest(schedule: Callable[[Any], Any]) -> float:
    """A schedule's first density, which none may exceed."""
    with jax.ensure_compile_time_eval():
        return float(schedule(0))


def dithered_steps(
    rows: random_bits.Rows, width: Float[Array, "..."], array: QuantizedArray
) -> Int16[Array, "..."]:
    """floor(width + U), U uniform in [0, 1) for each coordinate: `width` codes on average.

    Args:
        rows: where the bits come from.
        width: in codes, in the shape of `array.scale`.
        array: whose coordinates, a code to a byte.

    Examples:
        >>> from zoqo_jax import Quantizer
        >>> array = Quantizer()(jnp.ones((1, 10_000)))
        >>> rows = random_bits.rows(jax.random.key(0), (1,))
        >>> moves = dithered_steps(rows, jnp.float32(1.25), array)
        >>> sorted(set(moves.ravel().tolist())), round(moves.mean().item(), 2)
        ([1, 2], 1.25)
    """
    shape = array.shape
    whole = jnp.clip(jnp.floor(width * (1.0 + FLOOR_TOLERANCE)), 0.0, float(array.grid.high))
    rest = array.broadcast_scales(jnp.clip(width - whole, 0.0, 1.0))
    up = random_bits.bernoulli(rows, rest, shape[-1] if shape else 1, 0).reshape(shape)
    return array.broadcast_scales(whole.astype(jnp.int16)) + up.astype(jnp.int16)
