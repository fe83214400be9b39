"""SignFlip (Chen, Zhang, Hu and Wu, ECCV 2020), for l_inf and without a target.

"Boosting Decision-based Black-box Adversarial Attacks with Random Sign Flip", algorithm 1.

It begins at an image of uniform noise that is misread, brought to the image by ten steps of a
binary search over the ball's radius. Then two questions take turns. One projects the perturbation,
jittered, onto a ball that is smaller by alpha; one flips the sign of each value with a small
probability. What is misread stays. Every ten rounds alpha and the probabilities follow the shares
of both that stayed; a flip that stays also makes what it flipped less likely to be flipped again.

Settings are the authors' for small images. Their count leaves out the images of noise; here all
questions count.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.attack.config import Config
from experiments.attack.methods.method import Method

__all__ = ["make"]

_HALVINGS = 10  # questions of the binary search
_FIRST_ALPHA, _FACTOR = 0.004, 1.5
_FIRST_KEPT = 0.999  # probability that a value keeps its sign
_LEAST_KEPT, _MOST_KEPT = 0.99, 0.9999
_SHIFT, _SHIFT_OF_ONE = 1e-3, 1e-4  # of that probability: all values', one value's
_ROUNDS = 10  # between two looks at the shares that stayed
_FEW, _MANY = 0.3, 0.7


class _State(NamedTuple):
    image: jax.Array
    perturbation: jax.Array  # misread, from the binary search on
    low: jax.Array  # float32 (), radius of the binary search at which the image is read correctly
    high: jax.Array  # float32 (), at which it is misread
    kept: jax.Array  # float32 in the image's shape: probabilities that a sign is kept
    alpha: jax.Array  # float32 (), by how much the next ball is smaller
    stayed: jax.Array  # int32 (2,), projections and flips that stayed in the last rounds
    step: jax.Array  # int32 (), questions since an image of noise was misread; -1 before
    count: jax.Array  # int32 (), questions
    key: jax.Array


def make(config: Config, shape: tuple[int, int, int]) -> Method:
    """SignFlip has no settings but the ball."""
    del config, shape

    def asked(state: _State) -> tuple[jax.Array, jax.Array]:
        """The perturbation to look at, and where signs are kept (1) and flipped (-1)."""
        keys = jax.random.split(jax.random.fold_in(state.key, state.count), 3)
        noise = jax.random.uniform(keys[0], state.image.shape) - state.image
        halved = _within(state.perturbation, (state.low + state.high) / 2)
        jitter = state.alpha * jax.random.rademacher(keys[1], state.image.shape, jnp.float32)
        smaller = jnp.abs(state.perturbation).max() - state.alpha
        projected = _within(state.perturbation + jitter, jnp.maximum(smaller, 0.0))
        signs = 2.0 * jax.random.bernoulli(keys[2], state.kept).astype(jnp.float32) - 1.0
        is_flip = (state.step - _HALVINGS) % 2 == 1
        later = jnp.where(is_flip, state.perturbation * signs, projected)
        proposed = jnp.where(state.step < _HALVINGS, halved, later)
        proposed = jnp.where(state.step < 0, noise, proposed)
        return jnp.clip(proposed, -state.image, 1.0 - state.image), signs

    def init(key: jax.Array, image: jax.Array) -> _State:
        zero, none, start = jnp.zeros_like(image), jnp.float32(0), jnp.int32(0)
        kept, alpha = jnp.full_like(image, _FIRST_KEPT), jnp.float32(_FIRST_ALPHA)
        stayed = jnp.zeros(2, jnp.int32)
        return _State(image, zero, none, none, kept, alpha, stayed, start - 1, start, key)

    def ask(state: _State) -> jax.Array:
        return asked(state)[0][None]

    def tell(state: _State, misread: jax.Array) -> _State:
        proposed, signs = asked(state)
        middle = (state.low + state.high) / 2
        begins, is_halving = state.step < 0, (state.step >= 0) & (state.step < _HALVINGS)
        moves = state.step >= _HALVINGS
        is_flip = moves & ((state.step - _HALVINGS) % 2 == 1)
        low = jnp.where(is_halving & ~misread[0], middle, state.low)
        high = jnp.where(is_halving & misread[0], middle, state.high)
        here = jnp.where(misread[0], proposed, state.perturbation)
        # A search that halves keeps the image of noise until it ends, at the radius it found.
        ends = state.step == _HALVINGS - 1
        found = jnp.clip(_within(state.perturbation, high), -state.image, 1.0 - state.image)
        here = jnp.where(is_halving, jnp.where(ends, found, state.perturbation), here)
        learnt = jnp.clip(state.kept - _SHIFT_OF_ONE * signs, _LEAST_KEPT, _MOST_KEPT)
        which = jnp.array([moves & ~is_flip, is_flip])
        after = state._replace(
            perturbation=here,
            low=low,
            high=jnp.where(begins & misread[0], jnp.abs(proposed).max(), high),
            kept=jnp.where(is_flip & misread[0], learnt, state.kept),
            stayed=state.stayed + (which & misread[0]).astype(jnp.int32),
            step=jnp.where(begins & ~misread[0], state.step, state.step + 1),
            count=state.count + 1,
        )
        rounds, odd = jnp.divmod(after.step - _HALVINGS, 2)
        is_due = is_flip & (odd == 0) & (rounds % _ROUNDS == 0)
        return jax.tree.map(lambda a, b: jnp.where(is_due, a, b), _adjusted(after), after)

    return Method(init, ask, tell, 1, sees_labels=True)


def _within(perturbation: jax.Array, radius: jax.Array) -> jax.Array:
    return jnp.clip(perturbation, -radius, radius)


def _adjusted(state: _State) -> _State:
    """Alpha and the probabilities after a look at the shares of the last rounds that stayed."""
    projections, flips = state.stayed.astype(jnp.float32) / _ROUNDS
    factor = jnp.where(projections > _MANY, _FACTOR, 1.0)
    factor = jnp.where(projections < _FEW, 1.0 / _FACTOR, factor)
    shift = jnp.where(flips > _MANY, -_SHIFT, 0.0)
    shift = jnp.where(flips < _FEW, _SHIFT, shift)
    kept = jnp.clip(state.kept + shift, _LEAST_KEPT, _MOST_KEPT)
    return state._replace(
        alpha=state.alpha * factor, kept=kept, stayed=jnp.zeros_like(state.stayed)
    )
