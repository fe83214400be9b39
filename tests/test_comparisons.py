"""Steps of zoqo that never see a loss: `compare_fn` tells which end of a query is better.

Losses are dyadic fractions, exact in float32 in any order of summation, so that the sign of a
difference is the same however the two sides were computed.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

import zoqo_jax as zq
from zoqo_jax.transforms import queries

KEY = jax.random.key(5)
STEPS = 8


def integers(seed, *shape, size=2):
    return jnp.asarray(np.random.default_rng(seed).integers(-size, size + 1, shape), jnp.float32)


def start():
    w = zq.Quantizer(4, range=7.5)(integers(0, 4, 6, size=7))  # one code is 1.0
    return {"w": w, "b": integers(1, 6)}


X, Y = integers(2, 8, 4), integers(3, 8, 6, size=9)


def loss(params, x=X, y=Y):
    return jnp.mean(jnp.sum((x @ params["w"] + params["b"] - y) ** 2, axis=-1))


def judge(a, b):
    """A sort's comparator: the lower loss first."""
    return jnp.sign(loss(a) - loss(b))


def zoqo(**options):
    return zq.zoqo(1.0, 2.0, key=KEY, **options)


def run(tx, steps=STEPS, params=None, **asked):
    """Parameters, state and the log of differences after some steps, compiled as one."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(None, state, params, **asked)
        return (optax.apply_updates(params, updates), state), state.info.loss_differences

    @jax.jit
    def train(params):
        return jax.lax.scan(step, (params, tx.init(params)), length=steps)

    (params, state), log = train(start() if params is None else params)
    return params, state, log


def assert_same_codes(actual, expected):
    np.testing.assert_array_equal(actual["w"].packed, expected["w"].packed)


OPTIONS = [
    pytest.param({}, marks=pytest.mark.slow),
    pytest.param({"structure": "rank_one", "boundary": "mask"}, marks=pytest.mark.slow),
    {"structure": "sparse", "density": 0.4, "step": "dithered"},
    {"num_queries": 3, "vote": "majority", "query_batch": None, "structure": "rank_one"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_signs_of_loss_differences_make_the_trajectory_of_the_losses(options):
    expected, by_losses, log = run(zoqo(**options), value_fn=loss)
    params, state, votes = run(zoqo(**options), compare_fn=judge)
    assert_same_codes(params, expected)
    assert (params["w"].packed != start()["w"].packed).any()
    np.testing.assert_array_equal(votes, jnp.sign(log))
    assert (state.count, state.info.evaluations) == (by_losses.count, by_losses.info.evaluations)
    assert jnp.isposinf(state.info.losses).all() and state.info.skipped == 0
    assert jax.tree.map(jax.typeof, state) == jax.tree.map(jax.typeof, by_losses)


@pytest.mark.slow
def test_an_eager_step_is_the_jitted_step():
    tx, params = zoqo(), start()
    updates, _ = tx.update(None, tx.init(params), params, compare_fn=judge)
    assert_same_codes(optax.apply_updates(params, updates), run(tx, 1, compare_fn=judge)[0])


def test_the_mean_of_several_comparisons_is_of_signs():
    """With vote="mean" and q > 1, g is the sign of a sum of vote times u."""
    tx, params = zoqo(num_queries=5), start()
    state = tx.init(params)
    draw = jax.jit(lambda params, i: tx.probes(state, params, i)[0].draw(params["w"]))
    directions = [draw(params, i) for i in range(5)]
    step = jax.jit(lambda params, state: tx.update(None, state, params, compare_fn=judge))
    updates, after = step(params, state)
    g = np.sign(np.einsum("q,qij->ij", after.info.loss_differences, np.stack(directions)))
    codes = params["w"].codes.astype(int) - g.astype(int)
    grid = params["w"].grid
    moved = optax.apply_updates(params, updates)["w"].codes
    np.testing.assert_array_equal(moved, np.clip(codes, grid.low, grid.high))


@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.slow), {"num_queries": 2, "num_comparisons": 3}],
    ids=str,
)
def test_replay_rebuilds_a_run_of_comparisons(options):
    judged = noisy if "num_comparisons" in options else judge
    params, _, log = run(zoqo(**options), compare_fn=judged)
    assert set(np.unique(log)) <= {-1.0, 0.0, 1.0} and (log != 0).any()
    assert_same_codes(zq.replay(start(), log, zoqo(**options)), params)


# Judges that err


def noisy(a, b, key, temperature=32.0):
    """Bradley and Terry's judge: prefers a with probability sigmoid((loss(b) - loss(a)) / t)."""
    prefers_a = jax.random.bernoulli(key, jax.nn.sigmoid((loss(b) - loss(a)) / temperature))
    return jnp.where(prefers_a, -1, 1)


def test_a_noisy_judge_asked_repeatedly_descends_a_quadratic():
    """At a tenth of the starting loss a single answer is little better than a coin."""
    target = integers(7, 4, 6, size=6)
    params = {"w": zq.Quantizer(4, range=7.5)(jnp.zeros((4, 6)))}

    def quadratic(params):
        return jnp.sum((params["w"] - target) ** 2)

    def judge(a, b, key):
        prefers_a = jax.random.bernoulli(key, jax.nn.sigmoid((quadratic(b) - quadratic(a)) / 10))
        return jnp.where(prefers_a, -1, 1)

    before = quadratic(zq.dequantize(params)).item()
    after = {}
    for repeats in (1, 25):
        tx = zq.zoqo(1.0, 1.0, key=KEY, structure="sparse", density=0.1, num_comparisons=repeats)
        trained, state, _ = run(tx, 300, params, compare_fn=judge)
        after[repeats] = quadratic(zq.dequantize(trained)).item()
        assert state.info.evaluations == 300 * 2 * repeats
    assert after[1] < 0.4 * before
    assert after[25] < 0.5 * after[1]


def test_the_majority_of_the_comparisons_is_the_vote_and_every_key_is_new():
    tx, params, heard = zoqo(num_queries=2, num_comparisons=5), start(), []

    def coin(a, b, key):
        verdict = jax.random.randint(key, (), -1, 2)
        jax.debug.callback(lambda *said: heard.append(said), verdict, jax.random.key_data(key))
        return verdict

    @jax.jit
    def step(state):
        return tx.update(None, state, params, compare_fn=coin)[1]

    state = tx.init(params)
    for _ in range(3):
        state = step(state)
        jax.effects_barrier()
        verdicts = np.array([verdict for verdict, _ in heard[-10:]]).reshape(2, 5)
        assert sorted(np.sign(verdicts.sum(axis=1))) == sorted(state.info.loss_differences.tolist())
    assert len({tuple(data.tolist()) for _, data in heard}) == 3 * 2 * 5


@pytest.mark.slow
def test_comparisons_spread_over_devices_are_added_up():
    """Each device judges by its own data; the vote is the sign of the sum of the verdicts."""
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    whole, rows = PartitionSpec(), PartitionSpec("data")
    tx, params = zoqo(axis_names=("data", None)), start()

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(whole, whole, rows, rows), out_specs=(whole, whole)
    )
    def parallel(params, state, x, y):
        own = lambda a, b: jnp.sign(loss(a, x, y) - loss(b, x, y))  # noqa: E731
        return tx.update(None, state, params, compare_fn=own)

    @jax.jit
    def alone(params, probes, x, y):
        own = lambda a, b: jnp.sign(loss(a, x, y) - loss(b, x, y))  # noqa: E731
        return queries.verdicts(own, params, probes)

    state, heard = tx.init(params), []
    for _ in range(4):
        shards = zip(X.reshape(4, 2, 4), Y.reshape(4, 2, 6), strict=True)
        votes = sum(alone(params, tx.probes(state, params), x, y) for x, y in shards)
        updates, state = parallel(params, state, X, Y)
        assert state.info.loss_differences.item() == jnp.sign(votes)
        params = optax.apply_updates(params, updates)
        heard.append(state.info.loss_differences.item())
    assert any(heard)


@pytest.mark.slow
def test_devices_compare_with_keys_of_their_own():
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    tx, heard = zoqo(axis_names=("data", None), num_comparisons=3), []

    def coin(a, b, key):
        jax.debug.callback(
            lambda data: heard.append(tuple(data.tolist())), jax.random.key_data(key)
        )
        return jax.random.randint(key, (), -1, 2)

    @jax.jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),
    )
    def step(params, state):
        return tx.update(None, state, params, compare_fn=coin)[1].info.loss_differences

    vote = step(start(), tx.init(start()))
    jax.effects_barrier()
    assert vote.item() in (-1.0, 0.0, 1.0) and len(set(heard)) == 4 * 3


def test_a_judge_outside_of_jax_is_asked_by_a_callback():
    def outside(a, b):
        return np.sign(np.abs(a).sum() - np.abs(b).sum()).astype(np.float32)

    def compare(a, b):
        like = jax.ShapeDtypeStruct((), jnp.float32)
        return jax.pure_callback(outside, like, a["w"] + 0.0, b["w"] + 0.0)

    inside = lambda a, b: jnp.sign(jnp.abs(a["w"]).sum() - jnp.abs(b["w"]).sum())  # noqa: E731
    expected = run(zoqo(), 4, compare_fn=inside)[0]
    assert_same_codes(run(zoqo(), 4, compare_fn=compare)[0], expected)
    assert (expected["w"].packed != start()["w"].packed).any()


# What says nothing, and what is refused


def test_draws_move_nothing():
    params, state, log = run(zoqo(), compare_fn=lambda a, b: 0)
    assert_same_codes(params, start())
    assert state.info.skipped == 0 and not log.any()


@pytest.mark.parametrize("options", [{"num_queries": 2}, {"num_comparisons": 3}], ids=str)
def test_a_verdict_that_is_not_a_number_moves_nothing_and_is_counted(options):
    bad = lambda a, b, *key: jnp.nan * judge(a, b)  # noqa: E731
    params, state, log = run(zoqo(**options), 4, compare_fn=bad)
    assert_same_codes(params, start())
    assert state.info.skipped == 4 * options.get("num_queries", 1) and not log.any()


def test_value_fn_and_compare_fn_together_are_refused():
    tx = zoqo()
    with pytest.raises(ValueError, match="value_fn and compare_fn must not both be given"):
        tx.update(None, tx.init(start()), start(), value_fn=loss, compare_fn=judge)


@pytest.mark.parametrize(
    "tx", [zq.caq_zo(0.1, key=KEY), zq.spsa(0.1, key=KEY)], ids=["caq_zo", "spsa"]
)
def test_methods_that_need_magnitudes_refuse_comparisons(tx):
    with pytest.raises(ValueError, match=r"compare_fn serves zoqo alone.* needs losses"):
        tx.update(None, tx.init(start()), start(), compare_fn=judge)


@pytest.mark.parametrize(
    ("said", "message"),
    [
        (lambda a, b: loss(a) < loss(b), "compare_fn must return -1, 0 or 1, got a bool"),
        (lambda a, b: True, "compare_fn must return -1, 0 or 1, got a bool"),
        (lambda a, b: a["b"], r"compare_fn must return a real scalar, got shape \(6,\)"),
        (lambda a, b: "a", "compare_fn must return a real scalar, got a str"),
    ],
)
def test_verdicts_that_are_no_real_scalars_are_refused(said, message):
    tx = zoqo()
    with pytest.raises(ValueError, match=message):
        tx.update(None, tx.init(start()), start(), compare_fn=said)


@pytest.mark.parametrize("count", [0, -1])
def test_counts_of_comparisons_below_one_are_refused(count):
    with pytest.raises(
        ValueError, match=f"num_comparisons must be at least 1 or None, got {count}"
    ):
        zoqo(num_comparisons=count)
