"""A model whose GGUF file llama.cpp has split in parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zoqo_jax.interop.gguf.layout import Layout

__all__: list[str] = []  # what gguf.py is made of


def check(metadata: Mapping[str, Any], number: int, count: int) -> None:
    """That a file is the part that its name says, or a whole model.

    Raises:
        ValueError: it is another part, or the only one of several.
    """
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


def joined(
    parts: Sequence[tuple[dict[str, Any], Layout]], count: int
) -> tuple[dict[str, Any], Layout]:
    """Metadata and layout of a whole model, of those of its parts, which have `count` tensors.

    Raises:
        ValueError: the first part says that there are more tensors, or fewer.
    """
    metadata, layout = parts[0]
    if len(parts) == 1:
        return metadata, layout
    expected = metadata.get("split.tensors.count", count)
    if expected != count:
        raise ValueError(f"the parts have {count} tensors instead of {expected}.")
    sources = {name: source for _, one in parts for name, source in one.sources.items()}
    metadata = {key: value for key, value in metadata.items() if not key.startswith("split.")}
    return metadata, Layout(layout.version, sources=sources)
