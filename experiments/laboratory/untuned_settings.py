"""Settings that `untuned` compares with: what a search tries, and the transformations of each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

import zoqo_jax as zq
from experiments.laboratory.networks import methods
from experiments.laboratory.untuned_problems import FLOATS

__all__ = ["MAKERS", "UNTUNED", "Setting", "searched"]

UNTUNED = ("zoqo", "caq_zo", "spsa")
"""Methods that size their own steps, the last one in floats."""

_TINY = 1e-9  # in values: one code
_OCTAVES = 6.0  # by how many a falling setting falls in a run
_SPARSE = 1 / 16  # density of CAQ-ZO's sparse directions


class Setting(NamedTuple):
    """What a search tries.

    Attributes:
      method: of `MAKERS`.
      value: a density, radius in codes or rate, at first.
      octaves: by how many it falls during the run.
      radius: of queries in floats.
    """

    method: str
    value: float = 0.0
    octaves: float = 0.0
    radius: float = 0.0

    def __str__(self) -> str:
        falls = ", falling" if self.octaves else ""
        radius = f", radius {self.radius:.0e}" if self.radius else ""
        return f"{self.method} {self.value:.2g}{radius}{falls}"


def searched(rate: float, grid: str, way: str) -> list[Setting]:
    """The settings that a search tries.

    Args:
      rate: about which the rates of slopes lie that are worth trying, see `networks.methods`.
      grid: of `untuned_problems`.
      way: "searched", or "adam".
    """
    if way == "adam":
        return [Setting("adam", one) for one in (1e-3, 1e-2, 1e-1)]
    if grid == FLOATS:
        return [
            Setting("mezo", rate * 10 ** (k / 2), radius=radius)
            for radius in (1e-2, 1e-3, 1e-4)
            for k in range(-4, 5)
        ]
    falls = (0.0, _OCTAVES)
    found = [Setting("zoqo sparse", 2.0**-k, fall) for k in range(3, 12) for fall in falls]
    for method in ("caq_zo dense", "caq_zo sparse"):
        rates = [rate * 10 ** (k - 2.5) for k in range(6)]
        found += [Setting(method, one, fall) for one in rates for fall in falls]
    if grid.startswith("8"):
        found += [Setting("zoqo dense", 2.0**k, fall) for k in range(6) for fall in falls]
    return found


def _own(method: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, value, radius, **given: method(**given)


def _zoqo_sparse(params: Any, value: Any, radius: Any, **given: Any) -> Any:
    given |= {"structure": "sparse", "density": value, "noise": "rademacher"}
    return zq.zoqo(_TINY, _TINY, **given)


def _zoqo_dense(params: Any, value: Any, radius: Any, **given: Any) -> Any:
    # A little more than so many codes, lest the floor be one less.
    reach = methods.units(params).step * value * 1.001
    return zq.zoqo(lambda count: reach, lambda count: reach, **given)


def _caq_zo(density: float) -> Callable[..., Any]:
    def make(params: Any, value: Any, radius: Any, **given: Any) -> Any:
        unit = methods.units(params)
        eta = value / (density * unit.codes * unit.step**2)
        if density < 1:
            given |= {"structure": "sparse", "density": density}
        return zq.caq_zo(lambda count: eta, boundary="clamp", **given)

    return make


def _mezo(params: Any, value: Any, radius: Any, **given: Any) -> Any:
    size = sum(x.size for x in jax.tree.leaves(params))
    probe = zq.spsa(lambda count: radius, noise="gaussian", **given)
    return optax.chain(probe, optax.sgd(value / size))


def _adam(params: Any, value: Any, radius: Any, **given: Any) -> Any:
    return optax.adam(value)


MAKERS = {
    **{name: _own(getattr(zq, name)) for name in UNTUNED},
    "zoqo sparse": _zoqo_sparse,
    "zoqo dense": _zoqo_dense,
    "caq_zo dense": _caq_zo(1.0),
    "caq_zo sparse": _caq_zo(_SPARSE),
    "mezo": _mezo,
    "adam": _adam,
}
"""(parameters, value now, radius, key=, num_queries=) -> the transformation, of each method."""
