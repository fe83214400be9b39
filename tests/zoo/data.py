"""Random data that the models' losses are of, the same every time."""

import jax.numpy as jnp
import numpy as np

__all__ = ["cross_entropy", "labels", "normal", "tokens"]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def labels(count, classes=4, seed=1):
    return jnp.asarray(np.random.default_rng(seed).integers(0, classes, count), jnp.int32)


def tokens(*shape, vocabulary=40, seed=2):
    return jnp.asarray(np.random.default_rng(seed).integers(1, vocabulary, shape), jnp.int32)


def cross_entropy(logits, y):
    """Mean over everything; float32 whatever the logits are, as training scripts have it."""
    logits = logits.astype(jnp.float32)
    chosen = jnp.take_along_axis(logits, y[..., None], axis=-1)[..., 0]
    return jnp.mean(
        jnp.log(jnp.sum(jnp.exp(logits - logits.max(-1, keepdims=True)), -1))
        + logits.max(-1)
        - chosen
    )
