"""Graphs, groups, densities, quantum states and policies."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from zoo.data import cross_entropy, labels, normal
from zoo.registry import model


@model("jraph GraphNetwork of Haiku MLPs", "jraph", heavy=True)
def graph_network():
    import haiku as hk
    import jraph

    graph = jraph.GraphsTuple(
        nodes=normal(6, 4), edges=normal(8, 3, seed=3), globals=normal(1, 2, seed=4),
        senders=jnp.array([0, 1, 2, 3, 4, 5, 0, 2]), receivers=jnp.array([1, 2, 3, 4, 5, 0, 3, 5]),
        n_node=jnp.array([6]), n_edge=jnp.array([8]),
    )  # fmt: skip

    def fn(graph):
        @jraph.concatenated_args
        def update(features):
            return hk.nets.MLP([16, 4])(features)

        net = jraph.GraphNetwork(update, update, update)
        return net(graph).globals

    network = hk.without_apply_rng(hk.transform(fn))
    params = network.init(jax.random.PRNGKey(0), graph)
    return params, lambda params: cross_entropy(network.apply(params, graph), labels(1))


@model("jraph GraphConvolution of linen layers", "jraph", heavy=True)
def graph_convolution():
    import jraph
    from flax import linen as nn

    graph = jraph.GraphsTuple(
        nodes=normal(6, 4), edges=None, globals=None,
        senders=jnp.array([0, 1, 2, 3, 4, 5]), receivers=jnp.array([1, 2, 3, 4, 5, 0]),
        n_node=jnp.array([6]), n_edge=jnp.array([6]),
    )  # fmt: skip

    class GCN(nn.Module):
        @nn.compact
        def __call__(self, graph):
            hidden = jraph.GraphConvolution(nn.Dense(16), add_self_edges=True)(graph)
            hidden = hidden._replace(nodes=nn.relu(hidden.nodes))
            return jraph.GraphConvolution(nn.Dense(4), add_self_edges=True)(hidden).nodes

    net, y = GCN(), labels(6)
    variables = net.init(jax.random.key(0), graph)
    return variables, lambda variables: cross_entropy(net.apply(variables, graph), y)


@model("e3nn equivariant linear layers, Flax", "e3nn-jax", heavy=True, bits=8)
def equivariant():
    import e3nn_jax as e3nn
    from flax import linen as nn

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = e3nn.flax.Linear("8x0e + 8x1o")(x)
            x = e3nn.tensor_square(x).filter(["0e", "1o"])
            return e3nn.flax.Linear("4x0e")(x).array

    x, y, net = e3nn.IrrepsArray("4x0e + 2x1o", normal(8, 10)), labels(8), Net()
    variables = net.init(jax.random.key(0), x)
    return variables, lambda variables: cross_entropy(net.apply(variables, x), y)


@model("flowjax coupling flow", "flowjax", heavy=True)
def coupling_flow():
    import paramax
    from flowjax.distributions import StandardNormal
    from flowjax.flows import coupling_flow

    x = normal(16, 2)
    flow = coupling_flow(
        jax.random.key(0), base_dist=StandardNormal((2,)), flow_layers=2, nn_width=16, nn_depth=1
    )
    return flow, lambda flow: -paramax.unwrap(flow).log_prob(x).mean()


@model("NetKet RBM, log amplitudes", "netket", heavy=True)
def restricted_boltzmann():
    os.environ["NETKET_ENABLE_X64"] = "0"  # or all that comes after it computes in 64 bits
    import netket

    x = jnp.sign(normal(8, 6))
    net = netket.models.RBM(alpha=2, param_dtype=jnp.float32)
    variables = net.init(jax.random.key(0), x)
    # They begin so small that log cosh is flat.
    variables = jax.tree.map(lambda leaf: 20 * leaf, variables)
    return variables, lambda variables: jnp.mean((net.apply(variables, x) - 1.0) ** 2)


@model("Brax policy network", "brax", heavy=True)
def policy():
    from brax.training import networks

    net = networks.make_policy_network(4, 8, hidden_layer_sizes=(16, 16))
    x, target = normal(16, 8), normal(16, 4, seed=3)
    params = net.init(jax.random.PRNGKey(0))
    return params, lambda params: jnp.mean((net.apply(None, params, x) - target) ** 2)


@model("gymnax Pendulum, a policy's return over a rollout", "gymnax", heavy=True, bits=8)
def rollout():
    import gymnax

    environment, settings = gymnax.make("Pendulum-v1")
    params = {"in": normal(3, 16) / 2, "out": normal(16, 1, seed=3) / 4}

    def loss(params):
        first, state = environment.reset(jax.random.key(0), settings)

        def step(carry, key):
            seen, state = carry
            action = jnp.tanh(jnp.tanh(seen @ params["in"]) @ params["out"])
            seen, state, reward, *_ = environment.step(key, state, action, settings)
            return (seen, state), reward

        keys = jax.random.split(jax.random.key(1), 20)
        _, rewards = jax.lax.scan(step, (first, state), keys)
        return -rewards.mean()

    return params, loss


@model("evojax MLP policy's network", "evojax", heavy=True)
def evolved():
    from evojax.policy.mlp import MLP

    net = MLP(feat_dims=(16, 16), out_dim=4, out_fn="tanh")
    x, target = normal(16, 8), normal(16, 4, seed=3)
    params = net.init(jax.random.PRNGKey(0), x)
    return params, lambda params: jnp.mean((net.apply(params, x) - target) ** 2)


@model("distrax mixture density head", "distrax", heavy=True)
def mixture_density():
    import distrax

    x, y = normal(16, 4), normal(16, seed=3)
    params = {"in": normal(4, 16, seed=4) / 2, "out": normal(16, 9, seed=5) / 4}

    def loss(params):
        logits, mean, log_scale = jnp.split(jnp.tanh(x @ params["in"]) @ params["out"], 3, axis=-1)
        mixture = distrax.MixtureSameFamily(
            distrax.Categorical(logits=logits), distrax.Normal(mean, jnp.exp(log_scale))
        )
        return -mixture.log_prob(y).mean()

    return params, loss


@model("rlax Q-learning loss of a Haiku network", "rlax", heavy=True)
def q_learning():
    import haiku as hk
    import rlax

    network = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([16, 4])(x)))
    now, later = normal(8, 6), normal(8, 6, seed=3)
    actions, rewards = labels(8), normal(8, seed=4)
    params = network.init(jax.random.PRNGKey(0), now)

    def loss(params):
        q, next_q = network.apply(params, now), network.apply(params, later)
        errors = jax.vmap(rlax.q_learning)(q, actions, rewards, jnp.full(8, 0.9), next_q)
        return jnp.mean(rlax.huber_loss(errors))

    return params, loss


@model("NumPyro Bayesian network, potential energy", "numpyro", heavy=True)
def bayesian():
    import numpyro
    from numpyro import distributions as dist
    from numpyro.infer.util import log_density

    x, y = normal(16, 4), labels(16, 2)

    def network(x, y):
        first = numpyro.sample("first", dist.Normal(jnp.zeros((4, 16)), 1.0))
        last = numpyro.sample("last", dist.Normal(jnp.zeros((16, 1)), 1.0))
        logits = (jnp.tanh(x @ first) @ last)[:, 0]
        numpyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    params = {"first": normal(4, 16, seed=4), "last": normal(16, 1, seed=5) / 2}
    return params, lambda params: -log_density(network, (x, y), {}, params)[0] / 16


@model("OTT input-convex network", "ott-jax", heavy=True)
def input_convex():
    from ott.neural.networks import icnn

    net, x = icnn.ICNN(dim_data=4, dim_hidden=[16, 16]), normal(8, 4)
    variables = net.init(jax.random.key(0), x[0])
    evaluate = lambda variables: jax.vmap(lambda x: net.apply(variables, x))(x)  # noqa: E731
    return variables, lambda variables: jnp.mean((evaluate(variables) - 1.0) ** 2)


@model("JAX MD Behler-Parrinello network", "jax-md", heavy=True, tolerance=2e-3)
def potential():
    from flax import nnx
    from jax_md import energy, space

    displacement, _ = space.free()
    corners = np.stack(np.meshgrid([0, 2], [0, 2], [0, 2]), -1)
    place = jnp.asarray(corners.reshape(-1, 3), jnp.float32)
    evaluate = energy.behler_parrinello(displacement, key=jax.random.key(0), mlp_sizes=(16, 16))
    graph, state = nnx.split(evaluate.model)
    return state, lambda state: (nnx.merge(graph, state)(place) / 8 - 1.0) ** 2
