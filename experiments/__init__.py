"""Experiments that use `zoqo_jax`: black-box attacks, fine-tuning, and laboratory measurements."""
