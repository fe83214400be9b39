"""`explain`: what becomes of each quantized leaf inside an objective, and what that costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from zoqo_jax import directions
from zoqo_jax.grids.arrays import is_quantized, is_trained, trained_leaves
from zoqo_jax.implicit.arrays import PerturbedArray, Use, watch
from zoqo_jax.implicit.rules import quaxify
from zoqo_jax.transforms import queries

__all__ = ["Explanation", "explain"]

_MEANING = {
    "low_rank": "one decoded matrix and one product for all sides and queries",
    "mean_difference": "two decoded matrices and two products for all sides and queries",
    "integer": "codes as int8 times rounded vectors, for each side; sums are int32",
    "dequantize": "a decoded matrix and a product for each side, one after the other",
    "take_rows": "decodes the rows it looks up",
    "materialize": "has no rule here: gets an array of floats for each side",
}
_MATRICES = {"low_rank": 1, "mean_difference": 2, "integer": 1, "dequantize": 1, "take_rows": 0}


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What an objective does with its quantized leaves; print it for a table.

    Attributes:
        uses: every use of every leaf, in the order of the objective; one line for a scanned stack.
        unused: leaves that the objective never reads.
        population: displacements evaluated together.
        itemsize: bytes of a decoded value.

    Examples:
        >>> import jax.numpy as jnp, zoqo_jax as zq
        >>> params = zq.quantize({"w": jnp.ones((4, 2)), "v": jnp.ones((2, 2))}, zq.Quantizer(8))
        >>> found = explain(lambda params: jnp.sum(jnp.ones((3, 4)) @ params["w"]), params)
        >>> found.is_fused, found.unused, found.decoded_bytes(found.uses[0])
        (True, ("['v']",), 32)
    """

    uses: tuple[Use, ...]
    unused: tuple[str, ...]
    population: int
    itemsize: int

    @property
    def is_fused(self) -> bool:
        """Whether no operation needs a leaf as an array of floats for each side."""
        return all(use.plan.algorithms != ("materialize",) for use in self.uses)

    def decoded_bytes(self, use: Use) -> int:
        """Bytes of decoded floats, or of codes as int8, that a use has in memory at once."""
        plan = use.plan
        matrices = _MATRICES.get(plan.algorithms[0], self.population)
        size = math.prod(use.shape) // (plan.chunks * plan.parts)
        itemsize = 1 if plan.algorithms[-1] == "integer" else self.itemsize
        return 0 if plan.kernel else matrices * size * itemsize

    def multiplications(self, use: Use) -> int:
        """Multiplications of a product, for all displacements evaluated together."""
        products = {"mean_difference": 2}.get(use.plan.algorithms[0], 1 if use.vectors else 0)
        return products * math.prod(use.shape) * use.vectors * self.population

    def __str__(self) -> str:
        header = ("leaf", "shape", "operation", "plan", "decoded", "multiplications")
        lines = [
            (
                use.label,
                "x".join(map(str, use.shape)),
                use.operation,
                str(use.plan),
                f"{self.decoded_bytes(use) / 1e6:.2f} MB",
                f"{self.multiplications(use):.1e}" if use.vectors else "",
            )
            for use in self.uses
        ]
        widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
        rows = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in (header, *lines)
        ]
        rows.append("")
        algorithms = dict.fromkeys(name for use in self.uses for name in use.plan.algorithms)
        rows += [f"{name}: {_MEANING[name]}" for name in algorithms if name in _MEANING]
        rows += [f"unused: {label}" for label in self.unused]
        return "\n".join(rows)


def explain(
    value_fn: Callable[[Any], Any],
    params: PyTree,
    *,
    structure: directions.Structure = "rank_one",
    noise: directions.Distribution = "rademacher",
    query_batch: int = 1,
) -> Explanation:
    """Tell which quantized leaves an objective keeps implicit, which not, and what each costs.

    The objective is traced, not run.

    Args:
        value_fn: `value_fn(params) -> scalar`.
        params: tree with quantized leaves; of frozen ones products and look-ups are told.
        structure: that of the directions, as for `zoqo` and `caq_zo`.
        noise: distribution of their entries.
        query_batch: query pairs evaluated at once.

    Raises:
        ValueError: an unknown structure or noise, a `query_batch` below one, no quantized leaf, or
            an objective that returns no scalar.

    Examples:
        >>> import jax.numpy as jnp, zoqo_jax as zq
        >>> params = zq.quantize({"w": jnp.ones((4, 2)), "v": jnp.ones((2, 2))}, zq.Quantizer(8))
        >>> loss = lambda p: jnp.sum(jnp.ones((3, 4)) @ p["w"]) + jnp.sort(p["v"]).sum()
        >>> print(zq.explain(loss, params))
        leaf    shape  operation    plan                   decoded  multiplications
        ['w']   4x2    dot_general  low_rank / dequantize  0.00 MB  4.8e+01
        ['v']   2x2    sort         materialize            0.00 MB
        <BLANKLINE>
        low_rank: one decoded matrix and one product for all sides and queries
        dequantize: a decoded matrix and a product for each side, one after the other
        materialize: has no rule here: gets an array of floats for each side
    """
    directions.check(noise, structure, "clamp", 1.0)
    if query_batch < 1:
        raise ValueError(f"query_batch must be at least 1, got {query_batch}.")
    leaves = trained_leaves(params)

    def displaced(path: Any, leaf: Any) -> Any:
        if not is_quantized(leaf):
            return leaf
        leaf = dataclasses.replace(leaf, label=jax.tree_util.keystr(path))
        if not is_trained(leaf):
            return leaf
        choices = {"distribution": noise, "structure": structure}
        direction = directions.describe(jax.random.key(0), leaf, 1.0, **choices)
        return PerturbedArray(leaf, direction, 2 * query_batch)

    def loss() -> Any:
        tree = jax.tree_util.tree_map_with_path(displaced, params, is_leaf=is_quantized)
        return queries.scalar(quaxify(value_fn)(tree))

    uses: dict[Use, None] = {}
    with watch(lambda use: uses.setdefault(use)):
        jax.eval_shape(loss)
    used = {use.label for use in uses}
    return Explanation(
        uses=tuple(uses),
        unused=tuple(label for label in leaves if label not in used),
        population=2 * query_batch,
        itemsize=max(leaf.value_dtype.itemsize for leaf in leaves.values()),
    )
