r"""Steps that size themselves: how far a query looks and a step goes, from what the losses say.

A *size* is the root mean square of a direction's entries, as a share of the number of codes of its
grid: the same for 2 bits and for 8, whatever the weights' scale and the loss's. Where it is below a
code, few coordinates are probed (density); where it is above, entries are of several codes
(radius). A step goes as far as its queries looked: query i moves :math:`w_i` times along its
direction, :math:`w_i` a whole number that depends on its slope b_i among others' (`Weights`).

With a the gain that the slopes promise for a size of one, k what the loss is curved, and kappa the
share of what slopes promise that comes true on other data, a step of size s lowers the loss by

.. math:: \kappa a s - k s^2, \quad \text{most at}\quad s^* = \kappa a / 2 k

- a follows from every query;
- k from two more evaluations now and then, of the loss before and after a step on the same batch:
  what the slopes promised, less what came. It holds the curvature between directions too, which
  that of single directions leaves out: by those alone, runs of 8 queries a step stayed at a loss
  of 0.6 where these came to 0.28;
- kappa from two things. The losses of the run fall by less than slopes promise (`Trend`). And some
  directions are looked along again on the next batch: kappa is the mean of b b' over that of b^2,
  of the two slopes b and b'. They move the codes after the second look, by the mean of both, so
  little is lost where noise is all, and where it is not, few look twice.

The best size of one step is short for a run, whose later steps go on from where this one ends: of a
steep direction a longer step undoes what the last one did, along a flat one it gets further. But at
twice the best size a step brings nothing, and noise, which stays, wants short steps. So steps are
1 + kappa / 2 times as long. Slopes that grow all at once are looked at at once.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32

from zoqo_jax import directions
from zoqo_jax.directions import Structure
from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.transforms import floats, queries
from zoqo_jax.transforms.schedules import Schedule
from zoqo_jax.transforms.sizes import Sizes, more, ratio

__all__ = ["Sizing", "Weights"]

Weights = Literal["signs", "whole", "real"]
"""What a query's slope becomes: a sign or nothing, a whole number, or a real one."""

Look = Callable[[Any, Array], Array]
"""The loss of parameters as they are, if it is wanted, as the other argument says; else 0."""

_FIRST = 2.0**-8
_FEWEST = 4.0  # entries of a direction
_DENSEST = 1 / 16  # share of coordinates; larger sizes have longer entries
_LARGEST = 2.0**-5  # longer directions went nowhere: they lower a loss that is chaos to them
_SHORTEST, _LONGEST = 2.0**-30, 2.0**10  # of steps along directions that the user chose
_LEAST_SLOPE = 0.6  # in standard deviations of slopes: of smaller ones a step costs what it brings
_QUERIES = 64  # how many queries, at least, a mean of squared slopes goes over,
_STEPS = 16  # and how many steps
_LOOKS = 10  # how many looks at the curvature are averaged
_REPEATS = 400  # how many second looks along directions are averaged
_LOOK_AGAIN = 0.05  # of the directions, at least, two batches are asked; of the first steps'
_LOOK_AGAIN_FIRST = 0.4
_EVALUATIONS = 24  # query pairs for each look at the curvature, which takes two evaluations
_FIRST_STEPS = 16  # look at the curvature every time
_WORST = 8.0  # a step's cost over its promise, at most, and what was true of that over its cost
_STEEP = (1.6, 1.5)  # deviations of a step's slopes that are alarming, and over sqrt(queries)
_TINY = 1e-37
_HEAVIEST = 3.0  # times that a step goes along a direction, at most
_ROUNDING = 2.0**-21  # of the loss: slopes below it are what float32 rounds off
# What sizes grow by in a step, or fall by; and fall by with a look at the curvature. Growing by
# that, a pretrained model's first 16 steps took its loss from 1.07 to 1.21 (SmolLM2 on SST-2), now
# to 0.67: what long steps spoil is seen only when what is easily learnt has been.
_FAST, _FASTEST = 2.0**0.125, 2.0**0.5
_FAR = 32.0  # times as large as a size: up to there, and where slopes drown, sizes grow as fast


class Moves(NamedTuple):
    """What the queries of a step are found to have said.

    Attributes:
        record: for each query how many times the step goes along its direction, and the size of
            that, negative where it is one of the step before.
        promised: by how much the slopes say that this lowers the loss of the batch.
        sizes: what is known then, but for the curvature and the next size.
    """

    record: Float32[Array, "queries 2"]
    promised: Float32[Array, ""]
    sizes: Sizes


class Pending(NamedTuple):
    """What is known of a step before it is made.

    Attributes:
        promised: by how much its slopes say that it lowers the loss of the batch.
        looks: whether the loss is evaluated before and after it.
        loss: the one before, or 0.
    """

    promised: Float32[Array, ""]
    looks: Bool[Array, ""]
    loss: Float32[Array, ""]


@dataclasses.dataclass(frozen=True)
class Sizing:
    """How the directions and steps of a method are sized.

    Attributes:
        weights: what slopes become.
        structure: of directions.
        density: as the user gave it, or "auto".
        is_given: whether the user said how far to look: a size is then in units of directions.
        of_floats: whether numbers move, not codes: a size is then a share of what their root mean
            square in a leaf was at the start.
    """

    weights: Weights
    structure: Structure
    density: Schedule | Array | str = "auto"
    is_given: bool = False
    of_floats: bool = False

    @property
    def has_density(self) -> bool:
        """Whether directions are sparser for a smaller size; else they have one code at least."""
        is_free = self.density == "auto" and not self.is_given
        return is_free and directions.resolve(self.structure)[0].takes_density

    @property
    def is_whole(self) -> bool:
        """Whether steps are whole numbers of codes without being rounded."""
        return self.has_density and self.weights != "real"

    def describe(self, size: Array, array: QuantizedArray) -> dict[str, Any]:
        """What `directions.describe` is to know of an array's direction of a size."""
        few = min(_FEWEST / max(array.size, 1), 1.0)  # or most directions would be empty
        dense = max(_DENSEST, few) if self.has_density else self._density
        width = size * _codes(array)
        radius = jnp.maximum(jnp.round(width * np.float32(dense**-0.5)), 1.0)
        density = jnp.minimum((width / radius) ** 2, 1.0) if self.has_density else dense
        densest = {"densest": min(2 * dense, 1.0)} if self.has_density else {}
        return {"radius": radius, "density": density, **densest}

    def probed(self, size: Array, arrays: Sequence[Any]) -> Array:
        """The size of a direction for a step of a size."""
        if self.is_given:
            return jnp.ones_like(size)
        if self.of_floats:
            return size
        if self.has_density:
            return jnp.maximum(size, 4 * self._least(arrays))
        return jnp.maximum(size, self._density**0.5 / min(map(_codes, arrays)))

    @property
    def _density(self) -> float:
        return 1.0 if self.density == "auto" else float(self.density)

    def begin(self, state: Any, arrays: Sequence[Any]) -> Any:
        """The `State` before the first step."""
        sizes = self.first(arrays, len(state.info.losses))
        record = jnp.zeros((len(state.info.losses), 2), jnp.float32)
        info = state.info._replace(size=jnp.copy(sizes.size), record=record)
        return state._replace(sizes=sizes, info=info)

    def first(self, arrays: Sequence[Any], num_queries: int) -> Sizes:
        """What is known before the first step."""
        size = jnp.float32(0.25 if self.is_given else max(_FIRST, self._least(arrays)))
        probed = jnp.zeros(num_queries, jnp.float32) + self.probed(size, arrays)
        scales = floats.scales_at_start(arrays) if self.of_floats else ()
        return Sizes.new(size, probed, scales)

    def _least(self, arrays: Sequence[Any]) -> float:
        """The least size: a quarter of that of a direction of `_FEWEST` entries."""
        if self.of_floats:
            return max([_SHORTEST, *(float(jnp.finfo(array.dtype).eps) for array in arrays)])
        if self.is_given:
            return _SHORTEST
        entries = sum(array.size * _codes(array) ** 2 for array in arrays)
        return (_FEWEST / max(entries, _FEWEST)) ** 0.5 / 4

    @functools.partial(jax.jit, static_argnums=0)  # or eager steps would take 150 small programs
    def moves(self, sizes: Sizes, key: Array, count: Array, differences: Array) -> Moves:
        """What a step does, and what its slopes teach.

        Args:
            sizes: what is known before it.
            key: of the step.
            count: steps before it.
            differences: l+ - l- of each query; 0 where nothing was heard.
        """
        q = differences.size
        slopes, is_heard = differences / 2, differences != 0
        keep = 1.0 - 1.0 / max(_STEPS, _QUERIES / q)
        squares = jnp.where(is_heard, (slopes / sizes.probed) ** 2, 0.0)
        squares = more(sizes.squares, squares.sum(), is_heard.sum(), keep)
        now = sizes._replace(squares=squares)
        scores = slopes / (now.deviation * sizes.probed)
        # Slopes that grow all at once: a run that diverges did so in ten steps, between two looks.
        steep = jnp.sqrt(jnp.mean(scores**2)) > _STEEP[0] + _STEEP[1] / math.sqrt(q)
        now = now._replace(is_alarmed=sizes.is_alarmed | steep)

        twice = sizes.again & is_heard & (sizes.slopes != 0)
        earlier = sizes.slopes / (now.deviation * sizes.probed)
        products = jnp.where(twice, scores * earlier, 0.0).sum()
        number = twice.sum(dtype=jnp.float32)
        agreement = more(now.agreement, products, number, (1 - 1 / _REPEATS) ** number)
        now = now._replace(agreement=agreement)
        true = now.true_share

        least = jnp.where(count < _FIRST_STEPS, _LOOK_AGAIN_FIRST, _LOOK_AGAIN)
        chance = jnp.clip(_LOOK_AGAIN / true, least, 0.5)
        random = jax.random.uniform(jax.random.fold_in(key, q + 1), (q,))
        waits = ~sizes.again & is_heard & (random < chance)

        # The mean of two slopes deviates less than one, the less the more of them is noise.
        both = (scores + earlier) / jnp.sqrt(2 * (1 + true))
        scores = jnp.where(twice, both, scores)
        shorter = sizes.size / sizes.probed
        if self.has_density:  # directions of a few entries: shorter steps go along fewer of them
            weights = _weigh(scores * jnp.where(sizes.again, 1.0, shorter), self.weights)
        else:
            weights = _weigh(scores, self.weights) * shorter
        weights = jnp.where(waits | ~is_heard, 0.0, weights)
        weights = weights if self.is_whole else queries.rounded(weights)
        record = jnp.stack([weights, jnp.where(sizes.again, -1.0, 1.0) * sizes.probed], axis=-1)
        now = now._replace(again=waits, slopes=slopes)
        return Moves(record, (weights * slopes).sum(), now)

    def ask(self, key: Array, before: Any, after: Any, loss: Look, params: Any) -> Any:
        """What the losses of a step's queries make of it.

        Args:
            key: of the step.
            before: the `State` before it.
            after: the one after its losses came in.
            loss: that of the batch.
            params: where they are before the step.

        Returns:
            The state that knows what moves, and what `close` needs.
        """
        moves = self.moves(before.sizes, key, before.count, after.info.loss_differences)
        looks = self.looks(before.count, moves)
        info = after.info._replace(
            size=before.sizes.size, true_share=moves.sizes.true_share, record=moves.record
        )
        after = after._replace(info=info, sizes=moves.sizes)
        return after, Pending(moves.promised, looks, loss(params, looks))

    def close(
        self,
        before: Any,
        after: Any,
        arrays: Sequence[Any],
        pending: Pending,
        loss: Look,
        params: Any,
    ) -> Any:
        """The state after a step, with the size of the next; `params` are where it led."""
        later = loss(params, pending.looks)
        heard = after.info.losses.mean()
        sizes = self.learn(before.sizes, after.sizes, arrays, pending, later, heard)
        evaluations = after.info.evaluations + 2 * pending.looks.astype(jnp.int32)
        return after._replace(sizes=sizes, info=after.info._replace(evaluations=evaluations))

    def looks(self, count: Array, moves: Moves) -> Bool[Array, ""]:
        """Whether a step is one of those that evaluate the loss before and after it."""
        every = math.ceil(_EVALUATIONS / len(moves.record))
        its_turn = (count < _FIRST_STEPS) | (moves.sizes.unseen >= every) | moves.sizes.is_alarmed
        return its_turn & (moves.promised > 0)

    @functools.partial(jax.jit, static_argnums=0)
    def learn(
        self,
        before: Sizes,
        now: Sizes,
        arrays: Sequence[Any],
        pending: Pending,
        later: Float32[Array, ""],
        heard: Float32[Array, ""],
    ) -> Sizes:
        """What is known after a step, the size of the next one above all.

        Args:
            before: what was known before the step.
            now: what its slopes taught.
            arrays: the trained leaves.
            pending: what it promised, and whether the losses before and after it are known.
            later: the one after it.
            heard: the mean of the losses of its queries.
        """
        promised, looked, loss = pending
        size, is_finite = before.size, jnp.isfinite(heard)
        drop = loss - later
        # A step to where the loss is no number was much too long.
        cost = jnp.where(jnp.isfinite(drop), promised - drop, _WORST * promised)
        cost = jnp.clip(cost, now.true_share * promised / _WORST, _WORST * promised)
        is_bad = looked & (cost > 2 * promised)
        # Whole steps along directions of a few entries are no shorter, but fewer. By the shorter
        # size, gains would seem large and curvatures larger, and sizes would fall without end.
        made = self.probed(size, arrays) if self.is_whole else size
        keep = 1.0 - 1.0 / _LOOKS
        gains = more(now.gains, promised, now.deviation * made, keep)
        curvatures = more(now.curvatures, cost, made**2, keep)
        bends = more(now.bends, cost / now.deviation, made**2, keep)
        seen = jax.tree.map(
            lambda new, old: jnp.where(looked, new, old),
            (gains, curvatures, bends),
            (now.gains, now.curvatures, now.bends),
        )
        now = now._replace(gains=seen[0], curvatures=seen[1], bends=seen[2])
        curvature = ratio(now.curvatures)
        usual = curvature * made**2
        trend = now.trend.after(heard, promised, jnp.where(promised > 0, usual, 0.0))
        now = now._replace(trend=trend)

        # By the slopes as they are, and by those of when the curvature was looked at. The shorter:
        # where slopes grow, curvature does, but that is known later.
        of_now = now.deviation / jnp.maximum(curvature, _TINY)
        of_then = ratio(now.bends[::-1])
        true = now.true_share
        best = (1 + true / 2) * true * ratio(now.gains) / 2 * jnp.minimum(of_now, of_then)
        best = jnp.where(now.gains[1] > 0, best, size)
        largest = _LONGEST if self.is_given or self.of_floats else _LARGEST
        best = jnp.minimum(best, largest)
        drowned = looked & (now.deviation * size < _ROUNDING * jnp.abs(loss))
        is_silent = (now.slopes == 0).all()
        best = jnp.where(drowned | (is_silent & is_finite), 2 * size, best)
        best = jnp.where(is_silent & ~is_finite, size / 2, best)
        is_far = drowned | is_silent | (best > _FAR * size)
        grows = jnp.where(is_far, _FASTEST, _FAST)
        falls = jnp.where(looked | ~is_finite, _FASTEST, _FAST)
        best = jnp.clip(best, size / falls, size * grows)
        best = jnp.where(is_bad, size / 2, best)
        best = jnp.clip(best, self._least(arrays), largest)
        probed = jnp.where(now.again, before.probed, self.probed(best, arrays))
        unseen = jnp.where(looked, 1, now.unseen + 1)
        return now._replace(size=best, probed=probed, unseen=unseen, is_alarmed=is_bad)


def _codes(array: QuantizedArray) -> int:
    """How many codes a grid has."""
    return array.grid.high - array.grid.low + 1


def _weigh(scores: Array, how: Weights) -> Array:
    """Scores, slopes in standard deviations, as weights."""
    if how == "signs":
        return jnp.where(jnp.abs(scores) > _LEAST_SLOPE, jnp.sign(scores), 0.0)
    real = jnp.clip(scores * (0.5 / _LEAST_SLOPE), -_HEAVIEST, _HEAVIEST)
    return jnp.round(real) if how == "whole" else real
