"""A generation of each method: a population is tried, and what trains makes a step of its returns.

Codes and SPSA: zoqo_jax evaluates `query_batch=None`, so all, of a step's queries at once, and a
query's two sides on the same episodes. With ranks its losses are heard first, and the differences
of their ranks given to the method in their place, which is the same step but for the numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import Array

import zoqo_jax as zq
from experiments.policies.config import Config

__all__ = ["Generation", "Trainer", "ranked", "trainer"]

MeanReturn = Callable[[list[Array], Array], Array]
"""(layers, keys of episodes) -> mean return."""

_LAST = 0.1  # of the rate, which falls to this share of itself in the second half of a run
_RANGE = 2.0  # of weights: floats that learnt Pendulum stay within it
_FEW = 2  # bits: three levels, of which this range would round nearly all weights to zero


class Generation(NamedTuple):
    """What is told of one: mean return of its population, and how many codes moved."""

    mean_return: Array
    codes_moved: Array


class Trainer(Protocol):
    """A method, started once and then given the episodes of each generation."""

    def start(self, layers: list[Array], key: Array) -> Any:
        """What is kept between generations."""
        ...

    def generation(self, kept: Any, episodes: Array) -> tuple[Any, Generation]:
        """One step."""
        ...

    def layers(self, kept: Any) -> list[Array]:
        """The policy: a list of layers, in codes or floats."""
        ...


def trainer(config: Config, mean_return: MeanReturn) -> Trainer:
    """The method of a run.

    Raises:
      ImportError: evosax is not installed.
    """
    return (_OpenES if config.method == "open_es" else _Queries)(config, mean_return)


def ranked(losses: Array) -> Array:
    """Centred ranks: the least is -1/2, the greatest 1/2, equal ones are equal.

    Example:
      >>> ranked(jnp.array([[10.0, -1.0], [-1.0, 99.0]])).round(2).tolist()
      [[0.17, -0.33], [-0.33, 0.5]]
    """
    places = jax.scipy.stats.rankdata(losses.reshape(-1)) - 1.0
    return (places / (losses.size - 1) - 0.5).reshape(losses.shape)


def falling(config: Config) -> optax.Schedule:
    """The rate: as it is for half of a run, then falling."""
    half = max(config.steps // 2, 1)
    rate = config.used().learning_rate
    return optax.exponential_decay(rate, half, _LAST, transition_begin=half)


def quantized(layers: list[Array], bits: int) -> list[zq.QuantizedArray]:
    """Layers in codes."""
    if bits <= _FEW:
        return zq.quantize(layers, zq.Quantizer(bits))
    return zq.quantize(layers, zq.Quantizer(bits, range=_RANGE))


class _Queries:
    """zoqo_jax's methods, of codes or floats."""

    def __init__(self, config: Config, mean_return: MeanReturn) -> None:
        self._config, self._mean_return = config, mean_return
        self._tx = _transformation(config)

    def start(self, layers: list[Array], key: Array) -> Any:
        config = self._config
        params = layers if config.bits == 32 else quantized(layers, config.bits)
        own = lambda x: x._replace(key=key) if isinstance(x, zq.State) else x  # noqa: E731
        state = jax.tree.map(own, self._tx.init(params), is_leaf=lambda x: isinstance(x, zq.State))
        return params, state

    def layers(self, kept: Any) -> list[Array]:
        return kept[0]

    def generation(self, kept: Any, episodes: Array) -> tuple[Any, Generation]:
        params, state = kept
        loss = lambda layers: -self._mean_return(layers, episodes)  # noqa: E731
        step = functools.partial(self._tx.update, None, state, params)
        if self._config.shaped == "comparisons":
            updates, state = step(compare_fn=lambda a, b: jnp.sign(loss(a) - loss(b)))
        elif self._config.shaped == "ranks":
            _, heard = step(value_fn=loss)  # its update is not used, so it is not computed
            losses = heard.info.losses
            ranks = ranked(losses)
            updates, state = step(differences=ranks[:, 0] - ranks[:, 1])
            state = state._replace(info=state.info._replace(losses=losses))
        else:
            updates, state = step(value_fn=loss)
        info = _info(state)
        kept = zq.apply_updates(params, updates), state
        return kept, Generation(-info.losses.mean(), info.codes_moved)


def _info(state: Any) -> Any:
    """Of a chain, that of the first transformation."""
    return (state if isinstance(state, zq.State) else state[0]).info


def _transformation(config: Config) -> optax.GradientTransformationExtraArgs:
    key = jax.random.key(0)  # `start` puts the run's in its place
    queries = {"num_queries": config.population // 2, "query_batch": None, "key": key}
    if config.shaped == "sized":
        return getattr(zq, config.method)(**queries)
    rate, radius = falling(config), config.used().radius
    if config.method == "zoqo":
        return zq.zoqo(rate, radius, noise="gaussian", step="dithered", **queries)
    if config.method == "spsa":
        return optax.chain(zq.spsa(radius, noise="gaussian", **queries), optax.adam(rate))
    # Differences of ranks are about 0.4, so a step is about `rate` of the number of codes long,
    # whatever the radius and the population.
    codes = 2**config.bits
    unit = codes * radius * codes * config.population**0.5
    step = lambda count: rate(count) * unit  # noqa: E731
    if config.method == "qes":
        return zq.qes(step, radius * codes, window=None, decay=1.0, **queries)
    off_grid = {"query": "off_grid", "radius": 2 * radius, "boundary": "clamp"}
    return zq.caq_zo(step, rounding="error_feedback", **off_grid, **queries)


class _OpenES:
    """evosax's OpenES with Adam, by centred ranks of an antithetic population."""

    def __init__(self, config: Config, mean_return: MeanReturn) -> None:
        self._config, self._mean_return = config, mean_return

    def _strategy(self, layers: list[Array]) -> Any:
        try:
            from evosax.algorithms import Open_ES
        except ImportError:
            raise ImportError(
                "evosax is not installed: pip install -e '.[experiments,policies]', or make "
                "policies."
            ) from None
        rate, radius = falling(self._config), self._config.used().radius
        spread = optax.constant_schedule(radius)
        options = {"optimizer": optax.adam(rate), "std_schedule": spread}
        return Open_ES(self._config.population, layers, **options)

    def start(self, layers: list[Array], key: Array) -> Any:
        strategy = self._strategy(layers)
        state = strategy.init(key, layers, strategy.default_params)
        return layers, _typed(state), key

    def layers(self, kept: Any) -> list[Array]:
        return kept[0]

    def generation(self, kept: Any, episodes: Array) -> tuple[Any, Generation]:
        layers, state, key = kept
        strategy = self._strategy(layers)
        key, own = jax.random.split(key)
        population, state = strategy.ask(own, state, strategy.default_params)
        returns = jax.vmap(self._mean_return, (0, None))(population, episodes)
        state, _ = strategy.tell(own, population, -returns, state, strategy.default_params)
        count = jnp.float32(sum(layer.size for layer in layers))
        return (strategy.get_mean(state), _typed(state), key), Generation(returns.mean(), count)


def _typed(state: Any) -> Any:
    """A state without Python's numbers, for which the second chunk would be compiled anew."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.asarray(x).dtype), state)
