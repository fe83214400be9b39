"""Examples as tokens, and how they are put side by side."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

__all__ = ["Tokens", "batches", "checked", "in_order", "padded"]

_MULTIPLE = 8  # lengths are padded to multiples of it, so that few programs are compiled


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Examples as tokens.

    An example is a sequence; one whose choices are read apart has a sequence for each of them.

    Attributes:
      sequences: int32 tokens: a prompt, and its completion or one of its choices.
      begins: where completions begin, int32 (sequences,); where words are chosen, the length.
      answers: int32 (examples,), numbers of the right choices; zeros for completions.
      words: int32 (choices,), the tokens to choose from at the end of a prompt; none where choices
        are read apart, or where there are none.
      states: of each sequence, float32 (its length, width), what a decoder reads in place of
        tokens; None where it reads tokens.
      learnt: of each sequence, bool (its length,), which tokens are to be learnt; None: all of a
        completion.
      firsts: int32 (examples + 1,), the number of each example's first sequence, where choices are
        read apart; None elsewhere.
      weights: float32 (sequences,), what the log-probability of a choice that is read apart is
        multiplied by; None elsewhere.
      origins: int32 (examples,), the number of the text that each is of, where a text may be
        several examples; None where each is one.
    """

    sequences: list[np.ndarray]
    begins: np.ndarray
    answers: np.ndarray
    words: np.ndarray
    states: Any = None
    learnt: list[np.ndarray] | None = None
    firsts: np.ndarray | None = None
    weights: np.ndarray | None = None
    origins: np.ndarray | None = None

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.sequences) if self.firsts is None else len(self.firsts) - 1

    @property
    def content(self) -> list[Any]:
        """The arrays that examples are made of, without what was computed of them."""
        return [
            self.sequences, self.begins, self.answers, self.words, self.learnt, self.firsts,
            self.weights,
        ]  # fmt: skip

    @property
    def lengths(self) -> np.ndarray:
        """The number of tokens in the longest sequence of each example."""
        found = np.array([len(ids) for ids in self.sequences], int)
        return found if self.firsts is None else np.maximum.reduceat(found, self.firsts[:-1])

    @property
    def counts(self) -> np.ndarray:
        """How many sequences each example has."""
        return np.ones(len(self), int) if self.firsts is None else np.diff(self.firsts)

    def rows(self, places: Sequence[int] | np.ndarray) -> np.ndarray:
        """The numbers of the sequences of some examples."""
        if self.firsts is None:
            return np.asarray(places, int)
        spans = [np.arange(self.firsts[i], self.firsts[i + 1]) for i in places]
        return np.concatenate([np.zeros(0, int), *spans])

    def take(self, places: Sequence[int] | np.ndarray) -> "Tokens":
        """Some of the examples."""
        places = np.asarray(places, int)
        rows, firsts = self.rows(places), None
        if self.firsts is not None:
            firsts = np.cumsum([0, *self.counts[places]], dtype=np.int32)

        def some(values: Any) -> list[Any] | None:
            return None if values is None else [values[i] for i in rows]

        return Tokens(
            sequences=[self.sequences[i] for i in rows],
            begins=self.begins[rows],
            answers=self.answers[places],
            words=self.words,
            states=some(self.states),
            learnt=some(self.learnt),
            firsts=firsts,
            weights=None if self.weights is None else self.weights[rows],
            origins=None if self.origins is None else self.origins[places],
        )

    def beside(self, states: Any) -> "Tokens":
        """The same examples, with states."""
        return dataclasses.replace(self, states=states)


def checked(
    prompts: Sequence[str],
    sequences: list[list[int]],
    begins: list[int],
    window: int,
    *,
    is_prompt: bool = False,
    places: Sequence[str] = (),
) -> Tokens:
    """Examples of one sequence each, of a length that the model can read.

    Args:
      prompts: what they begin with, for messages about them.
      sequences: their tokens.
      begins: where their completions begin.
      window: the most tokens that the model reads.
      is_prompt: whether nothing follows the prompts.
      places: where each was read, for messages, too.

    Raises:
      ValueError: one is empty, too long, or has no completion; it is named.
    """
    for i, (prompt, ids, begin) in enumerate(zip(prompts, sequences, begins, strict=True)):
        if not 0 < begin <= len(ids) <= window or (begin == len(ids) and not is_prompt):
            where = f"{places[i]}: " if places else ""
            raise ValueError(
                f"{where}an example must have 1 to {window} tokens, prompt and completion at least "
                f"one each, got {len(ids)}: {prompt[:60]!r}."
            )
    arrays, none = [np.array(ids, np.int32) for ids in sequences], np.zeros(0, np.int32)
    return Tokens(arrays, np.array(begins, np.int32), np.zeros(len(arrays), np.int32), none)


def batches(lengths: np.ndarray, size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The places of an epoch's batches: at random, but of like lengths; the rest is left out.

    Args:
      lengths: tokens of each example.
      size: examples in a batch.
      seed: of the run.
      epoch: its number.

    Raises:
      ValueError: fewer examples than a batch holds.

    Example:
      >>> lengths = np.array([9, 3, 8, 4])
      >>> sorted(sorted(batch.tolist()) for batch in batches(lengths, 2, seed=0, epoch=0))
      [[0, 2], [1, 3]]
    """
    if len(lengths) < size:
        raise ValueError(f"batch_size must be at most {len(lengths)} examples, got {size}.")
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    whole = len(order) // size * size
    heaps = np.array_split(order[:whole], -(-whole // (16 * size)))
    like = np.concatenate([heap[np.argsort(lengths[heap], kind="stable")] for heap in heaps])
    found = like.reshape(-1, size)
    return list(found[rng.permutation(len(found))])


def in_order(lengths: Sequence[int] | np.ndarray, size: int) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of one size, short ones first: their places, and how many are not there twice.

    Example:
      >>> [(places.tolist(), count) for places, count in in_order([3, 9, 1], 2)]
      [([2, 0], 2), ([1, 1], 1)]
    """
    order = np.argsort(lengths, kind="stable")
    for begin in range(0, len(order), size):
        some = order[begin : begin + size]
        yield np.resize(some, size), len(some)


def padded(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """Sequences (or states) side by side, zeros after their ends; a few lengths only.

    Example:
      >>> padded([np.array([1, 2, 3]), np.array([4])]).shape
      (2, 8)
    """
    longest, first = max(map(len, sequences)), sequences[0]
    shape = len(sequences), -(-longest // _MULTIPLE) * _MULTIPLE, *first.shape[1:]
    table = np.zeros(shape, first.dtype)
    for row, ids in zip(table, sequences, strict=True):
        row[: len(ids)] = ids
    return table
