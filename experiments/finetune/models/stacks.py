"""Layers as stacks, also where not all of them hold a matrix in the same type.

A Q4_K_M file has values and down-projections in more bits in some layers. All layers are scanned
as one, so that a program has the size of one layer. What is alike in all of them is one stack, in
`params["layers"]` as one layer's would be; of a matrix of several types each type is a stack of the
layers that have it, `params["types"]["down"]["0"]`, of which the scan takes a layer's in its turn.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "Types",
    "arranged",
    "is_of_layers",
    "kind_of",
    "matrix_of",
    "part",
    "place_of",
    "stack",
    "unstack",
]

Types = tuple[tuple[str, tuple[int, ...]], ...]
"""Of each matrix of several types its name, and the number of every layer's type."""


def arranged(
    names: Sequence[str], span: range, get: Callable[[str, int], Any]
) -> tuple[dict[str, Any], Types]:
    """The parameters of layers, stacked, and the matrices of several types among them.

    Args:
      names: '/'-joined places of a layer's parameters, e.g. "q/weight".
      span: numbers of the layers.
      get: gives a parameter by its name and the layer's number.

    Returns:
      What "layers" and "types" are in a decoder's parameters, the latter only where there are such.

    Raises:
      ValueError: layers differ in what is no matrix.

    Example:
      >>> bits = lambda name, layer: jnp.zeros(2, jnp.int8 if layer == 1 else jnp.int16)
      >>> params, types = arranged(["q/weight"], range(3), bits)
      >>> params["types"]["q"]["0"].shape, types
      ((2, 2), (('q', (0, 1, 0)),))
    """
    params: dict[str, Any] = {"layers": {}}
    types = []
    for name in names:
        leaves = [get(name, layer) for layer in span]
        seen: dict[Hashable, int] = {}
        kinds = tuple(seen.setdefault(kind_of(leaf), len(seen)) for leaf in leaves)
        of_kind = [
            [x for x, its in zip(leaves, kinds, strict=True) if its == i] for i in range(len(seen))
        ]
        stacks = list(map(stack, of_kind))
        module, _, last = name.rpartition("/")
        if len(stacks) > 1 and last != "weight":
            raise ValueError(f"layers must be alike, but {name} has another shape in some.")
        _put(params, module, last, stacks)
        types += [(module, kinds)] if len(stacks) > 1 else []
    return params, tuple(types)


def part(
    params: dict[str, Any], span: range, types: Types, wanted: range
) -> tuple[dict[str, Any], Types]:
    """What `arranged` gave, of some of the layers.

    Example:
      >>> bits = lambda name, layer: jnp.zeros(2, jnp.int8 if layer == 1 else jnp.int16)
      >>> params, types = arranged(["q/weight"], range(3), bits)
      >>> some, types = part(params, range(3), types, range(2, 3))
      >>> some["layers"]["q"]["weight"].shape, types
      ((1, 2), ())
    """
    within = slice(wanted.start - span.start, wanted.stop - span.start)
    some: dict[str, Any] = {"layers": _slices(params["layers"], within)}
    left = []
    for module, kinds in types:
        stacks = []
        for kind in dict.fromkeys(kinds[within]):
            first = kinds[: within.start].count(kind)
            its = slice(first, first + kinds[within].count(kind))
            stacks.append(_slices(params["types"][module][str(kind)], its))
        _put(some, module, "weight", stacks)
        if len(stacks) > 1:
            numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds[within]))}
            left.append((module, tuple(numbers[kind] for kind in kinds[within])))
    return some, tuple(left)


def _put(params: dict[str, Any], module: str, last: str, stacks: list[Any]) -> None:
    """Where stacks belong: one by itself, or one for each type."""
    if len(stacks) > 1:
        by_type = {str(kind): stack for kind, stack in enumerate(stacks)}
        params.setdefault("types", {})[module] = by_type
    else:
        params["layers"].setdefault(module, {})[last] = stacks[0]


def _slices(tree: Any, some: slice) -> Any:
    # By NumPy, as in `stack`.
    return jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[some]), tree)


def place_of(path: str, span: range, types: Types) -> tuple[str, list[int]]:
    """What a leaf of layers is of each of them, and the numbers of those that it holds.

    Args:
      path: '/'-joined keys of the leaf in a decoder's parameters.
      span: numbers of the layers.
      types: as `arranged` gave.

    Example:
      >>> place_of("types/q/0", range(3, 6), (("q", (0, 1, 0)),))
      ('q/weight', [3, 5])
      >>> place_of("layers/k/weight", range(3, 6), (("q", (0, 1, 0)),))
      ('k/weight', [3, 4, 5])
    """
    where, rest = path.split("/", 1)
    if where == "layers":
        return rest, list(span)
    module, kind = rest.split("/")
    kinds = zip(span, dict(types)[module], strict=True)
    return f"{module}/weight", [number for number, its in kinds if its == int(kind)]


def is_of_layers(name: str) -> bool:
    """Whether what has this name in a decoder's parameters is of its layers."""
    return name in ("layers", "types")


def matrix_of(path: str) -> str | None:
    """Which matrix of layers a leaf holds, or None for what is none.

    Args:
      path: '/'-joined keys of the leaf in a decoder's parameters.

    Example:
      >>> [matrix_of(path) for path in ("layers/k/weight", "types/q/0", "layers/k/bias", "norm")]
      ['k', 'q', None, None]
    """
    where, *rest = path.split("/")
    if where == "types" or (where == "layers" and rest[-1] == "weight"):
        return rest[0]
    return None


def kind_of(leaf: Any) -> Hashable:
    """What must be the same in arrays that are stacked: types, grids, shapes and dtypes.

    Example:
      >>> [kind_of(x) == kind_of(jnp.ones(3)) for x in (jnp.zeros(3), jnp.ones(2))]
      [True, False]
    """
    leaves, structure = jax.tree.flatten(leaf)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def stack(leaves: list[Any]) -> Any:
    """Arrays of one kind on a new first axis.

    Example:
      >>> stack([jnp.zeros(2), jnp.ones(2)]).tolist()
      [[0.0, 0.0], [1.0, 1.0]]
    """
    # By NumPy: XLA would compile a program for each shape, longer than a file takes to read.
    return jax.tree.map(lambda *parts: jnp.asarray(np.stack(parts)), *leaves)


def unstack(leaf: Any) -> list[Any]:
    """What `stack` stacked.

    Example:
      >>> [one.tolist() for one in unstack(jnp.eye(2))]
      [[1.0, 0.0], [0.0, 1.0]]
    """
    return [jax.tree.map(lambda x, i=i: x[i], leaf) for i in range(leaf.shape[0])]
