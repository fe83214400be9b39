"""How a decoder computes, by the metadata of a GGUF file, as llama.cpp reads them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.finetune.models.architecture import Architecture
from experiments.finetune.models.families import FAMILIES, OF_GGUF, Family
from experiments.finetune.models.from_settings import local_of
from zoqo_jax.interop import gguf

__all__ = ["architecture"]

_READ = {
    "block_count", "context_length", "embedding_length", "feed_forward_length",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "attention.key_length", "rope.freq_base", "rope.scaling.type", "rope.scaling.factor",
    "rope.scale_linear",
}  # fmt: skip
_READ_BY_GEMMA = {
    "gemma2": {
        "attention.sliding_window", "attention.sliding_window_pattern", "attn_logit_softcapping",
        "final_logit_softcapping",
    },
    "gemma3": {
        "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa",
        "final_logit_softcapping",
    },
}  # fmt: skip
_SAYS_NOTHING = {
    # About the vocabulary and how the file was made; what only yarn and longrope, which are
    # refused, would read; and the epsilon of a norm that these architectures have not.
    "vocab_size", "tensor_data_layout", "rope.scaling.finetuned",
    "rope.scaling.original_context_length", "attention.layer_norm_epsilon",
}  # fmt: skip
_USUAL = {
    "attention.causal": True, "attention.scale": 0.0, "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0, "attention.sliding_window": 0, "attn_logit_softcapping": 0.0,
    "expert_count": 0, "expert_used_count": 0, "expert_shared_count": 0,
    "final_logit_softcapping": 0.0, "logit_scale": 1.0, "embedding_scale": 1.0,
    "residual_scale": 1.0, "pooling_type": 0, "rope.scaling.attn_factor": 1.0,
    "use_parallel_residual": False,
}  # fmt: skip
"""Metadata of an architecture: those that are read, those that do not change what is computed, and
the only values of others. All else is refused: it may change what is computed."""

_GEMMA_27B = {"gemma2": 46, "gemma3": 62}
"""Layers by which llama.cpp tells the models whose scores are divided by the root of width / heads
instead of that of a head's width; no metadata say so."""


def architecture(file: gguf.File) -> Architecture:
    """What a GGUF file's metadata say.

    Raises:
      ValueError: of another architecture, or something that is not read.
    """
    kind = file.metadata.get("general.architecture")
    if kind not in OF_GGUF:
        *names, last = OF_GGUF
        raise ValueError(
            f"general.architecture must be {', '.join(names)} or {last}, got {kind!r:.40}."
        )

    def number(name: str, otherwise: Any = None) -> Any:
        value = file.metadata.get(f"{kind}.{name}", otherwise)
        if not isinstance(value, int | float | np.number):
            raise ValueError(f"{kind}.{name} must be a number, got {value!r:.40}.")
        return value.item() if isinstance(value, np.number) else value

    known = FAMILIES[OF_GGUF[kind]]
    width, heads = number("embedding_length"), number("attention.head_count")
    depth, context = number("block_count"), number("context_length")
    head_width = number("attention.key_length", width // max(heads, 1))
    _refuse_unread(file, kind, number, head_width, context)
    if "token_embd.weight" not in file.tensors:
        raise ValueError("there is no tensor token_embd.weight.")
    parts: dict[str, Any] = {
        **known.parts,
        **(_of_gemma(kind, known, number) if kind in _READ_BY_GEMMA else {}),
        "qkv_bias": "blk.0.attn_q.bias" in file.tensors,
        "bias": "blk.0.attn_output.bias" in file.tensors,
    }
    if kind in _GEMMA_27B:
        parts["query_scalar"] = float(
            width // max(heads, 1) if depth == _GEMMA_27B[kind] else head_width
        )
    return Architecture(
        vocabulary=file.tensors["token_embd.weight"].shape[0],
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        hidden=number("feed_forward_length"),
        context=context,
        head_width=head_width,
        epsilon=number("attention.layer_norm_rms_epsilon"),
        positions="pairs" if kind == "llama" else "halves",
        rope_base=number("rope.freq_base", 10_000.0),
        rope_factors=_rope_factors(file, kind, head_width, number),
        tied="output.weight" not in file.tensors,
        embedding_scale=math.sqrt(width) if known.scales_embedding else 1.0,
        **parts,
    )


def _refuse_unread(
    file: gguf.File, kind: str, number: Callable[..., Any], head_width: int, context: int
) -> None:
    """Refuse metadata that may change what is computed, naming them."""
    usual = {
        **_USUAL,
        "attention.value_length": head_width,
        "rope.dimension_count": head_width,
    }
    read = _READ | _SAYS_NOTHING | _READ_BY_GEMMA.get(kind, set())
    for key, value in file.metadata.items():
        name = key.removeprefix(f"{kind}.")
        if name == key or name in read:
            continue
        if name == "attention.sliding_window" and number(name) >= context:
            continue  # no token is further away
        if name not in usual or not np.array_equal(value, usual[name]):
            raise ValueError(f"{key}={value!r:.40} is not read: it may change what is computed.")


def _of_gemma(kind: str, known: Family, number: Callable[..., Any]) -> dict[str, Any]:
    """Windows and caps, and what llama.cpp takes for those that a file leaves out."""
    window = number("attention.sliding_window", 4096 if kind == "gemma2" else 0)
    every = number("attention.sliding_window_pattern", known.global_every)
    found = {"window": window, "local": local_of(every) if window else ()}
    if kind == "gemma2":
        found["attention_cap"] = number("attn_logit_softcapping", 50.0)
        found["logit_cap"] = number("final_logit_softcapping", 30.0)
        return found
    found["logit_cap"] = number("final_logit_softcapping", 0.0)
    if window:
        found["local_rope_base"] = number("rope.freq_base_swa", 10_000.0)
    return found


def _rope_factors(
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
