"""Every transformation as optax's: every way that optax and JAX use one.

One model serves them all: the quantized matrix is what the others train, the float bias what spsa
trains. Its losses are dyadic fractions, exact in float32 in any order of summation.
"""

import contextlib
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import zoqo_jax as zq
from zoqo_jax.transforms import stepping

KEY = jax.random.key(3)
NAMES = ["zoqo", "caq_zo", "quzo", "qzo", "qes", "spsa"]
QUANTIZED = ["zoqo", "caq_zo", "quzo", "qzo", "qes"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("caq_zo", "quzo", "qzo", "qes")]
ONE_OF_EACH = ["zoqo", *SLOW, "spsa"]
# `update` is written three times: a promise that the others keep by the same lines is slow of them.
EACH_UPDATE = ["zoqo", *SLOW[:2], "qzo", SLOW[3], "spsa"]
four_devices = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")


def make(name, key=KEY, **options):
    """A transformation, and for spsa a step of sign descent behind it."""
    if name == "zoqo":
        return zq.zoqo(1.0, 2.0, key=key, **options)
    if name == "caq_zo":
        return zq.caq_zo(0.05, key=key, **{"rounding": "error_feedback", **options})
    if name == "quzo":
        return zq.quzo(0.05, 0.5, key=key, **options)
    if name == "qes":
        return zq.qes(0.02, 0.5, key=key, **{"window": 2, **options})
    if name == "qzo":
        return zq.qzo(0.25, 0.5, key=key, **{"clip": 1.0, "noise": "rademacher", **options})
    descent = optax.chain(optax.scale_by_sign(), optax.scale(-0.25))
    trained = {"w": False, "b": True}
    return optax.chain(zq.spsa(0.5, key=key, **options), optax.masked(descent, trained))


def integers(seed, *shape, size=2):
    return jnp.asarray(np.random.default_rng(seed).integers(-size, size + 1, shape), jnp.float32)


def start():
    quantizer = zq.Quantizer(4, range=7.5)  # one code is 1.0
    return {"w": quantizer(integers(0, 4, 6, size=7)), "b": integers(1, 6)}


X, Y = integers(2, 8, 4), integers(3, 8, 6, size=9)


def value_fn(params, x=X, y=Y):
    return jnp.mean(jnp.sum((x @ params["w"] + params["b"] - y) ** 2, axis=-1))


def stepper(tx, **arguments):
    """(params, state) -> (params, state)."""

    def step(params, state):
        updates, state = tx.update(None, state, params, **{"value_fn": value_fn, **arguments})
        return optax.apply_updates(params, updates), state

    return step


def loop(step, params, state, steps=6):
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def scan(step, params, state, steps=6):
    carry, _ = jax.lax.scan(lambda carry, _: (step(*carry), None), (params, state), length=steps)
    return carry


def run(tx, steps=6, **arguments):
    """Parameters and state after some steps, compiled as one."""
    step = stepper(tx, **arguments)
    return jax.jit(lambda params: scan(step, params, tx.init(params), steps))(start())


@functools.cache
def baseline(name):
    """A run of four queries a step."""
    return run(make(name, num_queries=4))


@functools.cache
def jitted(name):
    return jax.jit(stepper(make(name)))


def step_state(state):
    """The `StepState` in a state, chained or not."""
    is_one = lambda node: isinstance(node, zq.State)  # noqa: E731
    (found,) = [node for node in jax.tree.leaves(state, is_leaf=is_one) if is_one(node)]
    return found


def with_key(state, key):
    """The state of a run with another key."""
    is_one = lambda node: isinstance(node, zq.State)  # noqa: E731
    rekey = lambda node: node._replace(key=key) if is_one(node) else node  # noqa: E731
    return jax.tree.map(rekey, state, is_leaf=is_one)


def assert_equal(actual, expected):
    """Bit for bit, typed keys included."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


def assert_moved(params):
    """That a test which compares two runs compares something."""
    before = jax.tree.leaves(start())
    after = jax.tree.leaves(params)
    assert any((a != b).any() for a, b in zip(before, after, strict=True))


# How optax holds a transformation


@pytest.mark.parametrize("name", NAMES)
def test_is_a_gradient_transformation_with_extra_args(name):
    tx = zq.spsa(0.5, key=KEY) if name == "spsa" else make(name)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    init, update = tx
    assert callable(init) and callable(update)


@pytest.mark.parametrize("name", NAMES)
def test_third_argument_is_named_params_as_multi_steps_passes_it(name):
    tx = zq.spsa(0.5, key=KEY) if name == "spsa" else make(name)
    assert list(inspect.signature(tx.update).parameters)[:3] == ["updates", "state", "params"]


@pytest.mark.parametrize("name", EACH_UPDATE)
def test_params_may_be_given_by_name(name):
    tx, params = zq.spsa(0.5, key=KEY) if name == "spsa" else make(name), start()
    by_name = tx.update(None, tx.init(params), params=params, value_fn=value_fn)
    assert_equal(by_name, tx.update(None, tx.init(params), params, value_fn=value_fn))


def test_multi_steps_holds_spsa():
    tx = optax.MultiSteps(zq.spsa(0.5, key=KEY), every_k_schedule=2)
    params = {"b": integers(1, 6)}
    state, moved = tx.init(params), []
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(4):
            updates, state = tx.update(params, state, params, value_fn=lambda p: p["b"][0])
            moved.append(bool(updates["b"].any()))
    assert moved == [False, True, False, True]


@pytest.mark.parametrize("name", EACH_UPDATE)
def test_chain_passes_updates_and_arguments_through(name):
    tx, params = make(name), start()
    chained = optax.chain(optax.identity(), tx, optax.identity())
    expected, expected_state = tx.update(None, tx.init(params), params, value_fn=value_fn)
    updates, state = chained.update(None, chained.init(params), params, value_fn=value_fn)
    assert_equal(updates, expected)
    assert_equal(step_state(state), step_state(expected_state))


@pytest.mark.parametrize("name", EACH_UPDATE)
def test_unknown_extra_arguments_are_swallowed(name):
    params, state = start(), make(name).init(start())
    with_extras = stepper(make(name), value=1.0, grad=None, anything="at all")(params, state)
    assert_equal(with_extras, stepper(make(name))(params, state))


@pytest.mark.parametrize("name", NAMES)
def test_updates_have_the_structure_and_dtypes_of_params(name):
    params = start()
    tx = make(name)

    def updated(params):
        return tx.update(None, tx.init(params), params, value_fn=value_fn)[0]

    updates = jax.eval_shape(updated, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.leaves(updates) == jax.tree.leaves(jax.eval_shape(lambda x: x, params))


@pytest.mark.parametrize("name", [name for name in EACH_UPDATE if name != "spsa"])
def test_frozen_leaves_get_zero_updates(name):
    params = {
        **start(),
        "steps": jnp.arange(3),
        "flag": jnp.array(True),
        "half": jnp.ones(2, jnp.bfloat16),
    }
    tx = make(name)
    update = jax.jit(lambda params: tx.update(None, tx.init(params), params, value_fn=value_fn)[0])
    updates = update(params)
    for frozen in ("b", "steps", "flag", "half"):
        assert updates[frozen].dtype == params[frozen].dtype and not updates[frozen].any()
    moves, stays = ("scale", "packed") if name == "qzo" else ("packed", "scale")
    assert getattr(updates["w"], moves).any() and not getattr(updates["w"], stays).any()
    assert_equal(optax.apply_updates(params, updates)["b"], params["b"])


@pytest.mark.parametrize(("bits", "per_byte"), [(2, 4), (4, 2), (8, 1)])
def test_codes_move_both_ways_and_never_leave_the_grid(bits, per_byte):
    quantizer = zq.Quantizer(bits, range=1.0)
    params = {"w": quantizer(jnp.linspace(-1.0, 1.0, 64).reshape(8, 8))}
    tx, grid = zq.zoqo(0.4, 0.4, key=KEY), quantizer.grid
    slopes = 1.0 + 0.1 * jnp.sin(jnp.arange(32.0)).reshape(4, 8)  # so that no two losses tie
    loss = lambda params: jnp.sum(slopes * (params["w"][:4] - params["w"][4:]))  # noqa: E731
    step = jax.jit(stepper(tx, value_fn=loss))
    state = tx.init(params)
    for _ in range(5):
        before = params["w"].codes.astype(jnp.int32)
        params, state = step(params, state)
        after = params["w"].codes.astype(jnp.int32)
        assert params["w"].packed.dtype == jnp.uint8 and params["w"].per_byte == per_byte
        assert grid.low <= after.min() and after.max() <= grid.high
        assert (after > before).any() and (after < before).any()


# What JAX does with one


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_eager_jitted_and_scanned_steps_are_the_same(name):
    tx = make(name)
    eager = loop(stepper(tx), start(), tx.init(start()), steps=3)
    assert_equal(loop(jitted(name), start(), tx.init(start()), steps=3), eager)
    assert_equal(run(tx, steps=3), eager)
    assert_moved(eager[0])


@pytest.mark.parametrize("name", EACH_UPDATE)
def test_both_branches_of_a_cond_have_the_same_types(name):
    tx = make(name)
    params, state = start(), tx.init(start())

    @jax.jit
    def maybe(pred, params, state):
        return jax.lax.cond(pred, stepper(tx), lambda params, state: (params, state), params, state)

    assert_equal(maybe(False, params, state), (params, state))
    assert_equal(maybe(True, params, state), stepper(tx)(params, state))


@pytest.mark.parametrize("name", NAMES)
def test_state_keeps_its_dtypes_and_weak_types(name):
    tx = make(name)
    params, state = start(), tx.init(start())
    after = jitted(name)(params, state)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, (params, state))


@pytest.mark.parametrize("name", NAMES)
def test_second_call_does_not_recompile(name):
    loop(jitted(name), start(), make(name).init(start()), steps=3)
    assert jitted(name)._cache_size() == 1


@pytest.mark.parametrize("name", EACH_UPDATE)
def test_donated_buffers_are_reused(name):
    tx = make(name)
    params, state = start(), tx.init(start())
    donating = jax.jit(stepper(tx), donate_argnums=(0, 1))
    after = donating(params, state)
    assert params["w"].packed.is_deleted() and params["b"].is_deleted()
    assert_equal(loop(donating, *after, steps=2), loop(stepper(tx), start(), tx.init(start()), 3))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_vmap_over_64_problems_with_their_own_keys_equals_64_runs(name):
    tx = make(name, num_queries=2)
    keys, targets = jax.random.split(KEY, 64), integers(5, 64, 8, 6, size=9)

    def one(key, y):
        params = start()
        step = stepper(tx, value_fn=lambda params: value_fn(params, X, y))
        return scan(step, params, with_key(tx.init(params), key))

    together = jax.jit(jax.vmap(one))(keys, targets)
    single = jax.jit(one)
    for i in range(64):
        assert_equal(jax.tree.map(lambda leaf, i=i: leaf[i], together), single(keys[i], targets[i]))


@four_devices
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_runs_sharded_over_four_devices_equal_runs_on_one(name):
    tx = make(name)

    def one(key):
        params = start()
        return scan(stepper(tx), params, with_key(tx.init(params), key))

    keys = jax.random.split(KEY, 8)
    mesh = Mesh(np.array(jax.devices()[:4]), ("runs",))
    spread = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("runs")))
    sharded = jax.jit(jax.vmap(one))(spread)
    assert len(sharded[0]["w"].packed.sharding.device_set) == 4
    assert_equal(sharded, jax.jit(jax.vmap(one))(keys))


@four_devices
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_data_parallel_steps_equal_steps_on_one_device(name):
    tx = make(name, num_queries=4, axis_names=("data", None))
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    whole, rows = PartitionSpec(), PartitionSpec("data")

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(whole, whole, rows, rows), out_specs=(whole, whole)
    )
    def parallel(params, state, x, y):
        step = stepper(tx, value_fn=lambda params: value_fn(params, x, y))
        return scan(step, params, state)

    params = start()
    actual = parallel(params, tx.init(params), X, Y)
    assert_equal(actual, baseline(name))
    assert_moved(actual[0])


# Queries


@pytest.mark.parametrize("name", EACH_UPDATE)
def test_queries_are_counted_and_the_key_never_changes(name):
    state = step_state(baseline(name)[1])
    assert (state.count, state.info.evaluations, state.info.skipped) == (6, 2 * 4 * 6, 0)
    assert_equal(state.key, KEY)


@pytest.mark.parametrize("name", EACH_UPDATE)
def test_state_holds_the_losses_and_differences_of_the_last_step(name):
    state = step_state(baseline(name)[1])
    assert state.info.losses.shape == (4, 2) and (state.info.loss_differences != 0).any()
    np.testing.assert_array_equal(
        state.info.loss_differences, state.info.losses[:, 0] - state.info.losses[:, 1]
    )


@pytest.mark.parametrize(
    ("name", "query_batch"),
    [
        ("zoqo", 3),
        ("zoqo", None),
        pytest.param("spsa", 3, marks=pytest.mark.slow),
        pytest.param("spsa", None, marks=pytest.mark.slow),
        pytest.param("zoqo", 2, marks=pytest.mark.slow),
        pytest.param("caq_zo", 2, marks=pytest.mark.slow),
        pytest.param("caq_zo", 3, marks=pytest.mark.slow),
        pytest.param("caq_zo", None, marks=pytest.mark.slow),
        pytest.param("quzo", 3, marks=pytest.mark.slow),
    ],
)
def test_query_batch_changes_nothing_but_the_cost(name, query_batch):
    assert_equal(run(make(name, num_queries=4, query_batch=query_batch)), baseline(name))


def in_chunks(name, *, fast=None, **options):
    """Of one query and of three, whose sum is made otherwise; 8 s each, so few are fast."""
    return [
        pytest.param(name, options, n, marks=() if n == fast else pytest.mark.slow) for n in (1, 3)
    ]


@pytest.mark.parametrize(
    ("name", "options", "num_queries"),
    [
        *in_chunks("zoqo", structure="rank_one", noise="rademacher", boundary="mask"),
        *in_chunks("zoqo", structure="sparse", density=0.4, vote="majority", step="dithered"),
        *in_chunks("caq_zo", structure="rank_one", rounding="stochastic"),
        *in_chunks("caq_zo", structure="sparse", density=0.5, rounding="error_feedback", fast=1),
        *in_chunks("quzo", boundary="mask"),
        *in_chunks("qes", boundary="mask"),
    ],
)
def test_an_update_made_in_place_piece_by_piece_is_the_update_made_at_once(
    name, options, num_queries, monkeypatch
):
    """Of large leaves: the last piece goes over rows of the one before, and leaves them alone."""
    values = integers(4, 2, 7, 6, 24, size=7)
    params = {
        "packed": zq.Quantizer(2, axis=0)(values[0, 0]),  # pieces of 4 rows of 6
        "stack": zq.nf4(block=8)(values[0]),  # of one matrix of 7
        "rows": zq.Quantizer(8, block=3, axis=0)(values[1, 0]),
    }
    tx = make(name, num_queries=num_queries, **options)
    log = jnp.asarray([[1.0, -0.5, 0.25], [-0.75, 0.5, 1.0]])[:, :num_queries] * 64

    def replayed():
        def one(carry, differences):
            params, state = carry
            updates, state = tx.update(None, state, params, differences=differences)
            return (optax.apply_updates(params, updates), state), None

        return jax.jit(lambda start: jax.lax.scan(one, start, log)[0])((params, tx.init(params)))

    at_once = replayed()
    for leaf in params:
        assert (at_once[0][leaf].packed != params[leaf].packed).any()
    monkeypatch.setattr(stepping, "_CHUNK", 100)
    assert_equal(replayed(), at_once)


@pytest.mark.parametrize("name", EACH_UPDATE)
def test_legacy_keys_give_the_run_of_the_typed_key(name):
    legacy, typed = (make(name, key=key) for key in (jax.random.PRNGKey(3), jax.random.key(3)))
    params = start()
    assert_equal(legacy.init(params), typed.init(params))
    expected = stepper(typed)(params, typed.init(params))
    assert_equal(stepper(legacy)(params, legacy.init(params)), expected)


@pytest.mark.parametrize("name", EACH_UPDATE)
def test_schedules_start_at_count_zero(name):
    seen = []

    def schedule(count):
        seen.append(int(count))
        return 1.0

    tx = {
        "zoqo": lambda: zq.zoqo(schedule, schedule, key=KEY),
        "caq_zo": lambda: zq.caq_zo(schedule, key=KEY),
        "quzo": lambda: zq.quzo(schedule, schedule, key=KEY),
        "qzo": lambda: zq.qzo(schedule, schedule, key=KEY),
        "qes": lambda: zq.qes(schedule, schedule, key=KEY, window=None),
        "spsa": lambda: zq.spsa(schedule, key=KEY),
    }[name]()
    state = tx.init(start())
    for count in range(3):
        seen.clear()
        _, state = tx.update(None, state, start(), value_fn=value_fn)
        assert set(seen) == {count}


def test_zoqo_moves_by_what_its_schedule_says():
    eta = optax.piecewise_constant_schedule(5.0, {2: 0.4, 4: 0.5})
    tx = zq.zoqo(eta, 1.0, key=KEY, noise="rademacher", boundary="clamp")
    params = {"w": zq.Quantizer(8, range=127.5)(jnp.zeros((4, 4)))}
    step, state, moves = jax.jit(stepper(tx, value_fn=lambda p: p["w"][0, 0])), tx.init(params), []
    with jax.numpy_dtype_promotion("standard"):  # for optax
        for _ in range(6):
            before = params["w"].codes.astype(jnp.int32)
            params, state = step(params, state)
            moves.append(abs(params["w"].codes.astype(jnp.int32) - before).max().item())
    assert moves == [5, 5, 2, 2, 1, 1]


# Losses that say nothing


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("zoqo", {"num_queries": 2, "vote": "majority"}),
        ("caq_zo", {"rounding": "stochastic"}),
        pytest.param("zoqo", {"step": "dithered"}, marks=pytest.mark.slow),
        pytest.param("quzo", {}, marks=pytest.mark.slow),
        pytest.param("qes", {}, marks=pytest.mark.slow),
    ],
)
def test_equal_losses_move_nothing(name, options):
    params, state = run(make(name, **options), value_fn=lambda params: 0.0 * value_fn(params))
    assert_equal(params, start())
    assert step_state(state).info.skipped == 0


@pytest.mark.parametrize(
    ("name", "constant"),
    [
        pytest.param(name, constant, marks=() if fast else pytest.mark.slow)
        for name in NAMES
        for constant, fast in (
            (jnp.float32(1.5), name == "zoqo"),
            (2, name == "qzo"),
            (1.5, name == "spsa"),
        )
    ],
)
def test_an_objective_may_ignore_its_params(name, constant):
    tx = make(name)
    params, state = stepper(tx, value_fn=lambda params: constant)(start(), tx.init(start()))
    assert_equal(params, start())
    assert (step_state(state).info.losses == constant).all()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_losses_that_are_not_finite_move_nothing_and_are_counted(name):
    tx = make(name, num_queries=2)

    @jax.jit
    def four_steps(bad):
        step = stepper(tx, value_fn=lambda params: bad + value_fn(params))
        return scan(step, start(), tx.init(start()), steps=4)

    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        params, state = four_steps(jnp.float32(bad))
        assert_equal(params, start())
        state = step_state(state)
        assert state.info.skipped == 2 * 4 and state.info.evaluations == 2 * 2 * 4
        assert not state.info.loss_differences.any()


def test_one_bad_side_is_enough():
    tx = zq.zoqo(1.0, 1.0, key=KEY, noise="rademacher")
    centre = start()["w"].materialise()[0, 0]

    @jax.jit
    def six_steps(bad):
        loss = lambda params: jnp.where(params["w"][0, 0] > centre, bad, value_fn(params))  # noqa: E731
        return scan(stepper(tx, value_fn=loss), start(), tx.init(start()))

    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        params, state = six_steps(jnp.float32(bad))
        assert_equal(params, start())
        assert state.info.skipped == 6 and jnp.isfinite(state.info.losses).sum() == 1


@pytest.mark.parametrize("name", ["zoqo", pytest.param("caq_zo", marks=pytest.mark.slow)])
def test_one_bad_query_leaves_the_others_their_say(name):
    tx = make(name, num_queries=8, structure="sparse", density=0.5)
    params, state = start(), tx.init(start())
    centre = params["w"].materialise()[0, 0]

    @jax.jit
    def step(bad):
        loss = lambda params: jnp.where(params["w"][0, 0] == centre, 0.0, bad) + value_fn(params)  # noqa: E731
        return stepper(tx, value_fn=loss)(params, state)

    @jax.vmap
    def probes_the_first(query):
        (stencil,) = tx.probes(state, params, query)
        return stencil.draw(params["w"])[0, 0] != 0

    spoilt = probes_the_first(jnp.arange(8))
    assert 0 < spoilt.sum() < 8
    clean, (after, spoilt_state) = step(0.0)[1], step(jnp.nan)
    assert spoilt_state.info.skipped == spoilt.sum()
    heard = jnp.where(spoilt, 0.0, clean.info.loss_differences)
    np.testing.assert_array_equal(spoilt_state.info.loss_differences, heard)
    assert_equal(after, stepper(tx, value_fn=None, differences=heard)(params, state)[0])
    assert_moved(after)


# Errors name what is wrong


@pytest.mark.parametrize("name", NAMES)
def test_value_fn_is_required(name):
    tx = make(name)
    with pytest.raises(ValueError, match="value_fn must be given"):
        tx.update(None, tx.init(start()), start())


@pytest.mark.parametrize("name", NAMES)
def test_params_are_required(name):
    tx = zq.spsa(0.5, key=KEY) if name == "spsa" else make(name)
    with pytest.raises(ValueError, match="params must be given"):
        tx.update(None, tx.init(start()), value_fn=value_fn)


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_tree_without_a_quantized_leaf_is_refused(name):
    tx, floats = make(name), zq.dequantize(start())
    with pytest.raises(ValueError, match="params must hold a QuantizedArray"):
        tx.init(floats)
    with pytest.raises(ValueError, match="params must hold a QuantizedArray"):
        tx.update(None, tx.init(start()), floats, value_fn=value_fn)
    with pytest.raises(ValueError, match="params must be given"):
        tx.init(None)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda params: params["w"],
        lambda params: params["b"],
        lambda params: value_fn(params)[None],
        lambda params: value_fn(params).astype(jnp.complex64),
        lambda params: (value_fn(params), {}),
        lambda params: None,
        lambda params: "loss",
        lambda params: 1j,
    ],
    ids=["quantized", "vector", "shape (1,)", "complex", "tuple", "None", "str", "Python complex"],
)
@pytest.mark.parametrize("name", EACH_UPDATE)
def test_value_fn_must_return_a_real_scalar(name, wrong):
    tx = make(name)
    with pytest.raises(ValueError, match="value_fn must return a real scalar, got"):
        tx.update(None, tx.init(start()), start(), value_fn=wrong)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if fast else pytest.mark.slow)
        for name in NAMES
        for dtype, fast in (
            (jnp.bfloat16, name == "zoqo"),
            (jnp.float16, name == "qzo"),
            (jnp.int32, name == "spsa"),
        )
    ],
)
def test_losses_of_any_real_dtype_are_taken_as_float32(name, dtype):
    tx = make(name)
    value = lambda params: value_fn(params).astype(dtype)  # noqa: E731
    rounds = jnp.dtype(dtype).itemsize < 4
    with pytest.warns(UserWarning, match="16") if rounds else contextlib.nullcontext():
        _, state = tx.update(None, tx.init(start()), start(), value_fn=value)
    assert step_state(state).info.losses.dtype == jnp.float32


POSITIVE = [0, 0.0, -1.0, float("nan"), float("inf")]
FACTORIES = {
    "zoqo": lambda **options: zq.zoqo(
        **{"learning_rate": 1.0, "radius": 1.0, "key": KEY, **options}
    ),
    "caq_zo": lambda **options: zq.caq_zo(**{"learning_rate": 1.0, "key": KEY, **options}),
    "quzo": lambda **options: zq.quzo(**{"learning_rate": 1.0, "key": KEY, **options}),
    "qes": lambda **options: zq.qes(**{"learning_rate": 1.0, "key": KEY, **options}),
    "qzo": lambda **options: zq.qzo(**{"learning_rate": 1.0, "radius": 1.0, "key": KEY, **options}),
    "spsa": lambda **options: zq.spsa(**{"radius": 1.0, "key": KEY, **options}),
}
STENCIL_ERRORS = {
    "structure": ["low_rank"],
    "boundary": ["wrap"],
    "density": [0.0, -0.1, 1.5, float("nan"), 0.5],
}
QUERY_ERRORS = {"num_queries": [0, -1], "query_batch": [0, -2]}
ERRORS = {
    "zoqo": {
        **STENCIL_ERRORS,
        **QUERY_ERRORS,
        "learning_rate": POSITIVE,
        "radius": POSITIVE,
        "noise": ["normal"],
        "vote": ["median"],
        "step": ["ceil"],
    },
    "caq_zo": {
        **STENCIL_ERRORS,
        **QUERY_ERRORS,
        "learning_rate": POSITIVE,
        "rounding": ["up"],
        "query": ["between"],
        "radius": [0.5],
        "threshold": POSITIVE,
    },
    "quzo": {
        **STENCIL_ERRORS,
        **QUERY_ERRORS,
        "learning_rate": POSITIVE,
        "radius": POSITIVE,
        "noise": ["uniform"],
    },
    "qes": {
        **STENCIL_ERRORS,
        **QUERY_ERRORS,
        "learning_rate": POSITIVE,
        "radius": POSITIVE,
        "noise": ["uniform"],
        "window": [0, -1],
        "decay": [0.0, -0.5, 1.5, float("nan")],
    },
    "qzo": {
        **QUERY_ERRORS,
        "learning_rate": POSITIVE,
        "radius": POSITIVE,
        "clip": POSITIVE,
        "noise": ["uniform"],
    },
    "spsa": {**QUERY_ERRORS, "radius": POSITIVE, "noise": ["uniform"]},
}


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        (name, argument, value)
        for name, arguments in ERRORS.items()
        for argument, values in arguments.items()
        for value in values
    ],
)
def test_factories_refuse_what_they_cannot_use_and_name_it(untyped, name, argument, value):
    with pytest.raises(ValueError, match=argument) as error:
        FACTORIES[name](**{argument: value})
    assert str(value) in str(error.value)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("structure", {"structure": "sparse", "num_queries": 4}),
        ("threshold", {"num_queries": 3}),
        ("threshold", {"num_queries": 8, "threshold": 3.0}),
        ("threshold", {"num_queries": 8, "threshold": 0.0}),
    ],
)
def test_votes_that_cannot_be_significant_are_refused(argument, options):
    with pytest.raises(ValueError, match=argument):
        zq.caq_zo(1.0, key=KEY, rounding="significant", **options)


@pytest.mark.parametrize("radius", [None, *POSITIVE])
def test_off_grid_queries_need_a_positive_radius(untyped, radius):
    with pytest.raises(ValueError, match=f"radius.* {radius}|radius={radius}"):
        zq.caq_zo(1.0, key=KEY, query="off_grid", radius=radius)


@pytest.mark.parametrize("rounding", ["stochastic", "error_feedback"])
def test_a_scalar_is_trained_as_any_array_is(rounding):
    params = {"s": zq.Quantizer(8, range=1.0)(jnp.float32(0.0))}
    tx = zq.caq_zo(300.0, key=jax.random.key(0), rounding=rounding)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(
            None, state, params, value_fn=lambda params: (params["s"] - 0.5) ** 2
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(100):
        params, state = step(params, state)
    assert abs(zq.dequantize(params)["s"].item() - 0.5) < 0.1
