"""What checkpoints say about how they compute: it is computed, or the checkpoint is refused.

Reported of kindred projects: ggml-org/llama.cpp 2772 (a rope scale in nobody's metadata).
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_model

import zoqo_jax as zq
from experiments.finetune import llama_cpp, seed_log
from experiments.finetune.models import loading
from zoqo_jax.interop import gguf, safetensors

TOKENS = np.random.default_rng(0).integers(0, 90, (1, 40))
FACTORS = np.linspace(1.0, 8.0, tiny_model.WIDTH // tiny_model.HEADS // 2, dtype=np.float32)


def logits(checkpoint):
    read = zq.quaxify(
        lambda params: checkpoint.decoder.apply({"params": params}, jnp.asarray(TOKENS))
    )
    return np.asarray(jax.jit(read)(checkpoint.params))


def write(path, tensors=None, **changes):
    """A tiny model with more metadata, and more tensors or, None, fewer."""
    tiny_model.write_model(path, **{f"llama.{key}": value for key, value in changes.items()})
    if tensors:
        file = gguf.load(path)
        changed = {k: v for k, v in (file.tensors | tensors).items() if v is not None}
        gguf.save(path, changed, file.metadata)
    return path


LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
ROPES = {
    "none": ({}, ()),
    "linear": (LINEAR, (4.0,) * 4),
    "linear by default": ({"rope.scaling.factor": 4.0}, (4.0,) * 4),
    "old": ({"rope.scale_linear": 4.0}, (4.0,) * 4),
    "new before old": ({"rope.scale_linear": 2.0, **LINEAR}, (4.0,) * 4),
    "said to be none": ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, ()),
    "zero": ({"rope.scaling.factor": 0.0}, ()),
}


@pytest.mark.parametrize("name", ROPES)
def test_linear_scaling_divides_all_frequencies(tmp_path, name):
    changes, factors = ROPES[name]
    checkpoint = loading.load(write(tmp_path / "a.gguf", **changes))
    assert checkpoint.architecture.rope_factors == factors


def test_linear_scaling_comes_on_top_of_factors_of_the_file(tmp_path):
    """llama.cpp #8676 has them in a tensor."""
    checkpoint = loading.load(write(tmp_path / "a.gguf", {"rope_freqs.weight": FACTORS}, **LINEAR))
    np.testing.assert_array_equal(checkpoint.architecture.rope_factors, 4 * FACTORS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ROPES, "factors", "a bias", "sentence piece"])
def test_probabilities_are_those_of_llama_cpp(tmp_path, name):
    """llama.cpp rounds activations to 8 bits; frequencies that are off are off by nats."""
    pytest.importorskip("xllamacpp")
    path = tmp_path / "a.gguf"
    if name == "factors":
        write(path, {"rope_freqs.weight": FACTORS}, **LINEAR)
    elif name == "sentence piece":
        tiny_model.write_model(path, words=tiny_model.sentence_piece_metadata())
    elif name == "a bias":
        bias = np.linspace(-1.0, 1.0, tiny_model.WIDTH, dtype=np.float32)
        half = bias[: tiny_model.WIDTH // 2]
        sizes = {"attn_q": bias, "attn_k": half, "attn_v": half}
        write(path, {f"blk.{i}.{k}.bias": v for i in range(2) for k, v in sizes.items()})
    else:
        write(path, **ROPES[name][0])
    ours = jax.nn.log_softmax(logits(loading.load(path))[0, -1])
    server = llama_cpp.serve(str(path))
    question = {"prompt": TOKENS[0].tolist(), "n_predict": 1, "temperature": 0, "n_probs": 90}
    theirs = server.handle_completions(question)["choices"][0]["logprobs"]["content"][0]
    found = {one["id"]: one["logprob"] for one in theirs["top_logprobs"]}
    ids = list(found)
    assert len(ids) > 60
    assert np.abs(np.asarray(ours)[ids] - list(found.values())).max() < 0.15


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("rope.scaling.type", "yarn", "must be none or linear, got 'yarn'"),
        ("rope.scaling.type", "longrope", "must be none or linear, got 'longrope'"),
        ("rope.scaling.factor", np.float32(-2.0), "finite and positive, got -2.0"),
        ("rope.scaling.attn_factor", np.float32(0.5), "np.float32(0.5) is not read"),
        ("rope.scaling.yarn_ext_factor", np.float32(1.0), "np.float32(1.0) is not read"),
        ("rope.dimension_count", np.uint32(4), "np.uint32(4) is not read"),
        ("attention.causal", False, "False is not read"),
        ("attention.sliding_window", np.uint32(16), "np.uint32(16) is not read"),
        ("attention.value_length", np.uint32(4), "np.uint32(4) is not read"),
        ("attention.key_length", np.uint32(16), "attn_q.weight must be (64, 32), got (32, 32)"),
        ("attention.head_count_kv", np.array([2, 4], np.uint32), "must be a number"),
        ("expert_count", np.uint32(8), "np.uint32(8) is not read"),
        ("logit_scale", np.float32(0.5), "np.float32(0.5) is not read"),
        ("final_logit_softcapping", np.float32(30.0), "np.float32(30.0) is not read"),
        ("something.new", "gelu", "'gelu' is not read: it may change what is computed"),
        ("vocab_type", np.uint32(3), "np.uint32(3) is not read"),
    ],
)
def test_metadata_that_change_the_arithmetic_and_are_not_computed_are_refused(
    tmp_path, key, value, message
):
    path = write(tmp_path / "a.gguf", **{key: value})
    with pytest.raises(ValueError, match=rf"a\.gguf: .*{re.escape(message)}") as caught:
        loading.load(path)
    assert "tensor" in message or f"llama.{key}" in str(caught.value) or "attn_q" in message


def test_metadata_that_say_nothing_are_read_over(tmp_path):
    """What llama.cpp's converter and quantizer write."""
    plain = loading.load(write(tmp_path / "a.gguf"))
    head = np.uint32(tiny_model.WIDTH // tiny_model.HEADS)
    changes = {
        "vocab_size": np.uint32(90), "rope.dimension_count": head, "attention.key_length": head,
        "attention.value_length": head, "attention.causal": True, "rope.freq_base": 10_000.0,
        "tensor_data_layout": "Meta AI original pth", "expert_count": np.uint32(0),
        "expert_used_count": np.uint32(0), "attention.sliding_window": np.uint32(64),
        "rope.scaling.attn_factor": np.float32(1.0), "rope.scaling.finetuned": False,
        "rope.scaling.original_context_length": np.uint32(16),
    }  # fmt: skip
    write(tmp_path / "b.gguf", **changes)
    file = gguf.load(tmp_path / "b.gguf")
    more = {
        "general.name": "tiny", "general.file_type": np.uint32(2), "general.sampling.temp": 0.5,
        "quantize.imatrix.entries_count": np.int32(7), "quantize.imatrix.file": "imatrix.dat",
        "split.count": np.uint16(0), "tokenizer.chat_template": "{{ messages }}", "my.own": 1.5,
    }  # fmt: skip
    gguf.save(tmp_path / "b.gguf", file.tensors, {**file.metadata, **more})
    other = loading.load(tmp_path / "b.gguf")
    np.testing.assert_array_equal(logits(other), logits(plain))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        # Each was read over, or a crash of flax, before shapes were asked of the decoder.
        ({"blk.0.attn_k.bias": np.ones(16), "blk.1.attn_k.bias": np.ones(16)}, "without a place"),
        ({"blk.0.ffn_up.bias": np.ones(64), "blk.1.ffn_up.bias": np.ones(64)}, "without a place"),
        ({"blk.0.attn_norm.weight": None}, "no tensor blk.0.attn_norm.weight"),
        ({"output_norm.weight": None}, "no tensor output_norm.weight"),
        ({"output_norm.weight": np.ones(8)}, r"output_norm.weight must be \(32,\), got \(8,\)"),
        ({"rope_factors_long.weight": np.ones(4)}, "without a place"),
        ({"rope_freqs.weight": np.ones(3)}, "rope_factors must be 4, got 3"),
    ],
)
def test_tensors_that_do_not_make_the_decoder_are_refused(tmp_path, tensors, message):
    tensors = {k: None if v is None else v.astype(np.float32) for k, v in tensors.items()}
    path = write(tmp_path / "a.gguf", tensors)
    with pytest.raises(ValueError, match=message):
        loading.load(path)


def test_a_tokenizer_of_more_tokens_than_the_embedding_has_is_refused(tmp_path):
    path = write(tmp_path / "a.gguf")
    file = gguf.load(path)
    words = file.metadata["tokenizer.ggml.tokens"]
    file.metadata["tokenizer.ggml.tokens"] = [*words, "more"]
    file.metadata["tokenizer.ggml.token_type"] = np.ones(len(words) + 1, np.int32)
    gguf.save(path, file.tensors, file.metadata)
    with pytest.raises(ValueError, match=f"has {len(words)} rows, for {len(words) + 1} of the tok"):
        loading.load(path)


CONFIG = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "llama3, got 'dynamic'"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5 is not read",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not read"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "attention_factor": 3.0}},
            "attention_factor=3.0 is not read for rope_type 'linear'",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
            "full_attention=.* is not read",
        ),
        ({"is_causal": False}, "is_causal=False is not read"),
        ({"mlp_bias": True}, "mlp_bias=True is not read"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not read"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types='sliding_"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window=True"),
        ({"model_type": "opt", "ffn_dim": 48, "_remove_final_layer_norm": True}, "_remove_final"),
        ({"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 16}, "word_embed_proj_dim=16"),
        ({"model_type": "opt", "ffn_dim": 48, "do_layer_norm_before": False}, "before=False"),
    ],
)
def test_folders_that_compute_otherwise_are_refused(tmp_path, changes, message):
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    with pytest.raises(ValueError, match=message):
        loading.load(tmp_path)


def test_a_folder_scales_positions_as_a_file_does(tmp_path):
    folder = tiny_model.write_folder(tmp_path / "tiny")
    settings = json.loads((folder / "config.json").read_text())
    settings["rope_scaling"] = {"type": "linear", "factor": 4.0}
    (folder / "config.json").write_text(json.dumps(settings))
    assert loading.load(folder).architecture.rope_factors == (4.0,) * 4


def test_a_folder_of_other_shapes_or_a_damaged_tokenizer_is_refused(tmp_path):
    folder = tiny_model.write_folder(tmp_path / "tiny")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: no tokenizer"):
        loading.load(folder)
    tensors = safetensors.load(folder)
    tensors["model.norm.weight"] = jnp.ones(8)
    safetensors.save(folder / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight must be \(32,\), got \(8,\)"):
        loading.load(folder)


def test_a_model_in_parts_is_one_model(tmp_path):
    whole = loading.load(write(tmp_path / "a.gguf"))
    file = gguf.load(whole.path)
    names = list(file.tensors)
    paths = gguf.parts(tmp_path / "tiny-00001-of-00003.gguf")
    for i, path in enumerate(paths):
        some = {name: file.tensors[name] for name in names[i::3]}
        marks = {"split.no": np.uint16(i), "split.count": np.uint16(3)}
        marks["split.tensors.count"] = np.int32(len(names))
        gguf.save(path, some, {**(file.metadata if i == 0 else {}), **marks})
    found = loading.load(paths[1])
    assert found.path == paths[0]
    np.testing.assert_array_equal(logits(found), logits(whole))
    # What tells a run's base from another is made of all parts.
    digest = seed_log._digest(paths[0])
    content = bytearray(paths[2].read_bytes())
    content[-40] ^= 1
    paths[2].write_bytes(content)
    assert seed_log._digest(paths[0]) != digest
    paths[2].unlink()
    with pytest.raises(FileNotFoundError, match="tiny-00003-of-00003"):
        loading.load(paths[0])
