"""One Flax decoder for the families of Llama, Mistral, Qwen, Gemma and OPT.

They differ in a few places: norms, how positions enter, how far a token sees, which linear maps
have a bias, and the feed-forward part. `Architecture` says which; `families.py` has what all
models of a family share, and `from_metadata.py` and `from_settings.py` read the rest from a
checkpoint. Layers are stacked on a first axis and scanned, so that a program has the size of one. A
window, a rotary base or a matrix's type that differs by layer is data of the scan (`stacks.py`).

Weights are (outputs, inputs), as all these checkpoints have them, so that blocks of quantized
weights lie along the inputs; a `QuantizedArray` in a weight's place needs `zoqo_jax.quaxify`, or
a zoqo_jax transformation, round `apply`.

One decoder with declared differences, and not others' models (those of Tunix run here, too):
weights stay in the files' order and names, which is how trained codes go back to their place, one
scan reads stacks of codes, and nothing but Flax needs to be installed.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.finetune.models.architecture import Architecture
from experiments.finetune.models.stacks import Types

__all__ = ["Decoder"]

_SMALL = nn.initializers.normal(0.02)
_OPT_OFFSET = 2  # OPT's table of positions begins with two rows that are never read

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": nn.gelu,  # by tanh
    "relu": nn.relu,
}


class Decoder(nn.Module):
    """A causal language model, or some of its layers.

    The first layers of a model, whose outputs are states, and the rest, which reads states, are two
    decoders: `Decoder(arch, range(20))` and `Decoder(arch, range(20, 30))`.

    A matrix of bfloat16 is multiplied in that type with sums in float32; all else, logits and
    states among it, is float32.

    Attributes:
      architecture: what the whole model is made of.
      span: numbers of the layers that are in it; None for all.
      types: matrices that have not the same type in all of them.

    Example:
      >>> shape = Architecture(64, 16, depth=2, heads=4, kv_heads=2, hidden=32, context=8,
      ...                      head_width=4)
      >>> tokens = jnp.zeros((3, 5), jnp.int32)
      >>> logits, variables = Decoder(shape).init_with_output(jax.random.key(0), tokens)
      >>> logits.shape, variables["params"]["layers"]["q"]["weight"].shape
      ((3, 5, 64), (2, 16, 16))
    """

    architecture: Architecture
    span: range | None = None
    types: Types = ()

    @nn.compact
    def __call__(
        self, tokens: jax.Array, at: jax.Array | None = None, words: jax.Array | None = None
    ) -> jax.Array:
        """Logits of the next token, or, without the last layer, states.

        Args:
          tokens: int32 (n, length); what follows a sequence's end may be anything. Without the
            first layer, the states that `span` begins with, (n, length, width).
          at: int32 (n,), the one position to read in each sequence; None for all.
          words: int32 (k,), the only tokens whose logits are wanted; None for all.

        Returns:
          Float32 (n, length or none of it, vocabulary or k), or states, (n, length, width).
        """
        arch = self.architecture
        span = range(arch.depth) if self.span is None else self.span
        is_first, is_last = span.start == 0, span.stop == arch.depth

        def table(name: str, rows: int) -> jax.Array:
            return self.param(name, _SMALL, (rows, arch.width))

        if is_first or (is_last and arch.tied):
            embedding = table("embedding", arch.vocabulary)
        places = jnp.arange(tokens.shape[1])
        x = embedding[tokens].astype(jnp.float32) if is_first else tokens
        if is_first and arch.embedding_scale != 1.0:
            x = x * arch.embedding_scale
        if is_first and arch.positions == "learned":
            positions = table("positions", arch.context + _OPT_OFFSET)
            x = x + positions[places + _OPT_OFFSET].astype(jnp.float32)
        x = self._layers(x, _Sight.of(arch, places, span), span)
        if not is_last:
            return x
        if at is not None:
            x = x[jnp.arange(len(x)), at]
        x = _Norm(arch, name="norm")(x)
        output = embedding if arch.tied else table("output", arch.vocabulary)
        logits = _product(x, output if words is None else output[words])
        return _capped(logits, arch.logit_cap)

    def _layers(self, x: jax.Array, sight: "_Sight", span: range) -> jax.Array:
        """What all layers make of x, each with its own of what differs by layer."""
        typed = _Types(self.architecture, self.types, name="types")() if self.types else {}
        by_layer = _Sight(nn.broadcast, nn.broadcast, 0) if sight.differs else nn.broadcast
        scan = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(by_layer, {name: _Typed(nn.broadcast, 0, 0) for name in typed}),
            length=len(span),
        )
        return scan(self.architecture, name="layers")(x, sight, typed)[0]


class _Typed(NamedTuple):
    """A matrix of several types: the layers' or, with no axis in `kind` and `place`, one layer's.

    `stacks` has a stack of layers for each type, `kind` says which is a layer's, and `place` where
    in it the layer is.
    """

    stacks: tuple[Any, ...]  # float32 (layers of the type, outputs, inputs)
    kind: jax.Array  # int32 (layers,)
    place: jax.Array  # int32 (layers,)

    def product(self, x: jax.Array) -> jax.Array:
        """The product x W^T with the layer's own matrix."""

        def of(stack: Any) -> Callable[[], jax.Array]:
            take = jax.lax.dynamic_index_in_dim
            return lambda: _product(x, take(stack, self.place, keepdims=False))

        return jax.lax.switch(self.kind, list(map(of, self.stacks)))


class _Types(nn.Module):
    """The matrices of several types."""

    architecture: Architecture
    types: Types

    @nn.compact
    def __call__(self) -> dict[str, _Typed]:
        found = {}
        for name, kinds in self.types:
            shape = self.architecture.shape_of(name)
            place = [kinds[:layer].count(kind) for layer, kind in enumerate(kinds)]
            found[name] = _Typed(
                _Stacks(shape, kinds, name=name)(),
                jnp.array(kinds, jnp.int32),
                jnp.array(place, jnp.int32),
            )
        return found


class _Stacks(nn.Module):
    """A stack for each type of a matrix."""

    shape: tuple[int, int]
    kinds: tuple[int, ...]

    @nn.compact
    def __call__(self) -> tuple[jax.Array, ...]:
        return tuple(
            self.param(str(kind), _SMALL, (self.kinds.count(kind), *self.shape))
            for kind in range(max(self.kinds) + 1)
        )


class _Sight(NamedTuple):
    """How layers see positions: all alike, or, with a leading axis of 2, global ones and local.

    `kind` says which of the two each layer is.
    """

    angles: jax.Array  # radians by which each position turns each pair, (length, head_width / 2)
    window: jax.Array | None  # int32, how many tokens a token sees; None for all
    kind: jax.Array | None = None  # int32 (layers,), or one layer's: 0 for global, 1 for local

    @classmethod
    def of(cls, arch: Architecture, places: jax.Array, span: range) -> "_Sight":
        """What the layers of a span need; what they all share has no axis for it."""
        is_local = [arch.is_local(layer) for layer in span]
        if not any(is_local):
            return cls(_angles(arch, places, False), None)
        local = cls(_angles(arch, places, True), jnp.int32(arch.window))
        if all(is_local):
            return local
        everything = jnp.int32(len(places))
        return cls(
            jnp.stack([_angles(arch, places, False), local.angles]),
            jnp.stack([everything, local.window]),
            jnp.array(is_local, jnp.int32),
        )

    @property
    def differs(self) -> bool:
        """Whether layers see positions in two ways."""
        return self.kind is not None

    def of_layer(self) -> "_Sight":
        """What one layer sees, of a sight whose `kind` is that layer's."""
        if not self.differs:
            return self
        return _Sight(self.angles[self.kind], self.window[self.kind])


class _Layer(nn.Module):
    """Attention and a feed-forward part, each added to what comes in."""

    architecture: Architecture

    @nn.compact
    def __call__(
        self, x: jax.Array, sight: _Sight, typed: dict[str, _Typed]
    ) -> tuple[jax.Array, None]:
        arch, sight = self.architecture, sight.of_layer()

        def linear(name: str, x: jax.Array) -> jax.Array:
            bias = arch.qkv_bias if name in ("q", "k", "v") else arch.bias
            return _Linear(arch.shape_of(name), bias, name=name)(x, typed.get(name))

        def heads(name: str) -> jax.Array:
            y = linear(name, h)
            return y.reshape(*y.shape[:-1], -1, arch.head_width)

        h = _Norm(arch, name="attention_norm")(x)
        q, k, v = heads("q"), heads("k"), heads("v")
        if arch.qk_norm:
            q, k = _Norm(arch, name="q_norm")(q), _Norm(arch, name="k_norm")(k)
        if arch.positions != "learned":
            q, k = _rotated(q, sight.angles, arch), _rotated(k, sight.angles, arch)
        y = linear("o", _attention(q, k, v, sight.window, arch))
        x = x + (_Norm(arch, name="post_attention_norm")(y) if arch.post_norms else y)

        h, act = _Norm(arch, name="mlp_norm")(x), _ACTIVATIONS[arch.activation]
        y = linear("up", h)
        y = act(linear("gate", h)) * y if arch.gated else act(y)
        y = linear("down", y)
        return x + (_Norm(arch, name="post_mlp_norm")(y) if arch.post_norms else y), None


class _Linear(nn.Module):
    """x W^T + b, W of this layer's type where layers differ in it."""

    shape: tuple[int, int]
    bias: bool

    @nn.compact
    def __call__(self, x: jax.Array, typed: _Typed | None) -> jax.Array:
        if typed is None:
            y = _product(x, self.param("weight", _SMALL, self.shape))
        else:
            y = typed.product(x)
        return y + self.param("bias", nn.initializers.zeros, self.shape[:1]) if self.bias else y


def _product(x: jax.Array, w: jax.Array) -> jax.Array:
    """Float32 x W^T, both in the dtype of W, which may be bfloat16, and summed in float32."""
    return jnp.matmul(x.astype(w.dtype), w.T, preferred_element_type=jnp.float32)


class _Norm(nn.Module):
    """Root mean square or layer normalisation."""

    architecture: Architecture

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        arch, width = self.architecture, x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, width)
        if arch.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + arch.epsilon) * scale
        return x + self.param("bias", nn.initializers.zeros, width) if arch.norm == "layer" else x


def _angles(arch: Architecture, places: jax.Array, is_local: bool) -> jax.Array:
    """Radians by which each position turns each pair, float32 (length, head_width / 2)."""
    has_own = is_local and arch.local_rope_base > 0.0
    base = arch.local_rope_base if has_own else arch.rope_base
    frequencies = base ** (-jnp.arange(0, arch.head_width, 2) / arch.head_width)
    if arch.rope_factors and not has_own:
        frequencies = frequencies / jnp.array(arch.rope_factors, jnp.float32)
    return places.astype(jnp.float32)[:, None] * frequencies


def _rotated(x: jax.Array, angles: jax.Array, arch: Architecture) -> jax.Array:
    """Rotary positions (Su et al., 2021, arXiv 2104.09864), of x (n, length, heads, head_width)."""
    cos, sin = jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]
    if arch.positions == "pairs":
        a, b = x[..., ::2], x[..., 1::2]
        return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _attention(
    q: jax.Array, k: jax.Array, v: jax.Array, window: jax.Array | None, arch: Architecture
) -> jax.Array:
    """Causal attention, heads in groups that share keys and values; (n, length, all heads)."""
    n, length, heads, width = q.shape
    q = q.reshape(n, length, k.shape[2], heads // k.shape[2], width)
    scores = jnp.einsum("nqgsd,nkgd->ngsqk", q, k) / math.sqrt(arch.query_scalar or width)
    seen = jnp.tril(jnp.ones((length, length), bool))
    if window is not None:
        places = jnp.arange(length, dtype=jnp.int32)
        seen &= places[:, None] - places < window
    weights = jax.nn.softmax(
        jnp.where(seen, _capped(scores, arch.attention_cap), -jnp.inf), axis=-1
    )
    return jnp.einsum("ngsqk,nkgd->nqgsd", weights, v).reshape(n, length, heads * width)


def _capped(x: jax.Array, cap: float) -> jax.Array:
    """Numbers within -cap .. cap, smoothly; as they are for 0."""
    return cap * jnp.tanh(x / cap) if cap else x
