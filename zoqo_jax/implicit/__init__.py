"""A model run as it is on weights in codes: what stands for one, and what JAX makes of it."""
