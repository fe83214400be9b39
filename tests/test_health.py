"""`health` names what is wrong with a run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoqo_jax as zq

KEY = jax.random.key(0)


def infos(tx, params, loss, steps=60):
    """What each step told; `loss(params, step)`."""

    def step(carry, t):
        params, state = carry
        updates, state = tx.update(None, state, params, value_fn=lambda p: loss(p, t))
        return (optax.apply_updates(params, updates), state), state.info

    return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), jnp.arange(steps))[1])()


def bowl(params, t=0):
    """Least at 0.3."""
    del t
    return jnp.sum((params - 0.3) ** 2)


W = zq.Quantizer(bits=8, range=1.0)(jnp.zeros((8, 8)))
CASES = {
    "nothing has moved": (zq.caq_zo(1e-9, key=KEY, rounding="nearest"), bowl),
    "had a loss that is NaN or inf": (zq.zoqo(key=KEY), lambda p, t: jnp.nan * p.sum()),
    "had the same loss": (zq.zoqo(key=KEY), lambda p, t: jnp.float32(1.0) + 0.0 * p.sum()),
    "the loss is above its start": (zq.zoqo(2.0, 0.01, key=KEY), bowl),
    "are at an edge": (zq.zoqo(2.0, 0.01, key=KEY), bowl),
    "what float32 rounds off": (zq.zoqo(0.01, 0.01, key=KEY), lambda p, t: 1e5 + bowl(p)),
    "are noise of the batch": (
        zq.zoqo(key=KEY, num_queries=8),
        lambda p, t: bowl(p) + 30 * (p * jax.random.normal(jax.random.key(t), p.shape)).sum(),
    ),
}


@pytest.mark.parametrize("words", CASES)
def test_what_is_wrong_is_said(words):
    """Each trouble, made on purpose, is named."""
    tx, loss = CASES[words]
    found = zq.health(infos(tx, W, loss, steps=200 if "noise" in words else 60))
    assert any(words in finding for finding in found.findings), str(found)
    assert not found
    assert words in str(found)


def test_a_run_that_fares_well_has_no_findings():
    """Stacked infos, a list of them and a list of states tell the same."""
    told = infos(zq.zoqo(key=KEY, num_queries=4), W, bowl)
    found = zq.health(told)
    assert found, str(found)
    assert found.loss[1] < found.loss[0]
    one_by_one = [jax.tree.map(lambda x, i=i: x[i], told) for i in range(60)]
    assert str(zq.health(one_by_one)) == str(found)
    assert np.isfinite([found.size, found.true_share]).all()


def test_a_run_that_sizes_its_steps_is_not_told_to():
    """Advice to leave numbers out is for those who gave some."""
    told = infos(zq.zoqo(key=KEY, num_queries=4), W, bowl)
    rising = 1e6 * jnp.linspace(1.0, 2.0, 60)[:, None, None]
    told = told._replace(codes_moved=0 * told.codes_moved, losses=rising + 0 * told.losses)
    by_itself, by_hand = (zq.health(told._replace(size=told.size * k)).findings for k in (1, 0))
    assert len(by_itself) == len(by_hand) == 3, by_itself
    for word in ("learning_rate", "learning rate", "radius", "size themselves"):
        assert not any(word in finding for finding in by_itself), by_itself
        assert any(word in finding for finding in by_hand), by_hand


def test_grids_of_three_levels_may_have_most_codes_at_an_edge():
    """Two of their levels are edges, and many codes begin there."""
    told = infos(zq.zoqo(key=KEY, num_queries=4), W, bowl)
    for first, last, is_said in ((0.0, 0.6, True), (0.4, 0.75, False), (0.4, 0.9, True)):
        found = zq.health(told._replace(share_at_edges=jnp.linspace(first, last, 60)))
        assert any("at an edge" in x for x in found.findings) == is_said, (first, last)


def test_no_history_is_refused():
    """There must be a step."""
    with pytest.raises(ValueError, match="history must have a step"):
        zq.health([])
    with pytest.raises(ValueError, match="history must be Infos or States, got a int"):
        zq.health(3)
