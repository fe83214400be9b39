"""The formats of quantized tensors that `folder` reads and writes, in the order they are asked.

`nf4` (bitsandbytes) comes last: it takes folders whose config says nothing of a quantization, too.
"""

from __future__ import annotations

from zoqo_jax.interop.formats import awq, compressed_tensors, gptq, mlx, mxfp4, nf4
from zoqo_jax.interop.formats.protocol import Format

__all__ = ["FORMATS"]

FORMATS: tuple[Format, ...] = (gptq, awq, compressed_tensors, mxfp4, mlx, nf4)
"""Modules that are a `protocol.Format` each; a config is shown to one after another."""
