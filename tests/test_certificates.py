"""Floors against rounded optima, audits against their own logs, gates against planted chances."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from compiling import NORMALLY
from statistical import assert_binomial

import zoqo_jax as zq
from zoqo_jax.analysis import certificates
from zoqo_jax.implicit import arrays as implicit

KEY = jax.random.key(9)


# Floors


def spd(d, seed=0):
    """A random Hessian of condition 100."""
    rotation = np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]
    return (rotation * np.geomspace(0.1, 10.0, d)) @ rotation.T


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("d", [16, 64])
def test_floors_are_the_means_over_rounded_optima(d, bits):
    """Optima anywhere within the cells of the legal codes."""
    hessian, quantizer = spd(d), zq.Quantizer(bits, range=0.7)
    s = 1.4 / (2**bits - 1)
    grid = quantizer.grid
    edges = np.array([grid.levels[grid.low] - 0.5, grid.levels[grid.high] + 0.5]) * s
    optimum = np.random.default_rng(bits).uniform(*edges, size=(20_000, d)).astype(np.float32)
    error = np.asarray(quantizer(jnp.asarray(optimum)).materialise()) - optimum
    gradient = error @ hessian
    excess = 0.5 * np.sum(error * gradient, axis=1)
    square = np.sum(gradient**2, axis=1)
    assert certificates.loss_floor(s, hessian) == pytest.approx(excess.mean(), rel=0.02)
    assert certificates.gradient_floor(s, hessian) == pytest.approx(square.mean(), rel=0.02)


def test_floors_take_traces():
    hessian = spd(16)
    for spacing in (0.1, jnp.float32(0.1)):
        by_matrix = certificates.loss_floor(spacing, hessian)
        assert certificates.loss_floor(spacing, np.trace(hessian)) == pytest.approx(by_matrix)
        by_matrix = certificates.gradient_floor(spacing, hessian)
        square = np.trace(hessian @ hessian)
        assert certificates.gradient_floor(spacing, square) == pytest.approx(by_matrix)


@pytest.mark.parametrize("target", [10.0, 1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("width", [0.02, 2.0])
def test_bits_needed_are_the_fewest_whose_floor_is_low_enough(width, target):
    hessian = spd(16)
    floor = lambda bits: certificates.gradient_floor(width / (2**bits - 1), hessian)  # noqa: E731
    enough = next(bits for bits in range(1, 40) if floor(bits) <= target**2)
    assert certificates.bits_needed(width, hessian, target) == enough


@pytest.mark.parametrize("bits", range(1, 13))
def test_bits_that_are_needed_exactly_are_not_one_more(bits):
    target = 2.0 * 3.0 / (math.sqrt(12.0) * (2**bits - 1))
    assert certificates.bits_needed(2.0, 9.0, target) == bits
    assert certificates.bits_needed(2.0, 9.0, target * 0.999) == bits + 1


# Confidence


@pytest.mark.parametrize("trials", [1, 2, 15, 59, 1000])
@pytest.mark.parametrize("delta", [0.01, 0.05, 0.5])
def test_failures_alone_certify_one_less_a_root_of_delta(trials, delta):
    bound = certificates.success_bound(trials, delta)
    assert bound == pytest.approx(1 - delta ** (1 / trials), abs=2e-6)
    assert (1 - bound) ** trials == pytest.approx(delta, rel=2e-3)


def test_fifteen_failures_certify_18_percent():
    assert certificates.success_bound(15).item() == pytest.approx(0.181, abs=5e-4)


@pytest.mark.parametrize(("successes", "trials"), [(1, 15), (7, 15), (14, 15), (15, 15), (3, 500)])
def test_the_bound_after_successes_is_clopper_and_pearsons(successes, trials):
    bound = jax.jit(certificates.success_bound)(trials, successes=successes)
    expected = scipy.stats.beta.ppf(0.95, successes + 1, max(trials - successes, 1e-9))
    assert bound == pytest.approx(expected, abs=1e-5)
    if successes < trials:
        assert scipy.stats.binom.cdf(successes, trials, float(bound)) == pytest.approx(0.05, 1e-3)


def test_no_trial_certifies_nothing():
    assert certificates.success_bound(0) == 1.0


# Audits


def codes_of(array):
    return np.asarray(array.codes).astype(int)


def params_of_two_grids():
    """A companded 4-bit array with codes at its edges, and an 8-bit one; a frozen and a float."""
    rng = np.random.default_rng(3)
    w = jnp.asarray(rng.normal(size=(6, 8)), jnp.float32)
    v = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    frozen = zq.freeze(zq.Quantizer()(v))
    return {"nf4": zq.nf4(block=4)(w), "wide": zq.Quantizer(8)(v), "frozen": frozen, "b": v[0]}


def test_an_audit_is_what_a_log_of_its_evaluations_says():
    """Values tell codes, and the two ends of a direction share a support."""
    params, log = params_of_two_grids(), []
    names = ("nf4", "wide")
    slopes = {name: jax.random.normal(KEY, params[name].shape) for name in names}

    def loss(params):
        value = 10.0 + sum(jnp.sum(params[name] * slopes[name]) for name in names)
        told = [jnp.ravel(params[name] + 0.0) for name in names]
        jax.debug.callback(lambda *seen: log.append(seen), jnp.concatenate(told), value)
        return value

    gamma, trials = 5e-3, 40
    audit = lambda key: certificates.audit(  # noqa: E731
        loss, params, key, support=12, gamma=gamma, trials=trials
    )
    found = jax.jit(audit)(KEY)
    jax.effects_barrier()
    assert len(log) == found.queries == 2 * trials + 1

    def every(wanted):
        """Values, or whether codes are legal, a row for -1, 0 and 1 codes from where they are."""
        rows = []
        for step in (-1, 0, 1):
            arrays = [(params[name], codes_of(params[name]) + step) for name in names]
            rows.append(np.concatenate([wanted(*pair).ravel() for pair in arrays]))
        return np.stack(rows)

    value = every(lambda array, n: np.asarray(array.decode(jnp.asarray(n % 256, jnp.uint8))))
    legal = every(lambda array, n: (n >= array.grid.low) & (n <= array.grid.high))
    inner = legal.all(axis=0)
    assert 0 < inner.sum() < inner.size
    by_support = {}
    for values, at in log:
        distance = np.where(legal, np.abs(value - np.asarray(values, np.float64)), np.inf)
        assert distance.min(axis=0).max() < 1e-5
        u = distance.argmin(axis=0) - 1
        by_support.setdefault(tuple(np.flatnonzero(u)), []).append((u, np.float64(at)))
    ((_, here),) = by_support.pop(())
    assert len(by_support) == trials  # a fresh one each time
    successes, lowest = 0, math.inf
    for support, ((plus, l_plus), (minus, l_minus)) in by_support.items():
        np.testing.assert_array_equal(plus[inner], -minus[inner])
        np.testing.assert_array_equal(plus[~inner], minus[~inner])  # inward, at both ends
        successes += min(l_plus, l_minus) <= here - gamma * len(support) * here
        lowest = min(lowest, l_plus, l_minus)
    assert 0 < successes < trials
    assert (found.successes, found.trials, found.vacuous) == (successes, trials, 0)
    assert found.decrease == pytest.approx(here - lowest, abs=1e-5)
    assert found.bound == certificates.success_bound(trials, 0.05, successes)
    mean = np.mean([len(support) for support in by_support])
    assert mean == pytest.approx(12, abs=5 * math.sqrt(12 / trials))


def planted(k):
    """Of the directions that move all of 8 codes a fraction 2^(1 - k) lowers the loss, by half.

    Those that move the first k to the same side. The start is the middle of the grid.
    """
    params = zq.Quantizer(4, range=7.5)(jnp.zeros(8))  # one code is 1.0
    return lambda w: jnp.where(jnp.abs(w[:k].sum()) > k - 0.5, 0.5, 1.0), params


@pytest.mark.parametrize(("k", "failures"), [(2, 3), (2, 6), (3, 5), (4, 15)])
def test_false_stops_are_as_frequent_as_failures_in_a_row(k, failures):
    """The first chance to stop, (1 - p)^K, and all chances within 40 calls, by a Markov chain."""
    loss, params = planted(k)
    calls, runs, p = 40, 2000, 2.0 ** (1 - k)

    def first_stop(key):
        gate = certificates.gate(key=key, support=8, gamma=0.01, failures=failures)

        def call(state, _):
            stop, state = gate.update(state, loss, params)
            return state, stop

        state, stops = jax.lax.scan(call, gate.init(params), length=calls)
        return jnp.where(stops.any(), stops.argmax() + 1, calls + 1), state.successes

    found = jax.jit(jax.vmap(first_stop))(jax.random.split(KEY, runs))
    stopped, successes = map(np.asarray, found)
    at_once = (1 - p) ** failures
    error = math.sqrt(runs * at_once * (1 - at_once))
    assert abs((stopped == failures).sum() - runs * at_once) <= 3 * error
    assert_binomial(successes.sum(), runs * calls, p)
    row = np.zeros(failures + 1)  # chances of so many failures in a row, the last for good
    row[0] = 1.0
    for _ in range(calls):
        still = row[:-1].copy()
        row[0], row[1:-1] = p * still.sum(), (1 - p) * still[:-1]
        row[-1] += (1 - p) * still[-1]
    assert_binomial((stopped <= calls).sum(), runs, row[-1])


def test_audits_of_a_sparse_support_find_the_chance_that_it_has():
    """Only the first of 8 codes matters; an empty direction is no trial."""
    params = zq.Quantizer(8, range=127.5)(jnp.zeros((1, 8)))
    loss = lambda w: jnp.where(jnp.abs(w[0, 0]) > 0.5, 0.5, 1.0)  # noqa: E731
    found = jax.jit(
        lambda key: certificates.audit(
            loss, params, key, support=1, gamma=0.1, trials=8000, query_batch=100
        )
    )(KEY)
    # One cell of 6 codes and one of 2, each with one code by chance 3/4, or none.
    empty = (1 - 0.75) * (1 - 0.75 * 2 / 6)
    assert_binomial(int(found.trials), 8000, 1 - empty)
    assert_binomial(int(found.successes), int(found.trials), (1 / 8) / (1 - empty))
    assert found.queries == 16_001


@pytest.mark.parametrize("query_batch", [4, pytest.param(None, marks=pytest.mark.slow)])
def test_query_batch_changes_nothing_but_the_cost(query_batch):
    loss, params = planted(2)
    audits = [
        certificates.audit(loss, params, KEY, support=8, gamma=0.01, trials=10, query_batch=batch)
        for batch in (1, query_batch)
    ]
    jax.tree.map(np.testing.assert_array_equal, *audits)
    assert 0 < audits[0].successes < 10


@pytest.mark.parametrize("most", [16, 40, 48])
def test_codes_of_large_leaves_are_counted_piece_by_piece(most, monkeypatch):
    array = zq.nf4(block=8)(jnp.zeros((2, 5, 8)))
    (stencil,) = certificates._direction(KEY, 0, [array], 40)
    u = stencil.draw(array)
    few = functools.partial(implicit.sum_over_rows, most=most)
    monkeypatch.setattr(certificates, "sum_over_rows", few)
    assert 0 < certificates._codes(stencil, array) == (u != 0).sum() < u.size


@pytest.mark.slow
def test_an_audit_needs_the_memory_of_a_forward_pass():
    w = jax.eval_shape(zq.nf4(), jax.ShapeDtypeStruct((2048, 2048), jnp.float32))
    loss = lambda w: jnp.mean((jnp.ones((4, 2048)) @ w) ** 2)  # noqa: E731
    audit = lambda w: certificates.audit(loss, w, KEY, support=2048, gamma=1e-7)  # noqa: E731

    def temporary(function):
        program = jax.jit(function).lower(w).compile(compiler_options=NORMALLY)
        return program.memory_analysis().temp_size_in_bytes

    assert temporary(audit) < 1.2 * temporary(zq.quaxify(loss))


def test_audits_of_many_problems_by_vmap_are_the_single_ones():
    _, params = planted(2)
    targets = jnp.arange(3.0)

    @jax.jit
    def one(target, key):
        loss = lambda w: 1.0 + jnp.sum((w - target) ** 2)  # noqa: E731
        return certificates.audit(loss, params, key, support=4, gamma=1e-3, trials=6)

    keys = jax.random.split(KEY, 3)
    together = jax.vmap(one)(targets, keys)
    for i in range(3):
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.tree.map(lambda x, i=i: x[i], together),
            one(targets[i], keys[i]),
        )
    assert together.successes[0] == 0 and together.successes[2] > 0


def test_what_is_asked_for_is_a_fraction_of_the_loss():
    """All 8 codes move and lower a loss of 2 by 0.5: gamma * 8 * 2 must be at most that."""
    half, params = planted(2)
    loss = lambda w: 1.0 + half(w)  # noqa: E731  # 2, or 1.5
    for gamma, passes in ((0.25 / 8, True), (0.2501 / 8, False)):
        found = certificates.audit(loss, params, KEY, support=8, gamma=gamma, trials=10)
        assert (found.successes > 0) == passes


@pytest.mark.parametrize(("f_inf", "vacuous"), [(0.0, 0), (0.91, 0), (0.92, 10), (1.5, 10)])
def test_directions_asked_for_more_than_there_is_are_told(f_inf, vacuous):
    """gamma m |f| = .085 is at least f(x) - f_inf."""
    loss, params = planted(2)
    gamma = 0.085 / 8
    flat = lambda w: 1.0 + 0.0 * loss(w)  # noqa: E731
    found = certificates.audit(flat, params, KEY, support=8, gamma=gamma, trials=10, f_inf=f_inf)
    assert (found.successes, found.vacuous) == (0, vacuous)
    gate = certificates.gate(key=KEY, support=8, gamma=gamma, f_inf=f_inf)
    _, state = gate.update(gate.init(params), flat, params)
    assert (state.failures, state.vacuous) == (1, vacuous // 10)


def test_losses_below_zero_are_audited_where_nothing_is_known_of_their_bound():
    loss, params = planted(2)
    found = certificates.audit(
        lambda w: loss(w) - 3.0, params, KEY, support=8, gamma=0.01, trials=20, f_inf=-math.inf
    )
    assert 0 < found.successes < 20 and found.vacuous == 0


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_an_end_that_is_not_finite_is_no_success(bad):
    loss, params = planted(2)
    spoilt = lambda w: jnp.where(loss(w) < 1.0, bad, 1.0)  # noqa: E731
    found = certificates.audit(spoilt, params, KEY, support=8, gamma=0.01, trials=20)
    assert found.successes == 0 and found.trials == 20 and not found.decrease > 0


def test_a_state_whose_loss_is_not_a_number_certifies_nothing():
    _, params = planted(2)
    lost = lambda w: jnp.nan * w.sum()  # noqa: E731
    found = certificates.audit(lost, params, KEY, support=8, gamma=0.01)
    assert found.successes == 0 and found.vacuous == found.trials == 15


# Gates


def test_accepting_successes_lowers_the_loss_each_time_down_to_the_best_codes():
    params = params_of_two_grids()
    goal = {
        name: params[name].decode(
            jnp.clip(params[name].codes.astype(jnp.int16) + 1, 0, params[name].grid.high)
        )
        for name in ("nf4", "wide")
    }

    def loss(params):
        return 1e-3 + sum(jnp.sum(jnp.abs(params[name] - goal[name])) for name in goal)

    gate = certificates.gate(key=KEY, support=1, gamma=1e-6, failures=200)

    @jax.jit
    def step(params, state):
        stop, state = gate.update(state, loss, params)
        params = gate.accept(state, params)
        return stop, params, state, loss(zq.dequantize(params))

    stop, state, losses = False, gate.init(params), [loss(zq.dequantize(params)).item()]
    while not stop:
        before, started = params, state
        stop, params, state, reached = step(params, state)
        losses.append(reached.item())
        if state.side == 0:
            assert state.failures in (started.failures, started.failures + 1)
            jax.tree.map(np.testing.assert_array_equal, params, before)
        else:
            assert losses[-1] < losses[-2]
            assert (state.failures, state.successes) == (0, started.successes + 1)
            for name in goal:
                assert np.abs(codes_of(params[name]) - codes_of(before[name])).max() <= 1
    assert losses[-1] == pytest.approx(1e-3, abs=1e-4)
    assert state.failures == 200 and state.queries == 3 * state.count == 3 * (len(losses) - 1)


def test_a_gate_ends_a_run_of_zoqo():
    """At the optimum of a quadratic, not before."""
    loss = lambda w: 1.0 + jnp.sum((w - 3.0) ** 2)  # noqa: E731
    params = zq.Quantizer(4, range=7.5)(jnp.full(12, -4.0))
    tx = zq.zoqo(1.0, 1.0, key=KEY, structure="sparse", density=0.1)
    gate = certificates.gate(key=jax.random.key(1), support=2, gamma=1e-3)

    def step(carry, _):
        params, state, checks = carry
        updates, state = tx.update(None, state, params, value_fn=loss)
        params = optax.apply_updates(params, updates)
        stop, checks = gate.update(checks, loss, params)
        return (params, state, checks), (stop, loss(zq.dequantize(params)))

    carry = (params, tx.init(params), gate.init(params))
    _, (stops, losses) = jax.lax.scan(step, carry, length=400)
    assert stops.any()
    assert losses[stops.argmax()] < 0.1 * losses[0]


def test_legacy_keys_are_the_typed_keys():
    loss, params = planted(2)
    legacy, typed = jax.random.PRNGKey(3), jax.random.key(3)
    audit = lambda key: certificates.audit(loss, params, key, support=8, gamma=0.01, trials=5)  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, audit(legacy), audit(typed))
    states = [
        certificates.gate(key=key, support=8, gamma=0.01).init(params) for key in (legacy, typed)
    ]
    assert states[0].key == states[1].key


def test_states_keep_their_types_and_branch_alike():
    loss, params = planted(2)
    gate = certificates.gate(key=KEY, support=8, gamma=0.01)
    state = gate.init(params)

    @jax.jit
    def maybe(pred, state):
        ask = lambda state: gate.update(state, loss, params)  # noqa: E731
        return jax.lax.cond(pred, ask, lambda state: (jnp.array(False), state), state)

    _, same = maybe(False, state)
    _, after = maybe(True, state)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
    assert (same.count, after.count, after.queries) == (0, 1, 3)


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"support": 0}, "support must be at least 1, got 0"),
        ({"support": 9}, "support must be at most the 8 codes of params, got 9"),
        ({"gamma": 0.0}, "gamma must be positive and finite, got 0.0"),
        ({"gamma": math.inf}, "gamma must be positive and finite, got inf"),
        ({"gamma": 0.125}, r"gamma \* support must be below 1, got 1.0: no direction could pass"),
        ({"f_inf": math.nan}, "f_inf must be a number or -inf, got nan"),
        ({"f_inf": math.inf}, "f_inf must be a number or -inf, got inf"),
    ],
)
def test_arguments_that_no_audit_and_no_gate_can_have_are_refused(options, message):
    loss, params = planted(2)
    options = {"support": 8, "gamma": 0.01, **options}
    with pytest.raises(ValueError, match=message):
        certificates.audit(loss, params, KEY, **options)
    with pytest.raises(ValueError, match=message):
        certificates.gate(key=KEY, **options).init(params)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda audit: audit(trials=0), "trials must be at least 1, got 0"),
        (lambda audit: audit(query_batch=0), "query_batch must be at least 1 or None, got 0"),
        (lambda audit: audit(delta=1.0), r"delta must be in \(0, 1\), got 1.0"),
        (lambda audit: certificates.success_bound(5, 0.0), r"delta must be in \(0, 1\), got 0.0"),
        (
            lambda audit: certificates.gate(key=KEY, support=8, gamma=0.01, failures=0),
            "failures must be at least 1, got 0",
        ),
        (
            lambda audit: certificates.bits_needed(0.0, 1.0, 1.0),
            "width must be positive and finite, got 0.0",
        ),
        (
            lambda audit: certificates.bits_needed(1.0, 1.0, math.inf),
            "target must be positive and finite, got inf",
        ),
    ],
)
def test_bad_arguments_are_named_with_their_value(make, message):
    loss, params = planted(2)

    def audit(**options):
        return certificates.audit(loss, params, KEY, support=8, gamma=0.01, **options)

    with pytest.raises(ValueError, match=message):
        make(audit)


@pytest.mark.parametrize("shape", [(3,), (3, 2), (1, 3, 3)])
def test_hessians_that_are_not_square_are_refused(untyped, shape):
    message = f"hessian must be a number or a square matrix, got shape {re.escape(str(shape))}"
    for floor in (certificates.loss_floor, certificates.gradient_floor):
        with pytest.raises(ValueError, match=message):
            floor(0.1, jnp.ones(shape))


def test_a_tree_without_trained_codes_is_refused():
    loss, params = planted(2)
    for floats in (jnp.zeros(8), zq.freeze(params)):
        with pytest.raises(
            ValueError, match="params must hold a QuantizedArray that is not frozen"
        ):
            certificates.audit(loss, floats, KEY, support=8, gamma=0.01)
        with pytest.raises(
            ValueError, match="params must hold a QuantizedArray that is not frozen"
        ):
            certificates.gate(key=KEY, support=8, gamma=0.01).init(floats)
