"""A run: generations in chunks, each stored as it ends, so that a run that was stopped goes on.

A chunk is one compiled program, which all seeds share. What is kept between chunks is written
beside the run's result, and removed when the run is over: the same command goes on bit for bit.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import zoqo_jax as zq
from experiments.leaves import as_arrays, like
from experiments.policies import environments, methods
from experiments.policies.config import Config, Environment
from experiments.store import Row, Store

__all__ = ["Program", "policy", "program", "row_of", "store_of", "train"]

_CHUNK = 10  # generations; then the policy itself is tested
_LISTS = ("generations", "returns", "population", "codes_moved")
_FINAL = 4  # times as many test episodes at the end


class Keys(NamedTuple):
    """The randomness of a run; that of a generation's episodes is the same for every method."""

    start: Array
    method: Array
    episodes: Array
    test: Array


class Program(NamedTuple):
    """What runs of the same settings but for the seed share, compiled once.

    Attributes:
      start: seed -> what is kept between generations.
      chunk: (kept, keys of episodes, first generation, how many) -> kept, and returns of each.
      layers: kept -> the policy.
    """

    start: Callable[[Keys], Any]
    chunk: Callable[..., Any]
    layers: Callable[[Any], list[Any]]


def keys(seed: int) -> Keys:
    """The keys of a run."""
    return Keys(*jax.random.split(jax.random.key(seed), 4))


@functools.lru_cache(maxsize=12)  # those of an environment in a table
def program(config: Config) -> Program:
    """The program of a run's settings, those of seed 0."""
    game = environments.make(config)
    trainer = methods.trainer(config, game.mean_return)

    def start(of: Keys) -> Any:
        return trainer.start(game.start(of.start), of.method)

    def step(episodes: Array, kept: Any, generation: Array) -> Any:
        own = jax.random.split(jax.random.fold_in(episodes, generation), config.episodes)
        return trainer.generation(kept, own)

    @functools.partial(jax.jit, static_argnums=3)
    def chunk(kept: Any, episodes: Array, first: Array, length: int) -> Any:
        return jax.lax.scan(
            functools.partial(step, episodes), kept, first + jnp.arange(length, dtype=jnp.int32)
        )

    return Program(start, chunk, trainer.layers)


@functools.lru_cache(maxsize=5)
def _mean_return(environment: Environment, hidden: int) -> Callable[..., Array]:
    """What tests a policy of floats, compiled once for all methods."""
    game = environments.make(Config(environment=environment, hidden=hidden))
    return jax.jit(game.mean_return)


def train(
    config: Config,
    store: Store,
    on_progress: Callable[[int], None] = lambda generations: None,
) -> dict[str, Any]:
    """What a run comes to, from where it was stopped.

    Args:
      config: its settings.
      store: of its result, NAME.json; until it is over, what is kept is in NAME.run.npz beside it,
        and the policy of seed 0 in NAME.policy.npz from then on.
      on_progress: called with how many generations are done.

    Returns:
      "generations", "returns" of the policy after each of them, the mean "population" returns of
      every generation, "codes_moved" by it, the "final" return of more test episodes, the
      "policy_bytes" that layers take, and "seconds", compilation among them.
    """
    if "final" in store.content:
        return store.content
    shared, of = program(dataclasses.replace(config, seed=0)), keys(config.seed)
    kept = shared.start(of)
    saved = Store(store.path.with_suffix(".run.npz"), dataclasses.asdict(config.used()))
    found: dict[str, Any] = {name: [] for name in _LISTS} | {"seconds": 0.0}
    if saved.content:
        kept = restored(kept, saved.content)
        found |= {name: np.asarray(saved.content[name]).tolist() for name in found}

    def tested(keys: Array) -> list[float]:
        floats = zq.dequantize(shared.layers(kept))
        return _rounded(_mean_return(config.environment, config.hidden)(floats, keys)[None])

    test = jax.random.split(of.test, config.test_episodes)
    while (done := len(found["population"])) < config.steps:
        begin = time.perf_counter()
        on_progress(done)
        length = min(_CHUNK, config.steps - done)
        kept, told = shared.chunk(kept, of.episodes, jnp.int32(done), length)
        found["population"] += _rounded(told.mean_return)
        found["codes_moved"] += _rounded(told.codes_moved)
        found["generations"].append(done + length)
        found["returns"] += tested(test)
        found["seconds"] = round(found["seconds"] + time.perf_counter() - begin, 2)
        saved.write(**found, **parts(kept))
    last = jax.random.split(jax.random.fold_in(of.test, 1), _FINAL * config.test_episodes)
    (found["final"],) = tested(last)
    layers = shared.layers(kept)
    found["policy_bytes"] = sum(x.nbytes for x in jax.tree.leaves(layers))
    if config.seed == 0:
        policy_store(config, store.path).write(**parts(layers))
    store.write(**found)
    saved.path.unlink(missing_ok=True)
    on_progress(done)
    return found


def row_of(config: Config) -> Row:
    """The row of tables that a run belongs to, which names its files."""
    bits = "" if config.bits == 32 else f" {config.bits} bits"
    own = "" if config.shaping == "usual" else f" {config.shaping}"
    return Row(config.environment, f"{config.method}{bits}{own}", config.used())


def store_of(config: Config, folder: Path) -> Store:
    """Where a run's result is kept.

    Raises:
      ValueError: that of other settings is there.
    """
    store = row_of(config).store(folder, config.seed, ".json", ())
    if store.changed:
        raise ValueError(
            f"results: {store.path} is of a run with {store.changed}: name another folder, or "
            "delete this file."
        )
    return store


def policy(config: Config, folder: Path) -> list[Any] | None:
    """The layers that a run of seed 0 trained, or None where none is over in this folder."""
    content = policy_store(config, store_of(config, folder).path).content
    shared = program(dataclasses.replace(config, seed=0))
    return restored(shared.layers(shared.start(keys(0))), content) if content else None


def policy_store(config: Config, path: Path) -> Store:
    """Where the policy of a run is kept."""
    return Store(path.with_suffix(".policy.npz"), dataclasses.asdict(config.used()))


def parts(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a tree, as a file holds them."""
    return {f"part_{number}": x for number, x in enumerate(as_arrays(tree))}


def restored(tree: Any, content: dict[str, np.ndarray]) -> Any:
    """The tree of which `parts` are in a file; the one that is given has the same form."""
    return like(tree, [content[name] for name in parts(tree)])


def _rounded(values: Array) -> list[float]:
    return np.asarray(values, float).round(4).tolist()
