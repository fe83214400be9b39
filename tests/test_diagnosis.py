"""What a radius does to codes, against NumPy that rounds every end of every probe."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choosing import by_turns
from compiling import NORMALLY

import zoqo_jax as zq
from zoqo_jax.analysis import diagnosis
from zoqo_jax.grids import companders
from zoqo_jax.implicit import arrays as implicit


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def spans(levels, at, radius):
    """Brute force: the nearest of all levels to each end, for codes at given places."""
    nearest = lambda x: np.abs(x[:, None] - levels).argmin(axis=1)  # noqa: E731
    up, down = nearest(levels[at] + radius) - at, at - nearest(levels[at] - radius)
    still, far = (up == 0) & (down == 0), np.maximum(up, down) > 1
    clean = (up == 1) & (down == 1)
    return np.array([still.sum(), (~still & ~far & ~clean).sum(), clean.sum(), far.sum()])


def expected(array, radius, unit="values"):
    """(codes, weights, at_edge) of a leaf, block by block; blocks of zeros do not move."""
    grid, shape = array.grid, array.shape
    scale = np.asarray(array.scale, np.float64).ravel()
    number = np.arange(array.scale.size).reshape(array.scale.shape)
    number = np.broadcast_to(np.asarray(array.broadcast_scales(jnp.asarray(number))), shape)
    legal = np.asarray(grid.levels[grid.low : grid.high + 1])
    half = (legal[-1] - legal[0]) / 2
    at = np.asarray(array.codes).astype(int) - grid.low
    codes, weights = np.zeros(4, int), np.zeros(4, int)
    for block in range(array.scale.size):
        inside = number == block
        step = abs(scale[block])
        if step == 0:
            codes[0] += legal.size
            weights[0] += inside.sum()
            continue
        width = radius * (half if unit == "half_range" else 1 / step)
        codes += spans(legal, np.arange(legal.size), width)
        weights += spans(legal, at[inside], width)
    return codes, weights, np.isin(at, [0, legal.size - 1]).sum()


def assert_is(leaf, codes, weights, at_edge):
    np.testing.assert_array_equal(leaf.codes, codes)
    np.testing.assert_array_equal(leaf.weights, weights)
    assert leaf.at_edge == at_edge


@pytest.mark.parametrize(
    ("radius", "collapsed", "clean"), [(0.03, 16, 0), (0.05, 8, 6), (0.10, 2, 12), (0.15, 1, 4)]
)
def test_no_fixed_radius_probes_every_nf4_cell(radius, collapsed, clean):
    """The table of NF4, in units of absmax; of the codes, and of weights at each of them once."""
    levels = jnp.asarray(zq.nf4().grid.levels, jnp.float32)
    for absmax in (1.0, 0.037):
        w = zq.nf4(block=None)(absmax * levels)
        (leaf,) = zq.diagnose(w, radius, unit="half_range").leaves
        assert (leaf.codes.collapsed, leaf.codes.clean, sum(leaf.codes)) == (collapsed, clean, 16)
        assert leaf.weights == leaf.codes and leaf.at_edge == 2
        (leaf,) = zq.diagnose(w, radius * absmax).leaves
        assert (leaf.codes.collapsed, leaf.codes.clean) == (collapsed, clean)


GRIDS = {
    "nf4, blocks": zq.nf4(block=8),
    "nf4, blocks across rows, cut short": zq.nf4(block=4, axis=0),
    "nf4, one scale": zq.nf4(block=None),
    "fp4, channels": zq.Quantizer(4, companders.fp4(), axis=1),
    "mu-law, channels": zq.Quantizer(8, companders.mu_law(), axis=0),
    "uniform, 2 bits": zq.Quantizer(2, range=1.0),
    "uniform, 4 bits, offset": zq.Quantizer(4, range="minmax", block=8),
    "uniform, 8 bits": zq.Quantizer(8, range=(-1.0, 2.0)),
}


@pytest.mark.parametrize(("name", "radius"), by_turns(GRIDS, [0.004, 0.0613, 0.21, 1.7]))
def test_counts_are_those_of_brute_force(name, radius):
    array = GRIDS[name](normal(0, 6, 24))
    for unit in ("values", "half_range"):
        (leaf,) = zq.diagnose({"w": array}, radius, unit=unit).leaves
        assert_is(leaf, *expected(array, radius, unit))
        assert (leaf.label, leaf.shape) == ("['w']", (6, 24))


def test_radii_together_make_every_kind_of_span():
    array = zq.nf4(block=8)(normal(0, 6, 24))
    found = [zq.diagnose(array, radius).leaves[0] for radius in (0.01, 0.1, 0.2, 0.5)]
    assert (np.sum([leaf.codes for leaf in found], axis=0) > 0).all()
    assert (np.sum([leaf.weights for leaf in found], axis=0) > 0).all()


@pytest.mark.parametrize("shape", [(), (7,), (0, 4), (2, 5, 6)])
def test_leaves_of_every_shape(shape):
    array = zq.Quantizer(8, range=1.0)(normal(1, *shape))
    (leaf,) = zq.diagnose(array, 0.02).leaves
    assert_is(leaf, *expected(array, 0.02))
    assert sum(leaf.weights) == math.prod(shape)


@pytest.mark.parametrize(
    ("name", "piece"),
    by_turns(
        ["nf4, blocks", "nf4, blocks across rows, cut short", "fp4, channels"], [24, 100, 240]
    ),
)
def test_large_leaves_are_counted_piece_by_piece(name, piece, monkeypatch):
    array = GRIDS[name](normal(2, 7, 24))  # of 1, 4 and 7 rows
    few = functools.partial(implicit.sum_over_rows, most=piece)
    monkeypatch.setattr(diagnosis, "sum_over_rows", few)
    diagnosis._count.clear_cache()
    (leaf,) = zq.diagnose(array, 0.1).leaves
    assert_is(leaf, *expected(array, 0.1))
    stack = GRIDS["nf4, blocks"](normal(3, 3, 5, 24))
    assert_is(zq.diagnose(stack, 0.1).leaves[0], *expected(stack, 0.1))
    diagnosis._count.clear_cache()


def test_blocks_of_zeros_collapse_and_negative_scales_count_as_positive():
    values = normal(4, 4, 16).at[1].set(0.0)
    array = zq.nf4(block=16)(values)
    for unit in ("values", "half_range"):
        (leaf,) = zq.diagnose(array, 0.1, unit=unit).leaves
        assert_is(leaf, *expected(array, 0.1, unit))
        assert leaf.weights.collapsed >= 16
    turned = dataclasses.replace(array, scale=-array.scale)
    assert zq.diagnose(turned, 0.1).leaves == zq.diagnose(array, 0.1).leaves


def test_what_it_needs_besides_the_codes_does_not_grow_with_the_leaf():
    def temporary(rows):
        array = jax.eval_shape(zq.nf4(), jax.ShapeDtypeStruct((rows, 2048), jnp.float32))
        count = diagnosis._count.lower(array, jnp.float32(0.1), "values")
        count = count.compile(compiler_options=NORMALLY)
        return count.memory_analysis().temp_size_in_bytes

    assert temporary(2**16) < 1.1 * temporary(2**10)


def test_the_table_has_two_lines_for_each_trained_leaf():
    codes = jnp.asarray(zq.nf4().grid.levels, jnp.float32).reshape(2, 8)
    params = {
        "a": zq.nf4(block=None)(codes),
        "frozen": zq.freeze(zq.nf4(block=None)(codes)),
        "float": codes,
        "uniform": zq.Quantizer(2, range=1.5)(jnp.array([-1.0, 0.0, 0.0, 1.0])),
    }
    told = zq.diagnose(params, 0.15)
    assert str(told).splitlines() == [
        "leaf         shape  of       collapsed  one-sided   clean    wide  at edge",
        "['a']        2x8    codes        6.2 %     12.5 %  25.0 %  56.2 %",
        "                    weights      6.2 %     12.5 %  25.0 %  56.2 %   12.5 %",
        "['uniform']  4      codes      100.0 %      0.0 %   0.0 %   0.0 %",
        "                    weights    100.0 %      0.0 %   0.0 %   0.0 %   50.0 %",
    ]
    assert isinstance(told, zq.Diagnosis) and (told.radius, told.unit) == (0.15, "values")
    assert told.leaves[0].codes.shares == (1 / 16, 2 / 16, 4 / 16, 9 / 16)


@pytest.mark.parametrize(
    ("params", "options", "message"),
    [
        (None, {"radius": 0.0}, "radius must be positive and finite, got 0.0"),
        (None, {"radius": math.inf}, "radius must be positive and finite, got inf"),
        (None, {"unit": "codes"}, "unit must be one of .*, got 'codes'"),
        ({"w": jnp.zeros(2)}, {}, "params must hold a QuantizedArray that is not frozen"),
    ],
)
def test_what_cannot_be_diagnosed_is_refused(untyped, params, options, message):
    params = zq.Quantizer()(jnp.ones(3)) if params is None else params
    with pytest.raises(ValueError, match=message):
        zq.diagnose(params, **{"radius": 0.1, **options})


@pytest.mark.parametrize(("bits", "size"), [(4, None), (8, None), (8, 0.03)])
def test_what_is_said_of_a_step_that_sizes_itself_is_what_it_probes(bits, size):
    """As many coordinates, on average, by as many codes."""
    params = {"w": zq.Quantizer(bits)(normal(0, 64, 256))}
    (leaf,) = zq.diagnose(params, "auto", size=size).leaves
    tx = zq.zoqo(key=jax.random.key(0), num_queries=32)
    state = tx.init(params)
    if size is not None:
        sizes = state.sizes._replace(probed=jnp.full(32, size))
        state = state._replace(sizes=sizes)
    draws = [tx.probes(state, params, query)[0].draw(params["w"]) for query in range(32)]
    u = np.abs(np.stack(draws)).reshape(32, -1)
    share = 1 - leaf.weights.shares[0]
    np.testing.assert_allclose((u != 0).mean(), share, rtol=0.1)
    assert bool(leaf.weights.wide) == bool((u > 1).any())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"radius": "far"}, "radius must be one of"),
        ({"radius": 0.1, "size": 0.1}, "size=0.1 needs radius='auto'"),
        ({"radius": "auto", "size": 0.0}, "size must be positive"),
    ],
)
def test_sizes_are_for_steps_that_size_themselves(arguments, words):
    with pytest.raises(ValueError, match=words):
        zq.diagnose({"w": zq.Quantizer(4)(normal(0, 4, 4))}, **arguments)
