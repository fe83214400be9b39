"""Dense directions: every entry is drawn independently."""

from __future__ import annotations

from zoqo_jax.directions.base import Direction

__all__ = ["Dense"]


class Dense(Direction):
    """A direction of independent entries; what `Direction` does, and nothing else."""
