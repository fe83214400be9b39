"""qes is its formula, whether its residual is kept or made anew."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import test_reference as runs

import zoqo_jax as zq

KEY = jax.random.key(31)


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

    us, _ = runs.both_roundings(model, radius)
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
    ("boundary", "differ"),
    [
        ("mask", False),
        pytest.param("clamp", False, marks=pytest.mark.slow),
        pytest.param("clamp", True, marks=pytest.mark.slow),
    ],
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
    params = zq.Quantizer(8, range=127.5)(jnp.zeros(64))  # one code is 1.0
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
