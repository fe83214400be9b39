"""What the models of a family share: a declaration for each, of what differs from Llama.

A new family is an entry in `FAMILIES`: what its decoders are made of, what transformers calls its
tensors, the settings of a config.json that it may leave out, and those of which only one value is
read. All else of a checkpoint is read in `from_settings.py` and `from_metadata.py`.

Sources: the model classes of transformers (models/*/modeling_*.py) and llama.cpp (src/models).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

__all__ = ["FAMILIES", "GGUF_NAMES", "MODULES", "OF_GGUF", "Family"]

MODULES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
"""What transformers calls a layer's matrices, of all families but OPT."""


def _of_layers(
    layer: str, modules: Mapping[str, str], norms: Mapping[str, str], kinds: tuple[str, ...]
) -> dict[str, str]:
    """The names of a layer's parameters in a checkpoint, by place in `params`."""
    linear = {
        f"layers/{ours}/{kind}": f"{layer}.{theirs}.{kind}"
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }
    theirs = {"scale": "weight", "bias": "bias"}
    return linear | {
        f"layers/{ours}/{kind}": f"{layer}.{name}.{theirs[kind]}"
        for ours, name in norms.items()
        for kind in kinds
    }


_LLAMA = {
    "embedding": "model.embed_tokens.weight",
    "output": "lm_head.weight",
    "norm/scale": "model.norm.weight",
    **_of_layers(
        "model.layers.{}",
        MODULES,
        {
            "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
            "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
        },
        ("scale",),
    ),
}  # fmt: skip
_GEMMA = {
    **_LLAMA,
    **_of_layers(
        "model.layers.{}",
        {},
        {
            "post_attention_norm": "post_attention_layernorm",
            "mlp_norm": "pre_feedforward_layernorm",
            "post_mlp_norm": "post_feedforward_layernorm",
        },
        ("scale",),
    ),
}
_OPT = {
    "embedding": "model.decoder.embed_tokens.weight",
    "positions": "model.decoder.embed_positions.weight",
    "output": "lm_head.weight",
    "norm/scale": "model.decoder.final_layer_norm.weight",
    "norm/bias": "model.decoder.final_layer_norm.bias",
    **_of_layers(
        "model.decoder.layers.{}",
        {
            "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
            "o": "self_attn.out_proj", "up": "fc1", "down": "fc2",
        },
        {"attention_norm": "self_attn_layer_norm", "mlp_norm": "final_layer_norm"},
        ("scale", "bias"),
    ),
}  # fmt: skip
GGUF_NAMES = {
    "embedding": "token_embd.weight",
    "output": "output.weight",
    "norm/scale": "output_norm.weight",
    **_of_layers(
        "blk.{}",
        {
            "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
            "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
        },
        {
            "attention_norm": "attn_norm", "mlp_norm": "ffn_norm", "q_norm": "attn_q_norm",
            "k_norm": "attn_k_norm", "post_attention_norm": "post_attention_norm",
            "post_mlp_norm": "post_ffw_norm",
        },
        ("scale",),
    ),
}  # fmt: skip
"""What GGUF files call the parameters of all families."""

_USUAL = {
    "is_causal": True, "is_encoder_decoder": False, "add_cross_attention": False,
    "use_bidirectional_attention": False,
}  # fmt: skip
_USUAL_LLAMA = {
    **_USUAL, "use_sliding_window": False, "hidden_act": "silu", "attention_bias": False,
    "mlp_bias": False, "partial_rotary_factor": 1.0,
}  # fmt: skip
_TANH = "gelu_pytorch_tanh"
_USUAL_GEMMA = {**_USUAL_LLAMA, "hidden_act": _TANH, "hidden_activation": _TANH}
_USUAL_OPT = {
    **_USUAL, "do_layer_norm_before": True, "enable_bias": True, "activation_function": "relu",
    "layer_norm_elementwise_affine": True, "_remove_final_layer_norm": False,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Family:
    """What differs from Llama in all models of a family.

    Attributes:
      parts: attributes of `Architecture`.
      names: what transformers calls each parameter, "{}" for the layer.
      usual: settings that say how a decoder computes, and the only values of them that are read;
        None is as good.
      defaults: values of settings that a config.json may leave out.
      global_every: which layers see all that went before: 1 for all, 6 for every sixth, 0 for none.
        The others have a window, where the checkpoint has one.
      norms_plus: what is added to the norms' scales of safetensors; GGUF files have the sum.
      scales_embedding: whether rows of the embedding are multiplied by the width's root.
    """

    parts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    names: Mapping[str, str] = dataclasses.field(default_factory=lambda: _LLAMA)
    usual: Mapping[str, Any] = dataclasses.field(default_factory=lambda: _USUAL_LLAMA)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    global_every: int = 1
    norms_plus: float = 0.0
    scales_embedding: bool = False


def _gemma(qk_norm: bool, global_every: int, usual: Mapping[str, Any], **defaults: Any) -> Family:
    return Family(
        parts={"activation": "gelu", "post_norms": True, "qk_norm": qk_norm},
        names=_GEMMA,
        usual={**_USUAL_GEMMA, **usual},
        defaults={
            "tie_word_embeddings": True, "head_dim": 256, "query_pre_attn_scalar": 256,
            "sliding_window": 4096, **defaults,
        },
        global_every=global_every,
        norms_plus=1.0,
        scales_embedding=True,
    )  # fmt: skip


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(global_every=0, defaults={"sliding_window": 4096}),
    "qwen2": Family({"qkv_bias": True}),
    "qwen3": Family({"qk_norm": True}, defaults={"head_dim": 128}),
    "gemma2": _gemma(
        False, 2, {}, attn_logit_softcapping=50.0, final_logit_softcapping=30.0
    ),
    # Transformers has attn_logit_softcapping among Gemma 3's settings and does not compute it.
    "gemma3_text": _gemma(
        True,
        6,
        {"attn_logit_softcapping": None},
        rope_theta=1_000_000.0,
        rope_local_base_freq=10_000.0,
    ),
    "opt": Family(
        {
            "norm": "layer", "positions": "learned", "activation": "relu", "gated": False,
            "qkv_bias": True, "bias": True,
        },
        _OPT,
        _USUAL_OPT,
        {"tie_word_embeddings": True},
    ),
}  # fmt: skip
"""By config.json's model_type."""

OF_GGUF = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2",
    "gemma3": "gemma3_text",
}  # fmt: skip
"""The family of each general.architecture; Mistral's files say llama."""
