"""MNIST for the claims that train a network on it: images, a dense network, and where it starts."""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.attack import data

__all__ = ["Digits", "Params", "accuracy", "initial", "load", "loss", "pretrained"]

Params = list[dict[str, Any]]  # {"kernel", "bias"} of each layer; kernels may be quantized

_TRAIN_OF_BUNDLED = 8_000


class Digits(NamedTuple):
    """Images in [0, 1], a row of 784 pixels each, and their labels."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


@functools.cache
def load(source: str) -> Digits:
    """The images of a data set.

    Args:
      source: what `experiments.attack.data.load` takes, with a train and a test split; or "mnist",
        which has no train split: of its 10,000 test images 8,000 are trained on then, and 2,000
        tested on.

    Raises:
      ValueError: images of another size, or what else `data.load` refuses.
    """
    if source == "mnist":
        images, labels = data.load("mnist")
        order = np.random.default_rng(0).permutation(len(images))  # the first half is easier
        train, test = np.split(order, [_TRAIN_OF_BUNDLED])
        parts = images[train], labels[train], images[test], labels[test]
    else:
        parts = (*data.load(source, split="train"), *data.load(source, split="test"))
    if parts[0].shape[1:] != (28, 28, 1):
        raise ValueError(f"data must be of 28 x 28 pixels, got {source!r} of {parts[0].shape[1:]}.")
    flat = (parts[i].reshape(len(parts[i]), -1) for i in (0, 2))
    return Digits(next(flat), parts[1], next(flat), parts[3])


def initial(key: jax.Array, sizes: Sequence[int]) -> Params:
    """A network of dense layers, He-normal, biases zero."""
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        {
            "kernel": jax.random.normal(own, shape) * np.float32(np.sqrt(2 / shape[0])),
            "bias": jnp.zeros(shape[1]),
        }
        for own, shape in zip(keys, itertools.pairwise(sizes), strict=True)
    ]


def logits(params: Params, images: jax.Array) -> jax.Array:
    """What the network says of images; relu between layers."""
    x = images
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def loss(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy, nats."""
    said = logits(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(said, labels).mean()


def accuracy(params: Params, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Fraction of images that the network reads as they are labelled."""
    return jnp.mean((logits(params, images).argmax(-1) == labels).astype(jnp.float32))


@functools.cache
def pretrained(
    source: str, sizes: tuple[int, ...], steps: int, batch_size: int, seed: int
) -> Params:
    """A network trained by back-propagation in floats: Adam at a learning rate of 0.001."""
    digits = load(source)
    return _trained(
        jax.random.key(seed),
        jnp.asarray(digits.images),
        jnp.asarray(digits.labels),
        sizes=sizes,
        steps=steps,
        batch_size=batch_size,
    )


@functools.partial(jax.jit, static_argnames=("sizes", "steps", "batch_size"))
def _trained(
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    *,
    sizes: tuple[int, ...],
    steps: int,
    batch_size: int,
) -> Params:
    tx = optax.adam(1e-3)

    def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
        params, state = carry
        rows = jax.random.randint(key, (batch_size,), 0, len(labels))
        gradient = jax.grad(loss)(params, images[rows], labels[rows])
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = initial(jax.random.fold_in(key, 0), sizes)
    keys = jax.random.split(jax.random.fold_in(key, 1), steps)
    return jax.lax.scan(step, (params, tx.init(params)), keys)[0][0]
