"""Decoders from checkpoints: GGUF files, and folders of Hugging Face safetensors, 4-bit or not.

A `Checkpoint` keeps the names of what was read, so that what was trained goes back to its place in
the file, which is read again for that: nothing is held twice.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.finetune.models import architectures, places
from experiments.finetune.models.decoder import Architecture, Decoder
from zoqo_jax.grids.arrays import QuantizedArray
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
        arch = architectures.of_hugging_face(settings)
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


def load_gguf(path: str | Path) -> Checkpoint:
    """A decoder from a GGUF file of the llama or qwen2 architecture, or from all of its parts.

    Raises:
      ValueError: another architecture, tensors or metadata that do not make a decoder, or metadata
        that are not known and may say how it computes.
    """
    path = gguf.parts(path)[0]
    file = gguf.load(path)
    try:
        arch = architectures.of_gguf(file)
        params, names = _tree(file.tensors, _GGUF, arch, {"rope_freqs.weight"})
        count = file.tokenizer.get_vocab_size() if file.tokenizer else 0
        if count > arch.vocabulary:
            raise ValueError(
                f"token_embd.weight has {arch.vocabulary} rows, for {count} of the tokenizer."
            )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return Checkpoint(arch, params, file.tokenizer, path, file.metadata, names, range(arch.depth))


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
