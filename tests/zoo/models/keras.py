"""Keras 3 on JAX: `stateless_call` with lists of variables."""

import os

from zoo.data import cross_entropy, labels, normal, tokens
from zoo.registry import model

_PACKAGE = "keras"


def _stateless(make, x, y, tail=lambda logits: logits):
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras

    keras.utils.set_random_seed(0)
    net = make(keras)
    net(x)
    fixed = [variable.value for variable in net.non_trainable_variables]
    params = [variable.value for variable in net.trainable_variables]

    def loss(params):
        logits, _ = net.stateless_call(params, fixed, x, training=True)
        return cross_entropy(tail(logits), y)

    return params, loss


@model("Keras MLP, Sequential of Dense", _PACKAGE)
def mlp():
    def make(keras):
        layers = keras.layers
        return keras.Sequential([layers.Dense(32, activation="relu"), layers.Dense(4)])

    return _stateless(make, normal(16, 12), labels(16))


@model("Keras CNN with BatchNormalization", _PACKAGE, bits=8)
def cnn():
    def make(keras):
        layers = keras.layers
        return keras.Sequential(
            [
                layers.Conv2D(8, 3, activation="relu"),
                layers.BatchNormalization(),
                layers.SeparableConv2D(8, 3),
                layers.GlobalAveragePooling2D(),
                layers.Dense(4),
            ]
        )

    return _stateless(make, normal(4, 8, 8, 3), labels(4))


@model("Keras LSTM", _PACKAGE)
def lstm():
    def make(keras):
        return keras.Sequential([keras.layers.LSTM(16), keras.layers.Dense(4)])

    return _stateless(make, normal(4, 6, 8), labels(4))


@model("Keras GRU, bidirectional", _PACKAGE, slow=True)
def gru():
    def make(keras):
        layers = keras.layers
        return keras.Sequential([layers.Bidirectional(layers.GRU(8)), layers.Dense(4)])

    return _stateless(make, normal(4, 6, 8), labels(4))


@model("Keras transformer block, functional", _PACKAGE, slow=True)
def transformer():
    def make(keras):
        layers = keras.layers
        text = keras.Input((8,), dtype="int32")
        x = layers.Embedding(40, 16)(text)
        y = layers.MultiHeadAttention(num_heads=2, key_dim=8)(x, x, use_causal_mask=True)
        x = layers.LayerNormalization()(x + y)
        x = x + layers.Dense(16)(layers.Dense(32, activation="gelu")(x))
        return keras.Model(text, layers.Dense(40)(x))

    text = tokens(2, 9)
    return _stateless(make, text[:, :-1], text[:, 1:])
