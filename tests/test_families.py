"""Families of decoders: beside transformers and llama.cpp, and files of several types."""

import dataclasses

import family_files
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


def changes_of(arch):
    """What one could have overlooked in a family."""
    usual = {
        "local": (), "local_rope_base": 0.0, "rope_factors": (), "attention_cap": 0.0,
        "logit_cap": 0.0, "query_scalar": 0.0, "embedding_scale": 1.0,
    }  # fmt: skip
    found = [{name: x} for name, x in usual.items() if getattr(arch, name) not in (x, 1.0)]
    if arch.query_scalar == arch.head_width:
        found.remove({"query_scalar": 0.0})
    return [*found, {"activation": "silu"}] if arch.activation == "gelu" else found


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
    for change in changes_of(checkpoint.architecture):  # the test could tell
        assert apart(logits(checkpoint, **change), expected) > 1e-3, change


def probabilities_of_llama_cpp(path, tokens):
    """Log-probabilities of the next token, by token: of the 300 likeliest.

    Attention is computed in float32, so that nothing is rounded but gelu, which is in a table.
    """
    xllamacpp = pytest.importorskip("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), 512, 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    question = {"prompt": tokens, "n_predict": 1, "temperature": 0, "n_probs": 300}
    answer = xllamacpp.Server(params).handle_completions(question)
    (first,) = answer["choices"][0]["logprobs"]["content"]
    return {one["id"]: one["logprob"] for one in first["top_logprobs"]}


@pytest.mark.slow
@pytest.mark.parametrize("family", family_files.FAMILIES)
def test_probabilities_are_those_of_llama_cpp(tmp_path, family):
    path = family_files.write(tmp_path / "a.gguf", family, spread=1.5)
    tokens = np.random.default_rng(1).integers(3, family_files.VOCABULARY, (1, 40))
    checkpoint = loading.load(path)
    theirs = probabilities_of_llama_cpp(path, tokens[0].tolist())
    assert len(theirs) == 300

    def off(**changes):
        found = np.asarray(jax.nn.log_softmax(logits(checkpoint, tokens, **changes)[0, -1]))
        return np.abs(found[list(theirs)] - list(theirs.values())).max()

    assert off() < (0.005 if "gemma" in family else 1e-4)
    for change in changes_of(checkpoint.architecture):
        assert off(**change) > 0.05, change
