"""The methods that networks are trained by, all told their rates and radii in one measure.

Rates are free of size and units: a step along a slope is rate / d long for each unit of slope, a
step by signs rate / sqrt(d), in values, where d counts the numbers that a method trains. Methods
that count in codes or in units of a scale are told what that is in theirs, by `units`. Where the
Hessian is known, rates are in units of it: `experiments.laboratory.convex.descents`.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import zoqo_jax as zq
from experiments.laboratory.networks.models import Params
from experiments.laboratory.networks.training import Make, Schedule
from zoqo_jax.grids.arrays import trained_leaves

__all__ = ["FLOATS", "METHODS", "RATES", "Units", "in_turn", "units"]

METHODS = (
    "zoqo floor", "zoqo dithered", "caq_zo", "off_grid", "quzo", "qes", "qzo", "mezo", "zo_signsgd",
)  # fmt: skip
FLOATS = ("mezo", "zo_signsgd")
"""Those that train floats."""

_BY_SIGN = ("zoqo floor", "zoqo dithered", "zo_signsgd")
RATES = {
    name: tuple((0.6 if name in _BY_SIGN else 100.0) * 4.0**k for k in range(-5, 2))
    for name in METHODS
}
"""The rates that each may choose from: factors of four, as many for all."""


class Units(NamedTuple):
    """What a model's grids measure in, on average over its matrices.

    Attributes:
      codes: of all matrices.
      scales: of all matrices.
      step: the distance between two levels, values.
      size: the largest magnitude in a block, values.
      top: of a level at scale 1, by which a change of the scale changes a value at most.
    """

    codes: int
    scales: int
    step: jax.Array
    size: jax.Array
    top: float


def units(params: Params) -> Units:
    """The units of quantized parameters."""
    arrays = list(trained_leaves(params).values())

    def mean(of_grid: Callable[[Any], float]) -> Any:
        return sum(of_grid(x.grid) * jnp.abs(x.scale).mean() for x in arrays) / len(arrays)

    return Units(
        codes=sum(x.size for x in arrays),
        scales=sum(x.scale.size for x in arrays),
        step=mean(lambda grid: grid.spacing),
        size=mean(lambda grid: grid.largest),
        top=max(x.grid.largest for x in arrays),
    )


@functools.cache  # an equal function would be compiled again
def in_turn(names: tuple[str, ...], num_queries: int, radius: float) -> Make:
    """A method, or several that take turns.

    Args:
      names: of `METHODS`.
      num_queries: pairs a step.
      radius: of probes, in values, for those that have one. Off-grid probes are at least one mean
        step long, or they would round back. Those of `zoqo` are as long as its steps; where that is
        less than a code, "zoqo dithered" probes a random share of the codes and moves them by one.
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


def _zoqo_floor(params: Params, rate: Schedule, radius: float, **common: Any) -> Any:
    del radius
    eta = _per(rate, units(params).codes ** 0.5)
    return zq.zoqo(eta, eta, step="floor", **common)


def _zoqo_dithered(params: Params, rate: Schedule, radius: float, **common: Any) -> Any:
    del radius
    unit = units(params)
    mu = _per(rate, unit.codes**0.5)
    # Below one code, mu decides which codes are probed; were eta below it, few of them would move.
    return zq.zoqo(lambda count: jnp.maximum(mu(count), unit.step), mu, step="dithered", **common)


def _caq_zo(params: Params, rate: Schedule, radius: float, **common: Any) -> Any:
    del radius
    return zq.caq_zo(_in_codes(rate, units(params)), **common)


def _off_grid(params: Params, rate: Schedule, radius: float, **common: Any) -> Any:
    unit = units(params)
    reach = jnp.maximum(radius, unit.step) / unit.size
    eta = _in_codes(rate, unit)
    return zq.caq_zo(eta, query="off_grid", radius=lambda count: reach, **common)


def _rounded(method: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    def make(params: Params, rate: Schedule, radius: float, **common: Any) -> Any:
        unit = units(params)
        return method(_in_codes(rate, unit), lambda count: radius / unit.step, **more, **common)

    return make


def _qzo(params: Params, rate: Schedule, radius: float, **common: Any) -> Any:
    unit = units(params)
    eta = _per(rate, unit.scales * unit.top**2)
    return zq.qzo(eta, radius / unit.top, clip=100.0 * unit.top, **common)


def _floats(noise: Any, rule: Callable[..., Any], power: float) -> Callable[..., Any]:
    def make(params: Params, rate: Schedule, radius: float, **common: Any) -> Any:
        eta = _per(rate, sum(x.size for x in params) ** power)
        return optax.chain(zq.spsa(radius, noise=noise, **common), rule(eta))

    return make


def _in_codes(rate: Schedule, unit: Units) -> Schedule:
    """A rate along slopes in codes: both a code's slope and a code are a step's worth of values."""
    return _per(rate, unit.codes * unit.step**2)


def _per(rate: Schedule, unit: Any) -> Schedule:
    return lambda count: rate(count) / unit


_MAKERS = {
    "zoqo floor": _zoqo_floor,
    "zoqo dithered": _zoqo_dithered,
    "caq_zo": _caq_zo,
    "off_grid": _off_grid,
    "quzo": _rounded(zq.quzo),
    "qes": _rounded(zq.qes, window=None),  # the residual kept, not made anew in every step
    "qzo": _qzo,
    "mezo": _floats("gaussian", optax.sgd, 1.0),
    "zo_signsgd": _floats("rademacher", optax.sign_sgd, 0.5),
}
