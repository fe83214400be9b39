"""ZOQO, CAQ-ZO and their kin in NumPy, written from the papers' formulas.

Bar & Giryes, "ZOQO", arXiv:2501.06736, Algorithm 1; Shu & Zhu, "CAQ-ZO", arXiv:2605.10673; Zhou et
al., "QuZO", arXiv:2502.12346.
Directions and random words come from outside, drawn by `zoqo_jax.directions` and
`zoqo_jax.xla.random_bits`; everything that is done with them is done here: clamp, mask, reflect,
votes, steps. Real numbers are float32, as the library's are.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

F = np.float32


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One quantized array: codes `n` on a grid `low .. high`, standing for `scale * levels[n]`."""

    codes: np.ndarray  # int64
    scale: np.ndarray  # float32, in the shape of codes
    levels: np.ndarray  # float32
    low: int
    high: int

    @property
    def step(self) -> np.ndarray:
        """s, the distance between levels; the mean distance on a companded grid."""
        span = float(self.levels[self.high]) - float(self.levels[self.low])
        return self.scale * F(span / (self.high - self.low))

    def at(self, codes: np.ndarray) -> np.ndarray:
        assert codes.min() >= self.low and codes.max() <= self.high
        return self.scale * self.levels[codes]

    def with_codes(self, codes: np.ndarray) -> "Leaf":
        return dataclasses.replace(self, codes=np.clip(codes, self.low, self.high))


Loss = Callable[[list[np.ndarray]], np.float32]


def whole_steps(length: float, s: np.ndarray) -> np.ndarray:
    """max(floor(length / s), 1), forgiving a quotient that float32 put just below a whole one."""
    return np.maximum(np.floor(F(length) / s * (1 + 1e-6)), 1).astype(np.int64)


def leaves_the_grid(leaf: Leaf, u: np.ndarray) -> np.ndarray:
    return (leaf.codes + abs(u) > leaf.high) | (leaf.codes - abs(u) < leaf.low)


def end_point(leaf: Leaf, u: np.ndarray, boundary: str) -> np.ndarray:
    """The codes at n + u, brought back to the grid."""
    if boundary == "mask":
        return np.where(leaves_the_grid(leaf, u), leaf.codes, leaf.codes + u)
    n = leaf.codes + u
    if boundary == "reflect":
        return np.where(
            n > leaf.high, 2 * leaf.high - n, np.where(n < leaf.low, 2 * leaf.low - n, n)
        )
    return np.minimum(np.maximum(n, leaf.low), leaf.high)


def differences(pairs: np.ndarray) -> np.ndarray:
    """l+ - l- of a step's queries in float32, to 16 significant bits of the largest.

    They are multiples of one power of two (halves to even), with so many bits that a float32 holds
    any sum of them, none beyond 2^112. What is not finite counts for nothing.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        raw = pairs[:, 0].astype(F) - pairs[:, 1].astype(F)
    raw = np.where(np.isfinite(raw), raw, F(0)).astype(np.float64).clip(-(2.0**112), 2.0**112)
    bits = min(16, 24 - math.ceil(math.log2(len(raw))))
    _, exponent = np.frexp(abs(raw).max())  # the largest is a fraction in [1/2, 1) of 2^exponent
    return np.ldexp(np.rint(np.ldexp(raw, bits - exponent)), exponent - bits).astype(F)


def rounded_end_point(leaf: Leaf, u: np.ndarray, distance: np.float32) -> np.ndarray:
    """The legal codes whose levels are nearest to those at n, `distance` * u further."""
    legal = leaf.levels[leaf.low : leaf.high + 1]
    ends = leaf.levels[leaf.codes] + distance * u.astype(F)
    return leaf.low + abs(ends[..., None] - legal).argmin(axis=-1)


def largest(leaf: Leaf) -> np.float32:
    """The largest magnitude of a legal level."""
    return abs(leaf.levels[leaf.low : leaf.high + 1]).max()


def query(
    leaves: Sequence[Leaf],
    us: Sequence[np.ndarray],
    loss: Loss,
    boundary: str,
    radius: float | None = None,
) -> list[np.float32]:
    """l(n + u) and l(n - u), or off the grid, `radius` of the largest level to either side."""

    def end(leaf: Leaf, u: np.ndarray) -> np.ndarray:
        if radius is None:
            return end_point(leaf, u, boundary)
        return rounded_end_point(leaf, u, F(radius) * largest(leaf))

    return [
        loss([leaf.at(end(leaf, side * u)) for leaf, u in zip(leaves, us, strict=True)])
        for side in (1, -1)
    ]


def effective(leaf: Leaf, u: np.ndarray, boundary: str) -> np.ndarray:
    """The direction that was probed; under "mask" without what would leave the grid."""
    return np.where(leaves_the_grid(leaf, u), 0, u) if boundary == "mask" else u


def zoqo_step(
    leaves: Sequence[Leaf],
    directions: Sequence[Sequence[np.ndarray]],
    loss: Loss,
    *,
    learning_rate: float,
    vote: str,
    boundary: str,
    dither: Sequence[np.ndarray] | None = None,
) -> tuple[list[Leaf], np.ndarray]:
    """One step of Algorithm 1.

    Args:
        leaves: the arrays.
        directions: u for each query and leaf.
        loss: of the arrays' values.
        learning_rate: eta.
        vote: for several queries, "mean" or "majority".
        boundary: what happens at the grid's edges.
        dither: U in [0, 1) for every coordinate, or None for E = max(floor(eta / s), 1).

    Returns:
        The arrays after it, and l+ - l- of each query.
    """
    heard = differences(np.array([query(leaves, us, loss, boundary) for us in directions], F))
    after = []
    for i, leaf in enumerate(leaves):
        total = np.zeros(leaf.codes.shape, F)
        for d, us in zip(heard, directions, strict=True):
            u = effective(leaf, us[i], boundary)
            total += np.sign(d) * np.sign(u).astype(F) if vote == "majority" else d * u.astype(F)
        g = np.sign(total).astype(np.int64)
        if dither is None:
            E = whole_steps(learning_rate, leaf.step)
        else:
            E = np.floor((F(learning_rate) / leaf.step).astype(np.float64) + dither[i]).astype(
                np.int64
            )
        after.append(leaf.with_codes(leaf.codes - E * g))
    return after, heard


def caq_zo_step(
    leaves: Sequence[Leaf],
    directions: Sequence[Sequence[np.ndarray]],
    loss: Loss,
    project: Callable[[int, np.ndarray], np.ndarray],
    *,
    learning_rate: float,
    boundary: str,
    radius: float | None = None,
) -> tuple[list[Leaf], np.ndarray]:
    """n <- Proj(n - eta g_z), g_z the mean over queries of (l+ - l-) / 2 r, in codes (Delta = 1).

    Off the grid, g_z is the mean of (l+ - l-) / (2 m) r, m being the radius in codes on average.

    Args:
        leaves: the arrays.
        directions: r for each query and leaf.
        loss: of the arrays' values.
        project: (leaf's index, float32 step in codes) -> whole codes.
        learning_rate: eta.
        boundary: what happens at the grid's edges.
        radius: of off-grid queries, as a part of the largest level, or None.

    Returns:
        The arrays after it, and l+ - l- of each query.
    """
    pairs = [query(leaves, rs, loss, boundary, radius) for rs in directions]
    heard = differences(np.array(pairs, F))
    after = []
    for i, leaf in enumerate(leaves):
        factor = F(1 / (2 * len(directions)))
        if radius is not None:
            codes = largest(leaf) / (
                np.ptp(leaf.levels[leaf.low : leaf.high + 1]) / F(leaf.high - leaf.low)
            )
            factor = factor / codes / F(radius)
        factor = F(learning_rate) * factor
        total = np.zeros(leaf.codes.shape, F)
        for d, rs in zip(heard, directions, strict=True):
            total += d * effective(leaf, rs[i], boundary).astype(F)
        after.append(leaf.with_codes(leaf.codes + project(i, -factor * total)))
    return after, heard


def quzo_step(
    leaves: Sequence[Leaf],
    probed: Sequence[Sequence[np.ndarray]],
    heard: Sequence[Sequence[np.ndarray]],
    loss: Loss,
    project: Callable[[int, np.ndarray], np.ndarray],
    *,
    learning_rate: float,
    radius: float,
    boundary: str,
) -> tuple[list[Leaf], np.ndarray]:
    """n <- Q(n - eta g), g the mean over queries of (l+ - l-) / (2 mu^2) Q2(mu u).

    Args:
        leaves: the arrays.
        probed: Q1(mu u) for each query and leaf.
        heard: Q2(mu u) for each query and leaf.
        loss: of the arrays' values.
        project: (leaf's index, float32 step in codes) -> whole codes.
        learning_rate: eta.
        radius: mu.
        boundary: what happens at the grid's edges.

    Returns:
        The arrays after it, and l+ - l- of each query.
    """
    differing = differences(np.array([query(leaves, us, loss, boundary) for us in probed], F))
    factor = F(learning_rate) * (F(1 / (2 * len(probed))) / F(radius) ** 2)
    after = []
    for i, leaf in enumerate(leaves):
        total = np.zeros(leaf.codes.shape, F)
        for d, us in zip(differing, heard, strict=True):
            total += d * effective(leaf, us[i], boundary).astype(F)
        after.append(leaf.with_codes(leaf.codes + project(i, -factor * total)))
    return after, differing


def nearest(step: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(step, -255, 255)).astype(np.int64)


def stochastic(step: np.ndarray, words: np.ndarray) -> np.ndarray:
    """Away from zero with the probability of the fraction; `words` are uniform on 0 .. 2^32 - 1."""
    size = np.minimum(abs(step.astype(np.float64)), 255)
    up = words < np.floor((size - np.floor(size)) * 2.0**32)
    return np.sign(step).astype(np.int64) * (np.floor(size).astype(np.int64) + up)


def threshold(step: np.ndarray, least: float) -> np.ndarray:
    return np.where(abs(step) >= F(least), np.sign(step), 0).astype(np.int64)


def significant(votes: np.ndarray, heard: np.ndarray, least: float) -> np.ndarray:
    """One code where a sum of votes of random sign would seldom be so large."""
    heard = heard.astype(np.float64)  # whole multiples of a unit: squares and their sum are exact
    enough = votes.astype(np.float64) ** 2 >= least**2 * (heard**2).sum()
    return np.where(enough, np.sign(votes), 0).astype(np.int64)


class ErrorFeedback:
    """Round all that is due to nearest, halves down, and carry the rest, counted in 2^-22 codes."""

    def __init__(self, shape: tuple[int, ...], decay: float = 1.0):
        self.residual = np.zeros(shape, np.int64)
        self.decay = F(decay)

    def __call__(self, step: np.ndarray) -> np.ndarray:
        fresh = np.rint(np.clip(step, -255, 255).astype(np.float64) * 2**22).astype(np.int64)
        due = np.rint(self.residual.astype(F) * self.decay).astype(np.int64) + fresh
        moved = -((2**21 - due) // 2**22)
        self.residual = due - moved * 2**22
        return moved
