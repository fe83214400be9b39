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
import numpy as np

import zoqo_jax as zq
from experiments.finetune.models import from_metadata, from_settings, places, stacks
from experiments.finetune.models.architecture import Architecture
from experiments.finetune.models.decoder import Decoder
from experiments.finetune.models.families import FAMILIES, GGUF_NAMES, MODULES
from experiments.finetune.models.stacks import Types
from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.interop import gguf, tokenizing

__all__ = ["Checkpoint", "load", "load_gguf", "load_hugging_face", "module_names", "split"]


class Checkpoint(NamedTuple):
    """A decoder as it was read, or some of its layers.

    Attributes:
      architecture: of the whole decoder.
      params: for `Decoder.apply`; matrices may be a `QuantizedArray`, layers are stacked (see
        `stacks.py`).
      tokenizer: a `tokenizers.Tokenizer`.
      path: of the file or folder.
      metadata: of the file.
      names: the file's name of each parameter, by '/'-joined place; with "{}" for the layer, whose
        places are those of matrices of one type ("layers/q/weight").
      span: the numbers of the layers in `params`.
      types: matrices that have not the same type in all of them.
    """

    architecture: Architecture
    params: dict[str, Any]
    tokenizer: Any
    path: Path
    metadata: dict[str, Any]
    names: dict[str, str]
    span: range
    types: Types

    @property
    def decoder(self) -> Decoder:
        """What reads `params`."""
        return Decoder(self.architecture, self.span, self.types)

    def places_of(self, path: str) -> list[tuple[int, str]]:
        """The number and the file's name of each layer that a leaf of layers holds.

        Args:
          path: '/'-joined keys of the leaf in `params`.
        """
        place, numbers = stacks.place_of(path, self.span, self.types)
        name = self.names[f"layers/{place}"]
        return [(number, name.format(number)) for number in numbers]


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
    names = checkpoint.names if checkpoint.path.is_dir() else FAMILIES["llama"].names
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

    def of(span: range) -> Checkpoint:
        some, types = stacks.part(checkpoint.params, checkpoint.span, checkpoint.types, span)
        rest = {name: x for name, x in checkpoint.params.items() if not stacks.is_of_layers(name)}
        return checkpoint._replace(params={**rest, **some}, span=span, types=types)

    return of(range(depth - count)), of(range(depth - count, depth))


def in_dtype(checkpoint: Checkpoint, dtype: str) -> Checkpoint:
    """The same checkpoint, the values of its quantized matrices in another dtype.

    The decoder multiplies by them in that dtype, and sums in float32.

    Args:
      checkpoint: as it was read, with values in float32.
      dtype: "float32" or "bfloat16".
    """
    return checkpoint._replace(params=values_in(dtype, checkpoint.params))


def values_in(dtype: Any, tree: Any) -> Any:
    """A tree whose quantized leaves decode to another dtype; other leaves stay as they are."""

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, QuantizedArray):
            return leaf
        return dataclasses.replace(leaf, value_dtype=jnp.dtype(dtype))

    return jax.tree.map(one, tree, is_leaf=zq.is_quantized)


def load_hugging_face(folder: str | Path) -> Checkpoint:
    """A decoder from a folder with config.json, safetensors and tokenizer.json.

    Quantized tensors (see `zq.load`) become a `QuantizedArray`, with values in float32 instead of
    those rounded to the checkpoint's dtype.

    Raises:
      FileNotFoundError: one of them is missing.
      ValueError: another architecture, or tensors that do not make a decoder.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"model: there is no config.json in {folder}.")
    try:  # before any tensor is read
        settings = json.loads(path.read_text(encoding="utf-8"))
        family, arch = from_settings.family(settings), from_settings.architecture(settings)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    model = zq.load(folder, tokenizer=False)
    tensors, table = model.tensors, dict(family.names)
    copies = {table.pop("output")} if arch.tied else set()
    if family.scales_embedding and table["embedding"] in tensors:
        # Transformers rounds the factor to the dtype of the weights; mlx_lm to bfloat16 (Gemma 3).
        is_coarse = model.format == "mlx" and settings["model_type"] == "gemma3_text"
        dtype = jnp.bfloat16 if is_coarse else tensors[table["embedding"]].dtype
        scale = float(jnp.asarray(arch.embedding_scale, dtype))
        arch = dataclasses.replace(arch, embedding_scale=scale)
    try:
        params, names, types = _tree(tensors, table, arch, copies, family.norms_plus)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    words, span = tokenizing.from_folder(folder), range(arch.depth)
    return Checkpoint(arch, params, words, folder, settings, names, span, types)


def load_gguf(path: str | Path) -> Checkpoint:
    """A decoder from a GGUF file of a family in `families.py`, or from all of its parts.

    Raises:
      ValueError: another architecture, tensors or metadata that do not make a decoder, or metadata
        that are not known and may say how it computes.
    """
    path = gguf.parts(path)[0]
    file = gguf.load(path)
    try:
        arch = from_metadata.architecture(file)
        params, names, types = _tree(file.tensors, GGUF_NAMES, arch, {"rope_freqs.weight"})
        count = file.tokenizer.get_vocab_size() if file.tokenizer else 0
        if count > arch.vocabulary:
            raise ValueError(
                f"token_embd.weight has {arch.vocabulary} rows, for {count} of the tokenizer."
            )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    span = range(arch.depth)
    return Checkpoint(arch, params, file.tokenizer, path, file.metadata, names, span, types)


def _tree(
    tensors: dict[str, Any],
    table: Mapping[str, str],
    arch: Architecture,
    apart: set[str],
    norms_plus: float = 0.0,
) -> tuple[dict[str, Any], dict[str, str], Types]:
    """The tensors as `Decoder.apply` takes them, where each went, and matrices of several types.

    Tensors are taken out of the dictionary, so that none is held beside the stack that it is in.
    """
    expected = _shapes(arch)
    names = {place: name for place, name in table.items() if place in expected}

    def found(place: str, name: str) -> Any:
        if name not in tensors:
            raise ValueError(f"there is no tensor {name}.")
        shape = expected[place][1:] if place.startswith("layers/") else expected[place]
        leaf = tensors[name]
        if tuple(leaf.shape) != shape:
            raise ValueError(f"tensor {name} must be {shape}, got {leaf.shape}.")
        tensors[name] = leaf = _in_float32(leaf)
        return leaf + norms_plus if norms_plus and place.endswith("norm/scale") else leaf

    of_layers = [place.removeprefix("layers/") for place in names if place.startswith("layers/")]
    layers = [
        {place: found(f"layers/{place}", names[f"layers/{place}"].format(i)) for place in of_layers}
        for i in range(arch.depth)
    ]
    params = _nested(
        {place: found(place, name) for place, name in names.items() if "{}" not in name}
    )
    used = {name.format(i) for name in names.values() for i in range(arch.depth)}
    unknown = sorted(x for x in set(tensors) - used - apart if not _adds_nothing(x, tensors[x]))
    if unknown:
        raise ValueError(f"tensors without a place in the decoder: {', '.join(unknown[:3])}.")
    tensors.clear()
    stacked, types = stacks.arranged(
        of_layers, range(arch.depth), lambda place, i: layers[i].pop(place)
    )
    return {**params, **stacked}, names, types


def _adds_nothing(name: str, tensor: Any) -> bool:
    """Whether a decoder computes the same without a tensor that it has no place for.

    Older GPTQ files have a bias of zeros for every matrix.
    """
    if name.endswith(".bias"):
        return not isinstance(tensor, QuantizedArray) and not np.asarray(tensor).any()
    return name.endswith("inv_freq")


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of dictionaries by '/'-joined keys."""
    tree: dict[str, Any] = {}
    for place, leaf in leaves.items():
        *folders, last = place.split("/")
        folder = tree
        for step in folders:
            folder = folder.setdefault(step, {})
        folder[last] = leaf
    return tree


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
        return values_in(jnp.float32, leaf)
    return jnp.asarray(leaf, jnp.float32)
