"""What a decoder is made of, whatever file said so."""

import dataclasses
from typing import Literal

__all__ = ["Architecture"]

_MOST_LAYERS = 1024  # no decoder has a tenth; a damaged file may say four thousand million


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
      activation: of the feed-forward part; "gelu" is its approximation by tanh.
      gated: down(activation(gate(x)) * up(x)); otherwise down(activation(up(x))).
      qkv_bias: whether queries, keys and values have a bias.
      bias: whether all other linear maps have one.
      tied: whether the output is the embedding's transpose.
      qk_norm: whether each head's query and key pass a norm before they are rotated.
      post_norms: whether what attention and the feed-forward part give passes a norm, too.
      embedding_scale: what a token's row is multiplied by.
      query_scalar: attention's scores are divided by its root; 0 for `head_width`.
      attention_cap: scores become cap * tanh(scores / cap); 0 for as they are.
      logit_cap: the same of the logits.
      window: how many tokens, itself among them, a token sees in local layers.
      local: which layers are local, repeated to the depth; empty for none.
      local_rope_base: of local layers, whose frequencies have no factors; 0 for those of the rest.
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
    activation: Literal["silu", "gelu", "relu"] = "silu"
    gated: bool = True
    qkv_bias: bool = False
    bias: bool = False
    tied: bool = True
    qk_norm: bool = False
    post_norms: bool = False
    embedding_scale: float = 1.0
    query_scalar: float = 0.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    window: int = 0
    local: tuple[bool, ...] = ()
    local_rope_base: float = 0.0

    def __post_init__(self) -> None:
        """Check what a hostile or mistaken checkpoint could say."""
        for name in ("vocabulary", "width", "depth", "heads", "kv_heads", "hidden", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.depth > _MOST_LAYERS:
            raise ValueError(f"depth must be at most {_MOST_LAYERS}, got {self.depth}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide {self.heads} heads, got {self.kv_heads}.")
        if self.positions != "learned" and self.head_width % 2:
            raise ValueError(f"head_width must be even to be rotated, got {self.head_width}.")
        if self.rope_factors and len(self.rope_factors) != self.head_width // 2:
            raise ValueError(
                f"rope_factors must be {self.head_width // 2}, got {len(self.rope_factors)}."
            )
        if any(self.local) and self.window < 1:
            raise ValueError(f"window must be at least 1 in local layers, got {self.window}.")
        for name in ("rope_base", "local_rope_base", "query_scalar", "attention_cap", "logit_cap"):
            if not 0.0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be finite and positive, got {getattr(self, name)}.")

    def shape_of(self, matrix: str) -> tuple[int, int]:
        """Outputs and inputs of a layer's matrix, by our name for it.

        Example:
          >>> shape = Architecture(64, 16, depth=4, heads=4, kv_heads=2, hidden=32, context=8,
          ...                      head_width=4)
          >>> shape.shape_of("k"), shape.shape_of("down")
          ((8, 16), (16, 32))
        """
        if matrix in ("q", "o"):
            outputs, inputs = self.heads * self.head_width, self.width
        elif matrix in ("k", "v"):
            outputs, inputs = self.kv_heads * self.head_width, self.width
        else:
            outputs, inputs = self.hidden, self.width
        return (inputs, outputs) if matrix in ("o", "down") else (outputs, inputs)

    def is_local(self, layer: int) -> bool:
        """Whether a layer's tokens see only the last `window` of them.

        Example:
          >>> shape = Architecture(64, 16, depth=4, heads=4, kv_heads=2, hidden=32, context=8,
          ...                      head_width=4, window=4, local=(True, False))
          >>> [shape.is_local(layer) for layer in range(4)]
          [True, False, True, False]
        """
        return bool(self.local) and self.local[layer % len(self.local)]
