"""Training small models for claims: by back-propagation, or by queries at the best of a few rates.

A lane is a run with its own start, key and learning rate. Lanes follow each other in one program,
which is compiled once.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import zoqo_jax as zq
from experiments.laboratory.tasks import Examples, Params, Task

__all__ = [
    "Make",
    "Schedule",
    "Scores",
    "at_best_rate",
    "by_backpropagation",
    "by_queries",
    "cross_entropy",
    "one_lane",
    "scores",
    "shown",
]

Schedule = Callable[[Any], jax.Array]
Make = Callable[[Params, jax.Array, Schedule], tuple[optax.GradientTransformationExtraArgs, ...]]
"""(params, key, learning rate) -> transformations that take turns in every step."""


class Scores(NamedTuple):
    """What models answer, lane by lane.

    Attributes:
      loss: mean cross-entropy, nats.
      accuracy: a fraction.
    """

    loss: np.ndarray
    accuracy: np.ndarray


def cross_entropy(logits: Any, params: Params, batch: Examples) -> jax.Array:
    """The mean over a batch, nats."""
    answers = zq.quaxify(logits)(params, batch.inputs)
    return optax.softmax_cross_entropy_with_integer_labels(answers, batch.labels).mean()


def scores(task: Task, lanes: Params, examples: Examples) -> Scores:
    """Loss and accuracy of each lane's parameters."""
    loss, accuracy = _scores(task.logits, lanes, examples)
    return Scores(np.asarray(loss), np.asarray(accuracy))


def one_lane(lanes: Params, lane: int) -> Params:
    """The parameters of a lane."""
    return jax.tree.map(lambda x: x[lane], lanes)


def by_backpropagation(
    task: Task, keys: jax.Array, *, steps: int, rate: float = 3e-3, batch_size: int = 64
) -> Params:
    """Parameters after so many steps of Adam from the task's own start, a lane for each key.

    Args:
      task: the model and what it learns from.
      keys: of the lanes.
      steps: of Adam; the rate falls linearly to zero.
      rate: of Adam at first.
      batch_size: examples a step, drawn with replacement.
    """
    shape = {"steps": steps, "batch_size": batch_size}
    return _by_backpropagation(task.logits, task.init, keys, task.train, rate, **shape)


def by_queries(
    task: Task,
    make: Make,
    lanes: Params,
    keys: jax.Array,
    rates: jax.Array,
    *,
    steps: int,
    batch_size: int,
) -> tuple[Params, np.ndarray]:
    """Train by methods that see no more than losses.

    Args:
      task: the model and what it learns from.
      make: the method; for each function a program is compiled.
      lanes: where each begins, stacked.
      keys: of the lanes.
      rates: of the lanes at first; they fall linearly to zero.
      steps: of each of the method's transformations.
      batch_size: examples a step, drawn with replacement.

    Returns:
      The parameters of each lane, and how often each evaluated its loss.
    """
    shape = {"steps": steps, "batch_size": batch_size}
    lanes, queries = _by_queries(task.logits, make, lanes, keys, rates, task.train, **shape)
    return lanes, np.asarray(queries)


def at_best_rate(
    task: Task,
    make: Make,
    lanes: Params,
    key: jax.Array,
    rates: Sequence[float],
    *,
    steps: int,
    batch_size: int,
) -> dict[str, Any]:
    """Train at the rate that does best on the validation split, and read the test split.

    Each rate is tried in a whole run from the last lane's start. The least loss wins; then the
    other lanes run with it.

    Args:
      task: the model and what it learns from.
      make: the method.
      lanes: where each begins, stacked; the last one is there for the choice alone.
      key: of all lanes.
      rates: to choose from, in order.
      steps: of each of the method's transformations.
      batch_size: examples a step.

    Returns:
      "rate", whether it is the first or last ("at_edge"), "queries" of one run, and "loss" and
      "accuracy" of the runs, as `shown`.
    """
    shape = {"steps": steps, "batch_size": batch_size}
    count = jax.tree.leaves(lanes)[0].shape[0] - 1
    starts = jax.tree.map(lambda x: jnp.stack([x[count]] * len(rates)), lanes)
    keys = jax.random.split(key, count + 1)
    tried, queries = by_queries(
        task, make, starts, jnp.stack([keys[count]] * len(rates)), jnp.asarray(rates), **shape
    )
    loss = scores(task, tried, task.validation).loss
    best = int(np.argmin(np.where(np.isfinite(loss), loss, np.inf)))
    starts, rate = jax.tree.map(lambda x: x[:count], lanes), jnp.full(count, rates[best])
    trained, _ = by_queries(task, make, starts, keys[:count], rate, **shape)
    return {
        "rate": rates[best],
        "at_edge": best in (0, len(rates) - 1),
        "queries": int(queries[0]),
        **shown(scores(task, trained, task.test)),
    }


def shown(scores: Scores) -> dict[str, Any]:
    """Scores as a measurement: "loss" and "accuracy", lists, None where a loss is not finite."""
    loss = [float(x) if np.isfinite(x) else None for x in scores.loss]
    return {"loss": loss, "accuracy": scores.accuracy.tolist()}


@functools.partial(jax.jit, static_argnames="logits")
def _scores(logits: Any, lanes: Params, examples: Examples) -> tuple[jax.Array, jax.Array]:
    def one(params: Params) -> tuple[jax.Array, jax.Array]:
        answers = zq.quaxify(logits)(params, examples.inputs)
        loss = optax.softmax_cross_entropy_with_integer_labels(answers, examples.labels).mean()
        return loss, (answers.argmax(-1) == examples.labels).mean()

    return jax.lax.map(one, lanes)


@functools.partial(jax.jit, static_argnames=("logits", "init", "steps", "batch_size"))
def _by_backpropagation(
    logits: Any, init: Any, keys: Any, train: Examples, rate: Any, *, steps: int, batch_size: int
) -> Params:
    tx = optax.adam(_falling(rate, steps))

    def lane(key: jax.Array) -> Params:
        def step(now: Any, i: jax.Array) -> tuple[Any, None]:
            params, state = now
            batch = _batch(train, jax.random.fold_in(key, 1 + i), batch_size)
            gradient = jax.grad(lambda params: cross_entropy(logits, params, batch))(params)
            updates, state = tx.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        params = init(jax.random.fold_in(key, 0))
        return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[0][0]

    return jax.lax.map(lane, keys)


@functools.partial(jax.jit, static_argnames=("logits", "make", "steps", "batch_size"))
def _by_queries(
    logits: Any,
    make: Make,
    lanes: Params,
    keys: jax.Array,
    rates: jax.Array,
    train: Examples,
    *,
    steps: int,
    batch_size: int,
) -> tuple[Params, jax.Array]:
    def lane(start: tuple[Params, jax.Array, jax.Array]) -> tuple[Params, jax.Array]:
        params, key, rate = start
        txs = make(params, jax.random.fold_in(key, 0), _falling(rate, steps))
        data_key = jax.random.fold_in(key, 1)

        def turn(which: int, i: jax.Array, now: Any) -> Any:
            params, states = now
            batch = _batch(train, jax.random.fold_in(data_key, i), batch_size)
            loss = functools.partial(cross_entropy, logits, batch=batch)
            updates, state = txs[which].update(None, states[which], params, value_fn=loss)
            states = (*states[:which], state, *states[which + 1 :])
            return optax.apply_updates(params, updates), states

        turns = [functools.partial(turn, which) for which in range(len(txs))]
        first = (params, tuple(tx.init(params) for tx in txs))
        (params, states), _ = jax.lax.scan(
            lambda now, i: (jax.lax.switch(i % len(txs), turns, i, now), None),
            first,
            jnp.arange(steps * len(txs)),
        )
        return params, sum(optax.tree.get(state, "queries") for state in states)

    return jax.lax.map(lane, (lanes, keys, rates))


def _falling(rate: Any, steps: int) -> Schedule:
    return lambda count: rate * (1.0 - jnp.asarray(count, jnp.float32) / steps)


def _batch(examples: Examples, key: jax.Array, size: int) -> Examples:
    places = jax.random.randint(key, (size,), 0, examples.labels.shape[0])
    return examples.take(places)
