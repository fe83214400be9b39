"""zoqo and caq_zo against the papers' formulas in NumPy (reference.py), code by code, 200 steps."""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
from reference import Leaf

import zoqo_jax as zq
from zoqo_jax import directions
from zoqo_jax.grids import companders
from zoqo_jax.xla import random_bits

STEPS = 200
KEY = jax.random.key(2025)
RADIUS, LEARNING_RATE, CAQ_LEARNING_RATE = 0.0625, 0.03, 2e-5
BOUNDARIES = ["clamp", "mask", "reflect"]
FORMATS = {  # quantizer, shape of the codes, shape of the scale, largest scale
    "nf4_block": (zq.nf4(block=8), (4, 32), (4, 4), 1.0),
    "uniform8_tensor": (zq.Quantizer(8, range=1.0), (5, 7), (1, 1), 2.0**-7),
    "uniform4_block": (zq.Quantizer(4, block=16), (3, 40), (3, 3), 2.0**-3),
    "mu_law8_tensor": (zq.Quantizer(8, companders.mu_law()), (6,), (1,), 1.0),
    "uniform2_channel": (zq.Quantizer(2, axis=0), (5, 12), (5, 1), 2.0**-1),
    "nf4_stack": (zq.nf4(block=8), (2, 3, 16), (2, 3, 2), 1.0),
}
MODELS = [("nf4_block", "uniform8_tensor"), ("uniform4_block", "mu_law8_tensor")]
PACKED = ("uniform2_channel", "nf4_stack")  # four codes to a byte, and two of a stack


def radius_schedule(count):
    return jnp.where(count < 60, 0.3, 0.02)


def learning_rate_schedule(count):
    return jnp.where(count < 100, 0.25, 0.02)


def caq_schedule(count):
    return jnp.where(count < 100, 5e-5, 1e-5)


def at(number_or_schedule, count):
    return float(number_or_schedule(count) if callable(number_or_schedule) else number_or_schedule)


class Problem(NamedTuple):
    """Two quantized leaves and a frozen float, in the library's form and in the reference's."""

    params: dict
    leaves: list[Leaf]  # in the order of the tree, which is what numbers their keys
    targets: list[np.ndarray]

    @property
    def arrays(self):
        return [self.params[name] for name in sorted(self.params) if name != "bias"]

    def value_fn(self, params):
        """A sum of squares of whole numbers, below 2^24: exact in float32 in any order."""
        names = sorted(set(params) - {"bias"})
        return sum(
            jnp.sum((jnp.round(params[name] * 128.0) + params["bias"] - target) ** 2)
            for name, target in zip(names, self.targets, strict=True)
        )

    def loss(self, values):
        terms = [
            (np.round(x * np.float32(128)) + np.float32(16) - target).astype(np.int64) ** 2
            for x, target in zip(values, self.targets, strict=True)
        ]
        total = sum(int(term.sum()) for term in terms)
        assert total < 2**24
        return np.float32(total)


@functools.cache
def problem(model):
    """Codes all over their grids; scales are powers of two: products with them are exact."""
    rng = np.random.default_rng(7)
    params, leaves, targets = {"bias": jnp.float32(16)}, [], []
    for name in sorted(model):
        quantizer, shape, scale_shape, largest = FORMATS[name]
        grid, block = quantizer.grid, quantizer.block
        codes = rng.integers(grid.low, grid.high + 1, shape)
        scale = np.float32(largest / 2.0 ** rng.integers(0, 2, scale_shape))
        params[name] = zq.QuantizedArray.from_codes(
            jnp.asarray(codes, jnp.uint8), jnp.asarray(scale), None, grid, block and (-1, block)
        )
        spread = np.repeat(scale, block, axis=-1)[..., : shape[-1]] if block else scale
        levels = np.asarray(grid.levels, np.float32)
        leaves.append(Leaf(codes, np.broadcast_to(spread, shape), levels, grid.low, grid.high))
        targets.append(np.float32(rng.integers(-150, 151, shape)))
    return Problem(params, leaves, targets)


def leaf_key(count, query, leaf):
    """The documented rule: fold the step into the run's key, then the query, then the leaf."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(KEY, count), query), leaf)


def every_step(draw):
    """What `draw(count)` gives for each of the steps, as NumPy arrays."""
    scan = jax.jit(lambda: jax.lax.map(draw, jnp.arange(STEPS)))  # a vmap compiles far slower
    return jax.tree.map(np.asarray, scan())


@functools.cache
def drawn(model, radius, law, structure="dense", density=1.0, dithered=False, queries=3):
    """u of every step for each leaf, (steps, queries, ...), before any boundary acts."""
    arrays = problem(model).arrays

    def one(count, query, leaf):
        mu = radius(count) if callable(radius) else radius
        stencil = directions.describe(
            leaf_key(count, query, leaf),
            arrays[leaf],
            1.0 if mu is None else mu,
            unit="codes" if mu is None else "values",
            distribution=law,
            structure=structure,
            density=density,
            dithered=dithered,
        )
        return stencil.draw(arrays[leaf])

    def draw(count):
        return [
            jax.lax.map(functools.partial(one, count, leaf=leaf), jnp.arange(queries))
            for leaf in range(len(arrays))
        ]

    return every_step(draw)


@functools.cache
def both_roundings(model, radius, **structure):
    """Q1(mu u) and Q2(mu u) of every step for each leaf, (steps, 3 queries, ...)."""
    arrays = problem(model).arrays

    def one(count, query, leaf):
        key = leaf_key(count, query, leaf)
        law = {"distribution": "gaussian", "rounded": True, **structure}
        probed = directions.describe(key, arrays[leaf], radius, **law)
        return [stencil.draw(arrays[leaf]) for stencil in (probed, probed.rounded_again())]

    def draw(count):
        of_query = lambda query: [one(count, query, leaf) for leaf in range(len(arrays))]  # noqa: E731
        return jax.lax.map(of_query, jnp.arange(3))

    return tuple(zip(*every_step(draw), strict=True))


def run(model, tx):
    """Codes and differences of every step, and the last state, from one jitted scan."""
    start = problem(model)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params, value_fn=start.value_fn)
        params = optax.apply_updates(params, updates)
        codes = [array.codes.astype(jnp.int32) for array in start._replace(params=params).arrays]
        return (params, state), (codes, state.info.loss_differences)

    @jax.jit
    def scan(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=STEPS)

    (params, state), (codes, differences) = scan(start.params)
    assert params["bias"] == 16
    return [np.asarray(leaf) for leaf in codes], np.asarray(differences), state


def assert_same_run(model, tx, num_queries, us, step):
    """`tx` against `step(count, leaves, directions) -> (leaves, differences)`, at every step."""
    codes, differences, state = run(model, tx)
    leaves = problem(model).leaves
    edges = np.zeros(2, bool)
    for count in range(STEPS):
        drawn = [[u[count, query].astype(np.int64) for u in us] for query in range(num_queries)]
        leaves, expected = step(count, leaves, drawn)
        np.testing.assert_array_equal(differences[count], expected, f"step {count}")
        for i, leaf in enumerate(leaves):
            np.testing.assert_array_equal(codes[i][count], leaf.codes, f"step {count}, leaf {i}")
            edges |= [(leaf.codes == leaf.low).any(), (leaf.codes == leaf.high).any()]
    assert edges.all(), "a run that never met the grid's edges proves less"
    assert (differences != 0).any()
    assert (
        state.count == STEPS
        and state.info.evaluations == 2 * num_queries * STEPS
        and state.info.skipped == 0
    )
    return state


def assert_zoqo_is_algorithm_1(model, num_queries, vote, law, boundary, **structure):
    scheduled = num_queries > 1
    radius = radius_schedule if scheduled else RADIUS
    eta = learning_rate_schedule if scheduled else LEARNING_RATE
    tx = zq.zoqo(
        eta,
        radius,
        key=KEY,
        num_queries=num_queries,
        noise=law,
        vote=vote,
        boundary=boundary,
        **structure,
    )

    def step(count, leaves, us):
        for leaf, *drawn in zip(leaves, *us, strict=True):
            m = reference.whole_steps(at(radius, count), leaf.step)
            assert all((abs(u) <= m).all() for u in drawn)
            everywhere = law == "rademacher" and structure.get("density", 1.0) == 1.0
            assert not everywhere or all((abs(u) == m).all() for u in drawn)
        return reference.zoqo_step(
            leaves,
            us,
            problem(model).loss,
            learning_rate=at(eta, count),
            vote=vote,
            boundary=boundary,
        )

    us = drawn(model, radius, law, **structure)
    assert_same_run(model, tx, num_queries, us, step)


def product(*choices, fast):
    """Every choice on either model; those whose indices are not in `fast` are slow."""
    cases = []
    for indices in itertools.product(*(range(len(choice)) for choice in [*choices, MODELS])):
        values = [choice[i] for choice, i in zip([*choices, MODELS], indices, strict=True)]
        name = "-".join(map(str, [*values[:-1], *values[-1]]))
        marks = () if indices in fast else pytest.mark.slow
        cases.append(pytest.param(*values, id=name, marks=marks))
    return cases


@pytest.mark.parametrize(
    ("queries", "law", "boundary", "model"),
    product(
        [(1, "mean"), (3, "mean"), (3, "majority")],
        ["uniform", "gaussian", "rademacher"],
        BOUNDARIES,
        fast=[(0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 0)],  # every choice once; 6 s each
    ),
)
def test_zoqo_is_algorithm_1(queries, law, boundary, model):
    num_queries, vote = queries
    assert_zoqo_is_algorithm_1(model, num_queries, vote, law, boundary)


@pytest.mark.parametrize(
    ("model", "vote", "law", "boundary", "structure", "density"),
    [
        (MODELS[0], "mean", "uniform", "mask", "rank_one", 1.0),
        pytest.param(
            *(MODELS[1], "mean", "uniform", "clamp", "sparse", 0.375), marks=pytest.mark.slow
        ),
        # A single matrix product adds up the queries of these:
        (PACKED, "mean", "rademacher", "clamp", "rank_one", 1.0),
        pytest.param(
            *(MODELS[1], "majority", "rademacher", "reflect", "rank_one", 1.0),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(MODELS[0], "mean", "rademacher", "mask", "rank_one", 1.0), marks=pytest.mark.slow
        ),
        pytest.param(
            *(MODELS[1], "mean", "rademacher", "mask", "rank_one", 1.0), marks=pytest.mark.slow
        ),
        pytest.param(
            *(PACKED, "mean", "gaussian", "mask", "sparse", 0.25), marks=pytest.mark.slow
        ),  # 13 s
    ],
)
def test_zoqo_is_algorithm_1_in_any_structure(model, vote, law, boundary, structure, density):
    assert_zoqo_is_algorithm_1(model, 3, vote, law, boundary, structure=structure, density=density)


def test_zoqo_is_algorithm_1_for_codes_that_share_bytes():
    assert_zoqo_is_algorithm_1(PACKED, 1, "mean", "uniform", "clamp")


def words_of_moves(model, num_queries):
    """A random word for each code of each leaf in every step: the parts that share bytes in turn.

    Their key comes after the last query's.
    """

    def one(count, leaf, array):
        rows = random_bits.rows(leaf_key(count, num_queries, leaf), array.shape[:-1])
        columns = array.shape[-1] // array.per_byte
        parts = (random_bits.part(rows, i) for i in range(array.per_byte))
        of_parts = [random_bits.words(part, columns, 0) for part in parts]
        return jnp.concatenate(of_parts, axis=-1)

    arrays = problem(model).arrays
    return every_step(lambda count: [one(count, i, array) for i, array in enumerate(arrays)])


@pytest.mark.parametrize(
    ("model", "num_queries", "boundary"),
    [
        (PACKED, 3, "mask"),
        pytest.param(MODELS[0], 1, "reflect", marks=pytest.mark.slow),
        pytest.param(MODELS[1], 3, "clamp", marks=pytest.mark.slow),
    ],
)
def test_dithered_zoqo_moves_floor_of_eta_over_s_plus_u(model, num_queries, boundary):
    tx = zq.zoqo(
        learning_rate_schedule,
        radius_schedule,
        key=KEY,
        num_queries=num_queries,
        step="dithered",
        boundary=boundary,
    )
    # 24 bits of each, for rows are short here; below the fraction of eta / s they round it up.
    words = [word >> 8 for word in words_of_moves(model, num_queries)]

    def step(count, leaves, us):
        return reference.zoqo_step(
            leaves,
            us,
            problem(model).loss,
            learning_rate=at(learning_rate_schedule, count),
            vote="mean",
            boundary=boundary,
            dither=[1 - 2.0**-25 - word[count] * 2.0**-24 for word in words],
        )

    us = drawn(model, radius_schedule, "uniform", dithered=True)
    assert_same_run(model, tx, num_queries, us, step)


def assert_caq_zo_is_its_formula(rounding, boundary, num_queries, model, **structure):
    eta = caq_schedule if num_queries > 1 else CAQ_LEARNING_RATE
    tx = zq.caq_zo(
        eta,
        key=KEY,
        num_queries=num_queries,
        rounding=rounding,
        threshold=0.75,
        boundary=boundary,
        **structure,
    )
    shapes = [leaf.codes.shape for leaf in problem(model).leaves]
    feedback = [reference.ErrorFeedback(shape) for shape in shapes]
    words = rounding == "stochastic" and words_of_moves(model, num_queries)

    def step(count, leaves, rs):
        project = {
            "stochastic": lambda leaf, step: reference.stochastic(step, words[leaf][count]),
            "nearest": lambda leaf, step: reference.nearest(step),
            "error_feedback": lambda leaf, step: feedback[leaf](step),
            "threshold": lambda leaf, step: reference.threshold(step, 0.75),
        }[rounding]
        assert structure.get("density") or all((abs(r) == 1).all() for query in rs for r in query)
        loss = problem(model).loss
        return reference.caq_zo_step(
            leaves, rs, loss, project, learning_rate=at(eta, count), boundary=boundary
        )

    us = drawn(model, None, "rademacher", **structure)
    state = assert_same_run(model, tx, num_queries, us, step)
    kept = feedback if rounding == "error_feedback" else []
    for residual, memory in zip(state.residual, kept, strict=True):
        np.testing.assert_array_equal(residual, memory.residual)


@pytest.mark.parametrize(
    ("rounding", "boundary", "num_queries", "model"),
    product(
        ["stochastic", "error_feedback", "nearest", "threshold"],
        BOUNDARIES,
        [1, 3],
        fast=[(0, 1, 1, 0), (1, 0, 1, 1), (2, 1, 0, 0), (3, 2, 1, 0)],
    ),
)
def test_caq_zo_is_its_formula(rounding, boundary, num_queries, model):
    assert_caq_zo_is_its_formula(rounding, boundary, num_queries, model)


@pytest.mark.parametrize(
    ("rounding", "boundary", "num_queries", "model", "structure"),
    [
        ("error_feedback", "reflect", 1, PACKED, {"structure": "sparse", "density": 0.25}),
        pytest.param(
            *("stochastic", "mask", 3, PACKED, {"structure": "rank_one"}), marks=pytest.mark.slow
        ),
        pytest.param(
            *("error_feedback", "clamp", 3, MODELS[0], {"structure": "rank_one"}),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("nearest", "reflect", 3, MODELS[1], {"structure": "rank_one"}), marks=pytest.mark.slow
        ),
        pytest.param(
            *("stochastic", "mask", 3, MODELS[1], {"structure": "sparse", "density": 0.375}),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_caq_zo_is_its_formula_in_any_structure(rounding, boundary, num_queries, model, structure):
    assert_caq_zo_is_its_formula(rounding, boundary, num_queries, model, **structure)


# Four codes whose relative parities differ from their target's: odd, even, even, even away.
START = np.array([100, 100, 141, 100])
TARGET = np.array([103, 104, 137, 102])


def descend(tx, steps=400):
    """The codes after each step from START, under the distance to TARGET; one code is 1.0."""
    array = zq.Quantizer(8, range=127.5)(jnp.zeros(START.shape))
    params = array.with_codes(jnp.asarray(START))

    def distance(values):
        return jnp.sum(jnp.abs(values - jnp.asarray(TARGET - 128.0, jnp.float32)))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params, value_fn=distance)
        params = optax.apply_updates(params, updates)
        return (params, state), params.codes.astype(jnp.int32)

    run = jax.jit(lambda params: jax.lax.scan(step, (params, tx.init(params)), length=steps)[1])
    return np.asarray(run(params))


def test_parity_trap_signs_everywhere_and_steps_of_one_never_change_relative_parity():
    codes = descend(zq.zoqo(1.0, 1.0, key=KEY, noise="rademacher"))
    relative = (codes - codes[:, :1]) % 2
    np.testing.assert_array_equal(relative, np.broadcast_to((START - START[0]) % 2, codes.shape))
    distances = abs(codes - TARGET).sum(axis=-1)
    assert distances[-50:].max() < abs(START - TARGET).sum()  # it does descend
    assert distances.min() > 0  # and gets stuck


@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(zq.zoqo(1.0, 1.0, key=KEY), id="zoqo's defaults"),
        pytest.param(zq.caq_zo(0.25, key=KEY), id="caq_zo's defaults"),
        pytest.param(
            zq.zoqo(1.0, 1.0, key=KEY, noise="rademacher", structure="sparse", density=0.5),
            id="sparse support",
        ),
    ],
)
def test_parity_trap_is_escaped_by(tx):
    assert abs(descend(tx) - TARGET).sum(axis=-1).min() == 0
