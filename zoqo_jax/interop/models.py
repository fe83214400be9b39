"""`zoqo_jax.load` and `zoqo_jax.save`: a model's file or folder, in whatever format it is.

    model = zq.load("gemma-3-270m-q4_k_m.gguf")  # or a folder of GPTQ, AWQ, MLX, ...
    params = model.tensors                       # quantized arrays and floats by name
    ...                                          # train
    zq.save("trained.gguf", params, model)

A file that begins with GGUF's letters is read by `gguf`; a safetensors file, or a folder with some,
by `folder`, in the format that its `config.json` names.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.interop import folder, gguf, tokenizing

__all__ = ["Model", "load", "save"]

_GGUF = b"GGUF"


class Model(NamedTuple):
    """What a model's file or folder holds.

    Attributes:
        tensors: by name, in the file's order: a `QuantizedArray` for each quantized tensor, a
            matrix being (outputs, inputs), and other arrays as they are.
        format: "gguf", or what quantized the folder: "gptq", "awq", "compressed-tensors", "mxfp4",
            "mlx" or "bitsandbytes"; "safetensors" where nothing is quantized.
        metadata: a GGUF file's, or the content of `config.json`.
        tokenizer: a `tokenizers.Tokenizer`; None where there is none or it was not asked for.
        source: what `save` needs to know of the file or folder.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as path:
        ...     gguf.save(f"{path}/a.gguf", {"w": np.ones(2, np.float32)}, {"general.name": "one"})
        ...     model = load(f"{path}/a.gguf")
        >>> model.format, model.tensors["w"].tolist(), model.metadata["general.name"]
        ('gguf', [1.0, 1.0], 'one')
    """

    tensors: dict[str, QuantizedArray | jax.Array | np.ndarray]
    format: str
    metadata: dict[str, Any]
    tokenizer: Any
    source: gguf.Metadata | folder.Folder


def load(path: str | os.PathLike[str], *, tokenizer: bool = True) -> Model:
    """Read a model: a GGUF file (or one of its parts), a safetensors file, or a folder of either.

    Args:
        path: of the file or folder.
        tokenizer: whether to make the tokenizer, too.

    Raises:
        FileNotFoundError: there is no such file, or a part of it is missing; it is named.
        ValueError: a damaged file, or one that is not read; the message says where and why.

    Warns:
        UserWarning: quantized tensors of a GGUF type without codes were decoded to floats.

    Examples:
        >>> import tempfile
        >>> from zoqo_jax.interop import safetensors
        >>> with tempfile.TemporaryDirectory() as path:
        ...     safetensors.save(f"{path}/model.safetensors", {"w": np.ones(2, np.float32)})
        ...     load(path).format
        'safetensors'
    """
    path = _inside(Path(path))
    if path.is_file() and _begins_as_gguf(path):
        file = gguf.load(path, tokenizer=tokenizer)
        return Model({**file.tensors}, "gguf", file.metadata, file.tokenizer, file.metadata)
    found = folder.load(path)
    words = tokenizing.from_folder(path) if tokenizer else None
    return Model(found.tensors, found.format or "safetensors", found.config, words, found)


def save(path: str | os.PathLike[str], tensors: Mapping[str, Any], model: Model) -> None:
    """Write a model as it was read, with other codes or floats: all of it, or nothing.

    What is not given, or did not change, comes back byte for byte: other tensors, scales, metadata,
    and all other files of a folder.

    Args:
        path: the file or folder to write; it may be the one that was read.
        tensors: by name; those that are not given stay as they are.
        model: as `load` gives it.

    Raises:
        FileNotFoundError: the folder that was read is not there any more.
        ValueError: a tensor that the model has not, or that its format does not hold; or a folder
            that was changed since it was read, or a path that holds other files.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as path:
        ...     gguf.save(f"{path}/a.gguf", {"w": np.ones(2, np.float32)}, {"general.name": "one"})
        ...     model = load(f"{path}/a.gguf")
        ...     save(f"{path}/b.gguf", {"w": 2 * model.tensors["w"]}, model)
        ...     load(f"{path}/b.gguf").tensors["w"].tolist()
        [2.0, 2.0]
    """
    if unknown := sorted(set(tensors) - set(model.tensors)):
        raise ValueError(f"tensors: the model has no {unknown[0]!r}.")
    if isinstance(model.source, gguf.Metadata):
        gguf.save(path, {**model.tensors, **tensors}, model.source)
    else:
        folder.save(path, tensors, model.source)


def _inside(path: Path) -> Path:
    """The GGUF file of a folder that holds one and no safetensors; else the path itself."""
    if not path.is_dir() or next(path.glob("*.safetensors"), None) is not None:
        return path
    found = sorted(path.glob("*.gguf"))
    if found and gguf.parts(found[0]) == found:
        return found[0]
    if found:
        raise ValueError(
            f"path: {path} holds {len(found)} GGUF files, such as {found[0].name}: name one."
        )
    return path


def _begins_as_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_GGUF)) == _GGUF
