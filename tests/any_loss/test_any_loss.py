"""Losses that people might write: each is what it is on floats, at the codes and beside them.

`loss_table.py` says what a loss is, the other files are the catalogue, by kind. A loss that raises
on floats would say nothing here: all of them run on floats.
"""

import functools
import zlib

import equinox as eqx
import expected_failures
import jax
import jax.numpy as jnp
import losses_nested  # noqa: F401
import losses_of_control  # noqa: F401
import losses_of_movement  # noqa: F401
import losses_of_numbers  # noqa: F401
import losses_of_parallelism  # noqa: F401
import losses_of_products  # noqa: F401
import losses_of_rules  # noqa: F401
import losses_of_trees  # noqa: F401
import numpy as np
import pytest
from loss_table import TABLE

import zoqo_jax as zq
from zoqo_jax import directions
from zoqo_jax.grids.arrays import trained_leaves
from zoqo_jax.transforms import queries

DIRECTIONS = {"rank_one": "rademacher", "dense": "uniform"}


@pytest.fixture(autouse=True)
def _promotion_as_people_have_it():
    with jax.numpy_dtype_promotion("standard"):
        yield


def compiled(fn):
    """`jax.jit`, but leaves that are no arrays are closed over."""

    def call(*trees):
        arrays, rest = eqx.partition(trees, eqx.is_array)
        program = jax.jit(lambda arrays: fn(*eqx.combine(arrays, rest)))
        return program(arrays)

    return call


def on_floats(fn, example):
    """A loss of floats, compiled once for all trees like the example."""
    _, rest = eqx.partition(example, eqx.is_array)
    program = jax.jit(lambda arrays: fn(eqx.combine(arrays, rest)))
    return lambda tree: program(eqx.filter(tree, eqx.is_array))


def probes(params, structure, seed=3):
    """A direction for each leaf, that goes some way: a sixth of the grid."""
    leaves = trained_leaves(params).values()
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return [
        _probe(key, leaf, structure=structure, distribution=DIRECTIONS[structure])
        for key, leaf in zip(keys, leaves, strict=True)
    ]


def _probe(key, leaf, **choices):
    return directions.describe(key, leaf, leaf.grid.high / 6.0, **choices)


@jax.jit
def _end(leaf, probe, side):
    return zq.dequantize(queries.endpoints(leaf, [probe], side))


def at_end(params, directions, side):
    """The floats at one side of a query; leaf by leaf, so that leaves alike are compiled once."""
    remaining = iter(directions)
    return jax.tree.map(
        lambda leaf: _end(leaf, next(remaining), side) if zq.is_quantized(leaf) else leaf,
        params,
        is_leaf=zq.is_quantized,
    )


def marked(cases):
    """Parameters of (name, what is done with it), with the marks of each."""
    parameters = []
    for name, what, is_slow in cases:
        failures = expected_failures.FAILURES
        failure = failures.get(name) or failures.get(f"{name} ({what})")
        marks = [pytest.mark.xfail(reason=failure, strict=True)] if failure else []
        marks += [pytest.mark.slow] if is_slow else []
        parameters.append(pytest.param(name, what, marks=marks, id=f"{name}, {what}"))
    return parameters


def cases():
    """Each loss with each way of asking; one of twenty is asked in a minute, the rest is slow.

    Rank-one directions share products, so they are asked where there are products, dense ones
    elsewhere; what is not compiled takes as long as all else.
    """
    for name, loss in TABLE.items():
        chance = zlib.crc32(name.encode()) % 20
        is_slow = loss.is_slow or chance > 0
        yield name, "compiled", is_slow
        yield name, "not compiled", is_slow
        for structure in DIRECTIONS:
            yield name, structure, is_slow or (structure == "rank_one") != loss.is_fused
        if loss.is_fused:
            yield name, "explained", is_slow


def test_every_expected_failure_is_of_a_case():
    named = {f"{name} ({what})" for name, what, _ in cases()}
    assert set(expected_failures.FAILURES) <= named | set(TABLE)


@functools.cache
def made(name):
    """A loss's parameters and the loss of floats like theirs."""
    params = TABLE[name].quantized()
    return params, on_floats(TABLE[name].fn, zq.dequantize(params))


@pytest.mark.parametrize(("name", "what"), marked(cases()))
def test_a_loss_of_codes_is_that_of_their_values(name, what):
    loss, (params, plain) = TABLE[name], made(name)

    def same(actual, expected):
        np.testing.assert_allclose(actual, expected, loss.rtol, loss.rtol)

    if what == "explained":
        told = zq.explain(loss.fn, params)
        assert told.uses and told.is_fused, str(told)
        assert zq.explain(loss.fn, params) == told
    elif "compiled" in what:
        fn = zq.quaxify(loss.fn)
        same((compiled(fn) if what == "compiled" else fn)(params), plain(zq.dequantize(params)))
    else:
        directions = probes(params, what)
        asked = compiled(functools.partial(queries.losses, loss.fn))(params, directions)
        ends = [plain(at_end(params, directions, jnp.int8(side))) for side in (1, -1)]
        assert loss.is_flat or ends[0] != ends[1], "the loss does not depend on its weights"
        same(asked, jnp.stack(ends))
