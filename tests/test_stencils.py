"""Stencils: the laws of directions, what they cost in random words, and the grid's edges."""

import functools
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import stats

import zoqo_jax as zq
from zoqo_jax import Grid, Quantizer, companders, stencils

KEY = jax.random.key(0)
LAWS = ["uniform", "gaussian", "rademacher"]
STRUCTURES = ["dense", "rank_one", "sparse"]
GRIDS = {
    4: Grid(tuple(map(float, range(16))), 0, 15),
    8: Grid(tuple(map(float, range(256))), 0, 255),
}


def centred(shape, bits=8, seed=0):
    """An array with codes all over its grid, 0 to 2^bits - 1, and one scale."""
    codes = np.random.default_rng(seed).integers(0, 2**bits, size=shape)
    codes = jnp.asarray(codes, jnp.uint4 if bits <= 4 else jnp.uint8)
    scale = jnp.ones((1,) * len(shape), jnp.float32)
    return zq.QuantizedArray(codes, scale, None, GRIDS[bits], None, jnp.dtype(jnp.float32))


def sample(array, key, width, **choices):
    return stencils.draw(stencils.describe(key, array, width, **choices), array)


def random_words(function, *args, rounds=1):
    """How many 32-bit random words a function draws whose loops make so many rounds."""

    def count(jaxpr):
        total = 0
        for equation in jaxpr.eqns:
            if equation.primitive.name == "random_bits":
                assert equation.params["bit_width"] == 32
                total += equation.outvars[0].aval.size
            for name, times in (("jaxpr", 1), ("body_jaxpr", rounds)):
                if name in equation.params:
                    total += times * count(equation.params[name].jaxpr)
        return total

    return count(jax.make_jaxpr(function)(*args).jaxpr)


def assert_binomial(hits, trials, probability):
    """Within 4.5 standard errors (one false alarm in 150,000, were the keys not fixed)."""
    error = 4.5 * np.sqrt(trials * probability * (1 - probability))
    assert abs(hits - trials * probability) <= error, (hits, trials * probability)


def assert_identity_covariance(draws):
    """Every coordinate has variance 1, every pair of coordinates no correlation."""
    covariance = draws.T @ draws / len(draws)
    error = np.abs(covariance - np.eye(draws.shape[1])).max()
    assert error < 5 / np.sqrt(len(draws))


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


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", LAWS)
def test_entries_have_the_laws_frequencies(name, bits):
    """Chi-square against p(k), for reaches from one code to the width of the grid."""
    array = centred((400, 500), bits)
    draws = jax.jit(functools.partial(sample, law=name))
    widths = [0.4, 1.0, 2.0, 3.7, 7.0, 15.0] + [42.9, 127.0, 255.0, 400.0] * (bits == 8)
    for index, width in enumerate(widths):
        m = min(max(int(width), 1), 2**bits - 1)
        u = np.asarray(draws(array, jax.random.key(index), jnp.float32(width))).ravel()
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
            m = stencils.reach(jnp.asarray(mu) / jnp.asarray(s), grid)
            np.testing.assert_array_equal(m, k)
    below = jnp.asarray(k - 1e-3, jnp.float32)
    np.testing.assert_array_equal(stencils.reach(below, grid), np.maximum(k - 1, 1))
    wide = jnp.asarray([1e-6, 255.5, 1e9, np.inf], jnp.float32)
    np.testing.assert_array_equal(stencils.reach(wide, grid), [1, 255, 255, 255])
    assert stencils.reach(jnp.float32(99), Grid(grid.levels[:4], 1, 3)) == 2


@pytest.mark.parametrize("name", ["uniform", "rademacher"])
def test_every_block_has_its_own_reach(name):
    largest = np.array([1.0, 0.5, 0.1])
    scale = jnp.asarray(np.tile(2 * largest / 255, (50, 1)), jnp.float32)
    codes = jnp.full((50, 3 * 64), 128, jnp.uint8)
    array = zq.QuantizedArray(codes, scale, None, GRIDS[8], (-1, 64), jnp.dtype(jnp.float32))
    mu = 0.03
    draws = jax.jit(functools.partial(sample, law=name))
    u = np.abs(draws(array, KEY, mu / array.step)).reshape(50, 3, 64)
    np.testing.assert_array_equal(u.max(axis=(0, 2)), [3, 7, 38])
    if name == "rademacher":
        np.testing.assert_array_equal(u.min(axis=(0, 2)), [3, 7, 38])


# Keys


@pytest.mark.parametrize(
    ("name", "structure"),
    [("uniform", "rank_one"), ("gaussian", "dense"), ("rademacher", "sparse")],
)
def test_a_direction_is_made_from_its_key_alone(name, structure):
    """Not from codes, not from the program it is part of, not from 64-bit mode."""
    array, other = centred((6, 40)), centred((6, 40), seed=1)
    density = 0.3 if structure == "sparse" else 1.0
    choices = {"law": name, "structure": structure, "density": density, "dithered": True}
    draws = functools.partial(sample, **choices)
    compiled = jax.jit(draws)
    for width in (jnp.float32(0.7), jnp.float32(5.3)):
        u = np.asarray(compiled(array, KEY, width))
        np.testing.assert_array_equal(compiled(array, KEY, width), u)
        np.testing.assert_array_equal(compiled(other, KEY, width), u)
        assert (compiled(array, jax.random.key(1), width) != u).any()

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def both_sides(side, width):  # as a query draws it
        return stencils.draw(stencils.describe(KEY, array, width, **choices).flipped(side), array)

    sides = both_sides(jnp.asarray([1, -1, 0], jnp.int8), width)
    np.testing.assert_array_equal(sides, [u, -u, 0 * u])
    if name != "uniform":  # all integers, and the words are the gaussian's
        with jax.enable_x64(True):
            np.testing.assert_array_equal(jax.jit(draws)(array, KEY, width), u)


@pytest.mark.parametrize(
    ("structure", "layout"),
    [
        ("rank_one", {"block": 4}),
        ("sparse", {"axis": 0}),
        ("dense", {"block": 3, "axis": 1}),
    ],
)
def test_a_slice_of_a_stack_draws_what_the_stack_draws(structure, layout):
    """So that a scan over layers sees the direction that the update moves along."""
    x = np.random.default_rng(0).normal(size=(3, 4, 40))
    array = jax.jit(Quantizer(8, range=1.0, **layout))(jnp.asarray(x, jnp.float32))
    width = np.full(array.scale.shape, 2.0)
    if len(width) == 3:
        width += np.arange(3).reshape(3, 1, 1)
    density = 0.3 if structure == "sparse" else 1.0
    width = jnp.asarray(width, jnp.float32)
    describe = functools.partial(stencils.describe, structure=structure, density=density)
    stencil = jax.jit(describe)(KEY, array, width)
    draws = jax.jit(stencils.draw)
    whole = draws(stencil, array)

    def sliced(tree, i):
        return jax.tree.map(lambda leaf: leaf[i if leaf.shape[0] == 3 else 0], tree)

    for i in range(3):
        np.testing.assert_array_equal(draws(sliced(stencil, i), sliced(array, i)), whole[i])


# Signs


def test_signs_are_fair_and_uncorrelated_within_and_between_words():
    draws = np.asarray(stencils.signs(KEY, 64 * 20_000)).reshape(-1, 64)
    assert set(np.unique(draws)) == {-1, 1}
    assert_binomial((draws > 0).sum(), draws.size, 0.5)
    assert_identity_covariance(draws.astype(float))


@pytest.mark.parametrize(("count", "words"), [(0, 0), (1, 1), (32, 1), (33, 2), (1000, 32)])
def test_a_word_makes_32_signs(count, words):
    assert random_words(lambda key: stencils.signs(key, count), KEY) == words
    assert jax.eval_shape(lambda: stencils.signs(KEY, count)).shape == (count,)


@pytest.mark.parametrize(
    ("bits", "choices", "words"),
    [
        (8, {"law": "rademacher"}, 64 * 3),
        (4, {"law": "rademacher"}, 64 * 3),
        (8, {"law": "rademacher", "structure": "rank_one"}, 3 + 2),  # a row of signs, a column
        (8, {"law": "uniform"}, 64 * 96),
        (4, {"law": "uniform"}, 64 * 48),  # two draws from a word
        (4, {"law": "gaussian"}, 64 * 48),
        (8, {"law": "uniform", "structure": "rank_one"}, 96 + 2),
        (8, {"law": "rademacher", "structure": "sparse", "density": 2.0**-11}, 64 * 3 * (1 + 11)),
        (8, {"law": "rademacher", "structure": "sparse", "density": 0.3}, 64 * 3 * (1 + 24)),
    ],
)
def test_random_words_of_a_direction(bits, choices, words):
    array = centred((64, 96), bits)
    digits = {2.0**-11: 11, 0.3: 24}.get(choices.get("density"), 0)
    assert random_words(lambda key: sample(array, key, 1.0, **choices), KEY, rounds=digits) == words


# Structures


@pytest.mark.parametrize("name", ["uniform", "rademacher"])
def test_a_rank_one_direction_is_a_row_times_signs(name):
    draws = jax.jit(functools.partial(sample, law=name, structure="rank_one"))
    u = np.asarray(draws(centred((30, 20)), KEY, 9.0))
    assert np.linalg.matrix_rank(u) == 1
    assert ((u == u[0]).all(1) | (u == -u[0]).all(1)).all()
    assert 0 < (u == u[0]).all(1).sum() < 30


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5)], ids=str)
def test_entries_of_a_rank_one_direction_are_uncorrelated(shape):
    """E[r r^T] = I: for a matrix all 435 pairs of entries, for a stack pairs across slices too."""
    draws = functools.partial(sample, law="rademacher", structure="rank_one")
    draws = jax.jit(jax.vmap(draws, in_axes=(None, 0, None)))
    r = np.asarray(draws(centred(shape), jax.random.split(KEY, 20_000), 1.0))
    assert_identity_covariance(r.reshape(20_000, -1).astype(float))


def test_slices_of_a_rank_one_stack_share_nothing():
    draws = jax.jit(functools.partial(sample, law="rademacher", structure="rank_one"))
    u = np.asarray(draws(centred((50, 4, 64)), KEY, 1.0))
    rows, columns = u[:, 0, :], u[:, :, 0] * u[:, :1, 0]
    assert len(np.unique(rows, axis=0)) == 50
    assert len(np.unique(columns, axis=0)) == 8  # every pattern of three signs


@pytest.mark.parametrize(
    ("density", "shape"), [(2.0**-11, (400, 1000)), (0.01, (40_000, 10))], ids=str
)
def test_a_sparse_support_has_its_density(density, shape):
    draws = functools.partial(sample, law="rademacher", structure="sparse", density=density)
    u = np.asarray(jax.jit(draws)(centred(shape), KEY, 1.0))
    assert_binomial(np.count_nonzero(u), u.size, density)
    assert_binomial((u > 0).sum(), np.count_nonzero(u), 0.5)


def test_a_traced_density_is_kept():
    array = centred((400, 1000))
    draws = jax.jit(
        lambda density: sample(
            array, KEY, 1.0, law="rademacher", structure="sparse", density=density
        )
    )
    for density in (0.0, 2.0**-20, 2.0**-11, 0.01, 0.7, 1.0):
        assert_binomial(np.count_nonzero(draws(jnp.float32(density))), 400_000, density)


PROBABILITIES = [0.0, 2.0**-24, 1e-5, 2.0**-11, 0.01, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1 - 2.0**-11, 1.0]


@pytest.mark.parametrize(("columns", "shared"), [(33, True), (64, False)], ids=str)
def test_bernoulli_draws_have_their_probabilities(columns, shared):
    """By bit slicing where a long row shares one probability, a word each elsewhere."""
    rows = -(-32_768 // columns)
    p = jnp.asarray(PROBABILITIES, jnp.float32)
    keys = jax.random.split(KEY, (rows, p.size))
    probability = p[:, None] if shared else jnp.broadcast_to(p[:, None], (p.size, columns))
    draws = np.asarray(jax.jit(stencils.bernoulli, static_argnums=2)(keys, probability, columns))
    assert draws.shape == (rows, p.size, columns)
    for i, probability in enumerate(PROBABILITIES):
        assert_binomial(draws[:, i].sum(), draws[:, i].size, probability)


def test_bernoulli_draws_are_independent():
    draws = stencils.bernoulli(jax.random.split(KEY, 20_000), 0.3, 64)
    assert_identity_covariance((np.asarray(draws) - 0.3) / np.sqrt(0.21))


def test_a_few_digits_suffice_for_a_dyadic_probability():
    draws = functools.partial(stencils.bernoulli, columns=320_000, digits=3)
    assert_binomial(np.asarray(draws(KEY, 5 / 8)).sum(), 320_000, 5 / 8)
    assert random_words(lambda key: draws(key, 5 / 8), KEY, rounds=3) == 3 * 10_000


# Dither


@pytest.mark.parametrize("name", ["uniform", "rademacher"])
def test_a_dithered_probe_below_one_code_is_kept_with_probability_mu_over_s(name):
    array = centred((400, 500), 4)
    draws = jax.jit(functools.partial(sample, law=name, dithered=True))
    for width in (0.05, 0.4, 1.0, 3.0):
        u = np.asarray(draws(array, KEY, jnp.float32(width)))
        k, p = law(name, max(int(width), 1), width)
        assert_binomial(np.count_nonzero(u), u.size, min(width, 1.0) * (1 - p[k == 0].sum()))


@functools.cache
def dithered_by_row():
    codes = jnp.zeros((255, 2000), jnp.uint8)
    scale = jnp.ones((255, 1), jnp.float32)
    array = zq.QuantizedArray(codes, scale, None, GRIDS[8], None, jnp.dtype(jnp.float32))
    draws = jax.jit(stencils.dithered_reach)
    return lambda width: np.asarray(draws(KEY, jnp.asarray(width, jnp.float32), array))


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
        how: stencils.displace(n, u, grid, how).tolist() for how in ("clamp", "mask", "reflect")
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


@hypothesis.settings(max_examples=25)
@hypothesis.given(
    kind=st.sampled_from(sorted(GRIDDED)),
    shape=st.sampled_from([(), (2, 3, 9)]),
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
    codes = jnp.asarray(n, jnp.uint4 if quantizer.bits <= 4 else jnp.uint8)
    array = zq.QuantizedArray(
        codes, scale, None, grid, block if shape else None, jnp.dtype(jnp.float32)
    )
    width = width / np.asarray(scale)
    stencil = stencils.describe(
        jax.random.key(seed),
        array,
        jnp.asarray(width),
        law=name,
        structure=structure,
        boundary=boundary,
        density=0.5 if structure == "sparse" else 1.0,
        dithered=dithered,
    )
    u = stencils.draw(stencil, array)
    assert u.shape == shape and u.dtype == jnp.int32
    assert np.abs(u).max() <= np.clip(np.floor(width).max(), 1, high - low)
    plus = np.asarray(stencils.displace(array.codes, u, array.grid, boundary))
    minus = np.asarray(stencils.displace(array.codes, -u, array.grid, boundary))
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
        draws = jax.jit(functools.partial(sample, structure=structure, dithered=True))
        assert draws(array, KEY, 1.0).shape == shape
    width = jnp.ones(array.scale.shape, jnp.float32)
    assert jax.jit(stencils.dithered_reach)(KEY, width, array).shape == shape


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
        stencils.check(*choices)
