"""What is trained: a 12-layer network of 21 M parameters and decoders of 1 M to 135 M.

Weights are random and normal, of standard deviation width ** -0.5: time and memory do not depend
on what was learned. They do depend on the tails. Flax initialises from a truncated normal
distribution, which puts a thousandth of all codes on the grid's edges, where trained matrices have
next to none, and at an edge a rank-one direction cannot be shared.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import zoqo_jax as zq
from zoqo_jax.directions import Structure

__all__ = [
    "DECODERS",
    "NET",
    "STORAGES",
    "STRUCTURES",
    "TINY",
    "Decoder",
    "Net",
    "Shape",
    "step",
    "transformation",
]

STORAGES: Mapping[str, zq.Quantizer] = {
    "int8": zq.Quantizer(8),
    "uint4": zq.Quantizer(4, range="minmax", block=32),
    "nf4": zq.nf4(block=64),
}
STRUCTURES: tuple[Structure, ...] = ("rank_one", "sparse", "dense")
DENSITY = 1 / 128

# Shorter than the step of every grid here, so that each step moves a code by one. A longer one
# would drive the codes to the grid's edges within a few calls, and other code would be measured.
STRIDE = 1e-4

Loss = Callable[[Any, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class Net:
    """Residual blocks: LayerNorm, a product to `hidden`, gelu, a product back.

    Attributes:
        layers: how many.
        width: of the residual stream.
        hidden: of the inner layer.
        scanned: whether one block runs `layers` times (`nn.scan`) or each is compiled.
    """

    layers: int = 12
    width: int = 512
    hidden: int = 1728
    scanned: bool = False

    @property
    def weights(self) -> int:
        """Parameters in matrices."""
        return 2 * self.layers * self.width * self.hidden

    @property
    def largest(self) -> int:
        """Parameters of the largest matrix that is used at once."""
        return self.width * self.hidden

    def params(self, key: jax.Array) -> Any:
        """Random float32 parameters."""
        x = jnp.zeros((1, self.width))
        shapes = jax.eval_shape(self._module().init, key, x)
        return _random(key, shapes)

    def batch(self, tokens: int) -> jax.Array:
        """An input."""
        return jax.random.normal(jax.random.key(1), (tokens, self.width))

    def loss(self, params: Any, batch: jax.Array) -> jax.Array:
        """A number that depends on everything."""
        return jnp.mean(self._module().apply(params, batch) ** 2)

    def _module(self) -> nn.Module:
        return _Blocks(self.layers, self.width, self.hidden, self.scanned)


class _Block(nn.Module):
    width: int
    hidden: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
        inner = nn.gelu(nn.Dense(self.hidden, use_bias=False)(nn.LayerNorm()(x)))
        return x + nn.Dense(self.width, use_bias=False)(inner), None


class _Blocks(nn.Module):
    layers: int
    width: int
    hidden: int
    scanned: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.scanned:
            stack = nn.scan(
                _Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
            )
            return stack(self.width, self.hidden)(x, None)[0]
        for _ in range(self.layers):
            x, _none = _Block(self.width, self.hidden)(x)
        return x


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A language model in Llama's shape, in plain JAX.

    RMSNorm, rotary grouped-query attention, SwiGLU, one matrix for embedding and head. Its layers
    are stacked and `scanned`, or leaves of their own.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    hidden: int
    vocabulary: int
    scanned: bool = True

    @property
    def weights(self) -> int:
        """Parameters in matrices."""
        shapes = jax.eval_shape(self.params, jax.random.key(0))
        return sum(leaf.size for leaf in jax.tree.leaves(_matrices(shapes)))

    @property
    def largest(self) -> int:
        """Parameters of the largest matrix that is used at once."""
        return max(self.vocabulary, self.hidden) * self.width

    def params(self, key: jax.Array) -> Any:
        """Random float32 parameters."""
        return _random(key, self._shapes())

    def _shapes(self) -> Any:
        def f(*shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        n, d, size = self.layers, self.width, self.width // self.heads
        layers = {
            "attention": {"scale": f(n, d)},
            "query": {"kernel": f(n, d, d)},
            "key": {"kernel": f(n, d, self.kv_heads * size)},
            "value": {"kernel": f(n, d, self.kv_heads * size)},
            "out": {"kernel": f(n, d, d)},
            "feedforward": {"scale": f(n, d)},
            "gate": {"kernel": f(n, d, self.hidden)},
            "up": {"kernel": f(n, d, self.hidden)},
            "down": {"kernel": f(n, self.hidden, d)},
        }
        if not self.scanned:
            one = jax.tree.map(lambda leaf: f(*leaf.shape[1:]), layers)
            layers = [one] * n
        return {
            "embedding": f(self.vocabulary, d),
            "layers": layers,
            "final": {"scale": f(d)},
        }

    def batch(self, tokens: int) -> jax.Array:
        """Random text, 32 tokens a sequence."""
        length = min(tokens, 32)
        shape = (tokens // length, length + 1)
        return jax.random.randint(jax.random.key(1), shape, 0, self.vocabulary)

    def loss(self, params: Any, batch: jax.Array) -> jax.Array:
        """Mean cross-entropy of the next token."""
        x = params["embedding"][batch[:, :-1]]
        if self.scanned:
            x, _ = jax.lax.scan(lambda x, layer: (self._layer(layer, x), None), x, params["layers"])
        else:
            x = functools.reduce(lambda x, layer: self._layer(layer, x), params["layers"], x)
        logits = _rms_norm(params["final"], x) @ params["embedding"].T
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    def _layer(self, layer: Any, x: jax.Array) -> jax.Array:
        batch, length, _ = x.shape
        size, group = self.width // self.heads, self.heads // self.kv_heads
        y = _rms_norm(layer["attention"], x)
        q, k, v = (
            (y @ layer[name]["kernel"]).reshape(batch, length, -1, size)
            for name in ("query", "key", "value")
        )
        q = _rotate(q).reshape(batch, length, self.kv_heads, group, size)
        scores = jnp.einsum("bqhgd,bkhd->bhgqk", q, _rotate(k)) * size**-0.5
        causal = jnp.tril(jnp.ones((length, length), bool))
        attention = jax.nn.softmax(jnp.where(causal, scores, -jnp.inf))
        y = jnp.einsum("bhgqk,bkhd->bqhgd", attention, v).reshape(x.shape)
        x = x + y @ layer["out"]["kernel"]
        y = _rms_norm(layer["feedforward"], x)
        y = jax.nn.silu(y @ layer["gate"]["kernel"]) * (y @ layer["up"]["kernel"])
        return x + y @ layer["down"]["kernel"]


Shape = Net | Decoder

NET = Net()  # 21 M
TINY = Net(layers=1, width=512, hidden=1024)  # 1 M, for --quick
DECODERS: Mapping[str, Decoder] = {
    "1M": Decoder(4, 128, 2, 1, 384, 2_048),
    "8M": Decoder(8, 256, 4, 2, 768, 8_192),
    "35M": Decoder(16, 384, 6, 2, 1_024, 24_576),
    "135M": Decoder(30, 576, 9, 3, 1_536, 49_152),  # SmolLM2-135M
}


def transformation(
    structure: Structure, queries: int = 1, query_batch: int | None = 1, in_turn: bool = False
) -> Any:
    """The optimizer that is measured: ZOQO with Rademacher directions."""
    return zq.zoqo(
        STRIDE,
        STRIDE,
        key=jax.random.key(0),
        num_queries=queries,
        noise="rademacher",
        structure=structure,
        density=DENSITY if structure in ("sparse", "columns") else 1.0,
        query_batch=query_batch,
        sides="in_turn" if in_turn else "together",
    )


def step(tx: Any, loss: Loss) -> Callable[..., tuple[Any, Any]]:
    """One whole training step through the public interface."""

    def one(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        updates, state = tx.update(None, state, params, value_fn=lambda p: loss(p, batch))
        return optax.apply_updates(params, updates), state

    return one


def _random(key: jax.Array, shapes: Any) -> Any:
    """Ones for norms' scales, zeros for biases, normal matrices."""

    def one(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "scale" in name:
            return jnp.ones(leaf.shape, leaf.dtype)
        if "bias" in name:
            return jnp.zeros(leaf.shape, leaf.dtype)
        width = leaf.shape[-1] if "embedding" in name else leaf.shape[-2]
        of_leaf = jax.random.fold_in(key, sum(map(ord, name)) + math.prod(leaf.shape))
        return jax.random.normal(of_leaf, leaf.shape, leaf.dtype) * width**-0.5

    return jax.tree_util.tree_map_with_path(one, shapes)


def _matrices(tree: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if zq.is_matrix(path, leaf) else None, tree
    )


def _rms_norm(params: Any, x: jax.Array) -> jax.Array:
    mean_square = jnp.mean(x**2, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + 1e-5) * params["scale"]


def _rotate(x: jax.Array) -> jax.Array:
    """Rotary positions, (batch, length, heads, size)."""
    length, size = x.shape[1], x.shape[-1]
    frequency = 10_000.0 ** (-jnp.arange(0, size, 2) / size)
    angle = jnp.arange(length)[:, None, None] * frequency
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
