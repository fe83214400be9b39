"""The seed log of a run: a few bytes a step, from which its codes can be rebuilt.

Directions are made of the seed and a step's number, so that the differences of losses are all that
a run heard. With the run's settings and the file that it began from, they make its codes again, bit
for bit, without a forward pass.
"""

import hashlib
import json
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

import zoqo_jax as zq
from experiments.finetune.config import Config
from experiments.finetune.methods import transformation
from experiments.finetune.models import loading
from experiments.finetune.models.loading import Checkpoint
from experiments.finetune.parts import adapt
from zoqo_jax.interop import gguf
from zoqo_jax.interop.files import replacing

__all__ = ["rebuild", "save"]


def save(path: Path, config: Config, model: Checkpoint, log: np.ndarray) -> None:
    """Write the differences of a run, its settings, and what tells the file that it began from."""
    with replacing(path) as file:
        np.savez_compressed(
            file, log=log, settings=json.dumps(config.without_places), base=_digest(model.path)
        )


def rebuild(path: Path, model: str) -> tuple[Config, Checkpoint, Any]:
    """What a run trained, from its seed log.

    Args:
      path: of the log.
      model: what the run began from, as `Config.model`.

    Returns:
      The run's settings, what it trained (the model or its last layers), the trained parameters.

    Raises:
      ValueError: not a seed log, or of another model.
    """
    try:
        with path.open("rb") as whole, np.load(whole, allow_pickle=False) as file:
            log, base = file["log"], str(file["base"])
            settings = json.loads(str(file["settings"]))
        for name in {"targets", "looks"} & settings.keys():
            settings[name] = tuple(settings[name])
        config = Config(model=model, output=str(path.parent), data="-", **settings)
    except (KeyError, TypeError, EOFError, ValueError, BadZipFile) as error:
        raise ValueError(f"log: {path} is no seed log of a run ({error}).") from error
    whole = loading.load(model)
    if (found := _digest(whole.path)) != base:
        raise ValueError(f"model: {model} has digest {found}, the log's model had {base}.")
    _, part = loading.split(whole, config.layers_of(whole.architecture.depth))
    return config, part, zq.replay(adapt(part, config), log, transformation(config))


def _digest(path: Path) -> str:
    """Sixteen letters that tell a file of weights, or a folder of them, from another."""
    digest = hashlib.sha256()
    for part in sorted(path.glob("*.safetensors")) if path.is_dir() else gguf.parts(path):
        with part.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
