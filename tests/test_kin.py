"""The kin of ZOQO and CAQ-ZO: each is its formula, and has the property that it was made for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import test_reference as runs
from statistical import assert_uncorrelated

import zoqo_jax as zq
from zoqo_jax import queries, stencils
from zoqo_jax.transforms.floats import Directions

KEY = jax.random.key(31)


def in_the_middle(shape):
    """An array of 8-bit codes far from the grid's edges, one code being 1.0."""
    return zq.Quantizer(8, range=127.5)(jnp.zeros(shape))


def mean_and_error(samples):
    """The mean of samples and its standard error."""
    samples = np.asarray(samples, np.float64)
    return samples.mean(axis=0), samples.std(axis=0) / np.sqrt(len(samples))


# CAQ-ZO's baseline: queries off the grid


@pytest.mark.parametrize(
    ("model", "num_queries", "radius", "structure"),
    [
        (runs.MODELS[0], 1, 0.125, {}),
        (runs.PACKED, 3, 0.25, {"structure": "rank_one"}),
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

    us = runs.directions(model, None, "rademacher", **structure)
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
        updates, state = tx.update(None, tx.init(params), params, value_fn=loss)
        assert (state.differences[0] != 0) == moves and updates.packed.any() == moves


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
    probes = tx.probes(tx.init(params), params)
    for sides in ("together", "in_turn"):
        pair = queries.losses(loss, params, probes, sides=sides)
        for side, actual in zip((1, -1), pair, strict=True):
            expected = loss(zq.dequantize(queries.endpoints(params, probes, side)))
            np.testing.assert_allclose(actual, expected, rtol=1e-5)
        assert abs(pair[0] - pair[1]) > 1e-3


# QuZO


def roundings(radius, noise="gaussian", seeds=4_000, **structure):
    """Both roundings of many directions, (seeds, rows, columns)."""
    array = in_the_middle((4, 6))

    def both(key):
        probed = stencils.describe(key, array, radius, law=noise, rounded=True, **structure)
        return stencils.draw(probed, array), stencils.draw(probed.rounded_again(), array)

    drawn = jax.jit(jax.vmap(both))(jax.random.split(KEY, seeds))
    return [np.asarray(u, np.float64) for u in drawn]


def rounding_variance(radius):
    """E[f (1 - f)] of the fraction f of a Gaussian of standard deviation `radius`."""
    x = np.linspace(-9 * radius, 9 * radius, 2_000_001)
    density = np.exp(-0.5 * (x / radius) ** 2)
    fraction = x - np.floor(x)
    return (density * fraction * (1 - fraction)).sum() / density.sum()


@pytest.mark.parametrize("radius", [0.3, 1.0, 2.6])
def test_roundings_are_two_of_one_gaussian_direction(radius):
    first, second = roundings(radius)
    assert np.abs(first - second).max() == 1  # either side of the same real number
    count = first.size
    noise = rounding_variance(radius)
    for product, expected in (
        (first, 0.0),
        (first * second, radius**2),
        (first**2, radius**2 + noise),
        (second**2, radius**2 + noise),
    ):
        mean, error = mean_and_error(product.reshape(count))
        assert abs(mean - expected) < 4 * error
    assert_uncorrelated(first.reshape(len(first), -1))


def test_roundings_of_signs_are_the_whole_numbers_about_the_radius():
    first, second = roundings(1.25, "rademacher")
    assert set(np.unique(first)) == {-2.0, -1.0, 1.0, 2.0}
    np.testing.assert_array_equal(np.sign(first), np.sign(second))
    mean, error = mean_and_error(np.abs(first).reshape(-1))
    assert abs(mean - 1.25) < 4 * error
    mean, error = mean_and_error((first * second).reshape(-1))
    assert abs(mean - 1.25**2) < 4 * error


@pytest.mark.parametrize("structure", ["rank_one", "sparse"])
def test_roundings_of_any_structure_agree_on_the_direction(structure):
    density = {"density": 0.4} if structure == "sparse" else {}
    first, second = roundings(2.6, structure=structure, **density)
    assert np.abs(first - second).max() == 1
    mean, error = mean_and_error((first * second).reshape(-1))
    assert abs(mean - density.get("density", 1.0) * 2.6**2) < 4 * error


SLOPES = np.array([3.0, -2.0, 0.5, 1.0])
CURVATURE = np.array(
    [[2.0, 0.5, 0.0, -0.5], [0.5, 1.0, 0.3, 0.0], [0.0, 0.3, 0.5, 0.0], [-0.5, 0, 0, 1]]
)


def quadratic(x):
    """Its slopes at 0 are SLOPES, its Hessian CURVATURE."""
    x = x.astype(jnp.float32)
    H, g = jnp.asarray(CURVATURE, jnp.float32), jnp.asarray(SLOPES, jnp.float32)
    return 0.5 * x @ H @ x + g @ x


@pytest.mark.parametrize(("radius", "num_queries"), [(0.4, 1), (0.4, 3), (1.5, 1)])
def test_quzo_moves_against_the_gradient_of_a_quadratic_on_average(radius, num_queries):
    """Within four standard errors, where going along the probed rounding would be far off."""
    params, eta = in_the_middle((4,)), 0.1
    tx = zq.quzo(eta, radius, key=KEY, num_queries=num_queries)

    @jax.jit
    @jax.vmap
    def move(key):
        state = tx.init(params)._replace(key=key)
        updates, after = tx.update(None, state, params, value_fn=quadratic)
        (probed,) = tx.probes(state, params)
        u = stencils.draw(probed, params)
        same = after.differences[0] / (2 * radius**2) * u.astype(jnp.float32)
        return updates.packed.astype(jnp.int8), -eta * same

    moves, along_the_same = move(jax.random.split(KEY, 60_000))
    mean, error = mean_and_error(moves)
    assert (abs(mean + eta * SLOPES) < 4 * error).all()
    mean, error = mean_and_error(along_the_same)
    longer = 1 + rounding_variance(radius) / radius**2
    assert (abs(mean + eta * longer * SLOPES) < 4 * error).all()
    if num_queries == 1:
        assert (abs(mean + eta * SLOPES) > 4 * error)[:2].all()


@functools.cache
def both_roundings(model, radius, **structure):
    """Q1(mu u) and Q2(mu u) of every step for each leaf, (steps, 3 queries, ...)."""
    arrays = runs.problem(model).arrays

    def one(count, query, leaf):
        key = runs.leaf_key(count, query, leaf)
        law = {"law": "gaussian", "rounded": True, **structure}
        probed = stencils.describe(key, arrays[leaf], radius, **law)
        return [
            stencils.draw(stencil, arrays[leaf]) for stencil in (probed, probed.rounded_again())
        ]

    def draw(count):
        of_query = lambda query: [one(count, query, leaf) for leaf in range(len(arrays))]  # noqa: E731
        return jax.lax.map(of_query, jnp.arange(3))

    return tuple(zip(*runs.every_step(draw), strict=True))


@pytest.mark.parametrize(
    ("model", "num_queries", "radius", "boundary", "structure"),
    [
        (runs.MODELS[0], 1, 0.5, "clamp", {}),
        (runs.PACKED, 3, 2.0, "mask", {}),
        pytest.param(
            *(runs.MODELS[1], 3, 2.0, "reflect", {"structure": "sparse", "density": 0.25}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_quzo_is_its_formula(model, num_queries, radius, boundary, structure):
    eta = runs.caq_schedule
    options = {"num_queries": num_queries, "boundary": boundary, **structure}
    tx = zq.quzo(eta, radius, key=runs.KEY, **options)
    words = runs.words_of_moves(model, num_queries)
    us, heard = both_roundings(model, radius, **structure)

    def step(count, leaves, probed):
        drawn = [[u[count, query].astype(np.int64) for u in heard] for query in range(num_queries)]
        return reference.quzo_step(
            leaves,
            probed,
            drawn,
            runs.problem(model).loss,
            lambda leaf, step: reference.stochastic(step, words[leaf][count]),
            learning_rate=runs.at(eta, count),
            radius=radius,
            boundary=boundary,
        )

    runs.assert_same_run(model, tx, num_queries, us, step)


# QZO


def blocks(scale_dtype=jnp.float32, seed=0):
    """Codes in blocks of 4, with an offset."""
    values = jnp.asarray(np.random.default_rng(seed).normal(size=(3, 8)), jnp.float32)
    return zq.Quantizer(4, range="minmax", block=4, scale_dtype=scale_dtype)(values)


TARGET = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)


def distance(array):
    """Quadratic in the scales."""
    return jnp.mean((array - jnp.asarray(TARGET)) ** 2)


def values_at(array, scale):
    """The formula, in NumPy: scale * level + offset."""
    levels = np.asarray(array.grid.levels, np.float32)[np.asarray(array.codes)]
    spread = lambda x: np.repeat(np.asarray(x, np.float32), 4, axis=-1)  # noqa: E731
    return spread(scale) * levels + spread(array.offset)


@pytest.mark.parametrize(
    ("noise", "num_queries", "clip"),
    [("gaussian", 1, None), ("gaussian", 3, 2.0), ("rademacher", 2, 2.0)],
)
def test_qzo_is_its_formula(noise, num_queries, clip):
    eta, mu = lambda count: jnp.where(count < 10, 0.002, 0.001), 0.0625
    tx = zq.qzo(eta, mu, key=KEY, noise=noise, num_queries=num_queries, clip=clip)
    params = start = blocks()
    state = tx.init(params)
    update = jax.jit(lambda params, state: tx.update(None, state, params, value_fn=distance))
    clipped = 0
    for count in range(20):
        directions = Directions(jax.random.fold_in(KEY, count), num_queries, noise)
        scale, total = np.asarray(params.scale), np.zeros(params.scale.shape, np.float32)
        updates, state = update(params, state)
        for query in range(num_queries):
            z = np.asarray(directions.draw(query, 0, params.scale))
            ends = [values_at(params, scale + side * np.float32(mu) * z) for side in (1, -1)]
            losses = [np.mean((end - TARGET) ** 2) for end in ends]
            np.testing.assert_allclose(state.losses[query], losses, rtol=1e-5)
            d = np.asarray(state.differences)[query] / np.float32(2 * mu)
            clipped += clip is not None and abs(d) > clip
            total += (d if clip is None else np.clip(d, -np.float32(clip), np.float32(clip))) * z
        moved = scale - np.float32(runs.at(eta, count)) * np.float32(1 / num_queries) * total
        assert (moved > 0).all()
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params.scale, scale + (moved - scale))
    assert clip is None or 0 < clipped < 20 * num_queries
    np.testing.assert_array_equal(params.packed, start.packed)
    np.testing.assert_array_equal(params.offset, start.offset)
    assert distance(params.materialise()) < distance(start.materialise())


@pytest.mark.parametrize("noise", ["gaussian", "rademacher"])
@pytest.mark.parametrize("scale_dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_qzo_moves_against_the_gradient_on_average_in_any_dtype(scale_dtype, noise):
    """Within four standard errors, though each step is a small part of a 16-bit scale's spacing."""
    params, eta = blocks(scale_dtype), 2e-7
    tx = zq.qzo(eta, 0.01, key=KEY, noise=noise, clip=None)

    @jax.jit
    @jax.vmap
    def move(key):
        state = tx.init(params)._replace(key=key)
        return tx.update(None, state, params, value_fn=distance)[0].scale

    moves = move(jax.random.split(KEY, 40_000))
    assert moves.dtype == scale_dtype
    mean, error = mean_and_error(moves)
    levels = np.asarray(params.grid.levels)[np.asarray(params.codes)]
    slopes = 2 / TARGET.size * (np.asarray(params.materialise()) - TARGET) * levels
    expected = -eta * slopes.reshape(3, 2, 4).sum(axis=-1)
    assert (abs(mean - expected) < 4 * error).all() and (abs(mean) > 4 * error).any()
    if scale_dtype != jnp.float32:
        bits_less = jnp.finfo(jnp.float32).nmant - jnp.finfo(scale_dtype).nmant
        spacing = np.spacing(np.asarray(params.scale, np.float32)) * 2.0**bits_less
        assert set(np.unique(np.asarray(moves, np.float32) / spacing)) == {-1.0, 0.0, 1.0}
        assert (abs(expected) < 0.1 * spacing).all()


@pytest.mark.parametrize("scale_dtype", [jnp.float32, jnp.float16])
def test_scales_of_qzo_keep_their_sign(scale_dtype):
    """Those of a file's blocks may be negative; none is carried through zero."""
    scale = jnp.asarray([[0.5], [-0.5], [0.0]], scale_dtype)
    grid = zq.Quantizer(4).grid
    codes = jnp.full((3, 4), grid.high)
    params = zq.QuantizedArray.from_codes(codes, scale, None, grid)
    tx = zq.qzo(1.0, 0.125, key=KEY, clip=None)
    loss = lambda w: 1e3 * (w[0, 0] - w[1, 0] + w[2, 0])  # noqa: E731
    signs = set()
    for seed in range(8):
        state = tx.init(params)._replace(key=jax.random.key(seed))
        updates, _ = tx.update(None, state, params, value_fn=loss)
        after = optax.apply_updates(params, updates).scale
        assert after.dtype == scale_dtype and (jnp.sign(after) * jnp.sign(scale) >= 0).all()
        signs |= {(i, s) for i, s in enumerate(jnp.sign(after)[:, 0].tolist())}
    assert signs == {(0, 0.0), (0, 1.0), (1, 0.0), (1, -1.0), (2, 1.0), (2, -1.0)}


def test_qzo_is_the_same_through_a_scan_over_layers_and_layer_by_layer():
    values = jnp.asarray(np.random.default_rng(2).normal(size=(3, 8, 8)), jnp.float32)
    params = zq.nf4(block=4)(values)
    x = jnp.ones((2, 8))

    def scanned(w):
        return jnp.sum(jax.lax.scan(lambda h, layer: (jnp.tanh(h @ layer), None), x, w)[0] ** 2)

    def unrolled(w):
        h = x
        for i in range(3):
            h = jnp.tanh(h @ w[i])
        return jnp.sum(h**2)

    tx = zq.qzo(0.1, 0.01, key=KEY)
    losses = [
        tx.update(None, tx.init(params), params, value_fn=f)[1].losses for f in (scanned, unrolled)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("scale_dtype", [jnp.float32, jnp.float16])
def test_replay_rebuilds_the_scales_bit_for_bit(scale_dtype):
    start = {"w": blocks(scale_dtype), "bias": jnp.ones(3)}
    tx = zq.qzo(lambda count: jnp.where(count < 99, 0.02, 0.01), 0.01, key=KEY, num_queries=3)
    loss = lambda params: distance(jnp.tanh(params["w"]) + params["bias"][:, None])  # noqa: E731

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params, value_fn=loss)
        return (optax.apply_updates(params, updates), state), state.differences

    train = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=200))
    (trained, _), log = train(start)
    assert (trained["w"].scale != start["w"].scale).all()
    rebuilt = zq.replay(start, log, tx)
    jax.tree.map(np.testing.assert_array_equal, rebuilt, trained)


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
            after.append(leaf.moved(leaf.codes + moves))
            moved.append((moves != 0).mean())
        return after, heard

    us = runs.directions(model, None, "rademacher", structure, queries=queries_)
    runs.assert_same_run(model, tx, queries_, us, step)
    assert 0.05 < np.mean(moved) < 0.5


def test_votes_that_a_single_code_decides_move_it_alone():
    """l = 3 n_2, alone among 60 codes: its votes agree, the others' are coins."""
    params = in_the_middle((60,))
    tx = zq.caq_zo(1.0, key=KEY, num_queries=64, rounding="significant", threshold=4.5)
    updates, _ = tx.update(None, tx.init(params), params, value_fn=lambda w: 3.0 * w[2])
    np.testing.assert_array_equal(
        updates.packed.astype(jnp.int8), -(np.arange(60) == 2).astype(int)
    )


# QES


def assert_qes_is_its_formula(window, decay, num_queries):
    """The reference keeps what each step said, and makes the residual of the window's anew."""
    model, radius, eta = runs.MODELS[0], 0.5, 2e-6
    options = {"num_queries": num_queries, "window": window, "decay": decay}
    tx = zq.qes(eta, radius, key=runs.KEY, **options)
    shapes = [leaf.codes.shape for leaf in runs.problem(model).leaves]
    said = [[] for _ in shapes]

    def step(count, leaves, us):
        def project(leaf, length):
            feedback = reference.ErrorFeedback(shapes[leaf], decay)
            earlier = said[leaf] if window is None else said[leaf][-window:]
            for past in earlier:
                feedback(past)
            said[leaf].append(length)
            return feedback(length)

        return reference.quzo_step(
            leaves,
            us,
            us,
            runs.problem(model).loss,
            project,
            learning_rate=eta,
            radius=radius,
            boundary="clamp",
        )

    us, _ = both_roundings(model, radius)
    return runs.assert_same_run(model, tx, num_queries, us, step)


@pytest.mark.parametrize(
    ("window", "decay", "num_queries"),
    [
        (4, 0.9, 1),
        pytest.param(7, 1.0, 3, marks=pytest.mark.slow),
        pytest.param(None, 0.75, 3, marks=pytest.mark.slow),
    ],
)
def test_qes_is_its_formula(window, decay, num_queries):
    state = assert_qes_is_its_formula(window, decay, num_queries)
    if window is not None:
        assert state.residual == () and state.recent[0].shape == (window, num_queries)


@pytest.mark.parametrize(
    ("boundary", "differ"), [("clamp", False), ("mask", False), ("clamp", True)]
)
def test_a_residual_made_anew_is_the_one_that_is_kept(boundary, differ):
    """Bit for bit as long as the window reaches back to the first step, and no longer."""
    values = jnp.asarray(np.random.default_rng(6).normal(size=(4, 8)), jnp.float32)
    start = {"packed": zq.nf4(block=4)(values), "wide": zq.Quantizer(8)(values)}
    if boundary == "mask":  # exact where no code is near an edge
        start = {"wide": zq.Quantizer(8, range=100.0)(values)}
    steps, window = 12, 4 if differ else 11

    def loss(params):
        return sum(jnp.sum((w - 0.5) ** 2) for w in params.values())

    def codes(window):
        tx = zq.qes(0.5, 0.75, key=KEY, num_queries=2, window=window, boundary=boundary)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(None, state, params, value_fn=loss)
            params = optax.apply_updates(params, updates)
            return (params, state), {name: params[name].packed for name in params}

        train = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), length=steps))
        (_, state), codes = train()
        return codes, state

    (kept, _), (made, state) = codes(None), codes(window)
    assert state.residual == () and state.recent[0].size == 2 * window
    same = [bool((kept[name][k] == made[name][k]).all()) for name in start for k in range(steps)]
    assert all(same) != differ
    for name in start:
        np.testing.assert_array_equal(kept[name][: window + 1], made[name][: window + 1])
        assert (kept[name][-1] != start[name].packed).any()


def test_steps_far_below_half_a_code_are_taken_in_the_end():
    """A gradient that rounding to nearest never sees, and how far a window sees it."""
    params = in_the_middle((64,))
    loss = lambda w: jnp.sum(w)  # noqa: E731

    def moved(window, decay):
        tx = zq.qes(0.02, 1.0, key=KEY, num_queries=64, window=window, decay=decay)

        def step(carry, _):
            params, state = carry
            updates, state = tx.update(None, state, params, value_fn=loss)
            return (optax.apply_updates(params, updates), state), None

        train = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), length=100)[0][0])
        return jnp.mean(train().codes.astype(jnp.float32) - params.codes.astype(jnp.float32))

    assert abs(moved(None, 1.0) + 2.0) < 0.3  # 100 steps of .02
    assert moved(2, 1.0) == 0.0
