"""States: what the frozen layers of a decoder make of examples, computed once and kept on disk.

Where only the last layers train, all below them says the same of an example in every step. It is
computed before the first step, in batches that depend on nothing but the examples, so that a run
which goes on reads the same bits, and is read from the file a few examples at a time: it takes no
memory.
"""

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import zoqo_jax as zq
from experiments.finetune.data import Tokens, in_order, padded
from experiments.finetune.models.loading import Checkpoint
from experiments.finetune.programs import programs
from zoqo_jax.interop.files import replacing

__all__ = ["States", "with_states"]

_BATCH = 32


class States:
    """The states of examples, in a file.

    Args:
      path: of the file, float32, one example after another.
      lengths: tokens of each example.
      width: of a state.
    """

    def __init__(self, path: Path, lengths: list[int], width: int) -> None:
        self.path, self.width = path, width
        self.begins = np.concatenate([[0], np.cumsum(lengths)])

    def __getitem__(self, place: int) -> np.ndarray:
        """Float32 (length, width)."""
        begin, end = self.begins[place], self.begins[place + 1]
        count, offset = (end - begin) * self.width, begin * self.width * 4
        found = np.fromfile(self.path, "<f4", count=count, offset=offset)
        return found.reshape(end - begin, self.width)


def with_states(
    below: Checkpoint, tokens: Tokens, folder: Path, *, progress: bool = True
) -> Tokens:
    """The examples with what the layers below make of them.

    Args:
      below: the first layers of a model.
      tokens: the examples.
      folder: where to keep the states; what was computed before is found again.
      progress: whether to show a progress bar.
    """
    width, lengths = below.architecture.width, list(map(len, tokens.sequences))
    states = States(folder / f"{_digest(below, tokens)}.states", lengths, width)
    if not states.path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(states.path) as file:
            _compute(below, tokens, states, file, progress)
    return tokens.beside(states)


def _compute(below: Checkpoint, tokens: Tokens, states: States, file: Any, progress: bool) -> None:
    @programs
    def read(params: Any, batch: np.ndarray) -> jax.Array:
        return zq.quaxify(lambda params: below.decoder.apply({"params": params}, batch))(params)

    lengths = list(map(len, tokens.sequences))
    with tqdm(
        total=len(lengths), desc="reading with frozen layers", unit="example", disable=not progress
    ) as bar:
        for places, count in in_order(lengths, _BATCH):
            found = np.asarray(read(below.params, padded([tokens.sequences[i] for i in places])))
            for place, state in zip(places[:count], found, strict=False):
                file.seek(int(states.begins[place]) * states.width * 4)
                length = len(tokens.sequences[place])
                file.write(state[:length].astype("<f4", copy=False).tobytes())
            bar.update(count)


def _digest(below: Checkpoint, tokens: Tokens) -> str:
    """All that the states depend on, in a few letters."""
    digest = hashlib.sha256(repr((below.decoder, jax.tree.structure(below.params))).encode())
    for array in (*jax.tree.leaves(below.params), *tokens.sequences):
        digest.update(repr((array.shape, str(array.dtype))).encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()[:16]
