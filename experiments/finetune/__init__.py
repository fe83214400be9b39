"""Fine-tuning quantized language models with forward passes only."""
