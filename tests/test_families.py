"""Families of decoders: beside transformers and llama.cpp, and files of several types."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoqo_jax as zq
from experiments.finetune.models import Decoder, loading

SHAPE = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
    "head_dim": 12,
}  # fmt: skip
LONG = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32, "rope_theta": 5e5,
}  # fmt: skip
ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
GEMMA = {**SHAPE, "num_hidden_layers": 7, "query_pre_attn_scalar": 20, "sliding_window": 8}
FAMILIES = {
    "llama 3.2": ("Llama", {**SHAPE, "rope_parameters": LONG, "tie_word_embeddings": True}),
    "mistral": ("Mistral", {**SHAPE, "sliding_window": 8}),
    "mistral without a window": ("Mistral", {**SHAPE, "sliding_window": None}),
    "qwen3": ("Qwen3", SHAPE),
    "qwen3, tied": ("Qwen3", {**SHAPE, "tie_word_embeddings": True, "head_dim": 16}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 4.0}),
    "gemma3": ("Gemma3Text", GEMMA),
    "gemma3, longer": (
        "Gemma3Text",
        {**GEMMA, "rope_parameters": ROPES, "final_logit_softcapping": 4.0},
    ),
    "gemma3, other layers": (
        "Gemma3Text",
        {**GEMMA, "layer_types": [*["full_attention", "sliding_attention"] * 3, "full_attention"]},
    ),
}
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 40))


def logits(checkpoint, tokens=TOKENS, **changes):
    model = Decoder(
        dataclasses.replace(checkpoint.architecture, **changes), None, checkpoint.decoder.segments
    )

    def read(params):
        return model.apply({"params": params}, jnp.asarray(tokens))

    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(zq.quaxify(read))(checkpoint.params))


def apart(found, expected):
    """The largest difference, of the largest magnitude."""
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # norms begin at ones or zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()

    checkpoint = loading.load(tmp_path)
    assert apart(logits(checkpoint), expected) < 1e-4
    arch = checkpoint.architecture
    for change in (
        {"local": ()} if arch.local else {},
        {"local_rope_base": 0.0} if arch.local_rope_base else {},
        {"rope_factors": ()} if arch.rope_factors else {},
        {"attention_cap": 0.0} if arch.attention_cap else {},
        {"logit_cap": 0.0} if arch.logit_cap else {},
        {"query_scalar": 0.0} if arch.query_scalar else {},
        {"activation": "silu"} if arch.activation == "gelu" else {},
    ):  # the test could tell
        assert not change or apart(logits(checkpoint, **change), expected) > 1e-3, change
