"""What caq_zo has besides the paper's method: its baseline, and significant votes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_reference as runs

import zoqo_jax as zq
from zoqo_jax.transforms import queries

KEY = jax.random.key(31)


# Queries off the grid


@pytest.mark.parametrize(
    ("model", "num_queries", "radius", "structure"),
    [
        (runs.MODELS[0], 1, 0.125, {}),
        pytest.param(runs.PACKED, 3, 0.25, {"structure": "rank_one"}, marks=pytest.mark.slow),
        pytest.param(
            *(runs.MODELS[1], 3, 0.0625, {"structure": "sparse", "density": 0.5}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_off_grid_caq_zo_is_its_formula(model, num_queries, radius, structure):
    eta, words = runs.caq_schedule, runs.words_of_moves(model, num_queries)
    options = {"num_queries": num_queries, **structure}
    tx = zq.caq_zo(eta, key=runs.KEY, query="off_grid", radius=radius, **options)

    def step(count, leaves, rs):
        return reference.caq_zo_step(
            leaves,
            rs,
            runs.problem(model).loss,
            lambda leaf, step: reference.stochastic(step, words[leaf][count]),
            learning_rate=runs.at(eta, count),
            boundary="clamp",
            radius=radius,
        )

    us = runs.drawn(model, None, "rademacher", **structure)
    runs.assert_same_run(model, tx, num_queries, us, step)


@pytest.mark.parametrize(
    ("radius", "collapsed", "clean"), [(0.03, 16, 0), (0.05, 8, 6), (0.10, 2, 12), (0.15, 1, 4)]
)
def test_off_grid_end_points_on_nf4_are_those_of_the_paper(radius, collapsed, clean):
    """Collapsed: both round back to the code. Clean: both come to a neighbour's."""
    codes = jnp.tile(jnp.arange(16), (8, 1))
    scale = jnp.asarray(2.0 ** np.arange(8)[:, None], jnp.float32)  # it plays no part
    array = zq.QuantizedArray.from_codes(codes, scale, None, zq.nf4().grid)
    tx = zq.caq_zo(1.0, key=KEY, query="off_grid", radius=radius)
    probes = tx.probes(tx.init(array), array)
    ends = [queries.endpoints(array, probes, side).codes.astype(int) for side in (1, -1)]
    up, down = np.sort(ends, axis=0)[::-1]
    for row in range(8):
        lower, upper = np.maximum(np.arange(16) - 1, 0), np.minimum(np.arange(16) + 1, 15)
        assert ((up == codes) & (down == codes))[row].sum() == collapsed
        assert ((up[row] == upper) & (down[row] == lower))[1:15].sum() == clean


def test_off_grid_queries_that_collapse_hear_nothing_where_aligned_ones_do():
    values = jnp.asarray(np.random.default_rng(3).normal(size=(8, 8)), jnp.float32)
    params = zq.nf4(block=8)(values)
    loss = lambda w: jnp.sum((w - 0.25) ** 2)  # noqa: E731
    for options, moves in (({}, True), ({"query": "off_grid", "radius": 0.03}, False)):
        tx = zq.caq_zo(10.0, key=KEY, **options)
        update = jax.jit(functools.partial(tx.update, None, value_fn=loss))
        updates, state = update(tx.init(params), params)
        assert (state.info.loss_differences[0] != 0) == moves and updates.packed.any() == moves


@pytest.mark.parametrize(
    "structure",
    ["rank_one", *(pytest.param(s, marks=pytest.mark.slow) for s in ("dense", "sparse"))],
)
def test_off_grid_losses_are_those_of_the_end_points(structure):
    """In products, of a scanned stack with codes that share bytes, and in what has no rule."""
    density = {"density": 0.5} if structure == "sparse" else {}
    values = jnp.asarray(np.random.default_rng(4).normal(size=(3, 8, 8)), jnp.float32)
    params = {"stack": zq.nf4(block=4)(values), "w": zq.Quantizer(8)(values[0])}
    x = jnp.asarray(np.random.default_rng(5).normal(size=(5, 8)), jnp.float32)

    def loss(params):
        h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["stack"])
        return jnp.sum((h @ params["w"]) ** 2) + jnp.sort(params["w"])[:, 0].sum()

    tx = zq.caq_zo(1.0, key=KEY, query="off_grid", radius=0.2, structure=structure, **density)
    probes = jax.jit(lambda params: tx.probes(tx.init(params), params))(params)
    at_end = jax.jit(
        lambda params, probes, side: zq.dequantize(queries.endpoints(params, probes, side))
    )
    for sides in ("together", "in_turn"):
        pair = jax.jit(functools.partial(queries.losses, loss, sides=sides))(params, probes)
        for side, actual in zip((1, -1), pair, strict=True):
            expected = jax.jit(loss)(at_end(params, probes, jnp.int8(side)))
            np.testing.assert_allclose(actual, expected, rtol=1e-5)
        assert abs(pair[0] - pair[1]) > 1e-3


# Significant votes


@pytest.mark.parametrize(
    ("model", "structure"),
    [
        (runs.MODELS[0], "dense"),
        pytest.param(runs.PACKED, "rank_one", marks=pytest.mark.slow),
    ],
)
def test_a_code_moves_where_the_votes_are_significant(model, structure):
    queries_, least = 8, 1.5
    options = {"num_queries": queries_, "boundary": "clamp", "structure": structure}
    tx = zq.caq_zo(1.0, key=runs.KEY, rounding="significant", threshold=least, **options)
    loss, moved = runs.problem(model).loss, []

    def step(count, leaves, rs):
        pairs = [reference.query(leaves, r, loss, "clamp") for r in rs]
        heard = reference.differences(np.array(pairs, np.float32))
        after = []
        for i, leaf in enumerate(leaves):
            votes = sum(d.astype(np.float64) * r[i] for d, r in zip(heard, rs, strict=True))
            moves = -reference.significant(votes, heard, least)
            after.append(leaf.with_codes(leaf.codes + moves))
            moved.append((moves != 0).mean())
        return after, heard

    us = runs.drawn(model, None, "rademacher", structure, queries=queries_)
    runs.assert_same_run(model, tx, queries_, us, step)
    assert 0.05 < np.mean(moved) < 0.5


def test_votes_that_a_single_code_decides_move_it_alone():
    """l = 3 n_2, alone among 60 codes: its votes agree, the others' are coins."""
    params = zq.Quantizer(8, range=127.5)(jnp.zeros(60))  # one code is 1.0
    tx = zq.caq_zo(1.0, key=KEY, num_queries=64, rounding="significant", threshold=4.5)
    update = jax.jit(functools.partial(tx.update, None, value_fn=lambda w: 3.0 * w[2]))
    updates, _ = update(tx.init(params), params)
    np.testing.assert_array_equal(
        updates.packed.astype(jnp.int8), -(np.arange(60) == 2).astype(int)
    )
