"""One Flax decoder for the families of Llama (SmolLM2, TinyLlama, Llama 3), Qwen2 and OPT.

They differ in a few places: the norm, how positions enter, which linear maps have a bias, and
whether the feed-forward part is gated. `Architecture` says which; `loading.py` reads it from a
checkpoint. Layers are stacked on a first axis and scanned, so that a program has the size of one.

Weights are (outputs, inputs), as all these checkpoints have them, so that blocks of quantized
weights lie along the inputs; a `QuantizedArray` in a weight's place needs `zoqo_jax.quaxify`, or
a zoqo_jax transformation, round `apply`.
"""

import dataclasses
import math
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

__all__ = ["Architecture", "Decoder"]

_OPT_OFFSET = 2  # OPT's table of positions begins with two rows that are never read


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a decoder is made of.

    Attributes:
      vocabulary: number of tokens.
      width: of the residual stream.
      depth: number of layers.
      heads: of attention.
      kv_heads: of keys and values; a divisor of `heads`, which share them in groups.
      hidden: width inside the feed-forward part.
      context: the longest sequence, in tokens.
      head_width: of a head, for queries, keys and values.
      norm: "rms" (a scale) or "layer" (scale and bias).
      epsilon: under the norms' root.
      positions: "halves" rotates the first half of a head against the second, as Hugging Face's
        weights want it; "pairs" neighbours, as GGUF's of the Llama family do; "learned" adds rows
        of a table, as OPT does.
      rope_base: of rotary positions.
      rope_factors: what each of the head_width / 2 frequencies is divided by; empty for ones.
      gated: down(silu(gate(x)) * up(x)); otherwise down(relu(up(x))).
      qkv_bias: whether queries, keys and values have a bias.
      bias: whether all other linear maps have one.
      tied: whether the output is the embedding's transpose.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    hidden: int
    context: int
    head_width: int
    norm: Literal["rms", "layer"] = "rms"
    epsilon: float = 1e-5
    positions: Literal["halves", "pairs", "learned"] = "halves"
    rope_base: float = 10_000.0
    rope_factors: tuple[float, ...] = ()
    gated: bool = True
    qkv_bias: bool = False
    bias: bool = False
    tied: bool = True

    def __post_init__(self) -> None:
        """Check what a hostile or mistaken checkpoint could say."""
        for name in ("vocabulary", "width", "depth", "heads", "kv_heads", "hidden", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide {self.heads} heads, got {self.kv_heads}.")
        if self.positions != "learned" and self.head_width % 2:
            raise ValueError(f"head_width must be even to be rotated, got {self.head_width}.")
        if self.rope_factors and len(self.rope_factors) != self.head_width // 2:
            raise ValueError(
                f"rope_factors must be {self.head_width // 2}, got {len(self.rope_factors)}."
            )


class Decoder(nn.Module):
    """A causal language model, or some of its layers.

    The first layers of a model, whose outputs are states, and the rest, which reads states, are two
    decoders: `Decoder(arch, range(20))` and `Decoder(arch, range(20, 30))`.

    Attributes:
      architecture: what the whole model is made of.
      span: numbers of the layers that are in it; None for all.

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
        if is_first and arch.positions == "learned":
            x = x + table("positions", arch.context + _OPT_OFFSET)[places + _OPT_OFFSET]
        layers = nn.scan(
            _Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=len(span),
        )
        x, _ = layers(arch, name="layers")(x, _angles(arch, places))
        if not is_last:
            return x
        if at is not None:
            x = x[jnp.arange(len(x)), at]
        x = _Norm(arch, name="norm")(x)
        output = embedding if arch.tied else table("output", arch.vocabulary)
        return x @ (output if words is None else output[words]).T


class _Layer(nn.Module):
    """Attention and a feed-forward part, each added to what comes in."""

    architecture: Architecture

    @nn.compact
    def __call__(self, x: jax.Array, angles: jax.Array) -> tuple[jax.Array, None]:
        arch = self.architecture

        def linear(name: str, features: int, bias: bool) -> _Linear:
            return _Linear(features, bias, name=name)

        def heads(name: str, count: int) -> jax.Array:
            y = linear(name, count * arch.head_width, arch.qkv_bias)(h)
            return y.reshape(*y.shape[:-1], count, arch.head_width)

        h = _Norm(arch, name="attention_norm")(x)
        q, k = heads("q", arch.heads), heads("k", arch.kv_heads)
        v = heads("v", arch.kv_heads)
        if arch.positions != "learned":
            q, k = _rotated(q, angles, arch), _rotated(k, angles, arch)
        mixed = _attention(q, k, v)
        x = x + linear("o", arch.width, arch.bias)(mixed)

        h = _Norm(arch, name="mlp_norm")(x)
        y = linear("up", arch.hidden, arch.bias)(h)
        y = nn.silu(linear("gate", arch.hidden, arch.bias)(h)) * y if arch.gated else nn.relu(y)
        return x + linear("down", arch.width, arch.bias)(y), None


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


def _angles(arch: Architecture, places: jax.Array) -> jax.Array:
    """Radians by which each position turns each pair, float32 (length, head_width / 2)."""
    frequencies = arch.rope_base ** (-jnp.arange(0, arch.head_width, 2) / arch.head_width)
    if arch.rope_factors:
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


def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention, heads in groups that share keys and values; (n, length, all heads)."""
    n, length, heads, width = q.shape
    q = q.reshape(n, length, k.shape[2], heads // k.shape[2], width)
    scores = jnp.einsum("nqgsd,nkgd->ngsqk", q, k) / math.sqrt(width)
    seen = jnp.tril(jnp.ones((length, length), bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("ngsqk,nkgd->nqgsd", weights, v).reshape(n, length, heads * width)
