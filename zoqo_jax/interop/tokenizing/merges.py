"""Which tokens are put together of which others, for a vocabulary that says only how good each is.

SentencePiece's files list tokens and scores; byte-pair encoding wants pairs of tokens, the best
first. Every way of cutting a token into two others is such a pair: half a million of them for the
262,144 tokens of Gemma. Cuts are looked up by polynomial hashes of prefixes and suffixes
(R. M. Karp and M. O. Rabin, Efficient randomized pattern-matching algorithms, 1987), all at once,
which takes a third of the time of a loop over strings.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["of_scores"]

_FACTOR = 0x9E3779B97F4A7C15  # odd, so that it can be divided by modulo 2^64
_AT_ONCE = 1 << 16  # tokens: more take more memory, and no less time


def of_scores(tokens: Sequence[str], scores: np.ndarray) -> list[tuple[str, str]]:
    """Pairs of tokens that together are a token, that of the highest score first.

    Of the same score, those whose left token has the smallest number come first, then whose right
    one has.

    Args:
        tokens: all different, none empty.
        scores: (tokens,), of each.

    Raises:
        ValueError: two tokens have the same hash, or what can be put together has only one score.

    Examples:
        >>> of_scores(["a", "b", "c", "ab", "abc", "bc"], np.array([0, 0, 0, -1, -3, -2.0]))
        [('a', 'b'), ('b', 'c'), ('a', 'bc'), ('ab', 'c')]
    """
    if not tokens:
        return []
    whole, left, right = _cuts(tokens)
    rank = np.unique(-scores, return_inverse=True)[1]
    if (whole[1:] != whole[:-1]).any() and (rank[whole] == rank[whole[:1]]).all():
        raise ValueError("tokenizer.ggml.scores must differ: they say what is put together first.")
    order = np.argsort(left * len(tokens) + right)
    order = order[np.argsort(rank[whole[order]], kind="stable")]
    texts = np.array(tokens, object)
    return list(zip(texts[left[order]].tolist(), texts[right[order]].tolist(), strict=True))


def _cuts(tokens: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of tokens, and of the two that each is made of, for all ways of making one.

    A pair of the same hash that is no pair, one in 10^19 or made on purpose, is found out when the
    tokenizer is made: it wants the two to be a token together.
    """
    letters = np.frombuffer("".join(tokens).encode("utf-32-le"), "<u4").astype(np.uint64)
    lengths = np.fromiter(map(len, tokens), np.int64, len(tokens))
    ends = np.cumsum(lengths)
    begins = ends - lengths
    # Of a text from a to b the hash is the sum of letter * factor^place, over factor^a.
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(letters * _powers(1, len(letters)))])
    shift = _powers(-1, len(letters) + 1)
    hashes = (sums[ends] - sums[begins]) * shift[begins]
    order = np.argsort(hashes)
    ordered = hashes[order]
    if (ordered[1:] == ordered[:-1]).any():
        raise ValueError("tokenizer.ggml.tokens: two tokens have the same hash.")

    def numbered(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of tokens of some hashes, and which there are."""
        at = np.minimum(np.searchsorted(ordered, hashes), len(tokens) - 1)
        return order[at], ordered[at] == hashes

    found = []
    for start in range(0, len(tokens), _AT_ONCE):
        cuts = lengths[start : start + _AT_ONCE] - 1
        whole = np.repeat(np.arange(start, start + len(cuts)), cuts)
        within = np.arange(len(whole)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
        place = begins[whole] + within + 1
        left, is_token = numbered((sums[place] - sums[begins[whole]]) * shift[begins[whole]])
        whole, place, left = whole[is_token], place[is_token], left[is_token]
        right, is_token = numbered((sums[ends[whole]] - sums[place]) * shift[place])
        found.append((whole[is_token], left[is_token], right[is_token]))
    whole, left, right = (np.concatenate(part) for part in zip(*found, strict=True))
    return whole, left, right


def _powers(sign: int, count: int) -> np.ndarray:
    """The factor, or for -1 its inverse, to the powers 0, 1, 2, ... modulo 2^64."""
    factors = np.full(count, pow(_FACTOR, sign, 1 << 64), np.uint64)
    factors[:1] = 1
    return np.cumprod(factors)
