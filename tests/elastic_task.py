"""A task for elastic runs: a network of some codes, and a loss of eight examples a step."""

import jax
import jax.numpy as jnp

import zoqo_jax as zq

KEY = jax.random.key(5)
X = jax.random.normal(jax.random.key(1), (64, 10))
Y = jnp.sin(3 * X[:, :3])


def value_fn(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - y) ** 2)


def batch(step):
    rows = slice(8 * (step % 8), 8 * (step % 8) + 8)
    return X[rows], Y[rows]


def _start():
    one, other = jax.random.split(KEY)
    params = {"in": jax.random.normal(one, (10, 8)), "out": jax.random.normal(other, (8, 3))}
    return zq.quantize(params, zq.Quantizer(bits=4, block=4))


params = _start()
tx = zq.zoqo(1.0, 2.0, key=KEY, num_queries=3)
