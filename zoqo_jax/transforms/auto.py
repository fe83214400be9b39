"""What "auto" makes of a method's arguments: steps that size themselves, or numbers."""

from __future__ import annotations

from jaxtyping import Array

from zoqo_jax import directions
from zoqo_jax.directions import Structure
from zoqo_jax.transforms.schedules import Schedule, check_positive, is_traced
from zoqo_jax.transforms.sizing import Sizing, Weights

__all__ = ["Auto", "choose", "of_floats"]

Auto = str
"""The word "auto"; others are refused by name."""


def of_floats(*, radius: Schedule | Auto, **others: Schedule | Auto) -> Sizing | None:
    """How steps of floats size themselves, or None where the user says how far to look.

    Args:
        radius: as given.
        others: what was given for other lengths, by name; they are checked likewise.

    Raises:
        ValueError: a length that is not positive, or a word that is not "auto".
    """
    for name, value in {**others, "radius": radius}.items():
        if isinstance(value, str):
            directions.check_choice(name, value, ("auto",))
        else:
            check_positive(name, value)
    return Sizing("real", "dense", of_floats=True) if isinstance(radius, str) else None


def choose(
    weights: Weights,
    learning_rate: Schedule | Auto,
    radius: Schedule | Auto,
    density: Schedule | Array | Auto,
    structure: Structure | Auto,
    *,
    usual_radius: Schedule | None = None,
) -> tuple[Sizing | None, Schedule, Schedule, Schedule | Array, Structure]:
    """What a method is to do about arguments that may be "auto".

    Args:
        weights: what slopes become where steps size themselves.
        learning_rate: "auto" for steps that size themselves.
        radius: as given; a number is kept.
        density: likewise.
        structure: likewise; "auto" is sparse where the density is free, else dense.
        usual_radius: without one, steps of a given length look as far as they go.

    Returns:
        How steps size themselves, or None; and the four arguments, numbers where they are "auto"
        and nobody asks.

    Raises:
        ValueError: a number that is not positive, or a word that is not "auto".
    """
    given = {"learning_rate": learning_rate, "radius": radius, "density": density}
    for name, value in given.items():
        if isinstance(value, str) and value != "auto":
            raise ValueError(f"{name} must be a number, a schedule or 'auto', got {value!r}.")
        if name != "density" and not isinstance(value, str):
            check_positive(name, value)
    sizes_itself, looks, is_free = (isinstance(value, str) for value in given.values())
    if isinstance(structure, str) and structure == "auto":
        structure = "sparse" if sizes_itself and looks and is_free else "dense"
    number = 1.0 if is_free else density
    if not sizes_itself:
        usual = learning_rate if usual_radius is None else usual_radius
        return None, learning_rate, usual if looks else radius, number, structure
    if callable(density) or is_traced(density):
        raise ValueError("density must be a number or 'auto' where learning_rate is 'auto'.")
    sizing = Sizing(weights, structure, density, is_given=not looks)
    return sizing, 1.0, 1.0 if looks else radius, number, structure
