"""What a format of quantized tensors in safetensors files must say of itself.

A format is a module (or any object) with `name`, `settings`, `names`, `decode` and `encode`; the
registry is `formats.FORMATS`, and `folder` reads and writes files with it. A format sees NumPy
arrays and the folder's `config.json`, never a path.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from zoqo_jax.grids.arrays import QuantizedArray

__all__ = ["Format", "Stored"]


class Stored(NamedTuple):
    """What a file's header says of one stored tensor.

    Attributes:
        dtype: as safetensors spells it: "I32", "U8", "F16", "BF16", "F32", "F8_E4M3" and so on.
        shape: of the tensor as it is stored.

    Examples:
        >>> Stored("I32", (16, 64)).shape
        (16, 64)
    """

    dtype: str
    shape: tuple[int, ...]


@runtime_checkable
class Format(Protocol):
    """One way to store quantized tensors.

    The logical tensor of a matrix is (outputs, inputs), however it is stored. A file is read
    without trust: whatever does not fit raises a ValueError that names the tensor and what was
    found, before anything is allocated for it.

    Examples:
        >>> from zoqo_jax.interop.formats import gptq
        >>> isinstance(gptq, Format), gptq.name
        (True, 'gptq')
    """

    @property
    def name(self) -> str:
        """What the format is called in configs and errors, such as "gptq"."""
        ...

    def settings(self, config: Mapping[str, Any]) -> Any | None:
        """What a folder's `config.json` says of this format, checked.

        Args:
            config: the content of `config.json`; {} where there is none. Where the folder has a
                `quantize_config.json` or `quant_config.json` and no `quantization_config` in
                `config.json`, that file's content is put in the place of `quantization_config`.

        Returns:
            Anything that the other functions can use; None: the folder is not of this format.

        Raises:
            ValueError: the folder is of this format, with settings that are not read.
        """
        ...

    def names(self, stored: Mapping[str, Stored], settings: Any) -> dict[str, tuple[str, ...]]:
        """Which stored tensors each quantized tensor is made of.

        Args:
            stored: what headers say, by name, of all files of the folder.
            settings: as `settings` gives them.

        Returns:
            By the name of the quantized tensor, such as "model.layers.0.mlp.up_proj.weight", the
            names of all stored tensors that it needs. Stored tensors that no quantized tensor
            needs are kept as they are, under their own names.

        Raises:
            ValueError: a companion is missing, or has the wrong dtype or shape; it is named.
        """
        ...

    def decode(self, name: str, parts: Mapping[str, np.ndarray], settings: Any) -> QuantizedArray:
        """A quantized tensor from what is stored of it.

        Args:
            name: of the quantized tensor, a key of `names`.
            parts: the stored tensors, by their names in the file. They are read-only and lie in
                the file: copy what is kept. BF16 and 8-bit floats have `ml_dtypes`' dtypes.
            settings: as `settings` gives them.
        """
        ...

    def encode(
        self, name: str, array: QuantizedArray, parts: Mapping[str, np.ndarray], settings: Any
    ) -> dict[str, np.ndarray]:
        """The stored tensors that hold codes, with an array's codes in place of theirs.

        Args:
            name: of the quantized tensor.
            array: of the shape, grid and scales that `decode` gave; only its codes may be others.
            parts: what the file holds now, as for `decode`.
            settings: as `settings` gives them.

        Returns:
            By their names in the file, in the dtypes and shapes they have in `parts`. Bits that
            belong to no code, and codes that did not change, are as they were.

        Raises:
            ValueError: the array's shape, grid or scales are not those of `parts`.
        """
        ...
