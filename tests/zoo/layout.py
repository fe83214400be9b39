"""Which weights a loss could compute with implicitly: an answer that does not ask the library.

A weight counts where a matrix product, a convolution or a look-up takes it as it is, or after
operations that only rearrange it, cut it or change its dtype, and where nothing else takes it. One
that is divided by its norm, say, or has a prior, is an array of floats in any implementation.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend import core

__all__ = ["multiplied"]

_PRODUCTS = {"dot_general", "conv_general_dilated", "ragged_dot", "ragged_dot_general", "gather"}
_LAYOUT = {
    "broadcast_in_dim", "concatenate", "convert_element_type", "copy", "dynamic_slice",
    "expand_dims", "optimization_barrier", "reshape", "rev", "slice", "split", "squeeze",
    "stop_gradient", "transpose", "sharding_constraint", "pvary",
}  # fmt: skip

Leaves = frozenset[int]


def multiplied(fn: Callable[[list[Any]], Any], leaves: Sequence[Any]) -> set[int]:
    """Indices of the leaves that only products, convolutions or look-ups of `fn(leaves)` take."""
    closed = jax.make_jaxpr(fn)(list(leaves))
    found: set[int] = set()
    others: set[int] = set()
    _walk(closed.jaxpr, [frozenset([i]) for i in range(len(leaves))], found, others)
    return found - others


def _walk(jaxpr: Any, inputs: Sequence[Leaves], found: set[int], others: set[int]) -> list[Leaves]:
    """Follow leaves through a program; what its outputs are rearrangements of."""
    none: Leaves = frozenset()
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def of(atom: Any) -> Leaves:
        return none if isinstance(atom, core.Literal) else known.get(atom, none)

    for equation in jaxpr.eqns:
        name, sources = equation.primitive.name, [of(atom) for atom in equation.invars]
        if not any(sources):
            continue
        outputs = [none] * len(equation.outvars)
        bodies = list(_bodies(equation, sources))
        if name in _PRODUCTS:
            found |= sources[0] if name == "gather" else frozenset().union(*sources[:2])
        elif name in _LAYOUT:
            same = len(sources) == len(outputs)
            outputs = sources if same else [frozenset().union(*sources)] * len(outputs)
        elif not bodies:
            others |= frozenset().union(*sources)
        for body, its_inputs in bodies:
            made = _walk(body, its_inputs, found, others)
            if len(made) == len(outputs):
                outputs = [a | b for a, b in zip(outputs, made, strict=True)]
        known.update(zip(equation.outvars, outputs, strict=True))
    return [of(atom) for atom in jaxpr.outvars]


def _bodies(equation: Any, sources: Sequence[Leaves]) -> Iterator[tuple[Any, Sequence[Leaves]]]:
    """The programs inside an operation, and what goes into each."""
    params, name = equation.params, equation.primitive.name
    if name == "while":
        tests, runs = params["cond_nconsts"], params["body_nconsts"]
        carried = sources[tests + runs :]
        yield params["cond_jaxpr"].jaxpr, [*sources[:tests], *carried]
        yield params["body_jaxpr"].jaxpr, [*sources[tests : tests + runs], *carried]
        return
    if name == "cond":
        for branch in params["branches"]:
            yield branch.jaxpr, sources[1:]
        return
    for value in params.values():
        body = value.jaxpr if isinstance(value, core.ClosedJaxpr) else value
        if isinstance(body, core.Jaxpr) and len(body.invars) == len(sources):
            yield body, sources
