"""How a decoder computes, by the config.json of a Hugging Face folder."""

import math
from collections.abc import Mapping
from typing import Any

from experiments.finetune.models.architecture import Architecture
from experiments.finetune.models.families import FAMILIES, Family

__all__ = ["architecture", "family", "local_of", "refuse_other"]


def family(settings: Mapping[str, Any]) -> Family:
    """What all models of the settings' model_type share.

    Raises:
      ValueError: it is none that is read.

    Example:
      >>> family({"model_type": "qwen3"}).parts
      {'qk_norm': True}
    """
    kind = settings.get("model_type")
    if kind not in FAMILIES:
        *names, last = FAMILIES
        raise ValueError(f"model_type must be {', '.join(names)} or {last}, got {kind!r:.40}.")
    return FAMILIES[kind]


def architecture(settings: Mapping[str, Any]) -> Architecture:
    """What a config.json says.

    Raises:
      ValueError: of another family, or something that is not read and may change what is computed.

    Example:
      >>> shape = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3,
      ...          "num_attention_heads": 4, "intermediate_size": 48, "head_dim": 8,
      ...          "max_position_embeddings": 64, "sliding_window": 16}
      >>> found = architecture({"model_type": "mistral", **shape})
      >>> found.window, found.local, found.rope_base
      (16, (True,), 10000.0)
    """
    known = family(settings)
    settings = {**known.defaults, **settings}
    width, heads = settings["hidden_size"], settings["num_attention_heads"]
    head_width = settings.get("head_dim") or width // max(heads, 1)
    common: dict[str, Any] = {
        "vocabulary": settings["vocab_size"],
        "width": width,
        "depth": settings["num_hidden_layers"],
        "heads": heads,
        "context": settings["max_position_embeddings"],
        "tied": bool(settings.get("tie_word_embeddings", False)),
        "head_width": head_width,
        "embedding_scale": math.sqrt(width) if known.scales_embedding else 1.0,
        **known.parts,
    }
    if settings["model_type"] == "opt":
        refuse_other(settings, {**known.usual, "word_embed_proj_dim": width})
        return Architecture(**common, kv_heads=heads, hidden=settings["ffn_dim"])
    refuse_other(settings, known.usual)
    window, local = _window(settings, known)
    return Architecture(
        **common,
        **_rope(settings, head_width),
        kv_heads=settings.get("num_key_value_heads") or heads,
        hidden=settings["intermediate_size"],
        epsilon=settings.get("rms_norm_eps", 1e-6),
        window=window,
        local=local,
        query_scalar=float(settings.get("query_pre_attn_scalar") or 0.0),
        attention_cap=float(settings.get("attn_logit_softcapping") or 0.0),
        logit_cap=float(settings.get("final_logit_softcapping") or 0.0),
    )


def refuse_other(settings: Mapping[str, Any], usual: Mapping[str, Any]) -> None:
    """Refuse settings whose value is neither None nor the one that is read, naming them.

    Raises:
      ValueError: there is one.

    Example:
      >>> refuse_other({"hidden_act": "gelu"}, {"hidden_act": "silu"})
      Traceback (most recent call last):
      ValueError: hidden_act='gelu' is not read.
    """
    for name, value in usual.items():
        if settings.get(name) is not None and settings[name] != value:
            raise ValueError(f"{name}={settings[name]!r:.40} is not read.")


_FULL, _SLIDING = "full_attention", "sliding_attention"


def _window(settings: Mapping[str, Any], known: Family) -> tuple[int, tuple[bool, ...]]:
    """How far local layers see, and which layers are local."""
    kinds = list(settings.get("layer_types") or ())
    read = {_FULL} if known.global_every == 1 else {_FULL, _SLIDING}
    if others := sorted(set(kinds) - read):
        raise ValueError(f"layer_types={others[0]!r} is not read.")
    window = settings.get("sliding_window")
    if known.global_every == 1:
        return 0, ()
    if kinds:
        if len(kinds) != settings["num_hidden_layers"]:
            raise ValueError(
                f"layer_types must be {settings['num_hidden_layers']}, got {len(kinds)}."
            )
        local = tuple(kind == _SLIDING for kind in kinds)
    else:
        local = local_of(settings.get("sliding_window_pattern") or known.global_every)
    if not window and known.global_every > 1 and any(local):
        raise ValueError(f"sliding_window must be at least 1, got {window!r:.40}.")
    return (window, local) if window else (0, ())


def local_of(global_every: int) -> tuple[bool, ...]:
    """A period of layers, of which the last is global; 0: all are local.

    Raises:
      ValueError: it is no number of layers.

    Example:
      >>> local_of(3), local_of(0)
      ((True, True, False), (True,))
    """
    if not isinstance(global_every, int) or not 0 <= global_every <= 64:
        raise ValueError(f"sliding_window_pattern must be in [0, 64], got {global_every!r:.40}.")
    return (*[True] * (global_every - 1), False) if global_every else (True,)


def _rope(settings: Mapping[str, Any], head_width: int) -> dict[str, Any]:
    """Bases and factors of rotary positions, as `Architecture` has them."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    local: Mapping[str, Any] = {}
    has_local = settings.get("rope_local_base_freq") is not None  # it is a default of its family
    if has_local and settings.get("rope_parameters"):  # one for each kind of layer
        if others := sorted(set(rope) - {_FULL, _SLIDING}):
            raise ValueError(f"rope_parameters: {others[0]} is not read.")
        rope, local = rope.get(_FULL) or {}, rope.get(_SLIDING) or {}
        if local.get("rope_type", "default") != "default":
            raise ValueError(f"rope_type={local['rope_type']!r:.40} is not read in local layers.")
    base = float(rope.get("rope_theta") or settings.get("rope_theta") or 10_000.0)
    found: dict[str, Any] = {"rope_base": base, "rope_factors": _factors(rope, base, head_width)}
    if has_local:
        _factors(local, base, head_width)  # which refuses what is not read
        found["local_rope_base"] = float(
            local.get("rope_theta") or settings["rope_local_base_freq"]
        )
    return found


_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _factors(rope: Mapping[str, Any], base: float, head_width: int) -> tuple[float, ...]:
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
    refuse_other(rope, {"partial_rotary_factor": 1.0})
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
