"""One Flax decoder for the families of Llama, Mistral, Qwen, Gemma and OPT.

They differ in a few places: norms, how positions enter, how far a token sees, which linear maps
have a bias, and the feed-forward part. `Architecture` says which; `families.py` has what all
models of a family share, and `architectures.py` reads the rest from a checkpoint. Layers that are
alike are stacked on a first axis and scanned, so that a program has the size of one; `segments.py`
has those that are not. A window or a rotary base that differs by layer is data of the scan.

Weights are (outputs, inputs), as all these checkpoints have them, so that blocks of quantized
weights lie along the inputs; a `QuantizedArray` in a weight's place needs `zoqo_jax.quaxify`, or
a zoqo_jax transformation, round `apply`.

One decoder with declared differences, and not others' models (those of Tunix run here, too):
weights stay in the files' order and names, which is how trained codes go back to their place, one
scan reads stacks of codes, and nothing but Flax needs to be installed.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.finetune.models.architecture import Architecture
from experiments.finetune.models.segments import Segment, is_plain

__all__ = ["Decoder"]

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

    Attributes:
      architecture: what the whole model is made of.
      span: numbers of the layers that are in it; None for all.
      segments: how they are cut into stacks; empty for one stack.

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
    segments: tuple[Segment, ...] = ()

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
            return self.param(name, nn.initializers.normal(0.02), (rows, arch.width))

        if is_first or (is_last and arch.tied):
            embedding = table("embedding", arch.vocabulary)
        places = jnp.arange(tokens.shape[1])
        x = embedding[tokens] if is_first else tokens
        if is_first and arch.embedding_scale != 1.0:
            x = x * arch.embedding_scale
        if is_first and arch.positions == "learned":
            x = x + table("positions", arch.context + _OPT_OFFSET)[places + _OPT_OFFSET]
        x = self._layers(x, _Sight.of(arch, places, span), span)
        if not is_last:
            return x
        if at is not None:
            x = x[jnp.arange(len(x)), at]
        x = _Norm(arch, name="norm")(x)
        output = embedding if arch.tied else table("output", arch.vocabulary)
        return _capped(x @ (output if words is None else output[words]).T, arch.logit_cap)

    def _layers(self, x: jax.Array, sight: "_Sight", span: range) -> jax.Array:
        arch = self.architecture
        if not self.segments or is_plain(self.segments):
            return _scanned(_Layer, len(span), sight)(arch, name="layers")(x, sight)[0]
        return _Segments(arch, self.segments, name="layers")(x, sight)


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

    def of_layer(self) -> "_Sight":
        """What one layer sees, of a sight whose `kind` is that layer's."""
        if self.kind is None:
            return self
        return _Sight(self.angles[self.kind], self.window[self.kind])


def _scanned(layers: type[nn.Module], length: int, sight: _Sight) -> Callable[..., nn.Module]:
    """A module as often as its stacked parameters say, each with its own `sight.kind`."""
    by_layer = _Sight(nn.broadcast, nn.broadcast, 0)
    return nn.scan(
        layers,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast if sight.kind is None else (by_layer,),
        length=length,
    )


class _Segments(nn.Module):
    """Stacks of layers, one after another."""

    architecture: Architecture
    segments: tuple[Segment, ...]

    @nn.compact
    def __call__(self, x: jax.Array, sight: _Sight) -> jax.Array:
        first = self.segments[0].begin
        for number, (begin, period, repeats) in enumerate(self.segments):
            part = sight
            if sight.kind is not None:
                kind = sight.kind[begin - first :][: period * repeats]
                part = sight._replace(kind=kind.reshape(repeats, period))
            layers = _scanned(_Period, repeats, part)
            x, _ = layers(self.architecture, period, name=str(number))(x, part)
        return x


class _Period(nn.Module):
    """The layers of a period."""

    architecture: Architecture
    period: int

    @nn.compact
    def __call__(self, x: jax.Array, sight: _Sight) -> tuple[jax.Array, None]:
        for place in range(self.period):
            one = sight if sight.kind is None else sight._replace(kind=sight.kind[place])
            x, _ = _Layer(self.architecture, name=str(place))(x, one)
        return x, None


class _Layer(nn.Module):
    """Attention and a feed-forward part, each added to what comes in."""

    architecture: Architecture

    @nn.compact
    def __call__(self, x: jax.Array, sight: _Sight) -> tuple[jax.Array, None]:
        arch, sight = self.architecture, sight.of_layer()

        def linear(name: str, features: int, bias: bool) -> _Linear:
            return _Linear(features, bias, name=name)

        def heads(name: str, count: int) -> jax.Array:
            y = linear(name, count * arch.head_width, arch.qkv_bias)(h)
            return y.reshape(*y.shape[:-1], count, arch.head_width)

        h = _Norm(arch, name="attention_norm")(x)
        q, k = heads("q", arch.heads), heads("k", arch.kv_heads)
        v = heads("v", arch.kv_heads)
        if arch.qk_norm:
            q, k = _Norm(arch, name="q_norm")(q), _Norm(arch, name="k_norm")(k)
        if arch.positions != "learned":
            q, k = _rotated(q, sight.angles, arch), _rotated(k, sight.angles, arch)
        y = linear("o", arch.width, arch.bias)(_attention(q, k, v, sight.window, arch))
        x = x + (_Norm(arch, name="post_attention_norm")(y) if arch.post_norms else y)

        h, act = _Norm(arch, name="mlp_norm")(x), _ACTIVATIONS[arch.activation]
        y = linear("up", arch.hidden, arch.bias)(h)
        y = act(linear("gate", arch.hidden, arch.bias)(h)) * y if arch.gated else act(y)
        y = linear("down", arch.width, arch.bias)(y)
        return x + (_Norm(arch, name="post_mlp_norm")(y) if arch.post_norms else y), None


class _Linear(nn.Module):
    """x W^T + b."""

    features: int
    bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.features, x.shape[-1])
        y = x @ self.param("weight", nn.initializers.normal(0.02), shape).T
        return y + self.param("bias", nn.initializers.zeros, shape[:1]) if self.bias else y


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
