"""How a decoder computes, from what files say of it; what may mean something else is refused."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.finetune.models.decoder import Architecture
from zoqo_jax.interop import gguf

__all__ = ["of_gguf", "of_hugging_face"]


def of_hugging_face(settings: Mapping[str, Any]) -> Architecture:
    """What a config.json says.

    Raises:
      ValueError: of another architecture, or something that is not read.
    """
    kind = settings.get("model_type")
    if kind not in ("llama", "qwen2", "opt"):
        raise ValueError(f"model_type must be llama, qwen2 or opt, got {kind!r:.40}.")
    common: dict[str, Any] = {
        "vocabulary": settings["vocab_size"],
        "width": settings["hidden_size"],
        "depth": settings["num_hidden_layers"],
        "heads": settings["num_attention_heads"],
        "context": settings["max_position_embeddings"],
        "tied": settings.get("tie_word_embeddings", kind == "opt"),
    }
    head_width = settings.get("head_dim") or common["width"] // max(common["heads"], 1)
    if kind == "opt":
        _refuse_other(settings, {**_USUAL, **_USUAL_OPT, "word_embed_proj_dim": common["width"]})
        return Architecture(
            **common,
            kv_heads=common["heads"],
            hidden=settings["ffn_dim"],
            head_width=head_width,
            norm="layer",
            positions="learned",
            gated=False,
            qkv_bias=True,
            bias=True,
        )
    _refuse_other(settings, {**_USUAL, **_USUAL_LLAMA})
    if kinds := sorted(set(settings.get("layer_types") or ()) - {"full_attention"}):
        raise ValueError(f"layer_types={kinds[0]!r} is not read.")
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    base = float(settings.get("rope_theta") or rope.get("rope_theta") or 10_000.0)
    return Architecture(
        **common,
        kv_heads=settings.get("num_key_value_heads") or common["heads"],
        hidden=settings["intermediate_size"],
        head_width=head_width,
        epsilon=settings.get("rms_norm_eps", 1e-6),
        rope_base=base,
        rope_factors=_rope_factors(rope, base, head_width),
        qkv_bias=kind == "qwen2",
    )


_USUAL = {"is_causal": True, "is_encoder_decoder": False, "add_cross_attention": False}
_USUAL_OPT = {
    "do_layer_norm_before": True, "enable_bias": True, "activation_function": "relu",
    "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False,
}  # fmt: skip
_USUAL_LLAMA = {
    "use_sliding_window": False, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "partial_rotary_factor": 1.0,
}  # fmt: skip
"""Settings that say how a decoder computes, and the only values that are read; None is as good."""


def _refuse_other(settings: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    for name, value in usual.items():
        if settings.get(name) is not None and settings[name] != value:
            raise ValueError(f"{name}={settings[name]!r:.40} is not read.")


def _rope_factors(rope: Mapping[str, Any], base: float, head_width: int) -> tuple[float, ...]:
    """What frequencies are divided by.

    All by the same ("linear"), or slow ones so that they reach further than in training ("llama3").
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = {"default": (), "linear": ("factor",), "llama3": _LLAMA3}
    if kind not in known:
        raise ValueError(f"rope_type must be {', '.join(known)}, got {kind!r:.40}.")
    rest = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *known[kind]}
    for name, value in rope.items():
        if name not in rest and value is not None:
            raise ValueError(f"{name}={value!r:.40} is not read for rope_type {kind!r}.")
    _refuse_other(rope, {"partial_rotary_factor": 1.0})
    if kind == "default":
        return ()
    if kind == "linear":
        return (float(rope["factor"]),) * (head_width // 2)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for i in range(0, head_width, 2):
        turns = rope["original_max_position_embeddings"] * base ** (-i / head_width) / math.tau
        share = min(max((turns - low) / (high - low), 0.0), 1.0)  # of the frequency that is kept
        factors.append(1.0 / ((1.0 - share) / rope["factor"] + share))
    return tuple(factors)


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
    "rope.scale_linear",
}  # fmt: skip
_SAYS_NOTHING = {
    # About the vocabulary and how the file was made; what only yarn and longrope, which are
    # refused, would read; and the epsilon of a norm that these architectures have not.
    "vocab_size", "tensor_data_layout", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "attention.layer_norm_epsilon",
}  # fmt: skip
_USUAL_GGUF = {
    "attention.causal": True, "attention.scale": 0.0, "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0, "attention.sliding_window": 0, "attn_logit_softcapping": 0.0,
    "expert_count": 0, "expert_used_count": 0, "expert_shared_count": 0,
    "final_logit_softcapping": 0.0, "logit_scale": 1.0, "embedding_scale": 1.0,
    "residual_scale": 1.0, "pooling_type": 0, "rope.scaling.attn_factor": 1.0,
    "use_parallel_residual": False,
}  # fmt: skip
"""Metadata of an architecture: those that are read, those that do not change what is computed, and
the only values of others. All else is refused: it may change what is computed."""


def of_gguf(file: gguf.File) -> Architecture:
    """What a GGUF file's metadata say.

    Raises:
      ValueError: of another architecture, or something that is not read.
    """
    kind = file.metadata.get("general.architecture")
    if kind not in ("llama", "qwen2"):
        raise ValueError(f"general.architecture must be llama or qwen2, got {kind!r:.40}.")

    def number(name: str, otherwise: Any = None) -> Any:
        value = file.metadata.get(f"{kind}.{name}", otherwise)
        if not isinstance(value, int | float | np.number):
            raise ValueError(f"{kind}.{name} must be a number, got {value!r:.40}.")
        return value.item() if isinstance(value, np.number) else value

    width, heads, context = (
        number(name) for name in ("embedding_length", "attention.head_count", "context_length")
    )
    head_width = number("attention.key_length", width // max(heads, 1))
    usual = {
        **_USUAL_GGUF,
        "attention.value_length": head_width,
        "rope.dimension_count": head_width,
    }
    for key, value in file.metadata.items():
        name = key.removeprefix(f"{kind}.")
        if name == key or name in _READ or name in _SAYS_NOTHING:
            continue
        if name == "attention.sliding_window" and number(name) >= context:
            continue  # no token is further away
        if name not in usual or not np.array_equal(value, usual[name]):
            raise ValueError(f"{key}={value!r:.40} is not read: it may change what is computed.")
    if "token_embd.weight" not in file.tensors:
        raise ValueError("there is no tensor token_embd.weight.")
    return Architecture(
        vocabulary=file.tensors["token_embd.weight"].shape[0],
        width=width,
        depth=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        hidden=number("feed_forward_length"),
        context=context,
        head_width=head_width,
        epsilon=number("attention.layer_norm_rms_epsilon"),
        positions="pairs" if kind == "llama" else "halves",
        rope_base=number("rope.freq_base", 10_000.0),
        rope_factors=_rope_factors_of_gguf(file, kind, head_width, number),
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        bias="blk.0.attn_output.bias" in file.tensors,
        tied="output.weight" not in file.tensors,
    )


def _rope_factors_of_gguf(
    file: gguf.File, kind: str, head_width: int, number: Callable[..., Any]
) -> tuple[float, ...]:
    """What frequencies are divided by: the tensor's numbers, times the factor of all."""
    scaling = file.metadata.get(f"{kind}.rope.scaling.type", "linear")
    if scaling not in ("none", "linear"):
        raise ValueError(f"{kind}.rope.scaling.type must be none or linear, got {scaling!r:.40}.")
    factor = number("rope.scaling.factor", number("rope.scale_linear", 0.0))
    if not 0.0 <= factor < math.inf:
        raise ValueError(f"{kind}.rope.scaling.factor must be finite and positive, got {factor}.")
    if scaling == "none" or factor == 0.0:  # as llama.cpp reads it
        factor = 1.0
    tensor = file.tensors.get("rope_freqs.weight")
    if tensor is not None and kind != "llama":
        raise ValueError(f"rope_freqs.weight is not read in a {kind} model.")
    if tensor is None and factor == 1.0:
        return ()
    each = np.ones(head_width // 2) if tensor is None else np.asarray(tensor, np.float64)
    return tuple((factor * each).tolist())
