"""Families of decoders: beside transformers and llama.cpp, and files of several types."""

import dataclasses
import json
import re

import family_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoqo_jax as zq
from experiments.finetune.models import Decoder, from_settings, loading, stacks
from zoqo_jax.interop import gguf, safetensors

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
    model = Decoder(dataclasses.replace(checkpoint.architecture, **changes), None, checkpoint.types)

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


def mixed(name, layer):
    """Types as Q4_K_M mixes them: two of the matrices in more bits in some layers."""
    more = layer in (0, 3, 6)
    return {"attn_v": "Q8_0" if more else "Q5_0", "ffn_down": "Q4_1" if more else "Q4_0"}.get(
        name, "Q5_0"
    )


@pytest.fixture(scope="module")
def mixed_file(tmp_path_factory):
    return family_files.write(tmp_path_factory.mktemp("mixed") / "a.gguf", "gemma3", mixed)


def test_a_file_of_several_types_computes_what_its_values_do(mixed_file, tmp_path):
    checkpoint = loading.load(mixed_file)
    kinds = (0, 1, 1, 0, 1, 1, 0)
    assert checkpoint.types == (("v", kinds), ("down", kinds))
    assert set(checkpoint.params["types"]["down"]) == {"0", "1"}
    down = checkpoint.params["types"]["down"]["1"]
    assert down.shape == (4, family_files.WIDTH, family_files.HIDDEN)
    file = gguf.load(mixed_file)
    trained = [x for x in jax.tree.leaves(checkpoint.params, is_leaf=zq.is_quantized)]
    codes = sum(x.size for x in trained if zq.is_quantized(x))
    assert codes == sum(x.size for x in file.tensors.values() if zq.is_quantized(x))
    gguf.save(tmp_path / "floats.gguf", zq.dequantize(file.tensors), file.metadata)
    floats = loading.load(tmp_path / "floats.gguf")
    assert floats.types == ()
    np.testing.assert_allclose(logits(checkpoint), logits(floats), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "count", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 3, 4, 5, 6))]
)
def test_the_last_layers_of_several_types_go_on_where_those_below_ended(mixed_file, count):
    whole = loading.load(mixed_file)
    below, model = loading.split(whole, count)
    assert (below.span, model.span) == (range(7 - count), range(7 - count, 7))

    def read(part, x):
        read = zq.quaxify(lambda params: part.decoder.apply({"params": params}, x))
        return jax.jit(read)(part.params)

    states = read(below, jnp.asarray(TOKENS[:1]))
    np.testing.assert_allclose(read(model, states), logits(whole, TOKENS[:1]), atol=1e-3)
    # Each leaf knows its tensors: their codes are the file's.
    tensors = gguf.load(mixed_file).tensors
    found = jax.tree_util.tree_leaves_with_path(model.params, is_leaf=zq.is_quantized)
    named = []
    for path, leaf in found:
        if path[0].key not in ("layers", "types"):
            continue
        places = model.places_of("/".join(key.key for key in path))
        named += [name for _, name in places]
        for (_, name), layer in zip(places, stacks.unstack(leaf), strict=True):
            if zq.is_quantized(layer):
                np.testing.assert_array_equal(layer.codes, tensors[name].codes)
    assert sorted(named) == sorted(
        name for name in tensors if name.startswith("blk.") and int(name.split(".")[1]) >= 7 - count
    )


def test_a_program_of_several_types_has_the_size_of_one_layer(mixed_file):
    checkpoint = loading.load(mixed_file)
    floats = zq.dequantize(checkpoint.params)
    program = jax.make_jaxpr(lambda p: checkpoint.decoder.apply({"params": p}, TOKENS))(floats)
    # The products of 7 matrices, of which two are of two types, and 2 of attention; the head.
    assert str(program).count("dot_general[") == 9 + 2 + 1


GEMMA_1B = {
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
    "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4,
    "num_hidden_layers": 26, "num_key_value_heads": 1, "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    "torch_dtype": "bfloat16", "vocab_size": 262144,
}  # fmt: skip


def test_settings_of_gemma_3_are_read_in_their_older_and_newer_form():
    older = from_settings.architecture(GEMMA_1B)
    assert (older.window, older.rope_base, older.local_rope_base) == (512, 1e6, 1e4)
    assert [i for i in range(26) if not older.is_local(i)] == [5, 11, 17, 23]
    assert older.tied and older.embedding_scale == 1152**0.5
    newer = {k: x for k, x in GEMMA_1B.items() if not k.startswith("rope") and "pattern" not in k}
    newer["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    kinds = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(26)]
    found = from_settings.architecture({**newer, "layer_types": kinds})
    assert found == dataclasses.replace(older, local=tuple(kind != kinds[5] for kind in kinds))
    scaled = {**GEMMA_1B, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    assert from_settings.architecture(scaled).rope_factors == (8.0,) * 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0 is not read"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not read"),
        ({"hidden_activation": "silu"}, "hidden_activation='silu' is not read"),
        ({"layer_types": ["full_attention"] * 25}, "layer_types must be 26, got 25"),
        ({"layer_types": ["chunked_attention"] * 26}, "layer_types='chunked_attention'"),
        ({"sliding_window": None}, "sliding_window must be at least 1, got None"),
        ({"sliding_window_pattern": -1}, "sliding_window_pattern must be in [0, 64], got -1"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters: rope_type is not read"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_type='linear' is not read in local layers",
        ),
        ({"rope_theta": -1.0}, "rope_base must be finite and positive, got -1.0"),
        ({"num_hidden_layers": 4_000_000_000}, "depth must be at most 1024, got 4000000000"),
        ({"model_type": "gemma3"}, "model_type must be llama, mistral, qwen2, qwen3, gemma2"),
        ({"model_type": "mistral"}, "hidden_act"),
    ],
)
def test_settings_that_compute_otherwise_are_refused(changes, message):
    if message == "hidden_act":
        changes, message = {**changes, "hidden_act": "gelu"}, "hidden_act='gelu' is not read"
    with pytest.raises(ValueError, match=re.escape(message)):
        from_settings.architecture({**GEMMA_1B, **changes})


def test_the_embeddings_factor_is_rounded_as_transformers_rounds_it(tmp_path):
    """To the dtype of the weights: 5.65625 for a width of 32 in bfloat16."""
    settings = {**GEMMA, "model_type": "gemma3_text", "num_hidden_layers": 1}
    floats = write_folder(tmp_path / "floats", settings)
    assert loading.load(floats).architecture.embedding_scale == pytest.approx(32**0.5, rel=1e-7)
    halves = write_folder(tmp_path / "halves", settings, jnp.bfloat16)
    found = loading.load(halves)
    assert found.architecture.embedding_scale == 5.65625
    # Files of safetensors have norms' scales minus one.
    np.testing.assert_array_equal(found.params["norm"]["scale"], np.full(32, 1.25))
    np.testing.assert_array_equal(
        found.params["layers"]["q_norm"]["scale"], np.full((1, GEMMA["head_dim"]), 1.25)
    )


def test_the_embeddings_factor_of_mlx_is_rounded_to_bfloat16(tmp_path):
    """mlx_lm's gemma3_text does it, whatever the weights' dtype is; its gemma2 does not."""
    settings = {**GEMMA, "num_hidden_layers": 1, "model_type": "gemma3_text"}
    said = {"quantization": {"group_size": 32, "bits": 4}}
    factors = {}
    for kind in ("gemma3_text", "gemma2"):
        settings["model_type"] = kind
        model = write_folder(tmp_path / kind, settings, jnp.float16)
        tensors = dict(safetensors.load(model))
        for name in [name for name in tensors if name.endswith("up_proj.weight")]:
            rows = tensors[name].shape[0]
            tensors[name] = np.zeros((rows, 4), np.uint32)  # 32 codes of 4 bits
            for part in ("scales", "biases"):
                tensors[name.replace("weight", part)] = np.ones((rows, 1), np.float16)
        safetensors.save(model / "model.safetensors", tensors)
        (model / "config.json").write_text(json.dumps({**settings, **said}))
        factors[kind] = loading.load(model).architecture.embedding_scale
    assert factors == {"gemma3_text": 5.65625, "gemma2": float(np.float16(32**0.5))}


@pytest.mark.parametrize("name", ["mlp.up_proj.bias", "self_attn.o_proj.bias"])
def test_biases_of_zeros_are_read_over(tmp_path, name):
    """Older GPTQ files have one for every matrix."""
    model = write_folder(tmp_path / "a", {**SHAPE, "model_type": "llama", "head_dim": 8})
    tensors = dict(safetensors.load(model))
    of_layer = f"model.layers.2.{name}"
    tensors[of_layer] = np.zeros(tensors[of_layer.replace("bias", "weight")].shape[0], np.float32)
    safetensors.save(model / "model.safetensors", tensors)
    loading.load(model)
    tensors[of_layer][-1] = 1e-3
    safetensors.save(model / "model.safetensors", tensors)
    with pytest.raises(ValueError, match=f"without a place in the decoder: {of_layer}"):
        loading.load(model)


def write_folder(folder, settings, dtype=jnp.float32):
    """A Gemma whose norms are all 0.25."""
    known, arch = from_settings.family(settings), from_settings.architecture(settings)
    tensors = {}
    for place, shape in loading._shapes(arch).items():
        name, one = known.names[place], shape[1:] if place.startswith("layers/") else shape
        for layer in range(arch.depth):
            tensors[name.format(layer)] = jnp.full(one, 0.25, dtype)
    folder.mkdir()
    safetensors.save(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("family", "metadata", "message"),
    [
        (
            "gemma3",
            {"gemma3.attn_logit_softcapping": 50.0},
            "attn_logit_softcapping=np.float32(50.0) is",
        ),
        ("gemma3", {"gemma3.attention.sliding_window_pattern": 99}, "must be in [0, 64], got 99"),
        ("gemma3", {"gemma3.rope.freq_base": float("nan")}, "rope_base must be finite"),
        ("gemma3", {"gemma3.something": 1}, "gemma3.something=np.uint32(1) is not read"),
        ("qwen3", {"qwen3.attention.sliding_window": 8}, "sliding_window=np.uint32(8) is not read"),
        ("qwen3", {"qwen3.block_count": 4_000_000_000}, "depth must be at most 1024"),
        ("qwen3", {"qwen3.block_count": 900}, "there is no tensor blk.3."),
        ("mistral", {"general.architecture": "gemma"}, "must be llama, qwen2, qwen3, gemma2 or"),
    ],
)
def test_metadata_that_compute_otherwise_are_refused(tmp_path, family, metadata, message):
    path = family_files.write(tmp_path / "a.gguf", family)
    file = gguf.load(path)
    changes = {k: np.float32(x) if isinstance(x, float) else x for k, x in metadata.items()}
    gguf.save(path, file.tensors, {**file.metadata, **changes})
    with pytest.raises(ValueError, match=re.escape(message)):
        loading.load(path)


def test_scores_of_gemma_27b_are_divided_as_llama_cpp_does_it(tmp_path):
    """No metadata say so: it knows the model by its 62 layers."""
    path = family_files.write(tmp_path / "a.gguf", "gemma3 without a window")
    file = gguf.load(path)
    assert loading.load(path).architecture.query_scalar == family_files.HEAD_WIDTH
    tensors = {
        name.replace("blk.0.", f"blk.{layer}."): x
        for name, x in file.tensors.items()
        for layer in range(62 if name.startswith("blk.0.") else 1)
        if not name.startswith("blk.1.")
    }
    gguf.save(path, tensors, {**file.metadata, "gemma3.block_count": np.uint32(62)})
    expected = family_files.WIDTH / family_files.HEADS
    assert loading.load(path).architecture.query_scalar == expected


def test_a_token_sees_as_far_as_its_window(mixed_file):
    """Itself among them: the first token is seen by the 8 first, or by all without a window."""
    checkpoint = loading.load(mixed_file)
    other = TOKENS.copy()
    other[:, 0] = (other[:, 0] + 1) % 90
    for local, last in (((True,), 8), ((), 40)):
        one = dataclasses.replace(checkpoint.architecture, local=local, depth=1)
        params = {**checkpoint.params, "layers": first_layer(checkpoint)}
        read = jax.jit(zq.quaxify(lambda p, x, one=one: Decoder(one).apply({"params": p}, x)))
        gap = np.abs(read(params, TOKENS) - read(params, other)).max((0, 2))
        assert (gap[:last] > 1e-4).all() and (gap[last:] == 0).all()


def first_layer(checkpoint):
    layer, _ = stacks.part(checkpoint.params, checkpoint.span, checkpoint.types, range(1))
    return layer["layers"]
