"""The table of losses: each a name, a function of a few weights, and what is to be said of it.

A function names the weights that it takes, those of `WEIGHTS`, or gets a tree of its own. What it
returns need not be a scalar: the loss is then a weighted sum of all that it returned, so that no
two entries can change places unnoticed.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoqo_jax as zq


@functools.cache
def _normal(shape, seed):
    return np.random.default_rng((*shape, seed)).normal(size=shape).astype(np.float32)


def x(*shape, seed=0, dtype=jnp.float32):
    """Data: floats of a shape, the same every time."""
    return jnp.asarray(_normal(shape, 100 + seed)).astype(dtype)


def tree_of(shapes, dtype=jnp.float32):
    """A tree of weights from a tree of shapes."""
    leaves, treedef = jax.tree.flatten(shapes, is_leaf=lambda node: isinstance(node, tuple))
    arrays = [_normal(shape, i) for i, shape in enumerate(leaves)]
    return jax.tree.unflatten(treedef, [jnp.asarray(array, dtype) for array in arrays])


# What most losses are made of: two codes of four bits share a byte where the last axis is even.
SHAPES = {
    "a": (4, 6),
    "b": (6, 4),
    "e": (7, 5),
    "q": (4, 4),
    "s": (3, 4, 4),  # a stack of layers
    "r": (2, 3, 4, 4),  # a stack of stacks
    "k": (3, 3, 2, 4),  # a kernel, HWIO
    "g": (6, 24),  # four gates
    "v": (6,),
    "u": (4,),
    "t": (),
    "h": (4, 6),  # in bfloat16
    "f": (4, 6),  # in float16
}
DTYPES = {"h": jnp.bfloat16, "f": jnp.float16}


@functools.cache
def weight(name):
    array = _normal(SHAPES[name], 1 + sorted(SHAPES).index(name))
    return jnp.asarray(array).astype(DTYPES.get(name, jnp.float32))


@dataclasses.dataclass(frozen=True)
class Loss:
    """A loss and what is to be said of it.

    Attributes:
        name: what it is called in the table.
        fn: the loss, `fn(params) -> scalar`.
        params: makes its tree of floats.
        where: which floating leaves are weights, by their path.
        rtol: how far it may be off, beside the same number absolutely.
        is_flat: the two sides of a query may well have the same loss.
        is_fused: every use keeps its leaf implicit.
        is_slow: it takes seconds, or is a rarer case of what another loss checks.
    """

    name: str
    fn: Callable[[Any], Any]
    params: Callable[[], Any]
    where: Callable[[str], bool]
    rtol: float
    is_flat: bool
    is_fused: bool
    is_slow: bool

    def quantized(self):
        """The tree with its weights quantized, to 8 and to 4 bits by turns."""
        turn = len(self.name)  # so that either of two weights is the one of 4 bits
        quantizers = (zq.Quantizer(8), zq.Quantizer(4, block=4))

        def one(path, leaf):
            nonlocal turn
            is_floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
            if not is_floating or not self.where(jax.tree_util.keystr(path)):
                return leaf
            turn += 1
            return quantizers[turn % 2](leaf)

        return jax.tree_util.tree_map_with_path(one, self.params())


TABLE: dict[str, Loss] = {}


def kind(of):
    """A function that puts losses of a kind into the table, called plainly or as a decorator."""

    def put(
        name, fn=None, *, params=None, where=None, rtol=3e-5, flat=False, fused=False, slow=False
    ):
        if fn is None:
            more = {"where": where, "rtol": rtol, "flat": flat, "fused": fused, "slow": slow}
            return lambda fn: put(name, fn, params=params, **more)
        full = f"{of}: {name}"
        assert full not in TABLE, full
        loss, make = _scalar(fn), params
        if make is None:
            of_fn = inspect.signature(fn).parameters.values()
            names = tuple(p.name for p in of_fn if p.default is p.empty)
            loss = _scalar(lambda tree: fn(**tree))

            def make():
                return {name: weight(name) for name in names}

        TABLE[full] = Loss(full, loss, make, where or (lambda _: True), rtol, flat, fused, slow)
        return fn

    return put


def _scalar(fn):
    """A loss from a function of weights, unless it is one."""

    @functools.wraps(fn)
    def loss(tree):
        out = fn(tree)
        is_tree = isinstance(out, dict | list | tuple)
        if not is_tree and jnp.ndim(out) == 0 and jnp.issubdtype(out.dtype, jnp.floating):
            return out
        return sum(_weighted(leaf) for leaf in jax.tree.leaves(out))

    return loss


def _weighted(leaf):
    leaf = jnp.asarray(leaf)
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        return _weighted(leaf.real) + _weighted(leaf.imag)
    weights = np.cos(np.arange(leaf.size, dtype=np.float32)).reshape(leaf.shape)
    return jnp.sum(leaf.astype(jnp.float32) * weights)
