"""A task that takes a tenth of a second for a query, for `measure`: two layers of a million codes.

With LIGHT=1 in the environment, one that takes no time: what is left is what Ray and the head take.
"""

import os

import jax
import jax.numpy as jnp

import zoqo_jax as zq

_WIDTH, _EXAMPLES = (8, 8) if os.environ.get("LIGHT") else (1_024, 256)
_NAMES = ("in", "out")
_KEY = jax.random.key(0)
_X = jax.random.normal(jax.random.fold_in(_KEY, 1), (_EXAMPLES, _WIDTH))


def value_fn(params, batch):
    """The mean square of what two layers make of the examples, less their sine."""
    hidden = jnp.tanh(batch @ params["in"] / _WIDTH**0.5)
    return jnp.mean((hidden @ params["out"] / _WIDTH**0.5 - jnp.sin(batch)) ** 2)


def batch(step):
    """The same examples at every step."""
    del step
    return _X


def _start():
    keys = jax.random.split(jax.random.fold_in(_KEY, 2))
    shape = (_WIDTH, _WIDTH)
    params = {
        name: jax.random.normal(k, shape) for name, k in zip(("in", "out"), keys, strict=True)
    }
    return zq.quantize(params, zq.Quantizer(bits=8))


params = _start()
tx = zq.zoqo(0.05, 0.05, key=_KEY, num_queries=16, query_batch=1)
