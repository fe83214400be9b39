"""The methods that descents compare, at step sizes that mean the same on every grid.

A method is made of a *rate*, a schedule near 1: the part of 1 / (share of coordinates moved x trace
of the Hessian) that gradient descent would have for its learning rate. Methods of signs know no
gradient's length; for them it is the part of a tenth of the range that a coordinate moves.
"""

from collections.abc import Callable

import optax
from jaxtyping import Array, PRNGKeyArray

import zoqo_jax as zq

__all__ = ["FLOATS", "METHODS", "make"]

Rate = Callable[[Array], Array]
Maker = Callable[..., optax.GradientTransformationExtraArgs]

_SIGNS: dict[str, Maker] = {
    "ZOQO": zq.zoqo,
    "ZOQO, dithered": lambda *args, **options: zq.zoqo(*args, step="dithered", **options),
}
_NO_FEEDBACK = 1e-9  # of the residual, nothing is left that would round to a step
_SLOPES: dict[str, Maker] = {
    "CAQ-ZO, stochastic": lambda rate, **options: zq.caq_zo(rate, boundary="clamp", **options),
    "CAQ-ZO, error feedback": lambda rate, **options: zq.caq_zo(
        rate, boundary="clamp", rounding="error_feedback", **options
    ),
    "CAQ-ZO, nearest": lambda rate, **options: zq.caq_zo(
        rate, boundary="clamp", rounding="nearest", **options
    ),
    "QuZO": zq.quzo,
    "QES": lambda rate, **options: zq.qes(rate, window=None, **options),
    "QES, no feedback": lambda rate, **options: zq.qes(
        rate, window=None, decay=_NO_FEEDBACK, **options
    ),
}
METHODS = (*_SIGNS, *_SLOPES)
FLOATS = "ZO-SGD, floats"


def make(
    method: str,
    rate: Rate,
    *,
    key: PRNGKeyArray,
    spacing: float,
    trace: Array | float,
    range: float = 1.0,
    density: float = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """A method that probes one code away, or in floats by so much.

    Args:
      method: one of `METHODS`, or `FLOATS`.
      rate: steps taken -> rate.
      key: of the run.
      spacing: of the uniform grid, value units.
      trace: of the Hessian.
      range: how far the grid reaches on either side.
      density: share of the coordinates in a direction; below 1 it is sparse. Floats have all.

    Example:
      >>> import jax
      >>> tx = make("QuZO", lambda t: 1.0, key=jax.random.key(0), spacing=0.1, trace=2.0)
    """
    if method == FLOATS:
        learning_rate = lambda count: rate(count) / trace  # noqa: E731
        probe = zq.spsa(spacing, key=key, noise="gaussian")
        return optax.chain(probe, optax.scale_by_schedule(lambda count: -learning_rate(count)))
    options = {"key": key}
    if density < 1:
        options |= {"structure": "sparse", "density": density}
    if method in _SIGNS:
        return _SIGNS[method](lambda count: 0.1 * range * rate(count), spacing, **options)
    unit = 1 / (density * trace * spacing**2)  # codes for a unit of d loss / d code
    return _SLOPES[method](lambda count: unit * rate(count), **options)
