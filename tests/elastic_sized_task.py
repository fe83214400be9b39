"""The task of `elastic_task` by steps that size themselves."""

from elastic_task import KEY, batch, params, value_fn

import zoqo_jax as zq

__all__ = ["batch", "params", "tx", "value_fn"]

tx = zq.zoqo(key=KEY, num_queries=3)
