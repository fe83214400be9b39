"""Vectors of words, which know no labels and need no download."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

__all__ = ["bags", "numbers", "vectors"]

_LEAST_SEEN = 4  # a word that fewer sentences hold has no number


def numbers(tokens: Sequence[list[str]]) -> dict[str, int]:
    """The words that enough sentences hold, numbered from 1.

    Example:
      >>> numbers([["a", "fine", "film"], ["a", "film"], ["fine", "film"], ["film"]])
      {'film': 1}
    """
    seen = Counter(word for sentence in tokens for word in set(sentence))
    kept = sorted(word for word, count in seen.items() if count >= _LEAST_SEEN)
    return {word: i + 1 for i, word in enumerate(kept)}


def bags(tokens: Sequence[list[str]], number: dict[str, int]) -> np.ndarray:
    """A row for each sentence, 1 where it holds a word.

    Example:
      >>> bags([["a", "film"], ["film", "a", "film"]], {"film": 1, "fine": 2})
      array([[1., 0.], [1., 0.]], dtype=float32)
    """
    table = np.zeros((len(tokens), len(number) + 1), np.float32)
    for row, sentence in zip(table, tokens, strict=True):
        row[[number.get(word, 0) for word in sentence]] = 1.0
    return table[:, 1:]


def vectors(bags: np.ndarray, width: int) -> np.ndarray:
    """So many numbers for each word, vectors one long.

    They are the leading components of the positive pointwise mutual information of two words to be
    in one sentence (Bullinaria and Levy, 2007; Levy and Goldberg, 2014), found by subspace
    iteration from a random start (Halko, Martinsson and Tropp, 2011). A word that tells nothing of
    others has zeros.

    Args:
      bags: of the sentences to learn from.
      width: of a vector.

    Raises:
      ValueError: there are fewer words than a vector has numbers.
    """
    if bags.shape[1] < width:
        raise ValueError(
            f"sentences: {bags.shape[1]} words that occur {_LEAST_SEEN} times are too few for "
            f"vectors of {width} numbers."
        )
    often = bags.sum(0)
    together = (bags.T @ bags) * (len(bags) / np.outer(often, often))
    information = np.log(np.maximum(together, 1.0))
    basis = np.random.default_rng(0).normal(size=(len(often), width)).astype(np.float32)
    for _ in range(3):
        basis = np.linalg.qr(information @ basis)[0]
    rows = information @ basis
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
