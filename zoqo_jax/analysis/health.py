"""`health`: what is wrong with a run, in words, from what its steps told."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from zoqo_jax.transforms.state import Info, State

__all__ = ["Health", "health"]

_LATELY = 50  # steps that findings of the present go over
# Of three levels two are edges: a grid that begins with so many codes there comes to 71 to 78 %
# (digits and sentences, 2 bits), and nothing is wrong.
_MANY_AT_FIRST, _TOO_MANY, _FAR_TOO_MANY = 0.2, 0.5, 0.8
_RESOLUTION = 2.0**-20  # of a loss: what float32 sums of a batch round off, and some more


@dataclasses.dataclass(frozen=True)
class Health:
    """How a run fares; print it. It is true where nothing is found wrong.

    Attributes:
        findings: what is wrong, a sentence each.
        steps: how many there were.
        loss: mean of the losses of queries in the first step, and lately.
        codes_moved: in a step, lately.
        share_at_edges: of the codes, now.
        relative_difference: of the losses at the two sides of a query, as a share of them, lately.
        size: of steps, where they size themselves (see `zoqo_jax.Info`); else 0.
        true_share: of squared slopes, found again in other data; else 1.

    Examples:
        >>> import jax.numpy as jnp, zoqo_jax as zq
        >>> params = zq.Quantizer(range=1.0)(jnp.zeros(4))
        >>> tx = zq.zoqo(key=jax.random.key(0))
        >>> loss = lambda w: jnp.sum((w - 0.5) ** 2)
        >>> step = jax.jit(lambda state: tx.update(None, state, params, value_fn=loss)[1])
        >>> state = step(tx.init(params))
        >>> found = zq.health(state)
        >>> bool(found), found.steps, found.loss[0] == state.info.losses.mean().item()
        (True, 1, True)
    """

    findings: tuple[str, ...]
    steps: int
    loss: tuple[float, float]
    codes_moved: float
    share_at_edges: float
    relative_difference: float
    size: float
    true_share: float

    def __bool__(self) -> bool:
        return not self.findings

    def __str__(self) -> str:
        first, last = self.loss
        told = [
            f"{self.steps} steps, loss {first:.4g} at first and {last:.4g} lately",
            f"{self.codes_moved:.4g} codes moved a step, {self.share_at_edges:.1%} at an edge",
            f"the sides of a query differ by {self.relative_difference:.2g} of the loss",
        ]
        if self.size:
            told.append(f"size {self.size:.2g}, {self.true_share:.0%} of squared slopes are true")
        return "\n".join(["; ".join(told) + ".", *(f"- {finding}" for finding in self.findings)])


def health(history: Any) -> Health:
    """Say what is wrong with a run, from the `Info` of its steps.

    Args:
        history: `state.info` of each step: stacked, as `lax.scan` returns it, or a sequence of them
            or of states, in order.

    Returns:
        The findings and their figures: whether nothing moves, queries say nothing, the loss is
        above its start, most codes are at an edge, differences of losses are what float32 rounds
        off, or noise hides the slopes.

    Raises:
        ValueError: there is no step.

    Examples:
        >>> import jax.numpy as jnp, zoqo_jax as zq
        >>> params, told = zq.Quantizer(bits=4)(jnp.linspace(-1, 1, 9)), []
        >>> tx = zq.caq_zo(1e-9, key=jax.random.key(0), rounding="nearest")
        >>> state = tx.init(params)
        >>> step = jax.jit(
        ...     lambda state: tx.update(None, state, params, value_fn=lambda w: (w**2).sum())[1]
        ... )
        >>> for _ in range(3):
        ...     state = step(state)
        ...     told.append(state.info)
        >>> print(health(told).findings[0])  # doctest: +ELLIPSIS
        nothing has moved in the last 3 steps: the learning rate is too small for whole codes; ...
    """
    infos = _stacked(history)
    steps = len(infos.codes_moved)
    if not steps:
        raise ValueError("history must have a step, got none.")
    lately = slice(-min(_LATELY, steps), None)
    losses = np.where(np.isfinite(infos.losses), infos.losses, np.nan).astype(np.float64)
    of_step = np.array([np.nanmean(x) if np.isfinite(x).any() else np.nan for x in losses])
    few = max(min(_LATELY, steps // 4), 1)
    last = of_step[-few:]
    apart = np.abs(losses[..., 0] - losses[..., 1])[lately]
    size_of_loss = np.nanmean(np.abs(losses[lately])) if np.isfinite(losses[lately]).any() else 0.0
    relative = np.nanmean(apart) / max(size_of_loss, 1e-38) if np.isfinite(apart).any() else np.nan
    moved = float(infos.codes_moved[lately].mean())
    found = Health(
        findings=(),
        steps=steps,
        loss=(float(of_step[0]), _mean(last)),
        codes_moved=moved,
        share_at_edges=float(infos.share_at_edges[-1]),
        relative_difference=float(relative),
        size=float(infos.size[-1]),
        true_share=float(infos.true_share[-1]),
    )
    return dataclasses.replace(
        found, findings=tuple(_findings(found, infos, lately, _spread(last)))
    )


def _findings(found: Health, infos: Info, lately: slice, spread: float) -> list[str]:
    count = len(infos.codes_moved[lately])
    heard = infos.loss_differences[lately] != 0
    sized, said = found.size > 0, []  # advice to leave numbers out is for those who gave some
    # Comparisons leave no losses, but differences.
    if not heard.any() and not np.isfinite(infos.losses[lately]).all(axis=-1).any():
        said.append(
            f"every query of the last {count} steps had a loss that is NaN or inf: none moved "
            "anything."
        )
    elif not heard.any():
        said.append(
            f"both sides of every query of the last {count} steps had the same loss: nothing that "
            "is probed reaches the loss, or it is rounded too coarsely to tell (float16, accuracy)."
        )
    elif found.steps > 1 and not infos.codes_moved[lately].any():
        why = (
            "no slope stood out; use more queries a step (num_queries) or more examples."
            if sized
            else "the learning rate is too small for whole codes; leave it out and steps size "
            'themselves, or use rounding="stochastic".'
        )
        said.append(f"nothing has moved in the last {count} steps: {why}")
    if found.steps > 1 and found.loss[1] > found.loss[0] + 2 * spread:
        why = (
            "too little is known to size steps; use more queries a step (num_queries) or more "
            "examples."
            if sized
            else "steps are too long; leave learning_rate, radius and density out and they size "
            "themselves."
        )
        said.append(
            f"the loss is above its start, {found.loss[1]:.4g} after {found.loss[0]:.4g}: {why}"
        )
    few = infos.share_at_edges[0] < _MANY_AT_FIRST
    if found.share_at_edges > (_TOO_MANY if few else _FAR_TOO_MANY):
        said.append(
            f"{found.share_at_edges:.0%} of the codes are at an edge of their grid: steps are too "
            'long, or boundary="mask" keeps them there; use boundary="clamp".'
        )
    if heard.any() and found.relative_difference < _RESOLUTION:
        said.append(
            f"the sides of a query differ by {found.relative_difference:.1g} of the loss, which is "
            f"what float32 rounds off: {'' if sized else 'look further (radius, density), or '}"
            "take a constant off the loss."
        )
    if found.true_share < 0.1:
        said.append(
            f"{1 - found.true_share:.0%} of the squared slopes are noise of the batch: use more "
            "examples a step, or more queries (num_queries)."
        )
    return said


def _mean(x: np.ndarray) -> float:
    return float(np.nanmean(x)) if np.isfinite(x).any() else float("nan")


def _spread(x: np.ndarray) -> float:
    """The standard deviation of what is known."""
    known = x[np.isfinite(x)]
    return float(known.std()) if len(known) else 0.0


def _stacked(history: Any) -> Info:
    """The `Info` of all steps, arrays of NumPy with a first axis of steps."""
    if isinstance(history, State):
        history = history.info
    if isinstance(history, Info):
        infos = jax.tree.map(np.asarray, history)
        return infos if infos.codes_moved.ndim else jax.tree.map(lambda x: x[None], infos)
    if not isinstance(history, Sequence):
        raise ValueError(f"history must be Infos or States, got a {type(history).__name__}.")
    infos = [x.info if isinstance(x, State) else x for x in history]
    if not infos:
        raise ValueError("history must have a step, got none.")
    return jax.tree.map(lambda *xs: np.stack([np.asarray(x) for x in xs]), *infos)
