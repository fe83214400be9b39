"""`quaxify`: run a function of floats on trees with implicit arrays, by interpreting its program.

The function is traced once, as `jax.jit` does, on the shapes and dtypes that its implicit arguments
stand for; so it is ordinary JAX code to whatever library it is written in. The program that comes
out, a jaxpr, is then run one equation at a time. An equation without an implicit operand is JAX's
own; one with any goes to the rule for its primitive (`rules.py`, and `control.py` for those that
hold programs themselves). Where there is no rule it gets the values. If all that the program does
with the result is to multiply by it, then the operation is put off until there
(`implicit.DerivedArray`), where one matrix of values exists at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jaxtyping import Array

from zoqo_jax.implicit import products
from zoqo_jax.implicit.arrays import Node, Plan, bind, is_implicit, use
from zoqo_jax.xla import compiler

__all__ = ["Flags", "Rule", "evaluate", "higher", "quaxify", "register", "values_of"]

Rule = Callable[..., Any]
"""`rule(*operands, **params)`: the result, or NotImplemented where it does not cover the case."""

Flags = tuple[bool, ...]
"""For each of some variables, whether all that is done with it is to multiply by it."""

MATERIALIZE = Plan(("materialize",))

_rules: dict[tuple[str, type], Rule] = {}
_higher: dict[str, Rule] = {}
_wanted_by: dict[str, Callable[[Any, Flags], Flags]] = {}


def register(primitives: str | Sequence[str], *kinds: type) -> Callable[[Rule], Rule]:
    """Give primitives a rule for operands of some kinds of implicit arrays.

    Args:
        primitives: names of JAX primitives.
        kinds: classes of implicit arrays; the rule is asked where an operand is one of them.
    """

    def add(rule: Rule) -> Rule:
        for name in (primitives,) if isinstance(primitives, str) else primitives:
            for kind in kinds:
                _rules[name, kind] = rule
        return rule

    return add


def higher(*primitives: str, wanted: Callable[[Any, Flags], Flags]) -> Callable[[Rule], Rule]:
    """Give primitives that hold programs a rule, `rule(operands, flags, params) -> results`.

    Args:
        primitives: their names.
        wanted: from an equation and its results' flags to its operands' flags.
    """

    def add(rule: Rule) -> Rule:
        for name in primitives:
            _higher[name] = rule
            _wanted_by[name] = wanted
        return rule

    return add


def quaxify(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of float arrays take trees with quantized leaves, implicitly.

    Args:
        fn: any function of pytrees made of JAX operations, e.g. `model.apply`. It is traced, so
            what it computes cannot decide its Python control flow, as under `jax.jit`; leaves that
            are not implicit arrays it gets as they are.

    Returns:
        `fn`, but each `QuantizedArray` among its arguments stands for its values.

    Examples:
        >>> from zoqo_jax import Quantizer, quantize
        >>> params = quantize({"w": jnp.full((2, 2), 0.5)}, Quantizer(bits=8, range=1.0))
        >>> quaxify(lambda params, x: x @ params["w"])(params, jnp.ones(2)).round(2).tolist()
        [1.0, 1.0]
    """

    @functools.wraps(fn)
    def implicit(*args: Any, **kwargs: Any) -> Any:
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_implicit)
        places = [place for place, leaf in enumerate(leaves) if is_implicit(leaf)]
        if not places:
            return fn(*args, **kwargs)
        others: list[Any] = []  # what is returned that is no array, and where arrays go
        trees: list[Any] = []

        def of_arrays(*arrays: Array) -> list[Any]:
            filled = list(leaves)
            for place, array in zip(places, arrays, strict=True):
                filled[place] = array
            args, kwargs = jax.tree.unflatten(treedef, filled)
            out, tree = jax.tree.flatten(fn(*args, **kwargs), is_leaf=is_implicit)
            trees.append(tree)
            others.extend(None if _is_array(leaf) else (leaf,) for leaf in out)
            return [leaf for leaf in out if _is_array(leaf)]

        operands = [leaves[place] for place in places]
        operands = [x if x.size else x.materialise() for x in operands]
        closed = jax.make_jaxpr(of_arrays)(*map(_stand_in, operands))
        results = iter(evaluate(closed, operands))
        out = [next(results) if other is None else other[0] for other in others]
        return jax.tree.unflatten(trees[0], out)

    return implicit


def evaluate(closed: Any, operands: Sequence[Any], flags: Flags | None = None) -> list[Any]:
    """Run a closed jaxpr on operands of which some may be implicit.

    Args:
        closed: the program.
        operands: as many as its inputs.
        flags: for each of its outputs, whether it may be an operation that is put off.

    Returns:
        Its outputs, of which some may be implicit.
    """
    jaxpr = closed.jaxpr
    flags = flags or (False,) * len(jaxpr.outvars)
    evaluated = _evaluated(jaxpr, flags)
    env: dict[Any, Any] = {}
    decoded: dict[int, tuple[Any, Array]] = {}  # an array of which several operations want values
    env.update(zip(jaxpr.constvars, map(_constant, closed.consts), strict=True))
    env.update(zip(jaxpr.invars, operands, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        with equation.ctx.manager:
            outputs = _apply(equation, inputs, evaluated, decoded)
        env.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def values_of(x: Any, operation: str) -> Any:
    """The values of an array that may be implicit, the watchers being told."""
    if not is_implicit(x):
        return x
    use(x, operation, MATERIALIZE)
    return x.materialise()


def wanted_inputs(jaxpr: Any, flags: Flags) -> Flags:
    """For each input of a program, whether all that is done with it is to multiply by it."""
    evaluated = _evaluated(jaxpr, flags)
    return tuple(variable not in evaluated for variable in jaxpr.invars)


def _apply(
    equation: Any, inputs: list[Any], evaluated: set[Any], decoded: dict[int, tuple[Any, Array]]
) -> Sequence[Any]:
    """The results of an equation."""
    primitive, params = equation.primitive, equation.params
    implicit = [x for x in inputs if is_implicit(x)]
    name = primitive.name
    if not implicit and name not in _EVEN_FOR_DATA:
        return bind(primitive, inputs, params)
    flags = tuple(variable not in evaluated for variable in equation.outvars)
    if name in _higher:
        return _higher[name](inputs, flags, params)
    for kind in dict.fromkeys(kind for x in implicit for kind in type(x).__mro__):
        rule = _rules.get((name, kind))
        out = NotImplemented if rule is None else rule(*inputs, **params)
        if out is not NotImplemented:
            return out if primitive.multiple_results else [out]
    if all(flags) and name in _PUT_OFF and _is_weight_like(equation, inputs):
        return Node.put_off(primitive, params, inputs, [out.aval for out in equation.outvars])

    if name == "gather" and math.prod(equation.outvars[0].aval.shape) < implicit[0].size:
        # Columns looked up, not rows: the table is decoded, but once at a time.
        return [products.in_turn(name, lambda *xs: bind(primitive, xs, params)[0], *inputs)]

    def values(x: Any) -> Any:
        if not is_implicit(x):
            return x
        if id(x) not in decoded:
            decoded[id(x)] = x, x.materialise()
        use(x, name, MATERIALIZE)
        return decoded[id(x)][1]

    return bind(primitive, [values(x) for x in inputs], params)


_EVEN_FOR_DATA = ("composite", "ragged_dot_general")
"""What has a rule also for data: JAX cannot batch it, so not evaluate it at two sides at once."""


def _constant(x: Any) -> Any:
    """A constant as an array of JAX; some come as a NumPy type of JAX's own."""
    return jnp.asarray(x, x.dtype) if isinstance(x, np.ndarray | np.generic) else x


def _stand_in(x: Any) -> jax.ShapeDtypeStruct:
    """What the function sees in an implicit array's place."""
    varying = compiler.varying(x)
    if not varying:
        return jax.ShapeDtypeStruct(x.shape, x.dtype)
    if hasattr(jax.sharding, "ManualAxisType"):
        how = {"manual_axis_type": jax.sharding.ManualAxisType(varying=varying)}
    else:  # before jax 0.10.2
        how = {"vma": varying}
    return jax.ShapeDtypeStruct(x.shape, x.dtype, **how)


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array)  # what is NumPy's is handed back as it is


# Which operations are put off until a product


_MULTIPLY = {"dot_general": (0, 1), "conv_general_dilated": (1,), "gather": (0,)}
"""Operands of a product, or of a look-up: there rows of what was put off are computed, not all."""

_REARRANGING = """
    broadcast_in_dim concatenate copy dynamic_slice dynamic_update_slice gather pad pvary reshape
    rev select_n slice split squeeze stop_gradient transpose
"""
_ENTRY_BY_ENTRY = """
    abs acos acosh add add_any asin asinh atan atan2 atanh cbrt ceil clamp convert_element_type cos
    cosh div erf erf_inv erfc exp exp2 expm1 floor integer_pow log log1p logistic max min mul neg
    nextafter pow reduce_precision rem round rsqrt sign sin sinh sqrt square sub tan tanh
"""
_PUT_OFF = frozenset(_REARRANGING.split() + _ENTRY_BY_ENTRY.split())


def _is_weight_like(equation: Any, inputs: Sequence[Any]) -> bool:
    """Whether an operation makes a weight of weights, and not activations."""
    implicit = sum(x.size for x in inputs if is_implicit(x))
    rest = sum(math.prod(jnp.shape(x)) for x in inputs if not is_implicit(x))
    made = sum(math.prod(out.aval.shape) for out in equation.outvars)
    return rest <= implicit and made <= 2 * implicit


def _evaluated(jaxpr: Any, flags: Flags) -> set[Any]:
    """The variables of a program with which something is done but multiply by them.

    Operations that can be put off, and programs inside, count as what is done with their results.
    """
    uses: dict[Any, list[bool]] = {}  # of a variable, each: is it to be multiplied by?

    def note(atoms: Sequence[Any], how: Sequence[bool]) -> None:
        for atom, is_wanted in zip(atoms, how, strict=True):
            if not isinstance(atom, core.Literal):
                uses.setdefault(atom, []).append(is_wanted)

    note(jaxpr.outvars, flags)
    for equation in reversed(jaxpr.eqns):
        name = equation.primitive.name
        outs = tuple(all(uses.get(out, ())) for out in equation.outvars)
        if name in _MULTIPLY:
            how = [place in _MULTIPLY[name] for place in range(len(equation.invars))]
        elif name in _wanted_by:
            how = _wanted_by[name](equation, outs)
        else:
            how = [name in _PUT_OFF and all(outs)] * len(equation.invars)
        note(equation.invars, how)
    return {variable for variable, how in uses.items() if not all(how)}
