"""Flax's linen."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from zoo.data import labels, normal, tokens
from zoo.registry import model

_PACKAGE = "flax"


def _classifier(module, x, y):
    """A loss as Flax's examples have it."""
    variables = jax.jit(module.init)(jax.random.key(0), x)

    def loss(variables):
        logits = module.apply(variables, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return variables, loss


@model("linen MLP", _PACKAGE)
def mlp():
    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(32)(x))
            return nn.Dense(4)(nn.LayerNorm()(x))

    return _classifier(MLP(), normal(16, 12), labels(16))


@model("linen CNN with BatchNorm", _PACKAGE, bits=8)
def cnn():
    class CNN(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            for features in (8, 16):
                x = nn.Conv(features, (3, 3), use_bias=False)(x)
                x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
                x = nn.avg_pool(x, (2, 2), (2, 2))
            return nn.Dense(4)(x.reshape(len(x), -1))

    x, y, module = normal(4, 8, 8, 3), labels(4), CNN()
    variables = module.init(jax.random.key(0), x, train=True)

    def loss(variables):
        logits, _ = module.apply(variables, x, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return variables, loss


class _Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        mask = nn.make_causal_mask(x[..., 0])
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(y, mask=mask)
        y = nn.gelu(nn.Dense(32)(nn.LayerNorm()(x)))
        return x + nn.Dense(16)(y)


class _LanguageModel(nn.Module):
    """A decoder whose head is its embedding."""

    block: type[nn.Module] = _Block
    scanned: bool = False

    @nn.compact
    def __call__(self, tokens):
        embedding = nn.Embed(40, 16)
        x = embedding(tokens)
        if self.scanned:
            layers = nn.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            x, _ = layers(self.block(), x, None)
        else:
            for _ in range(1):
                x = self.block()(x)
        return embedding.attend(nn.LayerNorm()(x))


def _next_token(module):
    text = tokens(2, 9)
    return _classifier(module, text[:, :-1], text[:, 1:])


@model("linen transformer with a tied head", _PACKAGE)
def transformer():
    return _next_token(_LanguageModel())


@model("linen transformer, nn.remat", _PACKAGE, slow=True)
def transformer_remat():
    return _next_token(_LanguageModel(block=nn.remat(_Block)))


@model("linen transformer, nn.scan over layers", _PACKAGE, slow=True)
def transformer_scan():
    return _next_token(_LanguageModel(scanned=True))


@model("linen transformer, nn.scan of nn.remat", _PACKAGE)
def transformer_scan_remat():
    block = nn.remat(_Block, prevent_cse=False)
    return _next_token(_LanguageModel(block=block, scanned=True))


def _recurrent(cell):
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4)(nn.RNN(cell())(x)[:, -1])

    return _classifier(Recurrent(), normal(4, 6, 8), labels(4))


@model("linen LSTM, nn.RNN", _PACKAGE)
def lstm():
    return _recurrent(lambda: nn.OptimizedLSTMCell(16))


@model("linen GRU, nn.RNN", _PACKAGE)
def gru():
    return _recurrent(lambda: nn.GRUCell(16))


@model("linen ConvLSTM", _PACKAGE, bits=8, slow=True)
def conv_lstm():
    class Video(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.RNN(nn.ConvLSTMCell(4, (3, 3)), time_major=False)(x)
            return nn.Dense(4)(x[:, -1].mean((1, 2)))

    return _classifier(Video(), normal(2, 3, 6, 6, 2), labels(2))


@model("linen DenseGeneral over heads", _PACKAGE, slow=True)
def dense_general():
    class Heads(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.gelu(nn.DenseGeneral((4, 8))(x))
            return nn.DenseGeneral(4, axis=(-2, -1))(x)

    return _classifier(Heads(), normal(16, 12), labels(16))


@model("linen convolutions: transposed, grouped, dilated", _PACKAGE, bits=8, slow=True)
def convolutions():
    class Autoencoder(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), strides=2)(x))
            x = nn.relu(nn.Conv(8, (3, 3), feature_group_count=4, kernel_dilation=2)(x))
            return nn.ConvTranspose(3, (3, 3), strides=(2, 2))(x)

    x, module = normal(4, 8, 8, 3), Autoencoder()
    variables = jax.jit(module.init)(jax.random.key(0), x)
    return variables, lambda variables: jnp.mean((module.apply(variables, x) - x) ** 2)


@model("linen WeightNorm", _PACKAGE)
def weight_norm():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.WeightNorm(nn.Dense(32))(x))
            return nn.Dense(4)(x)

    return _classifier(Normed(), normal(16, 12), labels(16))


@model("linen SpectralNorm", _PACKAGE)
def spectral_norm():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.SpectralNorm(nn.Dense(32))(x, update_stats=False))
            return nn.Dense(4)(x)

    return _classifier(Normed(), normal(16, 12), labels(16))


@model("linen MLP in bfloat16 with dropout", _PACKAGE, tolerance=3e-2, slow=True)
def mlp_bfloat16():
    class MLP(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = functools.partial(nn.Dense, dtype=jnp.bfloat16)
            x = nn.Dropout(0.1, deterministic=False)(nn.silu(dense(32)(x)))
            return dense(4)(x)

    x, y, module = normal(16, 12), labels(16), MLP()
    variables = module.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x)

    def loss(variables):
        logits = module.apply(variables, x, rngs={"dropout": jax.random.key(2)})
        logits = logits.astype(jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    return variables, loss


@model("linen mixture of experts by nn.vmap", _PACKAGE)
def experts():
    class Experts(nn.Module):
        @nn.compact
        def __call__(self, x):
            gates = nn.softmax(nn.Dense(3)(x))
            dense = nn.vmap(
                nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None,
                axis_size=3,
            )  # fmt: skip
            return jnp.einsum("ebo,be->bo", dense(4)(x), gates)

    return _classifier(Experts(), normal(16, 12), labels(16))
