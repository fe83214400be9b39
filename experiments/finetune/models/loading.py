"""Decoders from checkpoints: GGUF files, and folders of Hugging Face safetensors.

A `Checkpoint` keeps the names of what was read, so that what was trained goes back to its place.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.finetune.models.decoder import Architecture
from zoqo_jax.arrays import QuantizedArray
from zoqo_jax.interop import gguf

__all__ = ["Checkpoint", "load_gguf", "stack", "unstack"]


class Checkpoint(NamedTuple):
    """A decoder as it was read.

    Attributes:
      architecture: of the decoder.
      params: for `Decoder.apply`; matrices may be a `QuantizedArray`, layers are stacked.
      tokenizer: a `tokenizers.Tokenizer`.
      tensors: of the file, by name, as they were read.
      metadata: of the file.
      names: the file's name of each leaf of `params`, by '/'-joined path; with "{}" for the layer.
    """

    architecture: Architecture
    params: dict[str, Any]
    tokenizer: Any
    tensors: dict[str, Any]
    metadata: dict[str, Any]
    names: dict[str, str]


_GGUF = {
    "embedding": "token_embd.weight",
    "output": "output.weight",
    "norm/scale": "output_norm.weight",
    "layers/attention_norm/scale": "blk.{}.attn_norm.weight",
    "layers/mlp_norm/scale": "blk.{}.ffn_norm.weight",
    **{
        f"layers/{ours}/{kind}": f"blk.{{}}.{theirs}.{kind}"
        for ours, theirs in {
            "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
            "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
        }.items()
        for kind in ("weight", "bias")
    },
}  # fmt: skip


def load_gguf(path: str | Path) -> Checkpoint:
    """A decoder from a GGUF file of the llama or qwen2 architecture.

    Raises:
      ValueError: another architecture, or tensors or metadata that do not make a decoder.
    """
    file = gguf.load(path)
    try:
        arch = _architecture_of_gguf(file)
        params, names = _tree(file.tensors, _GGUF, arch.depth, {"rope_freqs.weight"})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return Checkpoint(arch, params, file.tokenizer, file.tensors, file.metadata, names)


def _architecture_of_gguf(file: gguf.File) -> Architecture:
    kind = file.metadata.get("general.architecture")
    if kind not in ("llama", "qwen2"):
        raise ValueError(f"general.architecture must be llama or qwen2, got {kind!r:.40}.")

    def number(name: str, otherwise: Any = None) -> Any:
        value = file.metadata.get(f"{kind}.{name}", otherwise)
        if not isinstance(value, int | float | np.number):
            raise ValueError(f"{kind}.{name} must be a number, got {value!r:.40}.")
        return value.item() if isinstance(value, np.number) else value

    width, heads = number("embedding_length"), number("attention.head_count")
    factors = file.tensors.get("rope_freqs.weight")
    if "token_embd.weight" not in file.tensors:
        raise ValueError("there is no tensor token_embd.weight.")
    return Architecture(
        vocabulary=file.tensors["token_embd.weight"].shape[0],
        width=width,
        depth=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        hidden=number("feed_forward_length"),
        context=number("context_length"),
        head_width=number("attention.key_length", width // max(heads, 1)),
        epsilon=number("attention.layer_norm_rms_epsilon"),
        positions="pairs" if kind == "llama" else "halves",
        rope_base=number("rope.freq_base", 10_000.0),
        rope_factors=() if factors is None else tuple(np.asarray(factors, np.float64).tolist()),
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        bias="blk.0.attn_output.bias" in file.tensors,
        tied="output.weight" not in file.tensors,
    )


def _tree(
    tensors: Mapping[str, Any], table: Mapping[str, str], depth: int, apart: set[str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors as `Decoder.apply` takes them, stacked by layer, and where each went."""
    params: dict[str, Any] = {}
    names, used = {}, set(apart)
    for place, name in table.items():
        of_layers = [name.format(i) for i in range(depth)] if "{}" in name else [name]
        if of_layers[0] not in tensors:
            continue
        missing = [one for one in of_layers if one not in tensors]
        if missing:
            raise ValueError(f"there is no tensor {missing[0]}.")
        found = [tensors[one] for one in of_layers]
        leaf = stack(found) if "{}" in name else found[0]
        *folders, last = place.split("/")
        folder = params
        for step in folders:
            folder = folder.setdefault(step, {})
        folder[last] = leaf if isinstance(leaf, QuantizedArray) else leaf.astype(jnp.float32)
        names[place] = name
        used.update(of_layers)
    unknown = sorted(set(tensors) - used)
    if unknown:
        raise ValueError(f"tensors without a place in the decoder: {', '.join(unknown[:3])}.")
    return params, names


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
    if isinstance(leaf, QuantizedArray):
        parts = [leaf.packed, leaf.scale] + ([] if leaf.offset is None else [leaf.offset])
        return [
            dataclasses.replace(
                leaf, packed=one[0], scale=one[1], offset=one[2] if len(one) > 2 else None
            )
            for one in zip(*parts, strict=True)
        ]
    return list(leaf)
