"""Decoders: beside transformers on random networks, and what checkpoints may say."""

import dataclasses
import fnmatch
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

import zoqo_jax as zq
from experiments.finetune.models import Architecture, Decoder, loading, places
from zoqo_jax.interop import bitsandbytes, safetensors

LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}  # fmt: skip
LONG = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", LLAMA),
    "llama, all heads, untied": (
        "LlamaConfig",
        {**LLAMA, "num_key_value_heads": 4, "tie_word_embeddings": False},
    ),
    "llama 3": ("LlamaConfig", {**LLAMA, "rope_theta": 5e5, "rope_scaling": LONG}),
    "llama, linear": (
        "LlamaConfig",
        {**LLAMA, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    ),
    "qwen2": ("Qwen2Config", {**LLAMA, "num_key_value_heads": 1}),
    "opt": (
        "OPTConfig",
        {
            "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
            "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32,
        },
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms begin at zeros and ones
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 96, (2, 40))
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens)).logits.numpy()

    checkpoint = loading.load_hugging_face(tmp_path)
    model = Decoder(checkpoint.architecture)
    with jax.default_matmul_precision("highest"):
        found = model.apply({"params": checkpoint.params}, jnp.asarray(tokens))
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=2e-3)


def test_positions_and_words_pick_from_all_logits(tmp_path):
    checkpoint = loading.load_gguf(tiny_model.write_model(tmp_path / "tiny.gguf"))
    model, params = Decoder(checkpoint.architecture), checkpoint.params
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 90, (3, 12)))

    def logits(*picked):
        return zq.quaxify(lambda params: model.apply({"params": params}, tokens, *picked))(params)

    everything, at, words = logits(), jnp.array([2, 11, 5]), jnp.array([7, 3])
    np.testing.assert_allclose(
        logits(at, words), everything[jnp.arange(3), at][:, words], atol=1e-5
    )
    floats = model.apply({"params": zq.dequantize(params)}, tokens)
    np.testing.assert_allclose(everything, floats, atol=1e-4)


def test_in_bfloat16_products_are_rounded_and_logits_are_float32(tmp_path):
    checkpoint = loading.load_gguf(tiny_model.write_model(tmp_path / "tiny.gguf"))
    model, tokens = checkpoint.decoder, jnp.arange(24).reshape(2, 12)

    def logits(dtype):
        params = loading.in_dtype(checkpoint, dtype).params
        return zq.quaxify(lambda params: model.apply({"params": params}, tokens))(params)

    full, half = logits("float32"), logits("bfloat16")
    assert half.dtype == jnp.float32
    assert (half.astype(jnp.bfloat16).astype(jnp.float32) != half).mean() > 0.9
    error = jnp.linalg.norm(half - full) / jnp.linalg.norm(full)
    assert 1e-4 < error < 2e-2


def test_a_folder_of_4_bit_tensors_becomes_codes(tmp_path):
    folder = tiny_model.write_folder(tmp_path / "tiny")
    checkpoint = loading.load(folder)
    weight = checkpoint.params["layers"]["up"]["weight"]
    assert isinstance(weight, zq.QuantizedArray)
    assert weight.shape == (tiny_model.DEPTH, tiny_model.HIDDEN, tiny_model.WIDTH)

    (tmp_path / "floats").mkdir()
    (tmp_path / "floats" / "config.json").write_text((folder / "config.json").read_text())
    floats = {
        name: dataclasses.replace(x, value_dtype=jnp.float32) if zq.is_quantized(x) else x
        for name, x in bitsandbytes.load(folder).tensors.items()
    }
    safetensors.save(tmp_path / "floats" / "model.safetensors", zq.dequantize(floats))
    expected = loading.load(tmp_path / "floats").params
    found = zq.dequantize(checkpoint.params)
    jax.tree.map(np.testing.assert_array_equal, found, expected)

    model, tokens = Decoder(checkpoint.architecture), jnp.arange(24).reshape(2, 12)
    logits = jax.jit(zq.quaxify(lambda params: model.apply({"params": params}, tokens)))
    np.testing.assert_allclose(logits(checkpoint.params), logits(expected), atol=1e-4)


def test_a_copy_of_a_tied_embedding_is_kept_apart(tmp_path):
    folder = tiny_model.write_folder(tmp_path / "tiny")
    tensors, companions = bitsandbytes.load(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    bitsandbytes.save(folder / "model.safetensors", tensors, companions)
    assert "output" not in loading.load(folder).params


def test_what_follows_does_not_change_what_went_before(tmp_path):
    checkpoint = loading.load_gguf(tiny_model.write_model(tmp_path / "tiny.gguf"))
    model, params = Decoder(checkpoint.architecture), zq.dequantize(checkpoint.params)
    tokens = np.random.default_rng(0).integers(0, 90, (1, 12))
    other = tokens.copy()
    other[:, 8:] = 0
    one, two = (model.apply({"params": params}, jnp.asarray(x)) for x in (tokens, other))
    np.testing.assert_allclose(one[:, :8], two[:, :8], atol=1e-5)
    assert jnp.abs(one[:, 8:] - two[:, 8:]).max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type must be llama, mistral, .* or opt, got 'bert'"),
        ({"num_key_value_heads": 3}, "kv_heads must divide 4 heads, got 3"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "got 'yarn'"),
        ({"attention_bias": True}, "attention_bias=True is not read"),
        ({"num_hidden_layers": 0}, "depth must be at least 1, got 0"),
    ],
)
def test_configurations_that_are_not_read_are_refused(tmp_path, changes, message):
    settings = {"model_type": "llama", **LLAMA, **changes}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=message):
        loading.load_hugging_face(tmp_path)


def test_a_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        loading.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        loading.load(tmp_path)


def test_all_that_is_read_of_a_model_on_the_hub_is_downloaded(monkeypatch):
    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: asked.update(how))
    with pytest.raises(TypeError):  # nothing was downloaded
        places.find("hf:someone/tiny")
    names = (
        "config.json", "quantize_config.json", "model-00001-of-00002.safetensors",
        "model.safetensors.index.json", "tokenizer.json", "chat_template.jinja",
        "additional_chat_templates/tool_use.jinja",
    )  # fmt: skip
    for name in names:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in asked["allow_patterns"]), name
    assert not any(fnmatch.fnmatch("model.bin", x) for x in asked["allow_patterns"])


def test_a_name_on_the_hub_is_found_where_it_was_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, commit = tmp_path / "models--someone--tiny", 40 * "0"
    folder = model / "snapshots" / commit
    folder.mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **LLAMA}))
    assert places.find("hf:someone/tiny") == folder
    assert places.find(f"hf:someone/tiny@{commit}") == folder
    with pytest.raises(FileNotFoundError, match="someone/else was not downloaded before"):
        loading.load("hf:someone/else")
    with pytest.raises(ValueError, match="model must be hf:OWNER/NAME, got hf:a/b/c"):
        loading.load("hf:a/b/c")


def test_heads_of_odd_width_cannot_be_rotated():
    with pytest.raises(ValueError, match="head_width must be even"):
        Architecture(9, 9, 1, heads=3, kv_heads=3, hidden=9, context=9, head_width=3)
