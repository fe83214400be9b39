"""GGUF, llama.cpp's files: their blocks of 2 to 8 bits are codes here, bit for bit.

    tensors, metadata, tokenizer = gguf.load("model.gguf")
    gguf.save("trained.gguf", tensors, metadata)

What is loaded and saved again unchanged is the identical file; a code that has moved changes its
own bits. Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, the K-quants Q2_K to Q6_K, IQ4_NL, IQ4_XS, MXFP4, NVFP4 and
TQ2_0 become a `QuantizedArray`, with scales as the file has them; F32, F16 and BF16 become float
arrays. The other types (IQ1 to IQ3, TQ1_0) have no codes with an order: they are decoded to float32
by the `gguf` package, with a warning that says why, and saved as they were unless they have
changed. A model in parts, NAME-00001-of-00003.gguf and so on, is read whole, and saved as one file,
as `llama-gguf-split --merge` makes it.

In MXFP4 and NVFP4 plus and minus zero are one code. Which of them a zero was is not kept in memory:
`save` looks it up in the file that the tensors came from, if it is still there.

A file is read without trust: every length is checked against what is left of the file before
anything is made of it. Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.interop import ggml, tokenizing
from zoqo_jax.interop.gguf import reading, splitting, writing
from zoqo_jax.interop.gguf.layout import Layout, alignment_of, naming
from zoqo_jax.interop.gguf.sources import kept_kind, source_of, why_floats

__all__ = ["File", "Metadata", "load", "parts", "save"]

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)


class File(NamedTuple):
    """What a GGUF file holds.

    Attributes:
        tensors: by name, in the file's order: `QuantizedArray`, or float (or integer) arrays. The
            last axis is the one that lies contiguous in the file: a matrix is (outputs, inputs).
        metadata: by key, in the file's order: `str`, `bool`, numpy scalars and arrays of the
            file's types, lists of strings (`bytes` where they are not UTF-8). Of a model in parts,
            the first part's, without "split.count" and the like.
        tokenizer: a `tokenizers.Tokenizer` made of the metadata; None where they describe none.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/a.gguf", {"norm": np.ones(3, np.float32)}, {"general.name": "one"})
        ...     file = load(f"{folder}/a.gguf")
        >>> list(file.tensors), file.metadata, file.tokenizer
        (['norm'], {'general.name': 'one'}, None)
    """

    tensors: dict[str, QuantizedArray | jax.Array]
    metadata: Metadata
    tokenizer: Any


class Metadata(dict[str, Any]):
    """A dictionary of a file's metadata that also knows how the file was laid out.

    `save` writes the same version again, puts tensors in the same places if they take the same
    bytes, and reads minus zeros and tensors without codes again from the file that they came from.
    A copy, as `dict(metadata)`, does not know, and is saved as version 3 with tensors in order.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/a.gguf", {"norm": np.ones(3, np.float32)}, {"general.name": "one"})
        ...     metadata = load(f"{folder}/a.gguf").metadata
        >>> metadata, metadata.layout.version
        ({'general.name': 'one'}, 3)
    """

    layout: Layout


def load(path: str | os.PathLike[str], *, tokenizer: bool = True) -> File:
    """Read a GGUF file, or all files of a model in parts.

    Args:
        path: the file, version 2 or 3, little-endian; or one of the parts, which lie beside it.
        tokenizer: whether to make the tokenizer, too (needs the `tokenizers` package).

    Raises:
        FileNotFoundError: there is no such file, or a part is missing; it is named.
        ValueError: it is not a whole GGUF file, or of a kind that is not read, and where.

    Warns:
        UserWarning: tensors were decoded to floats.

    Examples:
        >>> import tempfile, jax.numpy as jnp
        >>> from zoqo_jax import Quantizer
        >>> codes = Quantizer(4, block=32, scale_dtype=jnp.float16)(jnp.ones((2, 64)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/a.gguf", {"w": codes}, {"general.name": "ones"})
        ...     tensors, metadata, _ = load(f"{folder}/a.gguf")
        >>> bool((tensors["w"].codes == codes.codes).all()), metadata
        (True, {'general.name': 'ones'})
    """
    paths = parts(path)
    for one in paths:
        if not one.is_file():
            raise FileNotFoundError(f"path: there is no file {one}.")
    tensors: dict[str, QuantizedArray | jax.Array] = {}
    read: list[tuple[dict[str, Any], Layout]] = []
    decoded: dict[str, int] = {}
    for number, one in enumerate(paths):
        with naming(one):
            found, entries, layout, floats = reading.read(one)
            splitting.check(entries, number, len(paths))
            if twice := sorted(set(found) & set(tensors)):
                raise ValueError(f"another part has a tensor {twice[0]!r}, too.")
        tensors |= found
        read.append((entries, layout))
        decoded |= floats
    path, words = paths[0], None
    with naming(path):
        entries, layout = splitting.joined(read, len(tensors))
    metadata = Metadata(entries)
    metadata.layout = layout
    if tokenizer:
        try:
            words = tokenizing.from_gguf(metadata)
        except ValueError as error:
            told = "With tokenizer=False, all else of the file is read."
            raise ValueError(f"{path}: {error} {told}") from error
    if decoded:
        warnings.warn(why_floats(path, decoded), stacklevel=2)
    return File(tensors, metadata, words)


def parts(path: str | os.PathLike[str]) -> list[Path]:
    """The files of a model in parts, by the name of one of them, as llama.cpp names them.

    Args:
        path: of a part, or of a file that is a whole model, which alone is given back.

    Examples:
        >>> [one.name for one in parts("model-00002-of-00002.gguf")]
        ['model-00001-of-00002.gguf', 'model-00002-of-00002.gguf']
        >>> [one.name for one in parts("model.gguf")]
        ['model.gguf']
    """
    path = Path(path)
    found = _PART.fullmatch(path.name)
    if not found or not 1 <= int(found[2]) <= int(found[3]) != 1:
        return [path]
    count = int(found[3])
    return [path.with_name(f"{found[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]


def save(
    path: str | os.PathLike[str],
    tensors: Mapping[str, QuantizedArray | jax.Array | np.ndarray],
    metadata: Mapping[str, Any],
) -> None:
    """Write a GGUF file, all of it or nothing: a file that was there stays till then.

    Args:
        path: the file to write.
        tensors: by name, written in this order. A `QuantizedArray` needs the grid of one of the
            types, such as Q4_0 (-8..7) or Q4_1 (0..15, with an offset), scales that as many
            neighbours of the last axis share as there, and scales and offsets that float16 holds.
        metadata: by key, written in this order, as `load` gives it; see `Metadata` for the version
            and the places of tensors. Python integers become uint32 or int64, floats float32.

    Raises:
        ValueError: a tensor or a value that no GGUF type holds, named.

    Warns:
        UserWarning: the file that minus zeros, or tensors without codes, came from has changed.

    Examples:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/a.gguf", {"norm": jnp.ones(3)}, {"general.alignment": 64})
        ...     load(f"{folder}/a.gguf").tensors["norm"].tolist()
        [1.0, 1.0, 1.0]
    """
    known = getattr(metadata, "layout", Layout())
    sources = {name: source_of(name, tensor, known.sources) for name, tensor in tensors.items()}
    kinds = {}
    for name, tensor in tensors.items():
        with naming(f"tensors: {name!r}"):
            kinds[name] = kept_kind(sources[name]) or ggml.kind_of(tensor)
    sizes = {name: ggml.bytes_of(kinds[name], tuple(x.shape)) for name, x in tensors.items()}
    layout = known.placing(sizes, alignment_of(metadata))
    writing.write(path, tensors, metadata, kinds, sources, layout)
