"""The training examples of a run, and those of each step: all depends on settings and the step."""

import numpy as np

from experiments.command import say
from experiments.finetune import data, objective
from experiments.finetune.config import Config
from experiments.finetune.models.loading import Checkpoint

__all__ = ["Batches", "training_tokens"]


class Batches:
    """The batch of each step.

    Args:
      tokens: the training examples.
      config: of the run.
    """

    def __init__(self, tokens: data.Tokens, config: Config) -> None:
        self._tokens, self._lengths = tokens, tokens.lengths
        self._size, self._seed = config.batch_size, config.seed
        self._epoch: tuple[int, list[np.ndarray]] = (-1, [])

    def __call__(self, step: int) -> objective.Batch:
        """The batch of a step."""
        return objective.batch_of(self._tokens, self.places(step))

    def places(self, step: int) -> np.ndarray:
        """Which examples it has."""
        epoch, place = divmod(step, len(self._tokens) // self._size)
        if self._epoch[0] != epoch:
            self._epoch = epoch, data.batches(self._lengths, self._size, self._seed, epoch)
        return self._epoch[1][place]


def training_tokens(texts: data.Texts, model: Checkpoint, config: Config) -> data.Tokens:
    """The training examples that are short enough."""
    window = model.architecture.context
    if config.max_tokens > window:
        raise ValueError(
            f"max_tokens must be at most {window}, the model's context, got {config.max_tokens}."
        )
    tokens = data.encode_for(texts, model, config.normalise)
    short = np.flatnonzero(tokens.lengths <= config.max_tokens)
    if len(short) < len(tokens):
        say(
            f"data: {len(tokens) - len(short)} of {len(tokens)} training examples have more than "
            f"max_tokens={config.max_tokens} and are left out"
        )
    if len(short) < config.batch_size:
        raise ValueError(
            f"batch_size must be at most {len(short)}, the training examples of at most "
            f"{config.max_tokens} tokens, got {config.batch_size}."
        )
    return tokens.take(short)
