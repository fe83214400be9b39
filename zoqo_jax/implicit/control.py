"""Rules for primitives that hold programs: calls, loops, branches, and maps over devices.

What is implicit outside is implicit inside: a scanned stack of weights is a stack of codes, of
which each step gets a layer. Where a loop or a branch hands back something else than it got, or
than another branch does, then it has values there.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from zoqo_jax.grids.arrays import QuantizedArray
from zoqo_jax.implicit.arrays import (
    DerivedArray,
    PerturbedArray,
    TransposedArray,
    is_implicit,
    silent,
    take_rows,
)
from zoqo_jax.implicit.interpreter import Flags, evaluate, higher, values_of, wanted_inputs

__all__ = ["slices"]


# Calls


def _called(params: dict[str, Any]) -> Any:
    """The program of a call, closed."""
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr", "call")
    jaxpr = next(params[name] for name in names if name in params)
    return jaxpr if hasattr(jaxpr, "consts") else jax.extend.core.ClosedJaxpr(jaxpr, ())


def _wanted_by_call(equation: Any, flags: Flags) -> Flags:
    return wanted_inputs(_called(equation.params).jaxpr, flags)


@higher(
    "checkpoint",
    "closed_call",
    "composite",
    "core_call",
    "custom_vmap_call",
    "remat2",
    wanted=_wanted_by_call,
)
def _call(inputs: list[Any], flags: Flags, params: dict[str, Any]) -> list[Any]:
    """In place."""
    return evaluate(_called(params), inputs, flags)


@higher("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", wanted=_wanted_by_call)
def _call_with_derivatives(inputs: list[Any], flags: Flags, params: dict[str, Any]) -> list[Any]:
    """In place, but not to be differentiated: its own rule would be forgotten."""
    trees: list[Any] = []

    @jax.custom_jvp
    def run(inputs: list[Any]) -> list[Array]:
        leaves, tree = jax.tree.flatten(evaluate(_called(params), inputs))
        trees.append(tree)
        return leaves

    @run.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(
            "quaxify keeps no custom derivative of a function of quantized weights: differentiate "
            "the loss of zoqo_jax.dequantize(params)."
        )

    leaves = run(inputs)
    return jax.tree.unflatten(trees[-1], leaves)


_compiled: weakref.WeakKeyDictionary[Any, Callable[..., Any]] = weakref.WeakKeyDictionary()


@higher("jit", "pjit", wanted=_wanted_by_call)
def _jit(inputs: list[Any], flags: Flags, params: dict[str, Any]) -> list[Any]:
    """In place where a compilation is under way, else compiled, once for each program."""
    program = _called(params)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(inputs)):
        return evaluate(program, inputs, flags)
    inputs = [x.materialise() if isinstance(x, DerivedArray) else x for x in inputs]
    if program not in _compiled:
        known = weakref.ref(program)
        _compiled[program] = jax.jit(lambda *inputs: evaluate(known(), inputs))
    return _compiled[program](*inputs)


# Loops


def _wanted_by_scan(equation: Any, flags: Flags) -> Flags:
    carries = equation.params["num_carry"]
    inner = (*flags[:carries], *(False,) * (len(flags) - carries))
    return wanted_inputs(equation.params["jaxpr"].jaxpr, inner)


@higher("scan", wanted=_wanted_by_scan)
def _scan(inputs: list[Any], flags: Flags, params: dict[str, Any]) -> list[Any]:
    program, length = params["jaxpr"], params["length"]
    num_consts, num_carry = params["num_consts"], params["num_carry"]
    consts, carry, xs = (
        inputs[:num_consts],
        inputs[num_consts : num_consts + num_carry],
        inputs[num_consts + num_carry :],
    )
    stacks, layer_of = zip(*map(slices, xs), strict=True) if xs else ((), ())
    stacks = list(stacks)

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        layers = [of(x) for of, x in zip(layer_of, xs, strict=True)]
        out = evaluate(program, [*consts, *carry, *layers])
        return out[:num_carry], [values_of(y, "scan") for y in out[num_carry:]]

    avals = program.out_avals
    layer = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stacks)
    carry = _settled(lambda carry, layer: body(carry, layer)[0], carry, "scan", layer)
    carry, ys = jax.lax.scan(
        lambda carry, xs: _returned("scan", carry, *body(carry, xs), avals),
        _of_dtype(carry, avals),
        stacks,
        length=length,
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*carry, *ys]


def _returned(
    name: str, given: list[Any], carry: list[Any], ys: list[Any], avals: Sequence[Any]
) -> tuple[list[Any], list[Any]]:
    """What a body hands back, in the form of what it was given."""
    pairs = zip(given, carry, strict=True)
    carry = [x if is_implicit(old) else values_of(x, name) for old, x in pairs]
    return _of_dtype(carry, avals), _of_dtype(ys, avals[len(carry) :])


def _wanted_by_while(equation: Any, flags: Flags) -> Flags:
    params = equation.params
    body = wanted_inputs(params["body_jaxpr"].jaxpr, flags)
    cond = wanted_inputs(params["cond_jaxpr"].jaxpr, (False,))
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    both = (a and b for a, b in zip(cond[num_cond:], body[num_body:], strict=True))
    return (*cond[:num_cond], *body[:num_body], *both)


@higher("while", wanted=_wanted_by_while)
def _while(inputs: list[Any], flags: Flags, params: dict[str, Any]) -> list[Any]:
    num_cond, num_body = params["cond_nconsts"], params["body_nconsts"]
    of_cond, of_body = inputs[:num_cond], inputs[num_cond : num_cond + num_body]
    program = params["body_jaxpr"]

    def once(carry: list[Any]) -> list[Any]:
        return evaluate(program, [*of_body, *carry])

    def goes_on(carry: list[Any]) -> Array:
        return values_of(evaluate(params["cond_jaxpr"], [*of_cond, *carry])[0], "while")

    is_vmapped = params["cond_jaxpr"].out_avals[0].ndim > 0  # some go on where others have ended
    start = inputs[num_cond + num_body :]
    carry = [values_of(x, "while") for x in start] if is_vmapped else _settled(once, start, "while")

    def body(carry: list[Any]) -> list[Any]:
        new = _returned("while", carry, once(carry), [], program.out_avals)[0]
        if not is_vmapped:
            return new
        going = goes_on(carry)
        return [_where(going, *pair) for pair in zip(new, carry, strict=True)]

    return jax.lax.while_loop(
        lambda carry: jnp.any(goes_on(carry)), body, _of_dtype(carry, program.out_avals)
    )


def _where(is_new: Array, new: Array, old: Array) -> Array:
    """New values of those that go on, by the first axes, and old ones of the others."""
    return jnp.where(is_new.reshape(is_new.shape + (1,) * (new.ndim - is_new.ndim)), new, old)


def _settled(
    once: Callable[..., list[Any]], carry: list[Any], name: str, *others: Any
) -> list[Any]:
    """A carry of which only that is implicit which a body hands back as it got it."""
    carry = list(carry)
    while any(map(is_implicit, carry)):
        with silent():
            out = jax.eval_shape(once, carry, *others)
        changed = [
            place
            for place, (old, new) in enumerate(zip(carry, out, strict=True))
            if is_implicit(old) and _form(old) != _form(new)
        ]
        if not changed:
            break
        for place in changed:
            carry[place] = values_of(carry[place], name)
    return carry


def _form(tree: PyTree) -> Any:
    """What must be the same of all that stands in one place."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(jnp.shape(leaf), leaf.dtype) for leaf in leaves]


def _of_dtype(xs: Sequence[Any], avals: Sequence[Any]) -> list[Any]:
    """Arrays of the dtypes that a program says, none of them weak."""

    def one(x: Any, aval: Any) -> Any:
        if is_implicit(x) or jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended):
            return x
        return jax.lax.convert_element_type(x, aval.dtype)

    return [one(x, aval) for x, aval in zip(xs, avals[: len(xs)], strict=True)]


@functools.singledispatch
def slices(x: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What a scan is given of a stack, and what makes a layer of a slice of that."""
    return values_of(x, "scan"), lambda part: part


@slices.register(QuantizedArray)
@slices.register(PerturbedArray)
def _(x: QuantizedArray | PerturbedArray) -> tuple[Any, Callable[[Any], Any]]:
    if x.ndim < 2:
        return values_of(x, "scan"), lambda part: part
    return _sliceable(x), lambda part: part


@slices.register
def _(x: TransposedArray) -> tuple[Any, Callable[[Any], Any]]:
    walked, *others = x.axes
    if walked == x.ndim - 1:
        return values_of(x, "scan"), lambda part: part
    stack, layer = slices(take_rows(lambda rows: jnp.moveaxis(rows, walked, 0), x.array))
    order = tuple(axis - (axis > walked) for axis in others)
    if order == tuple(range(len(order))):
        return stack, layer
    return stack, lambda part: TransposedArray(layer(part), order)


@slices.register
def _(x: DerivedArray) -> tuple[Any, Callable[[Any], Any]]:
    alone = x.entry_by_entry()
    if alone is None:
        return values_of(x, "scan"), lambda part: part
    stack, layer = slices(alone)
    return stack, lambda part: x.of(layer(part))


def _sliceable(leaf: Any) -> Any:
    """Give every slice of a stack a copy of what slices share."""
    if isinstance(leaf, PerturbedArray):
        direction = leaf.direction.for_layers(leaf.shape[0])
        return dataclasses.replace(leaf, array=_sliceable(leaf.array), direction=direction)
    block = leaf.block
    if block is not None and block[0] == -leaf.ndim:  # blocks of layers: a scale for every layer
        spread = {name: _spread(getattr(leaf, name), leaf) for name in ("scale", "offset")}
        return dataclasses.replace(leaf, **spread, block=None)
    scale, offset, block_of = jax.tree.map(
        lambda x: _spread_leading(x, leaf), (leaf.scale, leaf.offset, leaf.block_of)
    )
    return dataclasses.replace(
        leaf, scale=scale, offset=offset, block_of=block_of, has_copies=leaf.has_one_scale
    )


def _spread(per_block: Array | None, array: QuantizedArray) -> Array | None:
    return None if per_block is None else array.broadcast_scales(per_block)


def _spread_leading(per_block: Array, array: QuantizedArray) -> Array:
    """Repeat along the axis that a scan walks, a stack's first.

    Never along the last, within which draws depend on what is shared (`random_bits.bernoulli`).
    """
    if per_block.shape[0] != 1:
        return per_block
    return jnp.broadcast_to(per_block, (array.shape[0], *per_block.shape[1:]))


# Branches


def _wanted_by_cond(equation: Any, flags: Flags) -> Flags:
    branches = [wanted_inputs(branch.jaxpr, flags) for branch in equation.params["branches"]]
    return (False, *(all(how) for how in zip(*branches, strict=True)))


@higher("cond", wanted=_wanted_by_cond)
def _cond(inputs: list[Any], flags: Flags, params: dict[str, Any]) -> list[Any]:
    index, *operands = inputs
    traced = [_traced(branch, operands) for branch in params["branches"]]
    forms = [[_form(x) if is_implicit(x) else None for x in outs] for _, outs, _ in traced]
    is_same = [all(form == of[0] for form in of) for of in zip(*forms, strict=True)]

    def returned(run: Callable[[], list[Any]], avals: Any) -> Callable[[], list[Any]]:
        def kept() -> list[Any]:
            pairs = zip(run(), is_same, strict=True)
            return _of_dtype([x if same else values_of(x, "cond") for x, same in pairs], avals)

        return kept

    functions = [returned(run, avals) for run, _, avals in traced]
    platforms = params.get("branches_platforms")
    if platforms is None:
        return jax.lax.switch(values_of(index, "cond"), functions)
    named = {
        platform: function
        for function, names in zip(functions, platforms, strict=True)
        for platform in names or ("default",)
    }
    return jax.lax.platform_dependent(**named)


def _traced(branch: Any, operands: list[Any]) -> tuple[Callable[[], list[Any]], list[Any], Any]:
    """A branch, traced once however deep branches are nested: what runs it, and what it returns."""
    trees: list[Any] = []

    def flat() -> list[Array]:
        leaves, tree = jax.tree.flatten(evaluate(branch, operands))
        trees.append(tree)
        return leaves

    closed = jax.make_jaxpr(flat)()
    (tree,) = trees
    outs = jax.tree.unflatten(tree, closed.out_avals)

    def run() -> list[Any]:
        return jax.tree.unflatten(tree, jax.extend.core.jaxpr_as_fun(closed)())

    return run, outs, branch.out_avals


# Maps over devices


def _wanted_by_shard_map(equation: Any, flags: Flags) -> Flags:
    return wanted_inputs(equation.params["jaxpr"], flags)


@higher("shard_map", wanted=_wanted_by_shard_map)
def _shard_map(inputs: list[Any], flags: Flags, params: dict[str, Any]) -> list[Any]:
    """Whole weights go to every device as codes; sharded ones by rows, or as values."""
    program = _called(params)
    specs, given = [], []
    for x, spec in zip(inputs, params["in_specs"], strict=True):
        of_codes = _specs(x, spec) if is_implicit(x) else spec
        given.append(values_of(x, "shard_map") if of_codes is None else x)
        specs.append(spec if of_codes is None else of_codes)

    def body(*inputs: Any) -> list[Any]:
        out = evaluate(program, inputs)
        return _of_dtype([values_of(x, "shard_map") for x in out], program.out_avals)

    axes = params.get("newly_manual_axes", params.get("manual_axes"))
    return jax.shard_map(
        body,
        mesh=params["mesh"],
        in_specs=tuple(specs),
        out_specs=list(params["out_specs"]),
        axis_names=axes,
        check_vma=False,  # loops inside products would have to say what varies over which axis
    )(*given)


def _specs(x: Any, spec: Any) -> PyTree | None:
    """How an implicit array is sharded where its values are as `spec` says, None for as values."""
    if all(axis is None for axis in spec):
        return jax.tree.map(lambda _: PartitionSpec(), x)
    is_stored = isinstance(x, QuantizedArray | PerturbedArray)
    sharded = [place for place, axis in enumerate(spec) if axis is not None]
    if not is_stored or x.ndim - 1 in sharded:
        return None
    array = x.array if isinstance(x, PerturbedArray) else x
    if array.block is not None and array.block[0] % x.ndim in sharded:
        return None

    def along(shape: tuple[int, ...]) -> Any:
        axes = [
            axis if place < len(shape) and shape[place] == x.shape[place] else None
            for place, axis in enumerate(spec)
        ]
        return PartitionSpec(*axes[: len(shape)])

    if isinstance(x, PerturbedArray):
        direction = jax.tree.map(lambda leaf: along(leaf.shape), x.direction)
        return dataclasses.replace(x, array=_specs(array, spec), direction=direction)
    return jax.tree.map(lambda leaf: along(leaf.shape), x)
