"""Equinox: the whole module is the tree, functions and settings included."""

import equinox as eqx
import jax
import jax.numpy as jnp

from zoo.data import cross_entropy, labels, normal, tokens
from zoo.registry import model

_PACKAGE = "equinox"


@model("Equinox MLP, the whole module", _PACKAGE)
def mlp():
    x, y = normal(16, 12), labels(16)
    net = eqx.nn.MLP(12, 4, width_size=32, depth=1, key=jax.random.key(0))
    return net, lambda net: cross_entropy(jax.vmap(net)(x), y)


@model("Equinox CNN: Sequential with Conv2d, Lambda, pooling", _PACKAGE, bits=8)
def cnn():
    one, two = jax.random.split(jax.random.key(0))
    net = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(3, 8, kernel_size=3, padding=1, key=one),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.MaxPool2d(kernel_size=2, stride=2),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(128, 4, key=two),
        ]
    )
    x, y = normal(4, 3, 8, 8), labels(4)
    return net, lambda net: cross_entropy(jax.vmap(net)(x), y)


@model("Equinox MLP with LayerNorm and Dropout", _PACKAGE)
def dropout():
    class Net(eqx.Module):
        first: eqx.nn.Linear
        norm: eqx.nn.LayerNorm
        dropout: eqx.nn.Dropout
        last: eqx.nn.Linear

        def __init__(self, key):
            one, two = jax.random.split(key)
            self.first = eqx.nn.Linear(12, 32, key=one)
            self.norm = eqx.nn.LayerNorm(32)
            self.dropout = eqx.nn.Dropout(0.2)
            self.last = eqx.nn.Linear(32, 4, key=two)

        def __call__(self, x, key):
            x = jax.nn.gelu(self.norm(self.first(x)))
            return self.last(self.dropout(x, key=key))

    x, y, keys = normal(16, 12), labels(16), jax.random.split(jax.random.key(1), 16)
    net = Net(jax.random.key(0))
    return net, lambda net: cross_entropy(jax.vmap(net)(x, keys), y)


@model("Equinox CNN with BatchNorm and its state", _PACKAGE, bits=8)
def batch_norm():
    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm
        last: eqx.nn.Linear

        def __init__(self, key):
            one, two = jax.random.split(key)
            self.conv = eqx.nn.Conv2d(3, 8, 3, key=one)
            self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
            self.last = eqx.nn.Linear(8, 4, key=two)

        def __call__(self, x, state):
            x, state = self.norm(self.conv(x), state)
            return self.last(jax.nn.relu(x).mean((1, 2))), state

    x, y = normal(4, 3, 8, 8), labels(4)
    net, state = eqx.nn.make_with_state(Net)(jax.random.key(0))

    def loss(net):
        over_batch = jax.vmap(net, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        logits, _ = over_batch(x, state)
        return cross_entropy(logits, y)

    return net, loss


@model("Equinox transformer block, embedding under vmap", _PACKAGE, slow=True)
def transformer():
    class Net(eqx.Module):
        embedding: eqx.nn.Embedding
        attention: eqx.nn.MultiheadAttention
        norm: eqx.nn.RMSNorm
        mlp: eqx.nn.MLP
        head: eqx.nn.Linear

        def __init__(self, key):
            a, b, c, d = jax.random.split(key, 4)
            self.embedding = eqx.nn.Embedding(40, 16, key=a)
            self.attention = eqx.nn.MultiheadAttention(2, 16, key=b)
            self.norm = eqx.nn.RMSNorm(16)
            self.mlp = eqx.nn.MLP(16, 16, 32, 1, jax.nn.gelu, key=c)
            self.head = eqx.nn.Linear(16, 40, use_bias=False, key=d)

        def __call__(self, text):
            x = jax.vmap(self.embedding)(text)
            mask = jnp.tril(jnp.ones((len(text), len(text)), bool))
            y = jax.vmap(self.norm)(x)
            x = x + self.attention(y, y, y, mask=mask)
            return jax.vmap(self.head)(x + jax.vmap(self.mlp)(x))

    text = tokens(2, 9)
    net = Net(jax.random.key(0))
    return net, lambda net: cross_entropy(jax.vmap(net)(text[:, :-1]), text[:, 1:])


def _recurrent(cell, hidden):
    class Net(eqx.Module):
        cell: eqx.Module
        last: eqx.nn.Linear

        def __call__(self, x):
            def step(state, now):
                return self.cell(now, state), None

            state, _ = jax.lax.scan(step, hidden, x)
            return self.last(jax.tree.leaves(state)[0])

    one, two = jax.random.split(jax.random.key(0))
    net = Net(cell(8, 16, key=one), eqx.nn.Linear(16, 4, key=two))
    x, y = normal(4, 6, 8), labels(4)
    return net, lambda net: cross_entropy(jax.vmap(net)(x), y)


@model("Equinox GRUCell under lax.scan", _PACKAGE)
def gru():
    return _recurrent(eqx.nn.GRUCell, jnp.zeros(16))


@model("Equinox LSTMCell under lax.scan", _PACKAGE, slow=True)
def lstm():
    return _recurrent(eqx.nn.LSTMCell, (jnp.zeros(16), jnp.zeros(16)))


@model("Equinox MLPs stacked by filter_vmap, scanned with eqx.filter_checkpoint", _PACKAGE)
def stacked():
    class Block(eqx.Module):
        net: eqx.nn.MLP

        def __init__(self, key):
            self.net = eqx.nn.MLP(16, 16, 32, 1, key=key)

        def __call__(self, x):
            return x + self.net(x)

    x, target = normal(8, 16), normal(8, 16, seed=4)
    blocks = eqx.filter_vmap(Block)(jax.random.split(jax.random.key(0), 2))

    def loss(blocks):
        arrays, static = eqx.partition(blocks, eqx.is_array)

        @eqx.filter_checkpoint
        def layer(x, arrays):
            return jax.vmap(eqx.combine(arrays, static))(x)

        y, _ = jax.lax.scan(lambda x, arrays: (layer(x, arrays), None), x, arrays)
        return jnp.mean((y - target) ** 2)

    return blocks, loss


@model("Equinox MLP with SpectralNorm and its state", _PACKAGE)
def spectral_norm():
    class Net(eqx.Module):
        first: eqx.nn.SpectralNorm
        last: eqx.nn.Linear

        def __init__(self, key):
            a, b, c = jax.random.split(key, 3)
            linear = eqx.nn.Linear(12, 32, key=a)
            self.first = eqx.nn.SpectralNorm(linear, weight_name="weight", key=b)
            self.last = eqx.nn.Linear(32, 4, key=c)

        def __call__(self, x, state):
            x, state = self.first(x, state)
            return self.last(jax.nn.relu(x)), state

    x, y = normal(16, 12), labels(16)
    net, state = eqx.nn.make_with_state(Net)(jax.random.key(0))

    def loss(net):
        logits, _ = jax.vmap(net, in_axes=(0, None), out_axes=(0, None))(x, state)
        return cross_entropy(logits, y)

    return net, loss
