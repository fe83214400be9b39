"""JAX's own stax, and plain JAX as its documentation has it."""

import jax
import jax.numpy as jnp
from jax.example_libraries import stax

from zoo.data import cross_entropy, labels, normal
from zoo.registry import model

_PACKAGE = "jax"


@model("stax CNN", _PACKAGE, bits=8)
def cnn():
    init, apply = stax.serial(
        stax.Conv(8, (3, 3), padding="SAME"), stax.Relu, stax.MaxPool((2, 2), (2, 2)),
        stax.Flatten, stax.Dense(4), stax.LogSoftmax,
    )  # fmt: skip
    x, y = normal(4, 8, 8, 3), labels(4)
    _, params = init(jax.random.PRNGKey(0), x.shape)
    return params, lambda params: cross_entropy(apply(params, x), y)


@model("plain JAX: gradient of an energy inside the loss", _PACKAGE)
def force():
    x, target = normal(8, 6), normal(8, 6, seed=3)
    params = {"in": normal(6, 16, seed=4) / 2, "out": normal(16, 1, seed=5) / 2}

    def energy(params, x):
        return jnp.sum(jnp.tanh(x @ params["in"]) @ params["out"])

    def loss(params):
        return jnp.mean((jax.vmap(jax.grad(energy, argnums=1), (None, 0))(params, x) - target) ** 2)

    return params, loss


@model("plain JAX: a gradient step of the weights inside the loss (MAML)", _PACKAGE)
def meta():
    x, y, more, other = normal(8, 6), labels(8), normal(8, 6, seed=3), labels(8, seed=4)
    params = {"in": normal(6, 16, seed=4) / 2, "out": normal(16, 4, seed=5) / 2}

    def inner(params, x, y):
        return cross_entropy(jnp.tanh(x @ params["in"]) @ params["out"], y)

    def loss(params):
        gradient = jax.grad(inner)(params, x, y)
        return inner(jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), more, other)

    return params, loss
