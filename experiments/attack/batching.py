"""Many images attacked at once by one compiled program, each with its own key, count and stop.

The program advances a batch of fixed size by a few steps. Between two calls finished images leave
and waiting ones take their places; when none waits any more the batch shrinks to the next power of
two that holds what is left. So a program is compiled for each of a handful of sizes, never for an
image.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.attack import methods
from experiments.attack.config import Config

__all__ = ["Outcome", "attack", "margin_of"]

_STEPS_PER_CALL = 8
_SMALLEST_BATCH = 16


class Outcome(NamedTuple):
    """Results for each image, in the order given.

    Attributes:
      success: whether a misclassified point was found, bool (n,).
      queries: evaluations of the model, up to and with the step that found it or ran out, int32
          (n,).
      perturbation: the last point in the ball, in pixel values, float32 in the images' shape.
    """

    success: np.ndarray
    queries: np.ndarray
    perturbation: np.ndarray


def margin_of(logits: jax.Array, label: jax.Array) -> jax.Array:
    """How far the true class leads the best other, float32 (); negative when misclassified.

    Example:
      >>> margin_of(jnp.array([1.0, 3.0, 2.5]), jnp.int32(1)).item()
      0.5
    """
    others = jnp.where(jnp.arange(logits.shape[-1]) == label, -jnp.inf, logits)
    return logits[label] - others.max()


def attack(
    logits_fn: Callable[[jax.Array], jax.Array],
    images: np.ndarray,
    labels: np.ndarray,
    config: Config,
    on_progress: Callable[[int, int], None] = lambda finished, found: None,
) -> Outcome:
    """Search an l_inf ball round each image for a point that the model misclassifies.

    Args:
      logits_fn: images (n, height, width, channels) in [0, 1] -> logits (n, classes); never
        differentiated.
      images: float32 (n, height, width, channels) in [0, 1], correctly classified.
      labels: int32 (n,).
      config: the method and its settings.
      on_progress: called with the number of images finished and found so far.

    Returns:
      The outcome for each image. It depends on the image, its place and the seed, not on the batch
      size.

    Raises:
      ValueError: images and labels that do not belong together.
    """
    if len(images) != len(labels) or len(images) == 0:
        raise ValueError(f"images and labels must match, got {len(images)} and {len(labels)}.")
    method = methods.make(config, int(np.prod(images.shape[1:])))
    program = _program(logits_fn, jnp.asarray(images), jnp.asarray(labels), method, config)
    outcome = Outcome(
        np.zeros(len(images), bool), np.zeros(len(images), np.int32), np.zeros_like(images)
    )
    queue = iter(range(len(images)))
    place = np.full(_bucket(len(images), config.batch_size), -1, np.int32)
    batch = program.idle(len(place))
    finished = 0
    while finished < len(images):
        for slot in np.flatnonzero(place < 0):
            place[slot] = next(queue, -1)
        size = _bucket(int(np.count_nonzero(place >= 0)), config.batch_size)
        if size < len(place):  # only once nothing waits: the live images move to a smaller batch
            kept = np.argsort(place < 0, kind="stable")[:size]
            place, batch = place[kept], program.take(batch, kept)
        batch = program.advance(program.admit(batch, place))
        queries, found = np.asarray(batch.queries), np.asarray(batch.found)
        done = (place >= 0) & (found | (queries + method.queries_per_step > config.budget))
        if done.any():
            who = place[done]
            outcome.success[who] = found[done]
            outcome.queries[who] = queries[done]
            pixels = np.asarray(program.decode(batch))[done]
            outcome.perturbation[who] = pixels.reshape(-1, *images.shape[1:])
            place[done] = -1
            finished += len(who)
            on_progress(finished, int(outcome.success.sum()))
    return outcome


class _Slot(NamedTuple):
    """One image under attack, or an idle place in the batch."""

    index: jax.Array  # int32 (), the image's place among all, -1 if idle
    perturbation: Any
    state: Any
    queries: jax.Array  # int32 ()
    found: jax.Array  # bool ()


class _Program(NamedTuple):
    """The compiled parts, all on batches of slots."""

    idle: Callable[[int], _Slot]
    admit: Callable[[_Slot, np.ndarray], _Slot]
    advance: Callable[[_Slot], _Slot]
    take: Callable[[_Slot, np.ndarray], _Slot]
    decode: Callable[[_Slot], jax.Array]


def _program(
    logits_fn: Callable[[jax.Array], jax.Array],
    images: jax.Array,
    labels: jax.Array,
    method: methods.Attack,
    config: Config,
) -> _Program:
    key = jax.random.key(config.seed)

    def fresh(index: jax.Array) -> _Slot:
        perturbation, state = method.init(jax.random.fold_in(key, index))
        return _Slot(index, perturbation, state, jnp.int32(0), jnp.zeros((), bool))

    def is_active(slot: _Slot) -> jax.Array:
        affordable = slot.queries + method.queries_per_step <= config.budget
        return (slot.index >= 0) & ~slot.found & affordable

    def step(slot: _Slot) -> _Slot:
        image, label = images[slot.index], labels[slot.index]

        def margin(perturbation: jax.Array) -> jax.Array:
            queried = jnp.clip(image + perturbation.reshape(image.shape), 0.0, 1.0)
            return margin_of(logits_fn(queried[None])[0], label)

        at = method.step(margin, slot.perturbation, slot.state)
        queries = slot.queries + method.queries_per_step
        return _where(
            is_active(slot), _Slot(slot.index, at.perturbation, at.state, queries, at.found), slot
        )

    @jax.jit
    def advance(batch: _Slot) -> _Slot:
        def is_going(carry: tuple[jax.Array, _Slot]) -> jax.Array:
            return (carry[0] < _STEPS_PER_CALL) & jax.vmap(is_active)(carry[1]).any()

        def go(carry: tuple[jax.Array, _Slot]) -> tuple[jax.Array, _Slot]:
            return carry[0] + 1, jax.vmap(step)(carry[1])

        return jax.lax.while_loop(is_going, go, (jnp.int32(0), batch))[1]

    @jax.jit
    def admit(batch: _Slot, place: jax.Array) -> _Slot:
        return jax.vmap(lambda slot, index: _where(slot.index == index, slot, fresh(index)))(
            batch, place
        )

    return _Program(
        idle=lambda size: jax.vmap(fresh)(jnp.full(size, -1, jnp.int32)),
        admit=admit,
        advance=advance,
        take=jax.jit(lambda batch, kept: jax.tree.map(lambda x: x[kept], batch)),
        decode=jax.jit(jax.vmap(lambda slot: method.decode(slot.perturbation))),
    )


def _where(condition: jax.Array, true: _Slot, false: _Slot) -> _Slot:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), true, false)


def _bucket(count: int, largest: int) -> int:
    """The least power of two that holds `count`, between the smallest and the largest batch."""
    return min(largest, max(_SMALLEST_BATCH, 1 << max(count - 1, 0).bit_length()))
