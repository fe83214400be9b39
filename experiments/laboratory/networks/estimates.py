"""What estimates by comparisons tell of a gradient: means over directions, beside the theory's.

An estimate is sign(l+ - l-) sign(u), that of ZOQO (Bar & Giryes, 2025, arXiv:2501.06736).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoqo_jax as zq
from experiments.laboratory.networks.models import Params
from experiments.laboratory.networks.tasks import Examples
from experiments.laboratory.networks.training import cross_entropy
from zoqo_jax.directions import Distribution, Structure
from zoqo_jax.grids.arrays import trained_leaves

__all__ = ["linear_gain", "means", "statistics"]


@functools.partial(jax.jit, static_argnames=("logits", "law", "structure", "density"))
def means(
    logits: Any,
    params: Params,
    batch: Examples,
    keys: jax.Array,
    radius: jax.Array,
    *,
    law: Distribution,
    structure: Structure,
    density: float,
) -> dict[str, jax.Array]:
    """The true gradient, and means over directions.

    Args:
      logits: of the network.
      params: quantized.
      batch: that losses and the gradient are taken of.
      keys: of the directions, (rounds, how many are evaluated at once).
      radius: reach of a direction, codes.
      law: of its entries.
      structure: of it.
      density: share of the codes that a sparse one has.

    Returns:
      "g", the gradient in values; the "mean" estimate, its mean "square", and its "agreement", the
      share of the signs told that are right, each weighing |g|.
    """
    loss = functools.partial(cross_entropy, logits, batch=batch)
    g = _flat(jax.grad(loss)(zq.dequantize(params)))
    arrays = list(trained_leaves(params).values())
    options = {"distribution": law, "structure": structure, "density": density}

    def estimate(key: jax.Array) -> jax.Array:
        probes = [
            zq.directions.describe(jax.random.fold_in(key, i), array, radius, **options)
            for i, array in enumerate(arrays)
        ]
        plus, minus = zq.queries.losses(loss, params, probes, together=keys.shape[1])
        u = _flat([pair[0].draw(pair[1]) for pair in zip(probes, arrays, strict=True)])
        return jnp.sign(plus - minus) * jnp.sign(u).astype(jnp.float32)

    def agreement(estimated: jax.Array) -> jax.Array:
        weight = jnp.where(estimated != 0, jnp.abs(g), 0.0).sum()
        return 0.5 + 0.5 * (estimated @ g) / jnp.maximum(weight, 1e-30)

    def add(total: Any, keys: jax.Array) -> tuple[Any, None]:
        estimated = jax.vmap(estimate)(keys)
        agreed = jax.vmap(agreement)(estimated)
        more = estimated.sum(0), (estimated**2).sum(), agreed.sum()
        return jax.tree.map(jnp.add, total, more), None

    zeros = jnp.zeros_like(g), jnp.zeros(()), jnp.zeros(())
    (total, squares, agreed), _ = jax.lax.scan(add, zeros, keys)
    return {
        "g": g,
        "mean": total / keys.size,
        "square": squares / keys.size / g.size,
        "agreement": agreed / keys.size,
    }


def statistics(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, Any]:
    """What two independent halves tell.

    The mean estimate's squared length is taken as the product of the halves' means, to which the
    noise of neither adds; where noise makes it negative, cosines are None.
    """
    g, d = one["g"].astype(np.float64), one["g"].size
    mean = (one["mean"] + other["mean"]) / 2.0
    squared = float(one["mean"].astype(np.float64) @ other["mean"])
    gain = float(mean @ g / np.linalg.norm(g))
    of_signs = float(mean @ np.sign(g) / np.sqrt((g != 0).sum()))
    length = np.sqrt(squared) if squared > 0 else None
    return {
        "agreement": float(one["agreement"] + other["agreement"]) / 2,
        "gain": gain,
        "cosine": length and gain / length,
        "cosine_of_signs": length and of_signs / length,
        "variance": float(one["square"] + other["square"]) / 2 - squared / d,
    }


def linear_gain(law: str, reach: int, density: float = 1.0) -> float:
    """E[estimate . g] / |g| where the loss is linear and entries are many and independent.

    Then l+ - l- is Gaussian beside any one entry u, of which sign(l+ - l-) knows
    sqrt(2 / pi) g u / sqrt(E[u^2]) / |g|.

    Args:
      law: of an entry.
      reach: m, codes; the Gaussian law's deviation, too.
      density: the share of entries that are drawn; the others are zero.
    """
    k = np.arange(-reach, reach + 1)
    chances = {
        "uniform": np.ones(k.size),
        "gaussian": np.exp(-(k**2) / (2 * reach**2)),
        "rademacher": np.abs(k) == reach,
    }[law] * 1.0
    chances *= density / chances.sum()
    return float(np.sqrt(2 / np.pi) * chances @ np.abs(k) / np.sqrt(chances @ k**2))


def _flat(leaves: Any) -> jax.Array:
    return jnp.concatenate([leaf.ravel() for leaf in leaves])
