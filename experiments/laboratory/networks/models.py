"""Small networks: what they answer, and where their training starts.

The perceptron, the convolutional network and the transformer are matrices and nothing else (where a
bias is wanted, a one is appended to what the matrix reads), so that every number of them may lie on
a grid. The dense network has its biases beside its matrices, as networks commonly do; they stay
floats.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = [
    "Init",
    "Params",
    "convolutional",
    "dense",
    "kernels",
    "layers",
    "matrices",
    "perceptron",
    "transformer",
]

Params = list[Any]
"""A network's matrices, in floats or quantized, or its layers of "kernel" and "bias"."""

Init = Callable[[jax.Array], Params]
"""key -> parameters before any training."""

_HEADS = 4


def perceptron(params: Params, inputs: jax.Array) -> jax.Array:
    """Logits of dense layers with rectifiers between them."""
    *hidden, last = params
    for matrix in hidden:
        inputs = jax.nn.relu(_with_one(inputs) @ matrix)
    return _with_one(inputs) @ last


def transformer(params: Params, inputs: jax.Array) -> jax.Array:
    """Logits of a layer of attention and one of rectifiers, averaged over words; 0 is no word."""
    qkv, out, up, down, last = params
    is_word = (inputs != 0.0).any(-1)
    count, length, width = inputs.shape
    q, k, v = (
        part.reshape(count, length, _HEADS, width // _HEADS)
        for part in jnp.split(_normalised(inputs) @ qkv, 3, axis=-1)
    )
    heard = jnp.einsum("nqhd,nkhd->nhqk", q, k) * (width // _HEADS) ** -0.5
    weights = jax.nn.softmax(jnp.where(is_word[:, None, None], heard, -1e9), axis=-1)
    x = inputs + jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(inputs.shape) @ out
    x = x + jax.nn.relu(_normalised(x) @ up) @ down
    total = jnp.where(is_word[..., None], _normalised(x), 0.0).sum(1)
    mean = total / jnp.maximum(is_word.sum(1, keepdims=True), 1).astype(x.dtype)
    return _with_one(mean) @ last


def dense(params: Params, inputs: jax.Array) -> jax.Array:
    """Logits of dense layers with biases, and rectifiers between them."""
    for layer in params[:-1]:
        inputs = jax.nn.relu(inputs @ layer["kernel"] + layer["bias"])
    return inputs @ params[-1]["kernel"] + params[-1]["bias"]


def convolutional(params: Params, inputs: jax.Array) -> jax.Array:
    """Logits of convolutions, each of which halves a picture's sides, and a dense layer."""
    *filters, last = params
    for kernel in filters:
        inputs = jax.nn.relu(
            jax.lax.conv_general_dilated(
                inputs, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        )
    return _with_one(inputs.reshape(len(inputs), -1)) @ last


def kernels(channels: Sequence[int], last: tuple[int, int]) -> Init:
    """A start of 3 x 3 convolutions between so many channels and a matrix, likewise."""
    rows = [9 * one for one in channels[:-1]]
    flat = matrices([*zip(rows, channels[1:], strict=True), last])

    def init(key: jax.Array) -> Params:
        *filters, matrix = flat(key)
        pairs = zip(filters, itertools.pairwise(channels), strict=True)
        return [*(one.reshape(3, 3, *pair) for one, pair in pairs), matrix]

    return init


def matrices(shapes: Sequence[tuple[int, int]]) -> Init:
    """A start of Gaussian matrices, of He's standard deviation sqrt(2 / rows)."""

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(shapes))
        return [
            jax.random.normal(key, shape) * (2.0 / shape[0]) ** 0.5
            for key, shape in zip(keys, shapes, strict=True)
        ]

    return init


def layers(sizes: Sequence[int]) -> Init:
    """A start of dense layers between so many units: such matrices, and biases that are zero."""
    flat = matrices(list(itertools.pairwise(sizes)))

    def init(key: jax.Array) -> Params:
        return [{"kernel": kernel, "bias": jnp.zeros(kernel.shape[1])} for kernel in flat(key)]

    return init


def _with_one(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)


def _normalised(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)
