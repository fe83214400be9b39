"""What of a model trains: a few of its arrays; all others are frozen."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import zoqo_jax as zq
from experiments.finetune.config import Config
from experiments.finetune.models import stacks
from experiments.finetune.models.loading import Checkpoint
from zoqo_jax.grids.arrays import is_trained
from zoqo_jax.grids.scales import float_part
from zoqo_jax.implicit.lora import is_factor

__all__ = ["Parts", "adapt"]


def adapt(checkpoint: Checkpoint, config: Config) -> Any:
    """A model's parameters, ready to be trained: all but what trains frozen.

    Raises:
      ValueError: there is nothing to train, or a target that the model does not have.
    """
    params = checkpoint.params
    for name in config.targets:
        if f"layers/{name}/weight" not in checkpoint.names:
            raise ValueError(f"targets: {config.model} has no {name!r}.")

    def is_chosen(path: tuple[Any, ...], leaf: Any) -> bool:
        return stacks.matrix_of("/".join(key.key for key in path)) in config.matrices

    if config.train == "scales" and checkpoint.path.is_dir():
        raise ValueError(f"train='scales' needs a GGUF file, got the folder {checkpoint.path}.")
    if config.train != "lora":
        params = zq.freeze(params, lambda path, leaf: not is_chosen(path, leaf))
        if not any(map(is_trained, jax.tree.leaves(params, is_leaf=zq.is_quantized))):
            raise ValueError(f"model: {config.model} has no codes in {', '.join(config.matrices)}.")
        if config.train == "scales":
            _check_scales(params)
        return params
    key = jax.random.fold_in(jax.random.key(config.seed), 1)
    grid = zq.companders.nf4() if config.grid == "nf4" else zq.companders.identity()
    quantizer = zq.Quantizer(config.bits, compander=grid, range=config.range)
    quantizer = None if config.moves_floats else quantizer
    settings = {"key": key, "where": is_chosen, "quantizer": quantizer}
    if config.core:
        return zq.lora(params, core=config.core, **settings)
    return zq.lora(params, config.rank, config.alpha, **settings)


def _check_scales(params: Any) -> None:
    """Refuse scales that a file holds in too few bits to be moved, before they are trained."""
    for leaf in jax.tree.leaves(params, is_leaf=zq.is_quantized):
        if is_trained(leaf) and float_part(leaf.scale).dtype != jnp.float16:
            raise ValueError(
                f"train='scales' needs scales in float16, but those of {leaf!r} are powers of two "
                "or 8-bit floats: train its codes."
            )


class Parts(NamedTuple):
    """How parameters fall into arrays that a run changes and the rest."""

    shape: Any  # of the whole tree
    changes: tuple[bool, ...]  # for each of its leaves

    @classmethod
    def of(cls, params: Any, config: Config) -> "Parts":
        """The parts of parameters that `adapt` made."""
        shape = jax.tree.structure(params)
        if config.moves_floats:
            return cls(shape, tuple(jax.tree.leaves(is_factor(params))))
        changes = []
        for leaf in jax.tree.leaves(params, is_leaf=zq.is_quantized):
            moved = None
            if is_trained(leaf):
                moved = float_part(leaf.scale) if config.train == "scales" else leaf.packed
            changes += [array is moved for array in jax.tree.leaves(leaf)]
        return cls(shape, tuple(changes))

    def split(self, params: Any) -> tuple[list[Any], list[Any]]:
        """The arrays that change, and the others."""
        leaves = list(zip(jax.tree.leaves(params), self.changes, strict=True))
        return [x for x, yes in leaves if yes], [x for x, yes in leaves if not yes]

    def join(self, trained: list[Any], rest: list[Any]) -> Any:
        """Parameters again, of what `split` gave."""
        some, others = iter(trained), iter(rest)
        leaves = [next(some) if yes else next(others) for yes in self.changes]
        return jax.tree.unflatten(self.shape, leaves)
