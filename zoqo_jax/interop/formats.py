"""The formats of quantized tensors that `folder` reads and writes, in the order they are asked."""

from __future__ import annotations

from zoqo_jax.interop import awq, gptq
from zoqo_jax.interop.protocol import Format

__all__ = ["FORMATS"]

FORMATS: tuple[Format, ...] = (gptq, awq)
