"""dm-haiku: transformed functions and their nested dictionaries."""

import jax
import jax.numpy as jnp

from zoo.data import cross_entropy, labels, normal, tokens
from zoo.registry import model

_PACKAGE = "dm-haiku"


def _transformed(fn, x, y):
    import haiku as hk

    network = hk.without_apply_rng(hk.transform(fn))
    params = jax.jit(network.init)(jax.random.PRNGKey(0), x)
    return params, lambda params: cross_entropy(network.apply(params, x), y)


@model("Haiku MLP", _PACKAGE)
def mlp():
    import haiku as hk

    return _transformed(lambda x: hk.nets.MLP([32, 4])(x), normal(16, 12), labels(16))


@model("Haiku ResNet with BatchNorm and its state", _PACKAGE, bits=8, slow=True)
def resnet():
    import haiku as hk

    def fn(x, is_training):
        net = hk.nets.ResNet(
            blocks_per_group=(1, 1, 1, 1),
            num_classes=4,
            bottleneck=False,
            channels_per_group=(8, 8, 16, 16),
            use_projection=(False, True, True, True),
            initial_conv_config={"output_channels": 8, "kernel_shape": 3, "stride": 1},
        )
        return net(x, is_training)

    network = hk.without_apply_rng(hk.transform_with_state(fn))
    x, y = normal(4, 16, 16, 3), labels(4)
    init = jax.jit(network.init, static_argnames="is_training")
    params, state = init(jax.random.PRNGKey(0), x, is_training=True)

    def loss(params):
        logits, _ = network.apply(params, state, x, True)
        return cross_entropy(logits, y)

    # The last convolution of every block begins with a scale of zero, and would not be heard.
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.ones_like(leaf) if path[-1].key == "scale" else leaf, params
    )
    return params, loss


@model("Haiku LSTM, hk.dynamic_unroll", _PACKAGE)
def lstm():
    import haiku as hk

    def fn(x):
        core = hk.LSTM(16)
        out, _ = hk.dynamic_unroll(core, x, core.initial_state(x.shape[1]))
        return hk.Linear(4)(out[-1])

    return _transformed(fn, normal(6, 4, 8), labels(4))


def _attention(x):
    import haiku as hk

    mask = jnp.tril(jnp.ones((1, 1, x.shape[1], x.shape[1])))
    attention = hk.MultiHeadAttention(2, 8, w_init=hk.initializers.VarianceScaling(1.0))
    return attention(x, x, x, mask=mask)


@model("Haiku transformer block", _PACKAGE, slow=True)
def transformer():
    import haiku as hk

    def fn(text):
        x = hk.Embed(40, 16)(text)
        x = x + _attention(hk.LayerNorm(-1, True, True)(x))
        x = x + hk.nets.MLP([32, 16], activation=jax.nn.gelu)(x)
        return hk.Linear(40)(x)

    text = tokens(2, 9)
    return _transformed(fn, text[:, :-1], text[:, 1:])


@model("Haiku layers by hk.layer_stack, with hk.remat", _PACKAGE)
def layer_stack():
    import haiku as hk

    def fn(x):
        def block(x):
            return x + hk.remat(hk.nets.MLP([32, 16]))(x)

        return hk.Linear(4)(hk.layer_stack(3)(block)(x))

    return _transformed(fn, normal(16, 16), labels(16))


@model("Haiku vanilla RNN, hk.scan", _PACKAGE, slow=True)
def scan():
    import haiku as hk

    def fn(x):
        core = hk.VanillaRNN(16)
        step = lambda state, now: (core(now, state)[1], None)  # noqa: E731
        state, _ = hk.scan(step, core.initial_state(x.shape[1]), x)
        return hk.Linear(4)(state)

    return _transformed(fn, normal(6, 4, 8), labels(4))
