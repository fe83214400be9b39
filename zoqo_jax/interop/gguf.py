"""GGUF, llama.cpp's files: their blocks of 4, 5 and 8 bits are codes here, bit for bit.

    tensors, metadata, tokenizer = gguf.load("model.gguf")
    gguf.save("trained.gguf", tensors, metadata)

What is loaded and saved again unchanged is the identical file. Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 hold
32 codes a block, with a float16 scale (and minimum) each, and become a `QuantizedArray`; F32, F16
and BF16 become float arrays. All other types (K-quants and more) are decoded to float32 by the
`gguf` package, with a warning, and saved as such. A model in parts, NAME-00001-of-00003.gguf and so
on, is read whole, and saved as one file, as `llama-gguf-split --merge` makes it.

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
from zoqo_jax.interop import ggml, gguf_reading, gguf_writing, tokenizing
from zoqo_jax.interop.files import replacing
from zoqo_jax.interop.gguf_layout import Layout, alignment_of, naming, padded
from zoqo_jax.interop.gguf_sources import Stretch, source_of, why_floats

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

    `save` writes the same version again and, where tensors take the bytes that they took, puts them
    in the same places. A copy, as `dict(metadata)`, does not know, and is saved as version 3 with
    tensors in order.

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
        ValueError: it is not a whole GGUF file, or of a kind that is not read; the message says
            where.

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
    of_parts: list[Metadata] = []
    decoded: dict[str, int] = {}
    sources: dict[str, Stretch] = {}
    for number, one in enumerate(paths):
        with naming(one):
            found, metadata, other = _read(one)
            _check_part(metadata, number, len(paths))
            if twice := sorted(set(found) & set(tensors)):
                raise ValueError(f"another part has a tensor {twice[0]!r}, too.")
        tensors |= found
        of_parts.append(metadata)
        decoded |= other
        sources |= metadata.layout.sources
    path, metadata = paths[0], of_parts[0]
    if len(paths) > 1:
        expected = metadata.get("split.tensors.count", len(tensors))
        if expected != len(tensors):
            raise ValueError(
                f"{path}: the parts have {len(tensors)} tensors instead of {expected}."
            )
        version = metadata.layout.version
        metadata = Metadata({k: x for k, x in metadata.items() if not k.startswith("split.")})
        metadata.layout = Layout(version, sources=sources)
    words = None
    if tokenizer:
        try:
            words = tokenizing.from_gguf(metadata)
        except ValueError as error:
            raise ValueError(
                f"{path}: {error} With tokenizer=False, all else of the file is read."
            ) from error
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
        tensors: by name, written in this order. A `QuantizedArray` needs a uniform grid with levels
            as in Q4_0 (-8..7), Q4_1 (0..15, with an offset), Q5_0, Q5_1 or Q8_0, scales that
            32 neighbours of the last axis share, and scales and offsets that float16 holds.
        metadata: by key, written in this order, as `load` gives it; see `Metadata` for the version
            and the places of tensors. Python integers become uint32 or int64, floats float32.

    Raises:
        ValueError: a tensor or a value that no GGUF type holds, named.

    Examples:
        >>> import tempfile, jax.numpy as jnp
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/a.gguf", {"norm": jnp.ones(3)}, {"general.alignment": 64})
        ...     load(f"{folder}/a.gguf").tensors["norm"].tolist()
        [1.0, 1.0, 1.0]
    """
    alignment = alignment_of(metadata)
    known = getattr(metadata, "layout", Layout())
    sources = {name: source_of(name, tensor, known.sources) for name, tensor in tensors.items()}
    kinds = {}
    for name, tensor in tensors.items():
        with naming(f"tensors: {name!r}"):
            source = sources[name]
            keeps = source is not None and not ggml.is_exact(source.kind)
            kinds[name] = source.kind if keeps else ggml.kind_of(tensor)
    sizes = {name: ggml.bytes_of(kinds[name], tuple(x.shape)) for name, x in tensors.items()}
    layout = known.placing(sizes, alignment)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    header = gguf_writing.header(metadata, shapes, kinds, layout)
    start, gaps = padded(len(header), alignment), iter(layout.gaps)
    with replacing(path) as file:
        file.write(header)
        for name, _, offset in sorted(layout.places, key=lambda place: place[2]):
            gguf_writing.fill(file, start + offset, next(gaps, b""))
            with naming(f"tensors: {name!r}"):
                for part in ggml.encoded(tensors[name], kinds[name], sources[name]):
                    file.write(np.ascontiguousarray(part))
        gguf_writing.fill(file, start + layout.room, next(gaps, b""))


def _read(path: Path) -> tuple[dict[str, QuantizedArray | jax.Array], Metadata, dict[str, int]]:
    """Tensors and metadata of one file, and the types of tensors that were decoded to floats."""
    entries, layout, places = gguf_reading.read(path)
    metadata = Metadata(entries)
    metadata.layout = layout
    tensors = {}
    for name, (info, stretch) in places.items():
        with naming(f"tensor {name!r}"):
            tensors[name] = ggml.decode(info.kind, info.shape, stretch)
    kinds = {name: info.kind for name, (info, _) in places.items()}
    return tensors, metadata, {n: kind for n, kind in kinds.items() if not ggml.is_exact(kind)}


def _check_part(metadata: Metadata, number: int, count: int) -> None:
    """That a file is the part that its name says, or a whole model."""
    said = metadata.get("split.count", 0), metadata.get("split.no", 0)
    if not all(isinstance(x, int | np.integer) for x in said):
        raise ValueError(f"split.count and split.no must be whole numbers, got {said!r:.60}.")
    if count == 1 and said[0] > 1:
        raise ValueError(
            f"split.count says that this is one of {said[0]} parts, and then its name must end in "
            f"-{said[1] + 1:05}-of-{said[0]:05}.gguf, with the others beside it."
        )
    if count > 1 and said != (count, number):
        raise ValueError(
            f"its name says that it is part {number + 1} of {count}, but split.count is {said[0]} "
            f"and split.no {said[1]}."
        )
