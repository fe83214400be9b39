"""What every attack method is made of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

__all__ = ["Method"]


class Method(NamedTuple):
    """A method, on a single image; all its parts can be jitted and vmapped.

    Perturbations are float32 in the image's shape, in pixel values. What the model is shown is the
    image plus a perturbation, cut off at 0 and 1.

    Attributes:
      init: (key, image) -> state.
      ask: state -> perturbations (asks, height, width, channels) to evaluate.
      tell: (state, answers about them (asks,)) -> state. Answers are losses, float32, of which less
        is nearer to success, or, where `sees_labels`, whether each was misread, bool.
      asks: evaluations of the model that one step spends.
      is_over: state -> whether all that would follow was asked before, bool ().
      sees_labels: whether the method sees labels only.
    """

    init: Callable[[jax.Array, jax.Array], Any]
    ask: Callable[[Any], jax.Array]
    tell: Callable[[Any, jax.Array], Any]
    asks: int
    is_over: Callable[[Any], jax.Array] = lambda state: jnp.bool(False)
    sees_labels: bool = False
