"""States: what the frozen layers of a decoder make of examples, computed once and kept on disk.

Where only the last layers train, all below them says the same of an example in every step. It is
computed before the first step, in groups that depend on nothing but the examples and the order in
which they are asked for, so that a run which goes on reads the same bits, and is read from the file
a few examples at a time: it takes no memory.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
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
    """The states of sequences, in a file.

    Args:
      path: of the file, float32, one sequence after another, with holes for those nobody reads.
      lengths: tokens of each sequence.
      width: of a state.
      groups: the sequences that are read, in groups that are computed together: their places, and
        how many are not there twice.
    """

    def __init__(
        self, path: Path, lengths: list[int], width: int, groups: list[tuple[np.ndarray, int]]
    ) -> None:
        self.path, self.width, self.groups = path, width, groups
        self.begins = np.concatenate([[0], np.cumsum(lengths)])
        self._is_there = np.zeros(len(lengths), bool)
        for places, _ in groups:
            self._is_there[places] = True

    def __getitem__(self, place: int) -> np.ndarray:
        """Float32 (length, width)."""
        if not self._is_there[place]:
            raise IndexError(f"place must be of a sequence that was asked for, got {place}.")
        begin, end = self.begins[place], self.begins[place + 1]
        count, offset = (end - begin) * self.width, begin * self.width * 4
        found = np.fromfile(self.path, "<f4", count=count, offset=offset)
        return found.reshape(end - begin, self.width)


def with_states(
    below: Checkpoint,
    tokens: Tokens,
    folder: Path,
    batches: Iterable[np.ndarray] | None = None,
    *,
    progress: bool = True,
) -> Tokens:
    """The examples with what the layers below make of them.

    Args:
      below: the first layers of a model.
      tokens: the examples.
      folder: where to keep the states; what was computed before is found again.
      batches: the places of the examples that will be read, of one batch after another, of one
        size; an example's states are computed with the first batch that has it. None: all, in an
        order of their own, so that whoever reads the same examples finds the same states.
      progress: whether to show a progress bar.
    """
    width, lengths = below.architecture.width, list(map(len, tokens.sequences))
    groups = list(in_order(lengths, _BATCH) if batches is None else _as_asked(tokens, batches))
    name = _digest(below, tokens, () if batches is None else groups)
    states = States(folder / f"{name}.states", lengths, width, groups)
    if not states.path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(states.path) as file:
            _compute(below, tokens, states, file, progress)
    return tokens.beside(states)


def _as_asked(tokens: Tokens, batches: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """Groups of the sequences of one batch after another, each sequence once."""
    lengths = np.array(list(map(len, tokens.sequences)), int)
    is_new = np.ones(len(lengths), bool)
    for batch in batches:
        rows = tokens.rows(batch)
        rows = rows[is_new[rows]]
        is_new[rows] = False
        size = _BATCH if tokens.firsts is not None else min(_BATCH, len(batch))
        for places, count in in_order(lengths[rows], size):
            yield rows[places], count
        if not is_new.any():
            return


def _compute(below: Checkpoint, tokens: Tokens, states: States, file: Any, progress: bool) -> None:
    @programs
    def read(params: Any, batch: np.ndarray) -> jax.Array:
        return zq.quaxify(lambda params: below.decoder.apply({"params": params}, batch))(params)

    total = sum(count for _, count in states.groups)
    with tqdm(
        total=total, desc="reading with frozen layers", unit="example", disable=not progress
    ) as bar:
        for places, count in states.groups:
            found = np.asarray(read(below.params, padded([tokens.sequences[i] for i in places])))
            for place, state in zip(places[:count], found, strict=False):
                file.seek(int(states.begins[place]) * states.width * 4)
                length = len(tokens.sequences[place])
                file.write(state[:length].astype("<f4", copy=False).tobytes())
            bar.update(count)


def _digest(below: Checkpoint, tokens: Tokens, groups: Sequence[tuple[np.ndarray, int]]) -> str:
    """All that the states depend on, in a few letters; no groups: those of all sequences."""
    digest = hashlib.sha256(repr((below.decoder, jax.tree.structure(below.params))).encode())
    asked = [places for places, _ in groups]
    for array in (*jax.tree.leaves(below.params), *tokens.sequences, *asked):
        digest.update(repr((array.shape, str(array.dtype))).encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()[:16]
