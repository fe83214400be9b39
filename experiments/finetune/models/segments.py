"""Layers as few stacks that are scanned, where not all layers hold the same types.

A Q4_K_M file has some matrices in more bits in the first and last eighth of its layers and in every
third between. Such layers are cut into segments, each some repeats of a short period of layers: a
program then has the size of the periods' sum, 6 layers instead of 18 for Gemma 3 270M, whose kinds
of layers are AA BBA BBA BBA BBA B AAA. A model whose layers are all alike is one stack, and its
parameters lie in `params["layers"]` as one layer's would; those of segments in
`params["layers"][segment][place in the period]`, both numbers as strings.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Segment", "arranged", "cut", "is_plain", "kind_of", "place_of", "stack", "unstack"]

_LONGEST = 16  # layers of a period


class Segment(NamedTuple):
    """Layers that are scanned as one stack for each layer of a period.

    Attributes:
      begin: number of the first layer.
      period: layers of a repeat.
      repeats: how many there are.

    Example:
      >>> list(Segment(2, 3, 4).numbers(1))  # the second layers of the period
      [3, 6, 9, 12]
    """

    begin: int
    period: int
    repeats: int

    @property
    def end(self) -> int:
        """The number after the last layer's."""
        return self.begin + self.period * self.repeats

    def numbers(self, place: int) -> range:
        """Numbers of the layers at a place of the period."""
        return range(self.begin + place, self.end, self.period)


def cut(kinds: Sequence[Hashable], begin: int = 0) -> tuple[Segment, ...]:
    """Segments whose periods have the least sum, and of those the fewest.

    Args:
      kinds: what tells layers apart, one for each.
      begin: number of the first.

    Example:
      >>> cut("AABBABBABBABBABAAA")
      (Segment(begin=0, period=1, repeats=2), Segment(begin=2, period=3, repeats=4),
      Segment(begin=14, period=1, repeats=1), Segment(begin=15, period=1, repeats=3))
    """
    seen: dict[Hashable, int] = {}
    kinds = [seen.setdefault(kind, len(seen)) for kind in kinds]  # which compare fast
    count = len(kinds)
    if len(seen) == 1:
        return (Segment(begin, 1, count),)
    # Of the layers from each one on: the sum, how many segments, and of the first, which is as
    # long as these allow, minus the number after its last layer, and its period.
    best: list[tuple[int, int, int, int]] = [(0, 0, 0, 0)] * (count + 1)
    for i in reversed(range(count)):
        found = []
        for period in range(1, min(_LONGEST, count - i) + 1):
            end, repeated = i + period, kinds[i : i + period]
            found.append((period + best[end][0], 1 + best[end][1], -end, period))
            while kinds[end : end + period] == repeated:
                end += period
                found.append((period + best[end][0], 1 + best[end][1], -end, period))
        best[i] = min(found)
    segments, i = [], 0
    while i < count:
        end, period = -best[i][2], best[i][3]
        segments.append(Segment(begin + i, period, (end - i) // period))
        i = end
    return tuple(segments)


def is_plain(segments: Sequence[Segment]) -> bool:
    """Whether all layers are one stack.

    Example:
      >>> is_plain(cut("AAA")), is_plain(cut("AB"))
      (True, False)
    """
    return len(segments) == 1 and segments[0].period == 1


def arranged(
    segments: Sequence[Segment], names: Sequence[str], get: Callable[[str, int], Any]
) -> dict[str, Any]:
    """The tree of parameters of layers, stacked.

    Args:
      segments: how the layers are cut.
      names: '/'-joined places of a layer's parameters, e.g. "q/weight".
      get: gives a parameter by its name and the layer's number.

    Example:
      >>> tree = arranged(cut("AAB"), ["norm/scale"], lambda name, layer: jnp.full(2, layer))
      >>> tree["0"]["0"]["norm"]["scale"].tolist(), tree["1"]["0"]["norm"]["scale"].shape
      ([[0, 0], [1, 1]], (1, 2))
    """
    tree: dict[str, Any] = {}
    for name in names:
        *folders, last = name.split("/")
        for number, segment in enumerate(segments):
            for place in range(segment.period):
                leaf = stack([get(name, layer) for layer in segment.numbers(place)])
                where = [] if is_plain(segments) else [str(number), str(place)]
                folder = tree
                for step in [*where, *folders]:
                    folder = folder.setdefault(step, {})
                folder[last] = leaf
    return tree


def place_of(path: str, segments: Sequence[Segment]) -> tuple[str, range]:
    """What a leaf of `params["layers"]` is of each layer, and the numbers of its layers.

    Example:
      >>> place_of("1/0/q/weight", cut("AAB"))
      ('q/weight', range(2, 3))
    """
    if is_plain(segments):
        return path, segments[0].numbers(0)
    segment, place, name = path.split("/", 2)
    return name, segments[int(segment)].numbers(int(place))


def kind_of(layer: Mapping[str, Any]) -> Hashable:
    """What must be the same in layers that are stacked: types, grids, shapes and dtypes.

    Example:
      >>> one, other = {"q": jnp.ones((2, 3))}, {"q": jnp.ones((3, 2))}
      >>> kind_of(one) == kind_of(one), kind_of(one) == kind_of(other)
      (True, False)
    """
    leaves, structure = jax.tree.flatten(dict(layer))
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)


def stack(leaves: list[Any]) -> Any:
    """Arrays of one shape and grid on a new first axis.

    Raises:
      ValueError: they differ.

    Example:
      >>> stack([jnp.zeros(2), jnp.ones(2)]).tolist()
      [[0.0, 0.0], [1.0, 1.0]]
    """
    kinds = [kind_of({"": leaf}) for leaf in leaves]
    if any(kind != kinds[0] for kind in kinds):
        raise ValueError(
            "layers must be alike to be stacked, but a tensor has another type or shape in some: "
            f"{leaves[0]!r:.80}."
        )
    # By NumPy: XLA would compile a program for each shape, longer than a file takes to read.
    return jax.tree.map(lambda *parts: jnp.asarray(np.stack(parts)), *leaves)


def unstack(leaf: Any) -> list[Any]:
    """What `stack` stacked.

    Example:
      >>> [one.tolist() for one in unstack(jnp.eye(2))]
      [[1.0, 0.0], [0.0, 1.0]]
    """
    return [jax.tree.map(lambda x, i=i: x[i], leaf) for i in range(leaf.shape[0])]
