"""Many images attacked at once, each with its own key, count and stop.

`attack` takes any batched JAX function, and compiles; or, with `compiled=False`, any Python
function of numpy arrays, such as a client of a served model, and loops on the host. Both ask the
same questions and count the same answers.

A program advances a batch of fixed size until half of it is done. Then finished images leave and
waiting ones take their places; when none waits any more the batch shrinks to the next power of
four that holds what is left. So a program is compiled for each of two or three sizes, once for all
calls with the same settings. The model sees only the questions of images that are not done, and
always `model_batch` of them at a time, so that the size of a batch cannot change the last bit of an
answer. An image's randomness comes from its pixels and label: what an image gets depends on the
image, the seed, and nothing else.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.attack import hop_skip_jump, methods
from experiments.attack.answers import (
    Model,
    answers,
    check_logits,
    checked_classes,
    checked_images,
    chunked,
)
from experiments.attack.config import Config

__all__ = ["Outcome", "attack", "margin_of"]

_MOST_STEPS = 128  # of a program, so that progress is seen
_SMALLEST_BATCH = 16


class Outcome(NamedTuple):
    """Results for each image, in the order given.

    Attributes:
      success: whether a misclassified point of the ball was found, bool (n,).
      queries: evaluations of the model, up to and with the question that found it, or after which
          the budget or what the method can ask was spent, int32 (n,).
      perturbation: that point, or the one of least loss, in pixel values, float32 in the images'
          shape; add it and cut off at 0 and 1. Where only labels are seen and none is found, the
          first point inside the ball that was asked about, or zeros where none was.
    """

    success: np.ndarray
    queries: np.ndarray
    perturbation: np.ndarray


class _Task(NamedTuple):
    """What is attacked; of a batch, with a first axis more."""

    image: Any  # float32 (height, width, channels)
    wanted: Any  # int32 (), the label, or the target where there is one
    mark: Any  # uint32 (), what its randomness comes from
    is_there: Any  # bool (), False in an idle place of a batch


class _Slot(NamedTuple):
    """One image under attack, or an idle place in the batch."""

    task: _Task
    state: Any  # the method's
    queries: jax.Array  # int32 ()
    found: jax.Array  # bool ()
    best: jax.Array  # the perturbation of least loss inside the ball, float32
    loss: jax.Array  # there


def margin_of(logits: jax.Array, label: jax.Array) -> jax.Array:
    """How far a class leads the best other, float32 (); negative when another wins.

    Example:
      >>> margin_of(jnp.array([1.0, 3.0, 2.5]), jnp.int32(1)).item()
      0.5
    """
    others = jnp.where(jnp.arange(logits.shape[-1]) == label, -jnp.inf, logits)
    return logits[label] - others.max()


def attack(
    logits_fn: Model,
    images: np.ndarray,
    labels: np.ndarray,
    config: Config,
    *,
    targets: np.ndarray | None = None,
    compiled: bool = True,
    on_progress: Callable[[int, int], None] = lambda finished, found: None,
) -> Outcome:
    """Search an l_inf ball round each image for a point that the model misclassifies.

    Args:
      logits_fn: images (m, height, width, channels) in [0, 1] -> logits (m, classes), never
        differentiated; JAX operations, or any Python function of numpy arrays where not compiled,
        which may return labels, integers (m,), instead where the method sees nothing else.
      images: float32 (n, height, width, channels) in [0, 1], correctly classified; those that are
        not count as found with the first question that shows it.
      labels: integers (n,), the images' classes.
      config: the method and its settings.
      targets: integers (n,), classes to be taken for; None: any but the label.
      compiled: whether logits_fn is a JAX function.
      on_progress: called with the number of images finished and found so far.

    Returns:
      The outcome for each image. It does not depend on the batch size or the images' order.

    Raises:
      ValueError: images, labels, targets or logits that are not as said above, or a budget that
        does not pay for a single step.

    Example:
      >>> def logits_fn(images):  # is the upper half brighter than the lower?
      ...     return jnp.stack([images[:, :2].sum((1, 2, 3)), images[:, 2:].sum((1, 2, 3))], -1)
      >>> images = np.full((1, 4, 4, 1), 0.5, np.float32)
      >>> images[:, :2] = 0.6
      >>> attack(logits_fn, images, np.array([0]), Config(epsilon=0.1)).success
      array([ True])
    """
    images, labels = checked_images(images), checked_classes("labels", labels, len(images))
    if targets is not None:
        targets = checked_classes("targets", targets, len(images))
        if (targets == labels).any():
            place = int(np.flatnonzero(targets == labels)[0])
            raise ValueError(f"targets must differ from labels, got {labels[place]} at {place}.")
    wanted = labels if targets is None else targets
    highest = int(max(labels.max(), wanted.max()))
    marks = np.array([_mark(*pair, config.seed) for pair in zip(images, labels, strict=True)])
    if config.method == "hop_skip_jump":
        if targets is not None:
            raise ValueError(
                "targets must be None for hop_skip_jump: it begins at noise, of whatever class."
            )
        model = chunked(logits_fn, config.model_batch) if compiled else logits_fn
        return _one_by_one(model, images, labels, marks, config, on_progress)
    program = _program(_essence(config), images.shape[1:], targets is not None)
    if program.method.asks > config.budget:
        raise ValueError(
            f"budget must be at least {program.method.asks}, what a step of {config.name} asks, "
            f"got {config.budget}."
        )
    if compiled:
        seen = jax.ShapeDtypeStruct((config.model_batch, *images.shape[1:]), jnp.float32)
        check_logits(jax.eval_shape(logits_fn, seen), config.model_batch, highest)
        advance = program.compiled(logits_fn)
    else:
        advance = program.by_hand(logits_fn, highest)
    tasks = _Task(images, wanted, marks, np.ones(len(images), bool))
    return _work_off(program, advance, tasks, config, on_progress)


def _work_off(
    program: "_Program",
    advance: Callable[[_Slot, int], _Slot],
    tasks: _Task,
    config: Config,
    on_progress: Callable[[int, int], None],
) -> Outcome:
    """Bring every image through a slot of the batch."""
    count = len(tasks.image)
    outcome = Outcome(np.zeros(count, bool), np.zeros(count, np.int32), np.zeros_like(tasks.image))
    queue = iter(range(count))
    place = np.full(_bucket(count, config.batch_size), -1, np.int32)
    is_new = np.ones(len(place), bool)
    batch, finished = None, 0
    while finished < count:
        for slot in np.flatnonzero(place < 0):
            place[slot] = next(queue, -1)
            is_new[slot] = True
        live = int(np.count_nonzero(place >= 0))
        size = _bucket(live, config.batch_size)
        if size < len(place):  # only once nothing waits: the live images move to a smaller batch
            kept = np.argsort(place < 0, kind="stable")[:size]
            place, is_new, batch = place[kept], is_new[kept], program.take(batch, kept)
        here = _Task(*(x[place] for x in tasks))._replace(is_there=place >= 0)
        batch = program.fresh(here) if batch is None else program.admit(batch, here, is_new)
        is_new = np.zeros(len(place), bool)  # a new one: JAX may still be reading the old
        is_last = finished + live == count and size == _bucket(1, config.batch_size)
        batch = advance(batch, 0 if is_last else live // 2)
        queries, found = np.asarray(batch.queries), np.asarray(batch.found)
        done = (place >= 0) & ~np.asarray(program.active(batch))
        if done.any():
            who = place[done]
            outcome.success[who] = found[done]
            outcome.queries[who] = queries[done]
            outcome.perturbation[who] = np.asarray(batch.best)[done]
            place[done] = -1
            finished += len(who)
        on_progress(finished, int(outcome.success.sum()))
    return outcome


def _one_by_one(
    model: Model,
    images: np.ndarray,
    labels: np.ndarray,
    marks: np.ndarray,
    config: Config,
    on_progress: Callable[[int, int], None],
) -> Outcome:
    """HopSkipJump, whose library asks by itself."""
    count, highest = len(images), int(labels.max())
    outcome = Outcome(np.zeros(count, bool), np.zeros(count, np.int32), np.zeros_like(images))
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):

        def misread(shown: np.ndarray, label: int = label) -> np.ndarray:
            logits = answers(model, shown, config.model_batch, highest, sees_labels=True)
            return logits.max(-1) > logits[:, label]  # not where one is NaN

        asked = hop_skip_jump.Asked(misread, image, config.epsilon, config.budget)
        hop_skip_jump.search(asked, image, int(marks[i]))
        point = asked.first if asked.hit is None else asked.hit
        outcome.success[i], outcome.queries[i] = asked.hit is not None, asked.queries
        outcome.perturbation[i] = 0 if point is None else point - image
        on_progress(i + 1, int(outcome.success.sum()))
    return outcome


def _essence(config: Config) -> Config:
    """What of a configuration a program depends on."""
    unread = {"dataset": "", "weights": "", "weight_bits": 32, "num_images": 0, "seed": 0}
    return dataclasses.replace(config, **unread)


@functools.lru_cache(maxsize=8)  # another call with these settings compiles nothing again
def _program(config: Config, shape: tuple[int, int, int], targeted: bool) -> "_Program":
    return _Program(config, shape, targeted)


class _Program:
    """The parts of an attack, on batches of slots."""

    def __init__(self, config: Config, shape: tuple[int, int, int], targeted: bool) -> None:
        self.method, self.config, self.targeted = methods.make(config, shape), config, targeted
        self.fresh = jax.jit(jax.vmap(self._fresh))
        self.admit = jax.jit(jax.vmap(self._admitted))
        self.take = jax.jit(lambda batch, kept: jax.tree.map(lambda x: x[kept], batch))
        self.compiled = functools.lru_cache(maxsize=2)(self._compiled)

    def _compiled(self, logits_fn: Model) -> Callable[[_Slot, int], _Slot]:
        """Advance a batch by compiled steps until so few of its images are left."""
        chunk = self.config.model_batch

        def evaluate(shown: jax.Array, asked: jax.Array) -> jax.Array:
            """Logits of the images that are asked about, a chunk at a time; zeros for others."""
            some = jax.ShapeDtypeStruct((chunk, *shown.shape[1:]), shown.dtype)
            classes = jax.eval_shape(logits_fn, some).shape[1]
            places = jnp.argsort(~asked)  # of those that are asked about first
            order = jnp.pad(places, (0, -len(places) % chunk))

            def look(i: jax.Array, logits: jax.Array) -> jax.Array:
                here = jax.lax.dynamic_slice(order, [i * chunk], [chunk])
                answers = logits_fn(shown[here]).astype(jnp.float32)
                return jax.lax.dynamic_update_slice(logits, answers, [i * chunk, 0])

            chunks = (asked.sum() + chunk - 1) // chunk
            logits = jax.lax.fori_loop(0, chunks, look, jnp.zeros((len(order), classes)))
            return jnp.zeros((len(shown), classes)).at[places].set(logits[: len(places)])

        def is_going(carry: tuple[jax.Array, _Slot, jax.Array]) -> jax.Array:
            steps, batch, few = carry
            return (steps < _MOST_STEPS) & (self.active(batch).sum() > few)

        def go(carry: tuple[jax.Array, _Slot, jax.Array]) -> tuple[jax.Array, _Slot, jax.Array]:
            steps, batch, few = carry
            asked, shown = self.questions(batch)
            who = jnp.repeat(self.active(batch), self.method.asks)
            logits = evaluate(shown.reshape(-1, *shown.shape[2:]), who)
            return steps + 1, self.answered(batch, asked, logits), few

        @jax.jit
        def advance(batch: _Slot, few: jax.Array) -> _Slot:
            return jax.lax.while_loop(is_going, go, (jnp.int32(0), batch, few))[1]

        return lambda batch, few: advance(batch, jnp.int32(few))

    def by_hand(self, model: Model, highest: int) -> Callable[[_Slot, int], _Slot]:
        """Advance a batch by one step, its questions answered by a Python function."""
        questions, answered = jax.jit(self.questions), jax.jit(self.answered)

        def advance(batch: _Slot, few: int) -> _Slot:
            del few
            asked, shown = questions(batch)
            active = np.repeat(np.asarray(self.active(batch)), self.method.asks)
            shown = np.asarray(shown).reshape(-1, *shown.shape[2:])
            most, sees_labels = self.config.model_batch, self.method.sees_labels
            logits = answers(model, shown[active], most, highest, sees_labels)
            everyone = np.zeros((len(shown), logits.shape[-1]), np.float32)
            everyone[active] = logits
            return answered(batch, asked, everyone)

        return advance

    def active(self, batch: _Slot) -> jax.Array:
        """Which slots hold an image that is not found and has questions left, bool (slots,)."""
        affordable = batch.queries + self.method.asks <= self.config.budget
        is_over = jax.vmap(self.method.is_over)(batch.state)
        return batch.task.is_there & ~batch.found & affordable & ~is_over

    def questions(self, batch: _Slot) -> tuple[jax.Array, jax.Array]:
        """Perturbations, and the images shown, both (slots, asks, height, width, channels)."""
        asked = jax.vmap(self.method.ask)(batch.state)
        return asked, jnp.clip(batch.task.image[:, None] + asked, 0.0, 1.0)

    def answered(self, batch: _Slot, asked: jax.Array, logits: jax.Array) -> _Slot:
        """The batch after the model's answers, (slots * asks, classes), came in."""
        logits = logits.astype(jnp.float32).reshape(*asked.shape[:2], -1)
        after = jax.vmap(self._told)(batch, asked, logits)
        return _where(self.active(batch), after, batch)

    def _told(self, slot: _Slot, asked: jax.Array, logits: jax.Array) -> _Slot:
        wanted = slot.task.wanted
        margins = jax.vmap(lambda z: margin_of(z, wanted))(logits)
        cross_entropy = self.config.loss == "cross_entropy"
        losses = jax.nn.log_softmax(logits)[:, wanted] if cross_entropy else margins
        if self.targeted:
            margins, losses = -margins, -losses
        misread = margins < 0
        if self.method.sees_labels:
            losses = (~misread).astype(jnp.float32)
        losses = jnp.where(jnp.isnan(logits).any(-1), jnp.inf, losses)
        inside = (jnp.abs(asked) <= jnp.float32(self.config.epsilon)).all(axis=(1, 2, 3))
        hits = inside & misread
        found = hits.any()
        ranks = jnp.where(inside, losses, jnp.inf)
        which = jnp.where(found, jnp.argmax(hits), jnp.argmin(ranks))
        better = found | (ranks[which] < slot.loss)
        return _Slot(
            slot.task,
            self.method.tell(slot.state, misread if self.method.sees_labels else losses),
            slot.queries + self.method.asks,
            found,
            jnp.where(better, asked[which], slot.best),
            jnp.where(better, ranks[which], slot.loss),
        )

    def _fresh(self, task: _Task) -> _Slot:
        state = self.method.init(jax.random.key(task.mark, impl="threefry2x32"), task.image)
        loss = jnp.float32(jnp.inf)
        nothing = jnp.zeros_like(task.image)
        return _Slot(task, state, jnp.int32(0), jnp.bool(False), nothing, loss)

    def _admitted(self, slot: _Slot, task: _Task, is_new: jax.Array) -> _Slot:
        return _where(is_new, self._fresh(task), slot)


def _where(condition: jax.Array, true: _Slot, false: _Slot) -> _Slot:
    def choose(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(jnp.expand_dims(condition, range(condition.ndim, a.ndim)), a, b)

    return jax.tree.map(choose, true, false)


def _bucket(count: int, largest: int) -> int:
    """The least power of four that holds `count`, between the smallest and the largest batch."""
    size = _SMALLEST_BATCH
    while size < count:
        size *= 4
    return min(largest, size)


def _mark(image: np.ndarray, label: int, seed: int) -> np.uint32:
    """What tells an image from others and a seed from others, whatever the image's place."""
    return np.uint32(zlib.crc32(np.int64(seed).tobytes(), zlib.crc32(image.tobytes(), int(label))))
