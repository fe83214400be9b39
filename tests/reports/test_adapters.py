"""Adapters as PEFT reads them: names and orders of each family, and logits in transformers.

Reported of kindred projects: huggingface/peft 427 (layers_to_transform).
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model
from safetensors.numpy import load_file

import zoqo_jax as zq
from experiments.finetune import outputs
from experiments.finetune.config import Config
from experiments.finetune.models import loading
from experiments.finetune.models.families import GGUF_NAMES
from experiments.finetune.parts import adapt
from zoqo_jax.implicit.lora import is_factor
from zoqo_jax.interop import gguf, safetensors

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
LLAMA = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip
OPT = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", LLAMA),
    "qwen2": ("Qwen2Config", LLAMA),
    "opt": ("OPTConfig", OPT),
    "llama in a GGUF file": ("LlamaConfig", LLAMA),
    "qwen2 in a GGUF file": ("Qwen2Config", LLAMA),
}


def write_opt(folder, seed=0):
    """A random OPT as transformers keeps it."""
    rng = np.random.default_rng(seed)

    def linear(name, *shape):
        return {
            f"{name}.weight": rng.normal(size=shape),
            f"{name}.bias": rng.normal(size=shape[:1]),
        }

    def norm(name):
        return {f"{name}.weight": np.ones(32), f"{name}.bias": np.zeros(32)}

    base = "model.decoder"
    tensors = {f"{base}.embed_tokens.weight": rng.normal(size=(96, 32))}
    tensors |= {f"{base}.embed_positions.weight": rng.normal(size=(66, 32))}
    tensors |= norm(f"{base}.final_layer_norm")
    for i in range(3):
        layer = f"{base}.layers.{i}"
        tensors |= norm(f"{layer}.self_attn_layer_norm") | norm(f"{layer}.final_layer_norm")
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= linear(f"{layer}.self_attn.{name}", 32, 32)
        tensors |= linear(f"{layer}.fc1", 48, 32) | linear(f"{layer}.fc2", 32, 48)
    folder.mkdir()
    floats = {name: (0.2 * x).astype(np.float32) for name, x in tensors.items()}
    safetensors.save(folder / "model.safetensors", floats)
    (folder / "config.json").write_text(json.dumps({"model_type": "opt", **OPT}))
    return folder


def write_gguf(path, folder):
    """The folder's llama or qwen2 as a GGUF file of floats, as llama.cpp's converter writes it."""
    settings = json.loads((folder / "config.json").read_text())
    kind, heads = settings["model_type"], settings["num_attention_heads"]
    found = loading.load(folder)
    params, kv_heads = found.params, settings["num_key_value_heads"]
    tensors = {}
    for place, name in GGUF_NAMES.items():
        leaf = params
        for step in place.split("/"):
            leaf = leaf.get(step, {})
        if isinstance(leaf, dict):
            continue
        for i, layer in enumerate(leaf if "{}" in name else [leaf]):
            layer = np.asarray(layer)
            if kind == "llama" and name.endswith(("attn_q.weight", "attn_k.weight")):
                count = heads if "attn_q" in name else kv_heads
                halves = layer.reshape(count, 2, -1, layer.shape[-1])
                layer = halves.swapaxes(1, 2).reshape(layer.shape)  # halves become neighbours
            tensors[name.format(i)] = layer
    metadata = {
        "general.architecture": kind, f"{kind}.block_count": 3, f"{kind}.context_length": 64,
        f"{kind}.embedding_length": 32, f"{kind}.feed_forward_length": 48,
        f"{kind}.attention.head_count": heads, f"{kind}.attention.head_count_kv": kv_heads,
        f"{kind}.attention.layer_norm_rms_epsilon": settings["rms_norm_eps"],
    }  # fmt: skip
    gguf.save(path, tensors, metadata)
    return path


def adapted(path, folder, layers=0, targets=()):
    """An adapter of random factors, written, and the model's logits with it."""
    whole = loading.load(path)
    config = Config(
        str(path), str(folder), train="lora", method="mezo", rank=2, alpha=6.0,
        targets=targets or tuple(one for one in MATRICES if one in whole.params["layers"]),
        layers=layers,
    )  # fmt: skip
    below, model = loading.split(whole, layers)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    params = adapt(model, config)
    factors = is_factor(params)
    params = jax.tree.map(
        lambda x, yes: 0.3 * jax.random.normal(next(keys), x.shape) if yes else x, params, factors
    )
    written = outputs.write_trained(folder, config, model._replace(params={}), params)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 96, (2, 20)))

    def run(part, params, x):
        return zq.quaxify(lambda params: part.decoder.apply({"params": params}, x))(params)

    states = tokens if below is None else run(below, below.params, tokens)
    logits = run(model, params, states)
    return written, np.asarray(tokens), np.asarray(logits)


def test_adapters_of_opt_have_opts_names(tmp_path):
    folder = write_opt(tmp_path / "opt")
    written, _, _ = adapted(folder, tmp_path / "run", targets=("q", "o", "down"))
    found = load_file(written / "adapter_model.safetensors")
    places = ("self_attn.q_proj", "self_attn.out_proj", "fc2")
    assert set(found) == {
        f"base_model.model.model.decoder.layers.{i}.{place}.lora_{kind}.weight"
        for i in range(3)
        for place in places
        for kind in "AB"
    }
    settings = json.loads((written / "adapter_config.json").read_text())
    assert settings["target_modules"] == ["fc2", "out_proj", "q_proj"]
    with pytest.raises(ValueError, match=r"targets: .* has no 'gate'"):
        adapted(folder, tmp_path / "run", targets=("q", "gate"))


@pytest.mark.slow
def test_adapters_of_the_last_layers_say_which(tmp_path):
    path = tiny_model.write_model(tmp_path / "a.gguf")
    written, _, _ = adapted(path, tmp_path / "run", layers=1, targets=("q",))
    settings = json.loads((written / "adapter_config.json").read_text())
    assert settings["layers_to_transform"] == [1]
    assert len(load_file(written / "adapter_model.safetensors")) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_reads_what_was_trained(tmp_path, family, layers):
    torch = pytest.importorskip("torch")
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    name, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**settings, tie_word_embeddings=True)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    base = tmp_path / "base"
    theirs.save_pretrained(base)
    path = write_gguf(tmp_path / "a.gguf", base) if "GGUF" in family else base
    with jax.default_matmul_precision("highest"):
        written, tokens, ours = adapted(path, tmp_path / "run", layers=layers)
    with torch.no_grad():
        without = theirs(torch.tensor(tokens)).logits.numpy()
        model = peft.PeftModel.from_pretrained(theirs, str(written)).eval()
        expected = model(torch.tensor(tokens)).logits.numpy()
    assert np.abs(expected - without).max() > 0.1
    np.testing.assert_allclose(ours, expected, atol=1e-3, rtol=2e-3)
    found = set(load_file(written / "adapter_model.safetensors"))
    read = {key.replace(".default.", ".") for key in model.state_dict() if "lora_" in key}
    assert found == read
