"""A fine-tuning run as a task of an elastic one, and what is written of it."""

import functools
from pathlib import Path
from typing import Any

from experiments.cluster import digest
from experiments.elastic.task import Task
from experiments.files import plain
from experiments.finetune import data, objective, outputs, states
from experiments.finetune.batches import Batches, training_tokens
from experiments.finetune.config import Config
from experiments.finetune.methods import transformation
from experiments.finetune.models import loading
from experiments.finetune.parts import Parts, adapt

__all__ = ["of_finetuning", "write"]


def of_finetuning(config: Config) -> Task:
    """The task of a fine-tuning run; dev and test examples are not looked at.

    Raises:
      ValueError: data, model and settings that do not fit each other.
    """
    checkpoint = loading.load(config.model)
    below, model = loading.split(checkpoint, config.layers_of(checkpoint.architecture.depth))
    params = adapt(model, config)
    parts = Parts.of(params, config)
    texts = data.load_all(config.data, config.dev, config.test)
    tokens = training_tokens(texts["train"], checkpoint, config)
    of_model, of_data = digest(checkpoint.params), digest(tokens.content)
    del checkpoint

    @functools.cache  # the head evaluates nothing, and reads no example with the layers below
    def batches() -> Batches:
        cache = Path(config.cache or Path(config.output) / "states")
        read = tokens
        if below is not None:
            read = states.with_states(below, tokens, cache, progress=False)
        return Batches(read, config)

    @functools.lru_cache(maxsize=1)
    def divided(step: int) -> Any:
        return objective.divided(batches()(step))

    def part(step: int, number: int) -> objective.Batch:
        of_each, some = divided(step)
        size = config.batch_size // config.parts
        rows = slice(number * size, (number + 1) * size)
        return some({name: x[rows] for name, x in of_each.items()})

    return Task(
        params=params,
        split=parts.split,
        join=parts.join,
        tx=transformation(config),
        value_fn=objective.loss_fn(model.decoder),
        part=part,
        parts=config.parts,
        steps=config.steps,
        depends_on={**plain(config.without_places), "model": of_model, "data": of_data},
    )


def write(config: Config, params: Any) -> Path:
    """Write what was trained, as `experiments.finetune` does."""
    checkpoint = loading.load(config.model)
    _, model = loading.split(checkpoint, config.layers_of(checkpoint.architecture.depth))
    del checkpoint
    return outputs.write_trained(Path(config.output), config, model._replace(params={}), params)
