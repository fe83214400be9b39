"""What a model is asked, and how well it answers: losses of batches, accuracy of a data set."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import zoqo_jax as zq
from experiments.finetune.data import Tokens, in_order, padded
from experiments.finetune.models import Decoder
from experiments.finetune.programs import programs

__all__ = [
    "Batch",
    "Scores",
    "answers",
    "batch_of",
    "continued",
    "divided",
    "evaluator",
    "log_probabilities",
    "loss_fn",
    "size_of",
]


class Batch(NamedTuple):
    """Examples side by side.

    Attributes:
      tokens: int32 (n, length), zeros after the ends.
      lengths: int32 (n,).
      begins: int32 (n,), where completions begin.
      answers: int32 (n,), numbers of the right words.
      words: int32 (choices,), or none for completions and for choices that are read apart.
      states: float32 (n, length, width), what the decoder reads in place of tokens, or None.
      learnt: bool (n, length), the tokens that are learnt, or None for all of a completion.
      weights: float32 (examples, choices), of choices that are read apart, of which n is examples *
        choices: what their log-probabilities are multiplied by, 0 where there is no such choice; or
        None.
      within: int32 (positions,), zeros, as many as the longest of such choices has tokens; or None.
    """

    tokens: Any
    lengths: Any
    begins: Any
    answers: Any
    words: Any
    states: Any = None
    learnt: Any = None
    weights: Any = None
    within: Any = None


class Scores(NamedTuple):
    """How well a data set is answered.

    Attributes:
      accuracy: fraction of examples whose right word is likeliest of the choices; of completions,
        fraction of tokens that are the likeliest.
      loss: mean over examples, nats.
      said: the number of the likeliest choice of each example; none for completions.
    """

    accuracy: float
    loss: float
    said: tuple[int, ...] = ()


def batch_of(tokens: Tokens, places: np.ndarray) -> Batch:
    """Some examples, side by side."""
    if tokens.firsts is not None:
        return _with_choices(tokens, places)
    batch = _rows(tokens, places)
    learnt = None if tokens.learnt is None else padded([tokens.learnt[i] for i in places])
    return batch._replace(answers=tokens.answers[places], learnt=learnt)


def _rows(tokens: Tokens, rows: np.ndarray) -> Batch:
    """Some sequences, side by side."""
    sequences = [tokens.sequences[i] for i in rows]
    lengths = np.array([len(ids) for ids in sequences], np.int32)
    states = None if tokens.states is None else padded([tokens.states[i] for i in rows])
    return Batch(padded(sequences), lengths, tokens.begins[rows], None, tokens.words, states)


def _with_choices(tokens: Tokens, places: np.ndarray) -> Batch:
    """Some examples with each of their choices, the first in place of those that some lack."""
    most, firsts, counts = tokens.counts.max(), tokens.firsts, tokens.counts
    number = np.arange(most)
    is_there = number < counts[places][:, None]
    rows = firsts[places][:, None] + np.where(is_there, number, 0)
    batch = _rows(tokens, rows.ravel())
    longest = int((batch.lengths - batch.begins).max())
    return batch._replace(
        answers=tokens.answers[places],
        weights=np.where(is_there, tokens.weights[rows], np.float32(0)),
        within=np.zeros(1 << (longest - 1).bit_length(), np.int32),  # few sizes, few programs
    )


def loss_fn(model: Decoder) -> Callable[[Any, Batch], jax.Array]:
    """A function (params, batch) -> mean loss over the examples, nats.

    Cross-entropy among the choices, as in MeZO, or the mean over the tokens of a completion or of
    a conversation's answers.
    """

    def loss(params: Any, batch: Batch) -> jax.Array:
        losses, _, _ = _answered(model, params, batch)
        return losses.mean()

    return loss


def divided(batch: Batch) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Batch]]:
    """What a batch has of each example, and what makes a batch of some of them.

    Returns:
      Arrays by name, with an axis of examples first; a function of some rows of them.

    Example:
      >>> rows = np.arange(6).reshape(3, 2)
      >>> whole = Batch(rows, rows[:, 0], rows[:, 1], rows[:, 0], np.array([7, 8]))
      >>> of_each, of_some = divided(whole)
      >>> some = of_some({name: x[:2] for name, x in of_each.items()})
      >>> some.tokens.tolist(), some.words.tolist()
      ([[0, 1], [2, 3]], [7, 8])
    """
    examples = len(batch.answers)
    known = {name: x for name, x in batch._asdict().items() if x is not None}
    of_all = {name: known.pop(name) for name in ("words", "within") if name in known}
    of_each = {name: x.reshape(examples, -1, *x.shape[1:]) for name, x in known.items()}

    def some(rows: dict[str, Any]) -> Batch:
        flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in rows.items()}
        return Batch(**flat, **of_all)

    return of_each, some


def evaluator(model: Decoder, batch_size: int = 32) -> Callable[[Any, Tokens], Scores]:
    """A function (quantized or float parameters, tokens) that reads all examples, short ones first.

    Data sets that are read by one evaluator share its compiled programs.
    """
    read = programs(answers(model))

    def evaluate(params: Any, tokens: Tokens) -> Scores:
        if not len(tokens):
            raise ValueError("tokens: there are no examples to read.")
        found = np.zeros((3, len(tokens)), np.float32)
        for places, count in in_order(tokens.lengths, size_of(tokens, batch_size)):
            answered = read(params, batch_of(tokens, places))
            found[:, places[:count]] = np.stack(answered)[:, :count]
        losses, right, said = found
        chooses = len(tokens.words) or tokens.firsts is not None
        words = tuple(said.astype(int).tolist()) if chooses else ()
        return Scores(float(right.mean()), float(losses.mean()), words)

    return evaluate


def size_of(tokens: Tokens, sequences: int) -> int:
    """How many examples are read at once, of at most so many sequences together.

    Example:
      >>> none = np.zeros(0, np.int32)
      >>> rows = [np.zeros(3)] * 8
      >>> size_of(Tokens(rows, none, none, none, firsts=np.array([0, 4, 8])), 32)
      8
    """
    return max(1, sequences // int(tokens.counts.max()))


def answers(model: Decoder) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array, jax.Array]]:
    """A function (quantized or float parameters, batch) -> float32 (examples,) three times.

    They are each example's loss, nats; how right it is: 1 or 0 of choices, else the fraction of
    tokens that are the likeliest; and the number of the likeliest choice.
    """

    def read(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        return zq.quaxify(lambda params: _answered(model, params, batch))(params)

    return read


def log_probabilities(model: Decoder) -> Callable[[Any, Batch], jax.Array]:
    """A function (quantized or float parameters, batch) -> float32 (examples, choices), nats.

    They are multiplied by the batch's weights, and -inf where an example has no such choice.
    """

    def of(params: Any, batch: Batch) -> jax.Array:
        if batch.weights is not None:
            return _of_choices(model, params, batch)
        tokens = batch.tokens if batch.states is None else batch.states
        logits = model.apply({"params": params}, tokens, at=batch.lengths - 1)
        return jax.nn.log_softmax(logits)[:, batch.words]

    return lambda params, batch: zq.quaxify(lambda params: of(params, batch))(params)


def continued(
    model: Decoder, params: Any, prompts: Sequence[np.ndarray], count: int
) -> list[list[int]]:
    """So many of the likeliest next tokens after each prompt, one after another.

    Args:
      model: a whole decoder.
      params: quantized or float parameters.
      prompts: tokens of each prompt.
      count: how many to add.
    """

    @jax.jit
    def likeliest(params: Any, tokens: jax.Array, at: jax.Array) -> jax.Array:
        read = zq.quaxify(lambda params: model.apply({"params": params}, tokens, at=at))
        return read(params).argmax(-1)

    tokens = padded([np.append(ids, np.zeros(count, ids.dtype)) for ids in prompts])
    begins = np.array([len(ids) for ids in prompts])
    rows = np.arange(len(prompts))
    for now in range(count):
        tokens[rows, begins + now] = likeliest(params, tokens, begins + now - 1)
    return [row[begin : begin + count].tolist() for row, begin in zip(tokens, begins, strict=True)]


def _answered(model: Decoder, params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of each example the loss, how right it is, and what was said, all float32 (n,)."""
    read = batch.tokens if batch.states is None else batch.states
    if len(batch.words):
        logits = model.apply({"params": params}, read, at=batch.lengths - 1, words=batch.words)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.answers)
        said = logits.argmax(-1)
        return losses, (said == batch.answers).astype(jnp.float32), said.astype(jnp.float32)
    if batch.weights is not None:
        scores = _of_choices(model, params, batch)
        losses = optax.softmax_cross_entropy_with_integer_labels(scores, batch.answers)
        said = scores.argmax(-1)
        return losses, (said == batch.answers).astype(jnp.float32), said.astype(jnp.float32)
    logits = model.apply({"params": params}, read[:, :-1])
    places, following = jnp.arange(1, batch.tokens.shape[1]), batch.tokens[:, 1:]
    if batch.learnt is None:
        counted = (places >= batch.begins[:, None]) & (places < batch.lengths[:, None])
    else:
        counted = batch.learnt[:, 1:]
    weights = counted.astype(jnp.float32) / counted.sum(-1, keepdims=True).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, following)
    right = (logits.argmax(-1) == following).astype(jnp.float32)
    losses, right = (losses * weights).sum(-1), (right * weights).sum(-1)
    return losses, right, jnp.zeros_like(losses)


def _of_choices(model: Decoder, params: Any, batch: Batch) -> jax.Array:
    """Weighted log-probabilities of choices that are read apart, (examples, choices)."""
    read = batch.tokens if batch.states is None else batch.states
    places = batch.begins + jnp.arange(len(batch.within))[:, None]  # of their tokens
    is_there = places < batch.lengths
    places = jnp.where(is_there, places, batch.lengths - 1)
    # Only the logits of these positions are made, (positions, n, vocabulary).
    logits = model.apply({"params": params}, read, at=places - 1)
    words = jnp.take_along_axis(batch.tokens, places.T, axis=1).T
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, words)
    sums = -jnp.where(is_there, losses, 0.0).sum(0).reshape(batch.weights.shape)
    return jnp.where(batch.weights > 0, sums * batch.weights, -jnp.inf)
