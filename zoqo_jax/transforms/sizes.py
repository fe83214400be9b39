"""What a run that sizes its own steps knows: running sums, and what follows from them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Int32

__all__ = ["Sizes", "Trend", "more", "ratio"]

_TINY = 1e-37
_MEMORY = 150  # steps that a trend goes over; with 50, runs of one query ended worse
_BELIEF = 1.0  # second looks that agree, taken for granted before there are any
# In standard errors of the true share: what is taken off it, since steps too long cost more than
# short ones (a noisy quadratic ended at 0.28 of its loss without, at 0.23 with), and the least.
_CAUTION, _LEAST_SHARE = 0.5, 0.25


class Trend(NamedTuple):
    """The line through the losses of a run, drawn over what its slopes promised.

    A step whose slopes promise p and that costs c lowers the loss by kappa p - c. So a loss, plus
    what all steps since then cost, lies on a line over what they promised, and kappa is its slope.
    The line is fitted by least squares to about the last 150 steps.

    Attributes:
        steps: how many there were, up to that memory.
        promised: mean of what was promised since each.
        loss: mean of the losses, each plus what the steps since cost.
        promised_squares: mean squared deviation of the one,
        products: mean product of deviations,
        loss_squares: and mean squared deviation of the other.
    """

    steps: Float32[Array, ""]
    promised: Float32[Array, ""]
    loss: Float32[Array, ""]
    promised_squares: Float32[Array, ""]
    products: Float32[Array, ""]
    loss_squares: Float32[Array, ""]

    @classmethod
    def new(cls) -> Trend:
        """Of no step."""
        return cls(*(jnp.zeros((), jnp.float32) for _ in cls._fields))

    def after(self, loss: Array, promised: Array, cost: Array) -> Trend:
        """With one step more.

        Args:
            loss: the mean of its queries' losses; one that is no number is passed over.
            promised: by how much its slopes say that it lowers the loss.
            cost: by how much less it does.
        """
        mean = jnp.where(self.steps == 0, loss, self.loss)
        x, y = -self.promised, jnp.where(jnp.isfinite(loss), loss - mean, 0.0)
        # Of a run's first steps, which are the fastest, a later line is to know little.
        steps = jnp.minimum(self.steps + jnp.where(self.steps < 10, 1.0, 0.4), _MEMORY)
        new = 1 / steps
        pairs = zip(self[3:], (x * x, x * y, y * y), strict=True)
        deviations = [(1 - new) * (old + new * product) for old, product in pairs]
        return Trend(steps, self.promised + new * x + promised, mean + new * y + cost, *deviations)

    @property
    def share(self) -> Float32[Array, ""]:
        """kappa, the slope of the line."""
        return self.products / jnp.maximum(self.promised_squares, _TINY)

    @property
    def precision(self) -> Float32[Array, ""]:
        """One over the squared standard error of the slope."""
        rest = self.loss_squares - self.products * self.share
        found = self.steps * self.promised_squares / jnp.maximum(rest, _TINY)
        return jnp.where(self.steps > 3, found, 0.0)


class Sizes(NamedTuple):
    """What a run that sizes its own steps knows.

    Attributes:
        size: of the next step.
        probed: the sizes of the directions of its queries.
        again: which of them look along a direction of the last step once more.
        slopes: (l+ - l-) / 2 of the last step's queries.
        squares: of squared slopes for a size of one, their sum and weight; this and the following
            forget what is long past.
        gains: of what slopes promised, and of sizes in their standard deviations.
        curvatures: of what steps cost beyond what slopes promised, and of squared sizes.
        bends: likewise, costs being in standard deviations of slopes as they then were.
        agreement: likewise, of products of the two slopes along a direction, over squared ones.
        trend: of the losses.
        scales: of floats, the root mean square of each leaf at the start, which sizes are shares
            of; 1 where all were zero. Empty where codes move.
        unseen: steps since one was looked at.
        is_alarmed: whether the next step is to be looked at, whatever its turn.
    """

    size: Float32[Array, ""]
    probed: Float32[Array, " queries"]
    again: Bool[Array, " queries"]
    slopes: Float32[Array, " queries"]
    squares: Float32[Array, "2"]
    gains: Float32[Array, "2"]
    curvatures: Float32[Array, "2"]
    bends: Float32[Array, "2"]
    agreement: Float32[Array, "2"]
    trend: Trend
    scales: Float32[Array, " leaves"] | tuple[()]
    unseen: Int32[Array, ""]
    is_alarmed: Bool[Array, ""]

    @classmethod
    def new(cls, size: Array, probed: Array, scales: Array | tuple[()]) -> Sizes:
        """Before the first step, of a size, whose queries look so far."""
        sums = [jnp.zeros(2, jnp.float32) for _ in range(5)]
        slopes = jnp.zeros_like(probed)
        return cls(
            size,
            probed,
            probed < 0,
            slopes,
            *sums,
            Trend.new(),
            scales,
            jnp.int32(0),
            jnp.bool_(False),
        )

    @property
    def true_share(self) -> Float32[Array, ""]:
        """kappa: the share of what slopes promise that comes true on other data."""
        agreed, looks = self.agreement
        # What each step's directions happened to bring is noise too, as that of second looks is.
        trend = jnp.clip(self.trend.precision, 0.0, self.trend.steps * len(self.slopes))
        known = looks + _BELIEF + trend
        total = agreed + _BELIEF + trend * jnp.clip(self.trend.share, -1.0, 2.0)
        error = known**-0.5
        return jnp.clip(total / known - _CAUTION * error, _LEAST_SHARE * error, 1.0)

    @property
    def deviation(self) -> Float32[Array, ""]:
        """Standard deviation of slopes for a size of one; 1 before any was heard."""
        total, weight = self.squares
        return jnp.where(total > 0, jnp.sqrt(total / jnp.maximum(weight, 1e-9)), 1.0)


def ratio(mean: Array) -> Array:
    """What a mean is, of its sum and weight; 0 where it is of nothing."""
    return mean[0] / jnp.maximum(mean[1], _TINY)


def more(mean: Array, total: Array, weight: Any, keep: Any) -> Array:
    """A mean, as sum and weight, that forgot a little and learnt more."""
    return mean * keep + jnp.stack([total, jnp.asarray(weight, jnp.float32)])
