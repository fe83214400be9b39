"""Programs of a model without what they were made from.

`jax.jit` keeps the trace of a function as long as the function itself, some 100 MiB of Python
objects for each length of a batch where a quantized decoder takes a step: more than the model. And
functions that live as long as the process, such as those that the library compiles once for all
calls, keep theirs in JAX's caches: of a file of several types 260 MiB for each length.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax

from experiments import footprint

__all__ = ["programs"]


def programs(fn: Callable[..., Any], donate: Sequence[int] = ()) -> Callable[..., Any]:
    """A function compiled once for each structure, shapes and dtypes of its arguments.

    Args:
      fn: of pytrees of arrays.
      donate: numbers of the arguments whose memory the results may take.

    Example:
      >>> import jax.numpy as jnp
      >>> double = programs(lambda x: 2 * x)
      >>> double(jnp.ones(2)).tolist(), double(jnp.ones(3)).tolist()
      ([2.0, 2.0], [2.0, 2.0, 2.0])
    """
    compiled: dict[Hashable, Callable[..., Any]] = {}

    def call(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        kind = tree, tuple((x.shape, x.dtype) for x in leaves)
        if kind not in compiled:
            # A function of its own, so that its trace goes when it does.
            once = jax.jit(lambda *args: fn(*args), donate_argnums=tuple(donate))
            compiled[kind] = once.lower(*args).compile()
            del once
            footprint.forget_traces()
        return compiled[kind](*args)

    return call
