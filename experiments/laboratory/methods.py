"""The methods that claims compare, all told their rates and radii in values.

Some count in codes, some in units of a scale. `units` says how long these are on average over a
model's matrices: a gradient step of rate eta in values is one of eta / step^2 in codes.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import zoqo_jax as zq
from experiments.laboratory.tasks import Params
from experiments.laboratory.training import Make, Schedule
from zoqo_jax.arrays import trained_leaves

__all__ = ["FLOATS", "METHODS", "RATES", "Units", "in_turn", "units"]

METHODS = (
    "zoqo floor", "zoqo dithered", "caq_zo", "off_grid", "quzo", "qes", "qzo", "mezo", "zo_signsgd",
)  # fmt: skip
FLOATS = ("mezo", "zo_signsgd")
"""Those that train floats."""

_BY_SIGN = ("zoqo floor", "zoqo dithered", "zo_signsgd")
_SIGN, _SLOPE = 2e-3, 4e-3  # middle rates of steps by signs and along slopes

RATES = {
    name: tuple((_SIGN if name in _BY_SIGN else _SLOPE) * 4.0**k for k in range(-2, 3))
    for name in METHODS
}
"""The rates that each may choose from; factors of four, as many for all."""


class Units(NamedTuple):
    """What a model's grids measure in, on average over its matrices.

    Attributes:
      step: the distance between two levels, values.
      size: the largest magnitude in a block, values.
      top: of a level at scale 1, by which a change of the scale changes a value at most.
    """

    step: jax.Array
    size: jax.Array
    top: float


def units(params: Params) -> Units:
    """The units of quantized parameters."""
    arrays = list(trained_leaves(params).values())
    scales = [jnp.abs(array.scale).mean() for array in arrays]
    of_arrays = list(zip(arrays, scales, strict=True))
    step = sum(array.grid.spacing * scale for array, scale in of_arrays) / len(arrays)
    size = sum(array.grid.largest * scale for array, scale in of_arrays) / len(arrays)
    return Units(step, size, max(array.grid.largest for array in arrays))


@functools.cache  # an equal function would be compiled again
def in_turn(names: tuple[str, ...], num_queries: int, radius: float) -> Make:
    """A method, or several that take turns.

    Args:
      names: of `METHODS`.
      num_queries: pairs a step.
      radius: of probes, in values, for those that have one. Off-grid queries reach at least one
        mean step, for shorter ones would round back.
    """

    def make(
        params: Params, key: jax.Array, rate: Schedule
    ) -> tuple[optax.GradientTransformationExtraArgs, ...]:
        keys = jax.random.split(key, len(names))
        common = {"num_queries": num_queries, "query_batch": None}
        return tuple(
            _MAKERS[name](params, rate, radius, key=key, **common)
            for name, key in zip(names, keys, strict=True)
        )

    return make


def _zoqo(step: Any) -> Callable[..., Any]:
    return lambda params, rate, radius, **common: zq.zoqo(rate, radius, step=step, **common)


def _caq_zo(params: Params, rate: Schedule, radius: float, **common: Any) -> Any:
    return zq.caq_zo(_per(rate, units(params).step ** 2), **common)


def _off_grid(params: Params, rate: Schedule, radius: float, **common: Any) -> Any:
    step, size, _ = units(params)
    reach = jnp.maximum(radius, step) / size
    rate = _per(rate, step**2)
    return zq.caq_zo(rate, query="off_grid", radius=lambda count: reach, **common)


def _rounded(method: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    def make(params: Params, rate: Schedule, radius: float, **common: Any) -> Any:
        step = units(params).step
        return method(_per(rate, step**2), lambda count: radius / step, **more, **common)

    return make


def _qzo(params: Params, rate: Schedule, radius: float, **common: Any) -> Any:
    top = units(params).top
    return zq.qzo(_per(rate, top**2), radius / top, clip=100.0 * top, **common)


def _floats(noise: Any, rule: Callable[..., Any]) -> Callable[..., Any]:
    def make(params: Params, rate: Schedule, radius: float, **common: Any) -> Any:
        return optax.chain(zq.spsa(radius, noise=noise, **common), rule(rate))

    return make


def _per(rate: Schedule, unit: Any) -> Schedule:
    return lambda count: rate(count) / unit


_MAKERS = {
    "zoqo floor": _zoqo("floor"),
    "zoqo dithered": _zoqo("dithered"),
    "caq_zo": _caq_zo,
    "off_grid": _off_grid,
    "quzo": _rounded(zq.quzo),
    "qes": _rounded(zq.qes, window=None),  # the residual kept: the same steps, sooner
    "qzo": _qzo,
    "mezo": _floats("gaussian", optax.sgd),
    "zo_signsgd": _floats("rademacher", optax.sign_sgd),
}
