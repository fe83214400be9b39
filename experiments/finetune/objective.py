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

__all__ = ["Batch", "Scores", "batch_of", "continued", "evaluator", "loss_fn"]


class Batch(NamedTuple):
    """Examples side by side.

    Attributes:
      tokens: int32 (n, length), zeros after the ends.
      lengths: int32 (n,).
      begins: int32 (n,), where completions begin.
      answers: int32 (n,), numbers of the right words.
      words: int32 (choices,), or none for completions.
      states: float32 (n, length, width), what the decoder reads in place of tokens, or None.
    """

    tokens: Any
    lengths: Any
    begins: Any
    answers: Any
    words: Any
    states: Any = None


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
    sequences = [tokens.sequences[i] for i in places]
    lengths = np.array([len(ids) for ids in sequences], np.int32)
    states = None if tokens.states is None else padded([tokens.states[i] for i in places])
    begins, answers = tokens.begins[places], tokens.answers[places]
    return Batch(padded(sequences), lengths, begins, answers, tokens.words, states)


def loss_fn(model: Decoder) -> Callable[[Any, Batch], jax.Array]:
    """A function (params, batch) -> mean loss over the examples, nats.

    Cross-entropy among the choices, as in MeZO, or the mean over a completion's tokens.
    """

    def loss(params: Any, batch: Batch) -> jax.Array:
        losses, _, _ = _answered(model, params, batch)
        return losses.mean()

    return loss


def evaluator(model: Decoder, batch_size: int = 32) -> Callable[[Any, Tokens], Scores]:
    """A function (quantized or float parameters, tokens) that reads all examples, short ones first.

    Data sets that are read by one evaluator share its compiled programs.
    """

    @programs
    def read(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array]:
        return zq.quaxify(lambda params: _answered(model, params, batch))(params)

    def evaluate(params: Any, tokens: Tokens) -> Scores:
        if not len(tokens):
            raise ValueError("tokens: there are no examples to read.")
        found = np.zeros((3, len(tokens)), np.float32)
        for places, count in in_order(tokens, batch_size):
            answers = read(params, batch_of(tokens, places))
            found[:, places[:count]] = np.stack(answers)[:, :count]
        losses, right, said = found
        words = tuple(said.astype(int).tolist()) if len(tokens.words) else ()
        return Scores(float(right.mean()), float(losses.mean()), words)

    return evaluate


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
    logits = model.apply({"params": params}, read[:, :-1])
    places, following = jnp.arange(1, batch.tokens.shape[1]), batch.tokens[:, 1:]
    counted = (places >= batch.begins[:, None]) & (places < batch.lengths[:, None])
    weights = counted.astype(jnp.float32) / counted.sum(-1, keepdims=True).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, following)
    right = (logits.argmax(-1) == following).astype(jnp.float32)
    losses, right = (losses * weights).sum(-1), (right * weights).sum(-1)
    return losses, right, jnp.zeros_like(losses)
