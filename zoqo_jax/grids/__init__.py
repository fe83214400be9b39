"""Codes and what they stand for: companders, quantizers, arrays, and steps to whole codes."""
