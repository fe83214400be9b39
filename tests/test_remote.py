"""Steps whose losses come from elsewhere: the same bits as of a step that asks for them itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoqo_jax as zq

KEY = jax.random.key(5)
X = jax.random.normal(jax.random.key(1), (12, 10))
Y = jnp.sin(3 * X[:, :3])
PARTS = 3


def loss(params, batch=(X, Y)):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - y) ** 2)


def start():
    one, other = jax.random.split(KEY)
    params = {"in": jax.random.normal(one, (10, 8)), "out": jax.random.normal(other, (8, 3))}
    return zq.quantize(params, zq.Quantizer(bits=4, block=4))


def plain(tx, steps, parts, params):
    """Steps as one process makes them."""
    spread = zq.distributed.spread(tx, zq.distributed.mesh(devices=jax.devices()[:1]), parts=parts)
    given = {} if parts is None else {"batch": (X, Y)}

    @jax.jit
    def step(params, state):
        updates, state = spread.update(None, state, params, value_fn=loss, **given)
        return zq.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def in_pieces(tx, steps, parts, params):
    """Steps of pieces, the last one asked first."""
    remote = zq.distributed.Remote(tx, loss, parts)
    divided = [x.reshape(parts or 1, -1, *x.shape[1:]) for x in (X, Y)]
    of_parts = [None] if parts is None else list(zip(*divided, strict=True))
    names = ("losses", "mean", "mean_look", "wants_look", "look", "step")
    losses, mean, mean_look, wants_look, look, step = (jax.jit(getattr(remote, n)) for n in names)
    numbers, state, looks = remote.pieces(params), tx.init(params), 0
    for _ in range(steps):
        shape = len(numbers), len(of_parts), numbers.shape[1], 2
        found = np.zeros(shape, np.float32)
        for group in reversed(range(shape[0])):
            for part in reversed(range(shape[1])):
                found[group, part] = losses(params, state, numbers[group], of_parts[part])
        known = mean(found)
        about = jnp.zeros(2)
        if wants_look(params, state, known):
            about, looks = (
                mean_look(jnp.stack([look(params, state, known, x) for x in of_parts])),
                looks + 1,
            )
        params, state = step(params, state, known, about)
    return params, state, looks


def assert_same(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("parts", [PARTS, None])
def test_steps_of_given_lengths_are_the_same_in_pieces(parts):
    tx = zq.zoqo(1.0, 2.0, key=KEY, num_queries=3, query_batch=2)
    params, state, looks = in_pieces(tx, 5, parts, start())
    one, other = plain(tx, 5, parts, start())
    assert_same((params, state.info), (one, other.info))
    assert looks == 0 and (params["in"].packed != start()["in"].packed).any()


METHODS = {"caq_zo": zq.caq_zo, "quzo": zq.quzo, "qes": zq.qes, "qzo": zq.qzo}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(zq.zoqo, id="zoqo"),
        *(pytest.param(x, marks=pytest.mark.slow, id=name) for name, x in METHODS.items()),
    ],
)
def test_steps_that_size_themselves_are_the_same_in_pieces(make):
    tx = make(key=KEY, num_queries=3)
    params, state, looks = in_pieces(tx, 12, PARTS, start())
    one, other = plain(tx, 12, PARTS, start())
    assert_same(params, one)
    assert_same((state.info, state.sizes), (other.info, other.sizes))
    assert looks > 3
