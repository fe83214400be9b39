"""Companders: the monotone maps that bend a uniform grid into any other.

A quantizer is `Q = inverse . U . forward`: `forward` takes a normalised value to the coordinate `z`
in which the grid is uniform, `U` rounds there, `inverse` returns (Shu & Zhu, "CAQ-ZO",
arXiv:2605.10673). A compander is needed only where a code becomes a value or a value a code;
optimizers never see one.

Two kinds, told apart by `Compander.levels`:

- *parametric* (`identity`, `mu_law`, `a_law`, `power`, `gaussian`): values in [-1, 1] to z in [-1,
  1];
- *codebooks* (`nf4`, `fp4`, `codebook`, `quantile`, `lloyd_max`): piecewise linear through given
  levels, `forward(levels[j]) = j`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jax.scipy.special import erf, erfinv
from jaxtyping import Array, ArrayLike, Float

__all__ = [
    "Compander",
    "a_law",
    "codebook",
    "fp4",
    "gaussian",
    "identity",
    "lloyd_max",
    "mu_law",
    "nf4",
    "power",
    "quantile",
]

Map = Callable[[Array], Array]


@dataclasses.dataclass(frozen=True)
class Compander:
    """A strictly increasing map between normalised values and the uniform coordinate z.

    Attributes:
        forward: value -> z, elementwise, both floating point. Also called the compressor.
        inverse: z -> value, its inverse. Also called the expander.
        levels: the codebook, strictly increasing, or None for a parametric compander on [-1, 1].
        name: for `repr` and error messages.

    Examples:
        >>> squeeze = Compander(lambda x: x**3, jnp.cbrt, name="cube")
        >>> squeeze.inverse(squeeze.forward(jnp.float32(0.5))).item()
        0.5
    """

    forward: Map
    inverse: Map
    levels: tuple[float, ...] | None = None
    name: str = "compander"

    def __repr__(self) -> str:
        return f"companders.{self.name}"


def identity() -> Compander:
    """The uniform quantizer's compander, z = x.

    Examples:
        >>> identity().forward(jnp.float32(0.25)).item()
        0.25
    """
    return Compander(_same, _same, name="identity")


def mu_law(mu: float = 255.0) -> Compander:
    """Logarithmic companding, z = sign(x) log(1 + mu |x|) / log(1 + mu) (ITU-T G.711).

    Args:
        mu: curvature, positive; 255 is telephony's.

    Raises:
        ValueError: `mu` is not positive and finite.

    Examples:
        >>> round(mu_law().forward(jnp.float32(0.1)).item(), 3)
        0.591
    """
    _require_positive("mu", mu)
    height = math.log1p(mu)

    def forward(x: Array) -> Array:
        return jnp.sign(x) * jnp.log1p(mu * jnp.abs(x)) / height

    def inverse(z: Array) -> Array:
        return jnp.sign(z) * jnp.expm1(jnp.abs(z) * height) / mu

    return Compander(forward, inverse, name=f"mu_law({mu:g})")


def a_law(a: float = 87.6) -> Compander:
    """Logarithmic companding with a linear segment at zero (ITU-T G.711).

    Args:
        a: curvature, at least 1; 87.6 is telephony's.

    Raises:
        ValueError: `a` is below 1 or not finite.

    Examples:
        >>> round(a_law().forward(jnp.float32(0.1)).item(), 3)
        0.58
    """
    if not 1.0 <= a < np.inf:
        raise ValueError(f"a must be at least 1 and finite, got {a}.")
    height = 1.0 + math.log(a)

    def forward(x: Array) -> Array:
        size = jnp.abs(x)
        curved = (1.0 + jnp.log(jnp.maximum(a * size, 1.0))) / height
        return jnp.sign(x) * jnp.where(a * size < 1.0, a * size / height, curved)

    def inverse(z: Array) -> Array:
        size = jnp.abs(z) * height
        return jnp.sign(z) * jnp.where(size < 1.0, size, jnp.exp(jnp.maximum(size, 1.0) - 1.0)) / a

    return Compander(forward, inverse, name=f"a_law({a:g})")


def power(exponent: float = 0.5) -> Compander:
    """Power companding, z = sign(x) |x|^exponent; below 1 it crowds the levels round zero.

    Raises:
        ValueError: `exponent` is not positive and finite.

    Examples:
        >>> power(0.5).forward(jnp.float32(-0.25)).item()
        -0.5
    """
    _require_positive("exponent", exponent)

    def forward(x: Array) -> Array:
        return jnp.sign(x) * jnp.abs(x) ** exponent

    def inverse(z: Array) -> Array:
        return jnp.sign(z) * jnp.abs(z) ** (1.0 / exponent)

    return Compander(forward, inverse, name=f"power({exponent:g})")


def gaussian(sigma: float = 1.0 / 3.0) -> Compander:
    """Companding by a Gaussian's distribution function: equal probability in every cell.

    z = erf(x / (sigma sqrt 2)) / erf(1 / (sigma sqrt 2)), so that [-1, 1] maps onto itself.

    Args:
        sigma: standard deviation of the weights as a fraction of the range, in [0.25, 10].
            Narrower, and float32 could not tell the outer levels apart.

    Raises:
        ValueError: `sigma` is outside [0.25, 10].

    Examples:
        >>> round(gaussian().forward(jnp.float32(1 / 3)).item(), 3)
        0.685
    """
    if not 0.25 <= sigma <= 10.0:
        raise ValueError(f"sigma must be in [0.25, 10], got {sigma}.")
    width = sigma * math.sqrt(2.0)
    height = math.erf(1.0 / width)

    def forward(x: Array) -> Array:
        return erf(x / width) / height

    def inverse(z: Array) -> Array:
        return erfinv(z * height) * width

    return Compander(forward, inverse, name=f"gaussian({sigma:g})")


def codebook(levels: Sequence[float] | np.ndarray, name: str = "codebook") -> Compander:
    """A compander through given levels: piecewise linear, `forward(levels[j]) = j`.

    Rounding in z is then rounding to the nearest level, with the midpoints as borders.

    Args:
        levels: 2 to 256 finite numbers, strictly increasing in float32; usually scaled to |level|
            <= 1.
        name: what the compander calls itself.

    Raises:
        ValueError: too few or too many levels, a level that is not finite, or an order that does
            not increase strictly.

    Examples:
        >>> codebook([-1.0, 0.0, 0.25, 1.0]).forward(jnp.float32(0.25)).item()
        2.0
    """
    points = np.asarray(levels, np.float32)
    if points.ndim != 1 or not 2 <= points.size <= 256:
        raise ValueError(f"levels must be 2 to 256 numbers, got shape {points.shape}.")
    if not np.isfinite(points).all():
        raise ValueError(f"levels must be finite, got {points.tolist()}.")
    if not (np.diff(points) > 0).all():
        raise ValueError(f"levels must increase strictly, got {points.tolist()}.")
    index = np.arange(points.size, dtype=np.float32)

    def forward(x: Array) -> Array:
        return jnp.interp(x, points, index)

    def inverse(z: Array) -> Array:
        return jnp.interp(z, index, points)

    return Compander(forward, inverse, tuple(map(float, points)), name)


def nf4() -> Compander:
    """NormalFloat-4: the 16 levels of QLoRA (Dettmers et al., 2023, arXiv:2305.14314, appendix E).

    Examples:
        >>> nf4().levels[7], nf4().levels[15]
        (0.0, 1.0)
    """
    return codebook(_NF4, "nf4")


def fp4() -> Compander:
    """The 15 distinct values of a 4-bit float, 2 bits exponent and 1 mantissa (e2m1), over 6.

    Plus and minus zero are one level, so one of the 16 codes is never legal.

    Examples:
        >>> [round(6 * level, 1) for level in fp4().levels[7:]]
        [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    """
    positive = np.array([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32) / 6.0
    return codebook(np.concatenate([-positive[::-1], [0.0], positive]), "fp4")


def quantile(samples: Float[ArrayLike, "..."], bits: int) -> Compander:
    """A codebook of quantiles: about equally many samples round to each level.

    Levels are quantiles of `samples / max|samples|` at (j + 1/2) / 2^bits, the medians of equal
    shares. Cells end midway between levels all the same, so their counts differ a little where the
    density bends. Levels that coincide become one: many equal samples give fewer than 2^bits.

    Args:
        samples: at least two different finite numbers, any shape, any unit.
        bits: 2 to 8.

    Raises:
        ValueError: `bits` outside 2..8, or samples that are not finite or all equal.

    Examples:
        >>> [round(level, 4) for level in quantile(np.arange(-4.0, 5.0), bits=2).levels]
        [-0.75, -0.25, 0.25, 0.75]
    """
    values = _normalised(samples, bits)
    probabilities = (np.arange(2**bits) + 0.5) / 2**bits
    levels = np.unique(np.quantile(values, probabilities).astype(np.float32))
    if levels.size < 2:  # nearly constant samples: keep the two extremes
        levels = np.unique(values[[0, -1]].astype(np.float32))
    return codebook(levels, f"quantile({bits})")


def lloyd_max(samples: Float[ArrayLike, "..."], bits: int, iterations: int = 200) -> Compander:
    """The codebook of least mean squared error on the samples (Lloyd 1982, Max 1960).

    Lloyd's iteration from quantiles: every level moves to the mean of its cell until none moves.
    Levels are in units of max|samples|, like `quantile`'s.

    Args:
        samples: at least two different finite numbers, any shape, any unit.
        bits: 2 to 8.
        iterations: the most sweeps it makes.

    Raises:
        ValueError: `bits` outside 2..8, or samples that are not finite or all equal.

    Examples:
        >>> samples = np.array([-1, -1, -0.9, 0, 0.1, 0.9, 1, 1])
        >>> [round(level, 3) for level in lloyd_max(samples, bits=2).levels]
        [-0.967, 0.0, 0.1, 0.967]
    """
    values = _normalised(samples, bits)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    levels = np.asarray(quantile(values, bits).levels, np.float64)
    for _ in range(iterations):
        borders = np.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        edges = np.concatenate([[0], borders, [values.size]])
        sizes = np.diff(edges)
        means = np.diff(sums[edges]) / np.maximum(sizes, 1)
        moved = np.where(sizes > 0, means, levels)  # an empty cell stays where it is
        if np.array_equal(moved, levels):
            break
        levels = moved
    return codebook(np.unique(levels.astype(np.float32)), f"lloyd_max({bits})")


def _same(x: Array) -> Array:
    return x


def _require_positive(name: str, value: float) -> None:
    if not 0.0 < value < np.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}.")


def _normalised(samples: ArrayLike, bits: int) -> np.ndarray:
    """The samples in units of their largest magnitude, sorted, in float64."""
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be in [2, 8], got {bits}.")
    values = np.sort(np.asarray(samples, np.float64).ravel())
    if not np.isfinite(values).all():
        raise ValueError("samples must be finite, got NaN or inf.")
    if values.size < 2 or values[0] == values[-1]:
        raise ValueError(f"samples must hold two different numbers, got {values.size} equal ones.")
    return values / np.abs(values).max()


_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
