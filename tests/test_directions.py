"""Directions: distributions, what they cost in random words, sums, and the grid's edges."""

import dataclasses
import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from choosing import by_turns
from hypothesis import strategies as st
from scipy import stats
from statistical import (
    assert_binomial,
    assert_identity_covariance,
    assert_uncorrelated,
    random_words,
)

import zoqo_jax as zq
from zoqo_jax import Grid, Quantizer, directions
from zoqo_jax.grids import companders
from zoqo_jax.xla import random_bits

KEY = jax.random.key(0)
LAWS = ["uniform", "gaussian", "rademacher"]
STRUCTURES = ["dense", "rank_one", "sparse"]
GRIDS = {
    2: Grid(tuple(map(float, range(4))), 0, 3),
    4: Grid(tuple(map(float, range(16))), 0, 15),
    8: Grid(tuple(map(float, range(256))), 0, 255),
}


def centred(shape, bits=8, seed=0):
    """An array with codes all over its grid, 0 to 2^bits - 1, and one scale."""
    codes = np.random.default_rng(seed).integers(0, 2**bits, size=shape)
    scale = jnp.ones((1,) * len(shape), jnp.float32)
    return zq.QuantizedArray.from_codes(jnp.asarray(codes, jnp.uint8), scale, None, GRIDS[bits])


def sample(array, key, width, **choices):
    return directions.describe(key, array, width, **choices).draw(array)


# Laws


def law(name, m, width):
    """k and p(k), from the paper's formulas."""
    k = np.arange(-m, m + 1)
    weight = {
        "uniform": np.ones(k.size),
        "gaussian": np.exp(-(k**2) / (2 * width**2)),
        "rademacher": (np.abs(k) == m).astype(float),
    }[name]
    return k, weight / weight.sum()


@pytest.mark.parametrize(("name", "bits"), by_turns(LAWS, [8, 4]))
def test_entries_have_the_laws_frequencies(name, bits):
    """Chi-square against p(k), for reaches from one code to the width of the grid."""
    array = centred((400, 500), bits)
    drawn = jax.jit(functools.partial(sample, distribution=name))
    widths = [0.4, 1.0, 2.0, 3.7, 7.0, 15.0] + [42.9, 127.0, 255.0, 400.0] * (bits == 8)
    for index, width in enumerate(widths):
        m = min(max(int(width), 1), 2**bits - 1)
        u = np.asarray(drawn(array, jax.random.key(index), jnp.float32(width))).ravel()
        k, p = law(name, m, width)
        assert np.abs(u).max() <= m
        counts = np.bincount(u + m, minlength=k.size)
        assert (counts[p == 0] == 0).all()
        assert stats.chisquare(counts[p > 0], p[p > 0] * u.size).pvalue > 1e-4, width
        assert_binomial((u > 0).sum(), (u != 0).sum(), 0.5)
        if name != "rademacher":
            assert (u == 0).any()


def test_reach_is_the_floor_of_mu_over_s():
    """max(floor(mu / s), 1), where decimals that are k steps long count as k."""
    grid = GRIDS[8]
    k = np.arange(1, 256)
    for step in (0.6 / 255, 2 / 255, 16 / 255 / 255, 0.001, 0.1, 1 / 3, 0.0117):
        s = np.float32(step)
        for mu in ((k * step).astype(np.float32), k.astype(np.float32) * s):
            m = directions.radius_in_codes(jnp.asarray(mu) / jnp.asarray(s), grid)
            np.testing.assert_array_equal(m, k)
    below = jnp.asarray(k - 1e-3, jnp.float32)
    np.testing.assert_array_equal(directions.radius_in_codes(below, grid), np.maximum(k - 1, 1))
    wide = jnp.asarray([1e-6, 255.5, 1e9, np.inf], jnp.float32)
    np.testing.assert_array_equal(directions.radius_in_codes(wide, grid), [1, 255, 255, 255])
    assert directions.radius_in_codes(jnp.float32(99), Grid(grid.levels[:4], 1, 3)) == 2


@pytest.mark.parametrize("name", ["uniform", "rademacher"])
def test_every_block_has_its_own_reach(name):
    largest = np.array([1.0, 0.5, 0.1])
    scale = jnp.asarray(np.tile(2 * largest / 255, (50, 1)), jnp.float32)
    codes = jnp.full((50, 3 * 64), 128, jnp.uint8)
    array = zq.QuantizedArray.from_codes(codes, scale, None, GRIDS[8], (-1, 64))
    mu = 0.03
    drawn = jax.jit(functools.partial(sample, distribution=name, unit="values"))
    u = np.abs(drawn(array, KEY, mu)).reshape(50, 3, 64)
    np.testing.assert_array_equal(u.max(axis=(0, 2)), [3, 7, 38])
    if name == "rademacher":
        np.testing.assert_array_equal(u.min(axis=(0, 2)), [3, 7, 38])


# Keys


@pytest.mark.parametrize(
    ("name", "structure"),
    [
        ("uniform", "rank_one"),
        ("gaussian", "dense"),
        ("rademacher", "sparse"),
        ("gaussian", "paired"),
    ],
)
def test_a_direction_is_made_from_its_key_alone(name, structure):
    """Not from codes, not from the program it is part of, not from 64-bit mode."""
    array, other = centred((6, 40)), centred((6, 40), seed=1)
    density = 0.3 if structure in ("sparse", "paired") else 1.0
    choices = {"distribution": name, "structure": structure, "density": density, "dithered": True}
    compiled = jax.jit(functools.partial(sample, **choices))
    for width in (jnp.float32(0.7), jnp.float32(5.3)):
        u = np.asarray(compiled(array, KEY, width))
        np.testing.assert_array_equal(compiled(array, KEY, width), u)
        np.testing.assert_array_equal(compiled(other, KEY, width), u)
        assert (compiled(array, jax.random.key(1), width) != u).any()

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def both_sides(side, width):  # as a query draws it
        return directions.describe(KEY, array, width, **choices).flipped(side).draw(array)

    sides = both_sides(jnp.asarray([1, -1, 0], jnp.int8), width)
    np.testing.assert_array_equal(sides, [u, -u, 0 * u])
    if name != "uniform":  # all integers, and the words are the gaussian's
        with jax.enable_x64(True):
            np.testing.assert_array_equal(compiled(array, KEY, width), u)


@pytest.mark.parametrize(
    ("structure", "layout", "bits"),
    [
        ("rank_one", {"block": 4}, 8),
        ("rank_one", {"block": 4}, 2),  # blocks that straddle the parts of the last axis
        ("sparse", {"axis": 0}, 8),
        ("sparse", {"block": 8}, 4),
        ("paired", {"block": 8}, 4),
        ("dense", {"block": 3, "axis": 1}, 8),
        ("dense", {"axis": 0}, 4),
    ],
)
def test_a_slice_of_a_stack_draws_what_the_stack_draws(structure, layout, bits):
    """So that a scan over layers sees the direction that the update moves along."""
    x = np.random.default_rng(0).normal(size=(3, 4, 40))
    array = jax.jit(Quantizer(bits, range=1.0, **layout))(jnp.asarray(x, jnp.float32))
    assert array.per_byte == 8 // bits
    radius = 6 * array.step.max()
    if len(array.scale) == 3:
        layers = jnp.arange(1, 4, dtype=jnp.float32).reshape(3, 1, 1)
        array = dataclasses.replace(array, scale=array.scale * layers)
    density = 0.3 if structure in ("sparse", "paired") else 1.0
    describe = functools.partial(
        directions.describe, unit="values", structure=structure, density=density
    )
    direction = jax.jit(describe)(KEY, array, radius)
    drawn = jax.jit(lambda direction, array: direction.draw(array))
    whole = drawn(direction, array)

    def sliced(tree, i):
        return jax.tree.map(
            lambda leaf: leaf[i if leaf.shape[0] == 3 else 0] if leaf.ndim else leaf, tree
        )

    for i in range(3):
        np.testing.assert_array_equal(drawn(sliced(direction, i), sliced(array, i)), whole[i])


# Structures


def of(distribution, structure="dense", **more):
    return {"distribution": distribution, "structure": structure, **more}


@pytest.mark.parametrize(
    ("bits", "choices", "words"),
    [
        (8, of("rademacher"), 64 * 3),
        (4, of("rademacher"), 64 * 2 * 2),  # two for either part
        (8, of("rademacher", "rank_one"), 3 + 64),  # a row of signs, a column
        (8, of("uniform"), 64 * 96),
        (4, of("gaussian"), 64 * 96),
        (8, of("uniform", "rank_one"), 96 + 64),
        # A place and a sign for every cell, and words for whether it is in the support.
        (8, of("rademacher", "sparse", density=0.375), 64 * (48 + 2 + 2 * 2)),
        (8, of("uniform", "sparse", density=1 / 16), 64 * (8 + 8 + 8)),
        (8, of("rademacher", "sparse", density=2.0**-11), 64 * (1 + 1 + 1)),
        (8, of("rademacher", "sparse", density=0.5), 64 * 3 * (1 + 1)),
        (8, of("rademacher", "sparse", density=0.7), 64 * 3 * (1 + 24)),
    ],
)
def test_random_words_of_a_direction(bits, choices, words, monkeypatch):
    array = centred((64, 96), bits)
    digits = {0.375: 2, 0.5: 1, 0.7: 24}.get(choices.get("density"), 0)
    drawn = functools.partial(sample, array, width=1.0, **choices)
    assert random_words(drawn, KEY, monkeypatch=monkeypatch, rounds=digits) == words


@pytest.mark.parametrize("shape", [(7, 40), (8, 40), (3, 8, 40), (1, 40), (40,)])
def test_rows_of_a_paired_direction_are_each_others_opposites(shape):
    """All but those, two at most, that are their own partners; and each is as a sparse one."""
    array = centred(shape, bits=4)
    u = np.asarray(sample(array, KEY, 2.0, structure="paired", density=0.25))
    assert 0.1 < (u != 0).mean() < 0.4
    for layer in u.reshape(-1, *(1, *shape)[-2:]):
        opposite = [(layer == -row).all(axis=1).any() for row in layer]
        assert len(layer) - sum(opposite) <= 2


@pytest.mark.parametrize(("name", "bits"), by_turns(["uniform", "rademacher"], [8, 4, 2]))
def test_a_rank_one_direction_is_a_row_times_signs(name, bits):
    drawn = jax.jit(functools.partial(sample, distribution=name, structure="rank_one"))
    u = np.asarray(drawn(centred((30, 20), bits), KEY, 9.0))
    assert np.linalg.matrix_rank(u) == 1
    assert ((u == u[0]).all(1) | (u == -u[0]).all(1)).all()
    assert 0 < (u == u[0]).all(1).sum() < 30


@pytest.mark.parametrize(
    ("shape", "bits"), [((6, 5), 8), ((3, 4, 5), 8), ((2, 3, 8), 4), ((7,), 8)], ids=str
)
def test_entries_of_a_rank_one_direction_are_uncorrelated(shape, bits):
    """E[r r^T] = I: for a matrix all 435 pairs of entries, for a stack pairs across slices too."""
    drawn = functools.partial(sample, distribution="rademacher", structure="rank_one")
    drawn = jax.jit(jax.vmap(drawn, in_axes=(None, 0, None)))
    r = np.asarray(drawn(centred(shape, bits), jax.random.split(KEY, 20_000), 1.0))
    assert_identity_covariance(r.reshape(20_000, -1).astype(float))


@pytest.mark.parametrize("name", ["uniform", "rademacher"])
def test_slices_of_a_rank_one_stack_share_a_row_but_no_signs(name):
    drawn = jax.jit(functools.partial(sample, distribution=name, structure="rank_one"))
    u = np.asarray(drawn(centred((50, 4, 64)), KEY, 3.0))
    assert np.linalg.matrix_rank(u.reshape(200, 64)) == 1
    some = np.flatnonzero(u[0, 0])[0]
    signs = np.sign(u[:, :, some])
    columns = signs * signs[:, :1]
    assert len(np.unique(columns, axis=0)) == 8  # every pattern of three signs
    assert set(np.unique(signs[:, 0])) == {-1, 1}


@pytest.mark.parametrize(
    ("bits", "boundary", "layout"),
    [
        (8, "clamp", {}),
        (8, "mask", {"block": 7, "axis": 0}),
        (4, "mask", {"axis": 0}),
        (2, "mask", {"block": 16}),
        (4, "reflect", {"block": 6}),
    ],
)
def test_weighted_signs_are_the_sum_of_weighted_directions(bits, boundary, layout):
    """For weights like `queries.differences`, to the bit: the library's update of many queries."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(15, 36)), jnp.float32)
    array = jax.jit(Quantizer(bits, **layout))(x)
    weights = jnp.asarray(rng.integers(-(2**15), 2**15, 9), jnp.float32) * 2.0**-20
    scale = array.scale * jnp.asarray(rng.uniform(0.1, 1, size=array.scale.shape), jnp.float32)
    array = dataclasses.replace(array, scale=scale)
    radius = 0.02 * 2**bits * scale.max()

    @jax.jit
    @functools.partial(jax.vmap, in_axes=0)
    def describe(key):
        choices = {"distribution": "rademacher", "structure": "rank_one", "boundary": boundary}
        return directions.describe(key, array, radius, unit="values", **choices)

    @jax.jit
    def add_up(described, weights):
        sums = []
        for i, piece in enumerate(array.parts):

            def of_query(query, i=i, piece=piece):
                of_one = jax.tree.map(lambda leaf: leaf[query], described)
                return of_one.part(i, array), piece

            sums.append(directions.RankOne.direction_sum(of_query, weights, "product"))
        return jnp.concatenate(sums, axis=-1)

    described = describe(jax.random.split(KEY, 9))
    together = add_up(described, weights)
    drawn = jax.jit(jax.vmap(lambda direction: direction.draw(array)))(described)
    expected = np.tensordot(np.asarray(weights, np.float64), np.asarray(drawn, np.int64), 1)
    assert expected.any()
    np.testing.assert_array_equal(together, expected)


@pytest.mark.parametrize(
    ("density", "shape"),
    [(2.0**-11, (400, 1000)), (0.01, (40_000, 10)), (0.3, (300, 1000)), (4e-6, (20_000, 500))],
    ids=str,
)
def test_a_sparse_support_has_its_density(density, shape):
    drawn = functools.partial(sample, **of("rademacher", "sparse", density=density))
    u = np.asarray(jax.jit(drawn)(centred(shape), KEY, 1.0))
    assert_binomial(np.count_nonzero(u), u.size, density)
    assert_binomial((u > 0).sum(), np.count_nonzero(u), 0.5)


@pytest.mark.parametrize(
    ("density", "cell", "bits"),
    [(0.375, 2, 8), (1 / 4, 3, 8), (1 / 4, 3, 4), (0.07, 10, 8), (0.07, 10, 2), (0.0074, 101, 8)],
)
def test_at_most_one_place_in_every_cell_is_in_the_support(density, cell, bits):
    """Each is as likely as the others and says nothing of other cells or rows."""
    rows = 4_000
    columns = 3 * cell + cell // 2
    columns -= columns % (8 // bits)
    array = centred((rows, columns), bits)
    choices = {"distribution": "rademacher", "structure": "sparse", "density": density}
    assert directions.describe(KEY, array, 1.0, **choices).cell == cell
    u = np.asarray(jax.jit(functools.partial(sample, **choices))(array, KEY, 1.0))
    kept, places = [], []
    for part in np.split(u != 0, 8 // bits, axis=-1):
        full = part.shape[1] // cell
        cells = part[:, : full * cell].reshape(rows, full, cell)
        assert (cells.sum(axis=-1) <= 1).all()
        kept.append(cells.any(axis=-1))
        places += [cells[cells[:, i].any(axis=-1), i].argmax(axis=-1) for i in range(full)]
        cut = part[:, full * cell :]
        assert (cut.sum(axis=-1) <= 1).all()
        assert_binomial(cut.sum(), rows, density * cut.shape[1])
    kept = np.concatenate(kept, axis=-1)
    for place in places:
        assert stats.chisquare(np.bincount(place, minlength=cell)).pvalue > 1e-4
    if kept.size:  # else a part is shorter than a cell
        assert_binomial(kept.sum(), kept.size, density * cell)
        assert_uncorrelated(np.concatenate([kept[:-1], kept[1:]], axis=-1).astype(float))


@pytest.mark.parametrize(("density", "cell"), [(1.0, 1), (0.7, 1), (0.5, 1), (2.0**-30, 2**16)])
def test_cells_are_as_long_as_the_density_allows(density, cell):
    direction = directions.describe(KEY, centred((2, 4)), 1.0, structure="sparse", density=density)
    assert direction.cell == cell
    share = 1.0 if direction.share is None else direction.share.item()
    assert share == pytest.approx(density * cell)


@pytest.mark.parametrize("name", LAWS)
def test_entries_of_a_sparse_support_have_the_law_and_are_uncorrelated(name):
    """Whether the support's places were known or drawn entry by entry."""
    cell, width = 4, 3.0
    k, p = law(name, 3, width)

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def drawn(key, density):
        array = centred((2, 2 * cell))
        known = sample(array, key, width, **of(name, "sparse", density=1 / cell))
        return known, sample(array, key, width, **of(name, "sparse", density=density))

    for u in drawn(jax.random.split(KEY, 20_000), jnp.float32(1 / cell)):
        u = np.asarray(u).reshape(20_000, -1)
        counts = np.bincount(u.ravel() + 3, minlength=7)
        expected = p / cell
        expected[k == 0] += 1 - 1 / cell
        assert (counts[expected == 0] == 0).all()
        for hits, chance in zip(counts, expected, strict=True):
            assert_binomial(hits, u.size, chance)
        assert_uncorrelated(u)


def test_places_in_a_row_with_blocks_have_their_own_blocks_reach():
    """The width that counts is that where the entry is, even at the end of a row."""
    scale = jnp.asarray(np.tile([1.0, 0.5, 0.25, 0.125], (3_000, 1)), jnp.float32)
    codes = jnp.full((3_000, 22), 128, jnp.uint8)
    array = zq.QuantizedArray.from_codes(codes, scale, None, GRIDS[8], (-1, 6))
    choices = of("rademacher", "sparse", density=0.2, unit="values")
    u = np.abs(jax.jit(functools.partial(sample, **choices))(array, KEY, 3.0))
    reach = np.repeat([3, 6, 12, 24], 6)[:22]
    assert ((u == 0) | (u == reach)).all()
    assert (u.max(axis=0) == reach).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_traced_density_is_kept(bits):
    array = centred((400, 1000), bits)
    drawn = jax.jit(
        lambda density: sample(
            array, KEY, 1.0, distribution="rademacher", structure="sparse", density=density
        )
    )
    for density in (0.0, 2.0**-20, 2.0**-11, 0.01, 0.7, 1.0):
        assert_binomial(np.count_nonzero(drawn(jnp.float32(density))), 400_000, density)


# Dither


@pytest.mark.parametrize("name", ["uniform", "rademacher"])
def test_a_dithered_probe_below_one_code_is_kept_with_probability_mu_over_s(name):
    array = centred((400, 500), 4)
    drawn = jax.jit(functools.partial(sample, distribution=name, dithered=True))
    for width in (0.05, 0.4, 1.0, 3.0):
        u = np.asarray(drawn(array, KEY, jnp.float32(width)))
        k, p = law(name, max(int(width), 1), width)
        assert_binomial(np.count_nonzero(u), u.size, min(width, 1.0) * (1 - p[k == 0].sum()))


@functools.cache
def dithered_by_row():
    codes = jnp.zeros((255, 2000), jnp.uint8)
    scale = jnp.ones((255, 1), jnp.float32)
    array = zq.QuantizedArray.from_codes(codes, scale, None, GRIDS[8])
    rows, reach = random_bits.rows(KEY, (255,)), jax.jit(directions.dithered_steps)
    return lambda width: np.asarray(reach(rows, jnp.asarray(width, jnp.float32), array))


def test_a_dithered_reach_is_its_width_on_average():
    width = np.array([0.01, 0.5, 1.0, 2.3, 41.75], np.float32)
    steps = dithered_by_row()(np.repeat(width, 51)[:, None]).reshape(5, -1)
    for row, mean in zip(steps, width, strict=True):
        whole = int(np.floor(mean))
        assert set(np.unique(row)) <= {whole, whole + 1}
        assert_binomial((row - whole).sum(), row.size, mean - whole)


def test_a_dithered_reach_that_is_whole_is_hardly_random():
    """eta = k s moves k codes, though the float32 quotient may miss k by an ulp."""
    k = np.arange(1, 256)[:, None]
    s = np.float32(0.6 / 255)
    steps = dithered_by_row()((k * (0.6 / 255)).astype(np.float32) / s)
    assert (steps == k).mean() > 0.9999


# The grid's edges


def reflected(n, low, high):
    """Bounce off the edges as a ball does."""
    while not low <= n <= high:
        n = 2 * high - n if n > high else 2 * low - n
    return n


@pytest.mark.parametrize(
    "grid", [Grid((0.0, 1.0), 0, 1), Grid(GRIDS[4].levels, 1, 14), GRIDS[4]], ids=str
)
def test_every_displacement_of_every_code_obeys_its_boundary(grid):
    low, high = grid.low, grid.high
    pairs = list(itertools.product(range(low, high + 1), range(low - high, high - low + 1)))
    n, u = (jnp.asarray(column, jnp.int32) for column in zip(*pairs, strict=True))
    moved = {
        how: directions.displace(n, u, grid, how).tolist() for how in ("clamp", "mask", "reflect")
    }
    assert moved["clamp"] == np.clip(n + u, low, high).tolist()
    assert moved["reflect"] == [reflected(n + u, low, high) for n, u in pairs]
    fits = [low <= n - abs(u) and n + abs(u) <= high for n, u in pairs]
    assert moved["mask"] == [n + u if fit else n for (n, u), fit in zip(pairs, fits, strict=True)]


GRIDDED = {  # a quantizer for its grid, and where its scales stand
    "uniform": (Quantizer(8, range=1.0), lambda shape: ((1,) * len(shape), None)),
    "4 bits by rows": (Quantizer(4), lambda shape: (shape[:-1] + (1,) * len(shape[-1:]), None)),
    "3 bits by blocks": (
        Quantizer(3),
        lambda shape: (shape[:-1] + (3,) * len(shape[-1:]), (-1, 4)),
    ),
    "coarse": (Quantizer(2, range="minmax"), lambda shape: ((1,) * len(shape), None)),
    "nf4": (zq.nf4(), lambda shape: (shape[:-1] + (3,) * len(shape[-1:]), (-1, 4))),
    "mu_law": (Quantizer(8, companders.mu_law()), lambda shape: (shape, None)),
}


@hypothesis.settings(max_examples=10)
@hypothesis.given(
    kind=st.sampled_from(sorted(GRIDDED)),
    shape=st.sampled_from([(), (2, 3, 9), (2, 3, 12)]),
    name=st.sampled_from(LAWS),
    structure=st.sampled_from(STRUCTURES),
    boundary=st.sampled_from(["clamp", "mask", "reflect"]),
    width=st.sampled_from([0.3, 1.0, 2.5, 7.0, 300.0]),
    dithered=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_no_direction_leaves_the_grid(
    kind, shape, name, structure, boundary, width, dithered, seed
):
    rng = np.random.default_rng(seed)
    quantizer, layout = GRIDDED[kind]
    grid, (scales, block) = quantizer.grid, layout(shape)
    low, high = grid.low, grid.high
    n = rng.integers(low, high + 1, size=shape)
    scale = jnp.asarray(rng.uniform(0.5, 2.0, size=scales), jnp.float32)
    array = zq.QuantizedArray.from_codes(
        jnp.asarray(n, jnp.uint8), scale, None, grid, block if shape else None
    )
    direction = directions.describe(
        jax.random.key(seed),
        array,
        width,
        unit="values",
        distribution=name,
        structure=structure,
        boundary=boundary,
        density=0.5 if structure == "sparse" else 1.0,
        dithered=dithered,
    )
    u = direction.draw(array)
    assert u.shape == shape and u.dtype == jnp.int16
    assert np.abs(u).max() <= np.clip(np.floor(np.max(width / array.step)), 1, high - low)
    plus = np.asarray(directions.displace(array.codes, u, array.grid, boundary))
    minus = np.asarray(directions.displace(array.codes, -u, array.grid, boundary))
    assert plus.dtype == minus.dtype == np.int16
    u = np.asarray(u)
    assert (low <= plus).all() and (plus <= high).all()
    assert (low <= minus).all() and (minus <= high).all()
    if boundary == "clamp":
        np.testing.assert_array_equal(plus, np.clip(n + u, low, high))
        np.testing.assert_array_equal(minus, np.clip(n - u, low, high))
    elif boundary == "reflect":
        bounce = np.vectorize(functools.partial(reflected, low=low, high=high))
        np.testing.assert_array_equal(plus, bounce(n + u))
        np.testing.assert_array_equal(minus, bounce(n - u))
    else:  # nothing was clipped: both ends are exactly n + u and n - u
        np.testing.assert_array_equal(plus, n + u)
        np.testing.assert_array_equal(minus, n - u)


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)], ids=str)
def test_an_empty_array_has_an_empty_direction(shape):
    array = jax.jit(Quantizer(4, block=3))(jnp.zeros(shape, jnp.float32))
    for structure in STRUCTURES:
        density = 0.1 if structure == "sparse" else 1.0
        drawn = functools.partial(sample, structure=structure, density=density, dithered=True)
        assert jax.jit(drawn)(array, KEY, 1.0).shape == shape
    part = array.parts[0]
    width, rows = jnp.ones(part.scale.shape, jnp.float32), random_bits.rows(KEY, shape[:-1])
    assert jax.jit(directions.dithered_steps)(rows, width, part).shape == part.shape


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        (("normal", "dense", "clamp", 1.0), r"noise must be one of .*uniform.*, got 'normal'\."),
        (("uniform", "low_rank", "clamp", 1.0), r"structure must be one of .* got 'low_rank'\."),
        (("uniform", "dense", "wrap", 1.0), r"boundary must be one of .* got 'wrap'\."),
        (("uniform", "sparse", "clamp", 0.0), r"density must be in \(0, 1\], got 0\.0\."),
        (("uniform", "sparse", "clamp", 1.5), r"density must be in \(0, 1\], got 1\.5\."),
        (("uniform", "sparse", "clamp", float("nan")), r"density must be in \(0, 1\], got nan\."),
        (
            ("uniform", "dense", "clamp", 0.5),
            r"density=0\.5 needs structure='sparse', got .*'dense'",
        ),
    ],
)
def test_bad_choices_are_named_with_their_value(choices, message):
    with pytest.raises(ValueError, match=message):
        directions.check(*choices)


@pytest.mark.parametrize("method", ["zoqo", "caq_zo"])
def test_a_scheduled_density_is_that_of_its_step(method):
    def density(count):
        return 2.0**-4 / (1.0 + jnp.float32(count))

    array = zq.Quantizer(4, block=32)(jax.random.normal(jax.random.key(0), (256, 512)))
    rates = {"learning_rate": 1.0, **({"radius": 1e-3} if method == "zoqo" else {})}
    settings = {"key": jax.random.key(1), "structure": "sparse", **rates}
    extra = {"noise": "rademacher"} if method == "zoqo" else {"boundary": "clamp"}
    tx = getattr(zq, method)(density=density, **settings, **extra)
    state = tx.init(array)

    @jax.jit
    def share(state):
        (direction,) = tx.probes(state, array)
        return (direction.draw(array) != 0).mean()

    for count in (0, 1, 7):
        found = float(share(state._replace(count=jnp.int32(count))))
        expected = float(density(count))
        assert abs(found - expected) < 5 * (expected / array.size) ** 0.5
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 2.0"):
        getattr(zq, method)(density=lambda count: 2.0, **settings)


def test_a_negative_scale_probes_as_far_as_a_positive_one():
    """GGUF's Q4_0 has such scales: the value of largest size is its block's lowest level."""
    positive = zq.Quantizer(8, block=4, range=1.0)(jnp.zeros((2, 8)))
    negative = dataclasses.replace(positive, scale=-positive.scale)
    drawn = [
        directions.describe(jax.random.key(0), array, 0.1, unit="values").draw(array)
        for array in (positive, negative)
    ]
    assert jnp.abs(drawn[0]).max() > 1
    np.testing.assert_array_equal(*drawn)
