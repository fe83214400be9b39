"""Implicit arrays: what stands in for a weight while an unmodified model computes with it.

A `QuantizedArray` (see `arrays.py`) is one; here are the others: `PerturbedArray`, displaced along
a direction; `TransposedArray`, either of them with its axes in another order; and `DerivedArray`,
what operations would make of any of them, if they were not put off until a product. None holds
values.
`interpreter.py` runs a model on them, `rules.py` says what JAX operations make of them,
`products.py` how they are multiplied.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import quax
from jax.core import ShapedArray
from jaxtyping import Array, Bool, Float, Int16, PyTree

from zoqo_jax.directions import Direction
from zoqo_jax.grids.arrays import QuantizedArray

__all__ = [
    "DerivedArray",
    "Implicit",
    "Node",
    "PerturbedArray",
    "Plan",
    "TransposedArray",
    "Use",
    "bind",
    "by_row",
    "is_implicit",
    "perturbed",
    "silent",
    "sum_over_rows",
    "take_rows",
    "use",
    "watch",
]


class Plan(NamedTuple):
    """How an operation gets what it needs of an implicit array.

    Attributes:
        algorithms: of a product, the first one first and then those that it may hand on to (see
            `Direction.algorithms`), "dequantize" or "integer" last; else ("take_rows",), where only
            looked-up rows are decoded, or ("materialize",), where an operation without a rule gets
            floats.
        chunks: a table of many rows is decoded and multiplied in so many chunks.
        parts: codes that share bytes are multiplied in so many parts, never joined.
        kernel: whether a GPU kernel decodes and multiplies at once.
        note: what else a reader should know.
    """

    algorithms: tuple[str, ...]
    chunks: int = 1
    parts: int = 1
    kernel: bool = False
    note: str = ""

    def __str__(self) -> str:
        chunks = f", {self.chunks} chunks" if self.chunks > 1 else ""
        parts = f", {self.parts} parts" if self.parts > 1 else ""
        note = f" ({self.note})" if self.note else ""
        return " / ".join(self.algorithms) + chunks + parts + ", kernel" * self.kernel + note


class Use(NamedTuple):
    """What an operation made of an implicit array.

    Attributes:
        label: the array's.
        operation: name of the JAX primitive.
        plan: how it gets what it needs.
        shape: of the array as the operation saw it, one layer of a scanned stack.
        vectors: how many vectors a product multiplies for one displacement, else 0.
        is_displaced: whether the array is displaced, rather than frozen.
    """

    label: str
    operation: str
    plan: Plan
    shape: tuple[int, ...]
    vectors: int
    is_displaced: bool


_watchers: list[Callable[[Use], None]] = []


def is_implicit(x: Any) -> bool:
    """Whether something is an implicit array; the `is_leaf` for maps over trees with any."""
    return isinstance(x, quax.ArrayValue)


def perturbed(tree: PyTree) -> list[PerturbedArray]:
    """The displaced arrays of a tree, also those inside other implicit arrays."""
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, PerturbedArray))
    return [leaf for leaf in leaves if isinstance(leaf, PerturbedArray)]


@contextlib.contextmanager
def watch(watcher: Callable[[Use], None]) -> Iterator[None]:
    """Be told of every use of a displaced array while a function is traced."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Tell nobody, while something is traced that will be traced again."""
    watchers, _watchers[:] = _watchers[:], []
    try:
        yield
    finally:
        _watchers[:] = watchers


def use(w: Any, operation: str, plan: Plan, vectors: int = 0) -> None:
    """Tell the watchers of a use; of frozen arrays only where they have a label."""
    for watcher in _watchers:
        frozen = [w] if isinstance(w, QuantizedArray) and w.label else []
        for array in perturbed(w) or frozen:
            shape = tuple((array if isinstance(w, DerivedArray) else w).shape)
            displaced = isinstance(array, PerturbedArray)
            watcher(Use(array.label, operation, plan, shape, vectors, displaced))


class PerturbedArray(quax.ArrayValue):
    """A quantized array displaced along a direction, as floats: `value(boundary(n + u))`.

    Attributes:
        array: where the codes are.
        direction: where they would go; its side is that of the query.
        population: how many displacements of the array are evaluated together, by `jax.vmap`.

    Examples:
        >>> from zoqo_jax import Quantizer, directions
        >>> array = Quantizer(range=1.275)(jnp.zeros(3))  # s = .01
        >>> key = jax.random.key(0)
        >>> direction = directions.describe(key, array, 1.0, distribution="rademacher")
        >>> abs(PerturbedArray(array, direction).materialise()).round(3).tolist()
        [0.01, 0.01, 0.01]
    """

    array: QuantizedArray
    direction: Direction
    population: int = eqx.field(static=True, default=1)

    @property
    def label(self) -> str:
        """What `explain` calls the array."""
        return self.array.label

    def aval(self) -> ShapedArray:
        """The shape and dtype that JAX code sees."""
        return self.array.aval()

    def materialise(self) -> Array:
        """The values; what an operation without a rule gets."""
        return self.array.decode(self._codes())

    def part(self, i: Array | int) -> PerturbedArray:
        """The part whose codes are the i-th of their byte; `i` may be traced."""
        direction = self.direction.part(i, self.array)
        return dataclasses.replace(self, array=self.array.part(i), direction=direction)

    def endpoint(self) -> QuantizedArray:
        """The same values as a quantized array."""
        return self.array.with_codes(self._codes())

    def _codes(self) -> Int16[Array, "..."]:
        """The legal codes at `n + u`."""
        return self.direction.displaced(self.array, self.direction.draw(self.array))


class TransposedArray(quax.ArrayValue):
    """An implicit array with its axes permuted.

    Attributes:
        array: the array as it is stored.
        axes: the stored axis that each axis seen is.
    """

    array: QuantizedArray | PerturbedArray
    axes: tuple[int, ...] = eqx.field(static=True)

    def aval(self) -> ShapedArray:
        """The shape and dtype that JAX code sees."""
        stored = self.array.aval()
        return ShapedArray(tuple(stored.shape[axis] for axis in self.axes), stored.dtype)

    def materialise(self) -> Float[Array, "..."]:
        """The values."""
        return jnp.transpose(self.array.materialise(), self.axes)


def bind(primitive: Any, operands: Sequence[Any], params: dict[str, Any]) -> Sequence[Any]:
    """The results that JAX makes of arrays, by the parameters of an equation."""
    if primitive.name == "psum_invariant":  # `jax.lax.psum` where JAX knows what varies: not here
        return [jax.lax.psum(operands[0], params["axes"])]
    bound = primitive.get_bind_params(params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)
    out = primitive.bind(*functions, *operands, **params)
    return out if primitive.multiple_results else [out]


class Node:
    """An operation that was put off: what it is, and what it is applied to.

    Attributes:
        primitive: the JAX primitive.
        params: its parameters.
        inputs: for each operand another operation and which of its results, or the name of one of
            the arrays that a `DerivedArray` holds.
    """

    def __init__(self, primitive: Any, params: dict[str, Any], inputs: tuple[Any, ...]) -> None:
        self.primitive, self.params, self.inputs = primitive, params, inputs

    @classmethod
    def put_off(
        cls, primitive: Any, params: dict[str, Any], operands: Sequence[Any], avals: Sequence[Any]
    ) -> list[DerivedArray]:
        """What the operation would make of operands of which some are implicit.

        Args:
            primitive: the JAX primitive.
            params: its parameters.
            operands: arrays.
            avals: shapes and dtypes of its results.
        """
        arrays: dict[Any, Any] = {}
        for x in operands:
            if isinstance(x, DerivedArray):
                arrays.update(zip(x.names, x.arrays, strict=True))
        inputs = []
        for x in operands:
            if isinstance(x, DerivedArray):
                inputs.append((x.node, x.place))
                continue
            name = next((name for name, array in arrays.items() if array is x), object())
            arrays[name] = x
            inputs.append(name)
        node = cls(primitive, params, tuple(inputs))
        names, held = tuple(arrays), tuple(arrays.values())
        return [
            DerivedArray(held, names, node, place, tuple(aval.shape), aval.dtype)
            for place, aval in enumerate(avals)
        ]

    def results(self, values: dict[Any, Any]) -> Sequence[Array]:
        """What it makes, of arrays by name; results of operations are kept among them."""
        todo = [self]  # a stack of our own: chains may be longer than Python lets functions nest
        while todo:
            node = todo[-1]
            missing = [x[0] for x in node.inputs if isinstance(x, tuple) and x[0] not in values]
            if missing:
                todo += missing
                continue
            todo.pop()
            if node in values:
                continue
            operands = [
                values[x[0]][x[1]] if isinstance(x, tuple) else values[x] for x in node.inputs
            ]
            values[node] = bind(node.primitive, operands, node.params)
        return values[self]


class DerivedArray(quax.ArrayValue):
    """What operations would make of implicit arrays, put off until a product.

    A product evaluates them for one displacement at a time, so one matrix of values exists at a
    time. Made by operations that are all that a program does with an array but multiply by it.

    Attributes:
        arrays: what is computed with, implicit or not.
        names: one for each of them, by which the operations know them.
        node: the last operation.
        place: which of its results.
        seen_shape: of the result.
        seen_dtype: of the result.
    """

    arrays: tuple[Any, ...]
    names: tuple[Any, ...] = eqx.field(static=True)
    node: Node = eqx.field(static=True)
    place: int = eqx.field(static=True)
    seen_shape: tuple[int, ...] = eqx.field(static=True)
    seen_dtype: Any = eqx.field(static=True)

    def aval(self) -> ShapedArray:
        """The shape and dtype that JAX code sees."""
        return ShapedArray(self.seen_shape, self.seen_dtype)

    def materialise(self) -> Array:
        """The values."""
        pairs = zip(self.names, self.arrays, strict=True)
        values = {name: x.materialise() if is_implicit(x) else x for name, x in pairs}
        return self.node.results(values)[self.place]

    def entry_by_entry(self) -> Any:
        """The only array, where operations change its entries one by one; else None."""
        node: Any = self.node
        while isinstance(node, Node) and node.primitive.name in _ENTRY_BY_ENTRY:
            (of,) = node.inputs
            node = of[0] if isinstance(of, tuple) else of
        return self.arrays[0] if node in self.names and len(self.arrays) == 1 else None

    def of(self, array: Any) -> DerivedArray:
        """The same operations, entry by entry, on another array."""
        chain: list[Node] = []
        node: Any = self.node
        while isinstance(node, Node):
            chain.append(node)
            (of,) = node.inputs
            node = of[0] if isinstance(of, tuple) else of
        name: Any = object()  # the layer of a stack must not be taken for the stack
        last: Any = name
        for old in reversed(chain):
            node = Node(old.primitive, old.params, (last,))
            last = (node, 0)
        return DerivedArray((array,), (name,), node, 0, tuple(array.shape), self.seen_dtype)


_ENTRY_BY_ENTRY = ("convert_element_type", "copy", "neg", "pvary", "stop_gradient")

Implicit = QuantizedArray | PerturbedArray | TransposedArray | DerivedArray
_Stored = TypeVar("_Stored", bound=QuantizedArray | PerturbedArray)


def take_rows(fn: Callable[[Array], Array], w: _Stored) -> _Stored:
    """Apply what rearranges, picks or repeats whole rows, the last axis staying as it is.

    Args:
        fn: maps (*rows, k) to (*new_rows, k) for any k, the same rows for every k.
        w: an implicit array.

    Returns:
        The implicit array whose values are `fn` of the values.

    Examples:
        >>> from zoqo_jax import Quantizer
        >>> w = Quantizer(range=1.275)(jnp.array([[0.5, 0.25], [0.75, 1.0]]))
        >>> take_rows(lambda x: x[1], w).materialise().round(2).tolist()
        [0.75, 1.0]
    """
    if isinstance(w, PerturbedArray):
        direction = w.direction.take_rows(fn)
        return dataclasses.replace(w, array=take_rows(fn, w.array), direction=direction)
    return w.take_rows(fn)


def by_row(fn: Callable[[Array], Array], tree: PyTree) -> PyTree:
    """Apply a function of rows, as for `take_rows`, to arrays that have one number for each row."""
    return jax.tree.map(lambda x: fn(x[..., None])[..., 0], tree)


def sum_over_rows(
    fn: Callable[[_Stored, Bool[Array, "..."]], Array], w: _Stored, most: int = 2**18
) -> Array:
    """Sum what a function makes of the rows, some `most` elements at a time.

    Args:
        fn: of a few rows, and which of them to heed, a column of bools.
        w: an implicit array; one with less than two axes is a single piece.
        most: elements that a piece has, or one row.

    Examples:
        >>> from zoqo_jax import Quantizer
        >>> w = Quantizer(range=1.275)(jnp.full((5, 2), 0.5))
        >>> sum_over_rows(lambda rows, chosen: (rows.materialise() * chosen).sum(), w, 4).item()
        5.0
    """
    if w.ndim < 2 or w.size <= most:
        return fn(w, jnp.array(True))
    w = take_rows(lambda x: x.reshape(-1, x.shape[-1]), w)
    rows, columns = w.shape
    few = max(most // columns, 1)

    def piece(i: Array | int) -> Array:
        start = jnp.minimum(i * few, rows - few)
        is_new = start + jnp.arange(few) >= i * few  # the last piece may go over rows again
        some = take_rows(lambda x: jax.lax.dynamic_slice_in_dim(x, start, few), w)
        return fn(some, is_new[:, None])

    return jax.lax.fori_loop(1, -(-rows // few), lambda i, total: total + piece(i), piece(0))
