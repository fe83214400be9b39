"""Decoders from checkpoints: GGUF files, and folders of Hugging Face safetensors, 4-bit or not.

A `Checkpoint` keeps the names of what was read, so that what was trained goes back to its place in
the file, which is read again for that: nothing is held twice.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.finetune.models import places
from experiments.finetune.models.decoder import Architecture, Decoder
from zoqo_jax.arrays import QuantizedArray
from zoqo_jax.interop import bitsandbytes, gguf

__all__ = [
    "MODULES",
    "Checkpoint",
    "load",
    "load_gguf",
    "load_hugging_face",
    "module_names",
    "split",
    "stack",
    "unstack",
]


class Checkpoint(NamedTuple):
    """A decoder as it was read, or some of its layers.

    Attributes:
      architecture: of the whole decoder.
      params: for `Decoder.apply`; matrices may be a `QuantizedArray`, layers are stacked.
      tokenizer: a `tokenizers.Tokenizer`.
      path: of the file or folder.
      metadata: of the file.
      names: the file's name of each leaf of `params`, by '/'-joined path; with "{}" for the layer.
      span: the numbers of the layers in `params`.
    """

    architecture: Architecture
    params: dict[str, Any]
    tokenizer: Any
    path: Path
    metadata: dict[str, Any]
    names: dict[str, str]
    span: range

    @property
    def decoder(self) -> Decoder:
        """What reads `params`."""
        return Decoder(self.architecture, self.span)


MODULES = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
    "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip
"""What Hugging Face's Llama and Qwen2 call a layer's matrices."""


def _linear(layer: str, modules: Mapping[str, str]) -> dict[str, str]:
    """The names of linear maps' weights and biases in a checkpoint, by place in `params`."""
    return {
        f"layers/{ours}/{kind}": f"{layer}.{theirs}.{kind}"
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }


_GGUF = {
    "embedding": "token_embd.weight",
    "output": "output.weight",
    "norm/scale": "output_norm.weight",
    "layers/attention_norm/scale": "blk.{}.attn_norm.weight",
    "layers/mlp_norm/scale": "blk.{}.ffn_norm.weight",
    **_linear(
        "blk.{}",
        {
            "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
            "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
        },
    ),
}  # fmt: skip
_LLAMA = {
    "embedding": "model.embed_tokens.weight",
    "output": "lm_head.weight",
    "norm/scale": "model.norm.weight",
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    **_linear("model.layers.{}", MODULES),
}
_OPT = {
    "embedding": "model.decoder.embed_tokens.weight",
    "positions": "model.decoder.embed_positions.weight",
    "output": "lm_head.weight",
    "norm/scale": "model.decoder.final_layer_norm.weight",
    "norm/bias": "model.decoder.final_layer_norm.bias",
    "layers/attention_norm/scale": "model.decoder.layers.{}.self_attn_layer_norm.weight",
    "layers/attention_norm/bias": "model.decoder.layers.{}.self_attn_layer_norm.bias",
    "layers/mlp_norm/scale": "model.decoder.layers.{}.final_layer_norm.weight",
    "layers/mlp_norm/bias": "model.decoder.layers.{}.final_layer_norm.bias",
    **_linear(
        "model.decoder.layers.{}",
        {
            "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
            "o": "self_attn.out_proj", "up": "fc1", "down": "fc2",
        },
    ),
}  # fmt: skip


def load(path: str | Path) -> Checkpoint:
    """A decoder from a GGUF file, or from a folder of safetensors.

    Args:
      path: of the file or folder, or a name that `places.find` knows.

    Raises:
      FileNotFoundError: there is nothing.
      OSError: it could not be downloaded.
      ValueError: it is no decoder that is read here.
    """
    path = places.find(path)
    return load_hugging_face(path) if path.is_dir() else load_gguf(path)


def module_names(checkpoint: Checkpoint) -> dict[str, str]:
    """What transformers calls each matrix of a model's layers, "{}" for the layer, by our names."""
    names = checkpoint.names if checkpoint.path.is_dir() else _LLAMA
    return {
        name: names[f"layers/{name}/weight"].removesuffix(".weight")
        for name in MODULES
        if f"layers/{name}/weight" in checkpoint.names
    }


def split(checkpoint: Checkpoint, count: int) -> tuple[Checkpoint | None, Checkpoint]:
    """The layers below, if there are any, and the last `count` of them; 0: all.

    Raises:
      ValueError: there are not so many.
    """
    depth = checkpoint.architecture.depth
    if count > depth:
        raise ValueError(f"layers must be at most {depth}, the model's, got {count}.")
    if count in (0, depth):
        return None, checkpoint

    def part(span: range) -> Checkpoint:
        layers = jax.tree.map(lambda x: x[span.start : span.stop], checkpoint.params["layers"])
        return checkpoint._replace(params={**checkpoint.params, "layers": layers}, span=span)

    return part(range(depth - count)), part(range(depth - count, depth))


def load_hugging_face(folder: str | Path) -> Checkpoint:
    """A decoder from a folder with config.json, safetensors and tokenizer.json.

    4-bit tensors of bitsandbytes become a `QuantizedArray`, with values in float32 instead of those
    rounded to the checkpoint's dtype.

    Raises:
      FileNotFoundError: one of them is missing.
      ValueError: another architecture, or tensors that do not make a decoder.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"model: there is no config.json in {folder}.")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        arch = _architecture_of_hugging_face(settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    tensors, _ = bitsandbytes.load(folder)
    table = dict(_OPT if settings["model_type"] == "opt" else _LLAMA)
    copies = {table.pop("output")} if arch.tied else set()
    try:
        params, names = _tree(tensors, table, arch, copies)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    tokenizer = _tokenizer(folder)
    return Checkpoint(arch, params, tokenizer, folder, settings, names, range(arch.depth))


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, or None."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path)) if path.is_file() else None
    except Exception as error:  # the package raises bare exceptions
        raise ValueError(f"{path}: no tokenizer: {error}.") from error


def _architecture_of_hugging_face(settings: Mapping[str, Any]) -> Architecture:
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


def load_gguf(path: str | Path) -> Checkpoint:
    """A decoder from a GGUF file of the llama or qwen2 architecture, or from all of its parts.

    Raises:
      ValueError: another architecture, tensors or metadata that do not make a decoder, or metadata
        that are not known and may say how it computes.
    """
    path = gguf.parts(path)[0]
    file = gguf.load(path)
    try:
        arch = _architecture_of_gguf(file)
        params, names = _tree(file.tensors, _GGUF, arch, {"rope_freqs.weight"})
        count = file.tokenizer.get_vocab_size() if file.tokenizer else 0
        if count > arch.vocabulary:
            raise ValueError(
                f"token_embd.weight has {arch.vocabulary} rows, for {count} of the tokenizer."
            )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return Checkpoint(arch, params, file.tokenizer, path, file.metadata, names, range(arch.depth))


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


def _architecture_of_gguf(file: gguf.File) -> Architecture:
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


def _tree(
    tensors: Mapping[str, Any], table: Mapping[str, str], arch: Architecture, apart: set[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors as `Decoder.apply` takes them, stacked by layer, and where each went."""
    params: dict[str, Any] = {}
    names, used = {}, set(apart)
    expected = _shapes(arch)
    for place, name in table.items():
        if place not in expected:
            continue
        of_layers = [name.format(i) for i in range(arch.depth)] if "{}" in name else [name]
        missing = [one for one in of_layers if one not in tensors]
        if missing:
            raise ValueError(f"there is no tensor {missing[0]}.")
        found = [tensors[one] for one in of_layers]
        leaf = stack(found) if "{}" in name else found[0]
        if tuple(leaf.shape) != expected[place]:
            shape = expected[place][1:] if "{}" in name else expected[place]
            raise ValueError(f"tensor {of_layers[0]} must be {shape}, got {found[0].shape}.")
        *folders, last = place.split("/")
        folder = params
        for step in folders:
            folder = folder.setdefault(step, {})
        folder[last] = _in_float32(leaf)
        names[place] = name
        used.update(of_layers)
    unknown = sorted(name for name in set(tensors) - used if not name.endswith("inv_freq"))
    if unknown:
        raise ValueError(f"tensors without a place in the decoder: {', '.join(unknown[:3])}.")
    return params, names


def _shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter that a decoder reads."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    tree = jax.eval_shape(Decoder(arch).init, jax.random.key(0), tokens)["params"]
    return {
        "/".join(key.key for key in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _in_float32(leaf: Any) -> Any:
    """A leaf that computes in float32: its numbers where they are floats, else its values."""
    if isinstance(leaf, QuantizedArray):
        return dataclasses.replace(leaf, value_dtype=jnp.dtype(jnp.float32))
    return jnp.asarray(leaf, jnp.float32)


def stack(leaves: list[Any]) -> Any:
    """Arrays of one shape and grid on a new first axis.

    Raises:
      ValueError: they differ.
    """
    kinds = [jax.tree.structure(leaf) for leaf in leaves]
    shapes = [leaf.shape for leaf in leaves]
    if any(kind != kinds[0] for kind in kinds) or any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            "layers must be alike to be scanned, but a tensor has another type or shape in some: "
            f"{leaves[0]!r:.80}."
        )
    return jax.tree.map(lambda *parts: jnp.stack(parts), *leaves)


def unstack(leaf: Any) -> list[Any]:
    """What `stack` stacked."""
    return [jax.tree.map(lambda x, i=i: x[i], leaf) for i in range(leaf.shape[0])]
