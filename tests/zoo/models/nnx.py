"""Flax's nnx: what `nnx.split` gives, also where keys and counts of random streams are in it."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from zoo.data import labels, normal, tokens
from zoo.registry import model

_PACKAGE = "flax"


def _classifier(module, x, y, call=lambda module, x: module(x)):
    graph, state = nnx.split(module)

    def loss(state):
        logits = call(nnx.merge(graph, state), x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return state, loss


@model("nnx MLP", _PACKAGE)
def mlp():
    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(12, 32, rngs=rngs)
            self.norm = nnx.LayerNorm(32, rngs=rngs)
            self.last = nnx.Linear(32, 4, rngs=rngs)

        def __call__(self, x):
            return self.last(self.norm(nnx.gelu(self.first(x))))

    return _classifier(MLP(nnx.Rngs(0)), normal(16, 12), labels(16))


@model("nnx CNN with BatchNorm, split into parameters and statistics", _PACKAGE, bits=8)
def cnn():
    class CNN(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, kernel_size=(3, 3), rngs=rngs)
            self.norm = nnx.BatchNorm(8, rngs=rngs)
            self.last = nnx.Linear(128, 4, rngs=rngs)

        def __call__(self, x):
            x = nnx.avg_pool(nnx.relu(self.norm(self.conv(x))), (2, 2), (2, 2))
            return self.last(x.reshape(len(x), -1))

    x, y = normal(4, 8, 8, 3), labels(4)
    graph, params, statistics = nnx.split(CNN(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def loss(params):
        logits = nnx.merge(graph, params, statistics, copy=True)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return params, loss


@model("nnx MLP with dropout: the whole state, keys among it", _PACKAGE)
def dropout():
    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(12, 32, rngs=rngs)
            self.dropout = nnx.Dropout(0.2, rngs=rngs)
            self.last = nnx.Linear(32, 4, rngs=rngs)

        def __call__(self, x):
            return self.last(self.dropout(nnx.relu(self.first(x))))

    return _classifier(MLP(nnx.Rngs(0)), normal(16, 12), labels(16))


def _recurrent(cell):
    class Recurrent(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(cell(8, 16, rngs=rngs))
            self.last = nnx.Linear(16, 4, rngs=rngs)

        def __call__(self, x):
            return self.last(self.rnn(x)[:, -1])

    return _classifier(Recurrent(nnx.Rngs(0)), normal(4, 6, 8), labels(4))


@model("nnx LSTM, nnx.RNN", _PACKAGE)
def lstm():
    return _recurrent(nnx.LSTMCell)


@model("nnx GRU, nnx.RNN", _PACKAGE, slow=True)
def gru():
    return _recurrent(nnx.GRUCell)


class _Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(16, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            num_heads=2, in_features=16, decode=False, rngs=rngs
        )
        self.up = nnx.Linear(16, 32, rngs=rngs)
        self.down = nnx.Linear(32, 16, rngs=rngs)

    def __call__(self, x):
        mask = nnx.make_causal_mask(x[..., 0])
        x = x + self.attention(self.norm(x), mask=mask)
        return x + self.down(nnx.silu(self.up(x)))


class _LanguageModel(nnx.Module):
    def __init__(self, blocks, rngs):
        self.embedding = nnx.Embed(40, 16, rngs=rngs)
        self.blocks = blocks

    def __call__(self, text, run):
        return self.embedding.attend(run(self.blocks, self.embedding(text)))


def _next_token(blocks, run):
    text = tokens(2, 9)
    module = _LanguageModel(blocks, nnx.Rngs(1))
    return _classifier(module, text[:, :-1], text[:, 1:], lambda module, x: module(x, run))


@model("nnx transformer with a tied head", _PACKAGE)
def transformer():
    return _next_token(_Block(nnx.Rngs(0)), lambda block, x: block(x))


@model("nnx transformer, nnx.remat", _PACKAGE)
def transformer_remat():
    return _next_token(_Block(nnx.Rngs(0)), lambda block, x: nnx.remat(lambda b, x: b(x))(block, x))


@model("nnx transformer, nnx.jit inside the loss", _PACKAGE, slow=True)
def transformer_jit():
    return _next_token(_Block(nnx.Rngs(0)), lambda block, x: nnx.jit(lambda b, x: b(x))(block, x))


@model("nnx transformer, nnx.scan over layers", _PACKAGE)
def transformer_scan():
    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(rngs):
        return _Block(rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(block, x):
        return block(x)

    return _next_token(stack(nnx.Rngs(0)), run)


@model("nnx MLP with nnx.custom_vjp", _PACKAGE)
def custom_vjp():
    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(12, 32, rngs=rngs)
            self.last = nnx.Linear(32, 4, rngs=rngs)

    @nnx.custom_vjp
    def clipped(layer, x):
        return layer(x)

    def forward(layer, x):
        y, back = nnx.vjp(lambda layer, x: layer(x), layer, x)
        return y, back

    def backward(back, g):
        (_, g) = g
        return back(jnp.clip(g, -1, 1))

    clipped.defvjp(forward, backward)
    call = lambda module, x: module.last(nnx.relu(clipped(module.first, x)))  # noqa: E731
    return _classifier(MLP(nnx.Rngs(0)), normal(16, 12), labels(16), call)


@model("nnx MLP with LoRA", _PACKAGE)
def lora():
    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.LoRALinear(12, 32, lora_rank=4, rngs=rngs)
            self.last = nnx.Linear(32, 4, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.relu(self.first(x)))

    module = MLP(nnx.Rngs(0))
    module.first.lora.lora_b[...] = 0.1 * normal(4, 32, seed=5)  # zero, as it begins, has no grid
    return _classifier(module, normal(16, 12), labels(16))


@model("nnx convolutions: transposed, grouped", _PACKAGE, bits=8, slow=True)
def convolutions():
    class Autoencoder(nnx.Module):
        def __init__(self, rngs):
            self.down = nnx.Conv(4, 8, (3,), strides=2, feature_group_count=2, rngs=rngs)
            self.up = nnx.ConvTranspose(8, 4, (3,), strides=2, rngs=rngs)

        def __call__(self, x):
            return self.up(nnx.relu(self.down(x)))

    x = normal(4, 8, 4)
    graph, state = nnx.split(Autoencoder(nnx.Rngs(0)))
    return state, lambda state: jnp.mean((nnx.merge(graph, state)(x) - x) ** 2)


@model("nnx MLP in bfloat16", _PACKAGE, tolerance=3e-2, slow=True)
def mlp_bfloat16():
    linear = {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}

    class MLP(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(12, 32, **linear, rngs=rngs)
            self.last = nnx.Linear(32, 4, **linear, rngs=rngs)

        def __call__(self, x):
            return self.last(jax.nn.gelu(self.first(x))).astype(jnp.float32)

    return _classifier(MLP(nnx.Rngs(0)), normal(16, 12), labels(16))
