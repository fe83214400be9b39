"""Steps that are spread over devices and processes: the same bits, and few bytes between them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, PartitionSpec

import zoqo_jax as zq
from zoqo_jax.transforms import spreading

KEY = jax.random.key(5)
X = jax.random.normal(jax.random.key(1), (12, 10))
Y = jnp.sin(3 * X[:, :3])
MESHES = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4)]
four_devices = pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices")
METHODS = {
    "zoqo": zq.zoqo,
    "caq_zo": zq.caq_zo,
    "quzo": zq.quzo,
    "qes": zq.qes,
    "qzo": zq.qzo,
}


def loss(params, batch=(X, Y)):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params["in"]) @ params["out"] - y) ** 2)


def first(params, batch):
    """A loss of one matrix alone, whose steps compile fast."""
    return jnp.mean((jnp.tanh(batch[0] @ params["in"])[:, :3] - batch[1]) ** 2)


def start():
    one, other = jax.random.split(KEY)
    params = {"in": jax.random.normal(one, (10, 8)), "out": jax.random.normal(other, (8, 3))}
    return zq.quantize(params, zq.Quantizer(bits=4, block=4))


def mesh_of(data, queries):
    return zq.distributed.mesh(queries, jax.devices()[: data * queries])


def trained(tx, steps=16, batch=(X, Y), begin=start, value_fn=loss):
    """What a run comes to: parameters, and what its last step knew."""
    given = {} if batch is None else {"batch": batch}

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(None, state, params, value_fn=value_fn, **given)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, tx.init(params)), length=steps)[0]

    return jax.tree.map(np.asarray, jax.tree.map(_plain, run(begin())))


def _plain(x):
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x


def assert_same_bits(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()


@functools.cache
def on_one_device(name, batched=True, parts=3):
    tx = METHODS[name](key=KEY, num_queries=3)
    spread = zq.distributed.spread(tx, mesh_of(1, 1), parts=parts)
    return trained(spread, batch=(X, Y) if batched else None)


def has_moved(params):
    old, new = (jax.tree.leaves(tree) for tree in (start(), params))
    return any((np.asarray(a) != b).any() for a, b in zip(old, new, strict=True))


@four_devices
def test_steps_of_a_given_length_are_the_same_on_four_devices():
    """Of 3 parts and of 3 queries, two devices have unequal shares."""
    tx = zq.zoqo(1.0, 2.0, key=KEY, num_queries=3)
    begin = lambda: {"in": start()["in"]}  # noqa: E731
    one, other = (
        trained(zq.distributed.spread(tx, mesh_of(*shape), parts=3), 3, begin=begin, value_fn=first)
        for shape in [(1, 1), (2, 2)]
    )
    assert_same_bits(one, other)
    assert (one[0]["in"].packed != start()["in"].packed).any()


SOME = [(name, shape) for name in list(METHODS)[1:] for shape in [(2, 2), (4, 1)]]


@four_devices
@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), [*(("zoqo", shape) for shape in MESHES[1:]), *SOME])
def test_steps_that_size_themselves_are_the_same_on_any_mesh(name, shape):
    tx = METHODS[name](key=KEY, num_queries=3)
    found = trained(zq.distributed.spread(tx, mesh_of(*shape), parts=3))
    assert_same_bits(found, on_one_device(name))
    assert has_moved(found[0])


@four_devices
@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 2), (1, 4)])
def test_without_a_batch_all_devices_divide_the_queries(shape):
    tx = zq.zoqo(key=KEY, num_queries=3)
    found = trained(zq.distributed.spread(tx, mesh_of(*shape)), batch=None)
    assert_same_bits(found, on_one_device("zoqo", batched=False))


@four_devices
@pytest.mark.slow
def test_queries_evaluated_together_stay_together():
    tx = zq.zoqo(key=KEY, num_queries=5, query_batch=2)
    one, other = (
        trained(zq.distributed.spread(tx, mesh_of(*shape), parts=2)) for shape in [(1, 1), (1, 4)]
    )
    assert_same_bits(one, other)


@four_devices
@pytest.mark.slow
def test_trees_of_floats_are_the_same_on_any_mesh():
    begin = lambda: zq.dequantize(start())  # noqa: E731
    tx = optax.chain(zq.spsa(key=KEY, num_queries=3), optax.scale(1.0))
    one, other = (
        trained(zq.distributed.spread(tx, mesh_of(*shape), parts=3), begin=begin)
        for shape in [(1, 1), (2, 2)]
    )
    assert_same_bits(one, other)


@four_devices
@pytest.mark.slow
def test_comparisons_are_divided():
    tx = zq.zoqo(1.0, 2.0, key=KEY, num_queries=3)
    judge = lambda a, b: jnp.sign(loss(a) - loss(b))  # noqa: E731
    params = start()

    def step(tx):
        return jax.jit(lambda state: tx.update(None, state, params, compare_fn=judge))

    plain, spread = step(tx), step(zq.distributed.spread(tx, mesh_of(2, 2)))
    one, other = plain(tx.init(params)), spread(tx.init(params))
    assert_same_bits(
        *(jax.tree.map(lambda x: np.asarray(_plain(x)), found) for found in (one, other))
    )


# What travels

_COLLECTIVE = re.compile(
    r"= (.*?) (?:all-reduce|all-gather|all-to-all|collective-\w+|reduce-scatter)(?:-start)?\("
)


def collective_bytes(tx):
    """Bytes of the results of a compiled step's collectives."""
    params = start()
    state = tx.init(params)
    step = jax.jit(
        lambda params, state: tx.update(None, state, params, value_fn=loss, batch=(X, Y))
    )
    text = step.lower(params, state).compile().as_text()
    found = _COLLECTIVE.findall(text)
    assert found
    sizes = [
        int(np.prod([int(n) for n in shape.split(",") if n] or [1])) * int(bits) // 8
        for shapes in found
        for bits, shape in re.findall(r"[fsu](\d+)\[([\d,]*)\]", shapes)
    ]
    return sum(sizes)


@four_devices
def test_a_step_sends_at_most_12_bytes_a_query():
    tx = zq.zoqo(1.0, 2.0, key=KEY, num_queries=4)
    assert collective_bytes(zq.distributed.spread(tx, mesh_of(2, 2), parts=4)) == 12 * 4


@four_devices
@pytest.mark.slow
def test_a_step_that_sizes_itself_sends_8_bytes_more_for_each_look():
    tx = zq.zoqo(key=KEY, num_queries=4)
    found = collective_bytes(zq.distributed.spread(tx, mesh_of(2, 2), parts=4))
    assert found == 12 * 4 + 2 * 8 == 16 * 4


# Means


@four_devices
def test_means_are_right_to_the_last_bits_and_the_same_on_any_mesh():
    losses = np.random.default_rng(0).lognormal(0, 3, (6, 4)).astype(np.float32)  # queries, parts
    losses[5, 2] = np.inf

    def mean(shape, parts=4):
        @functools.partial(
            jax.shard_map,
            mesh=mesh_of(*shape),
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        def run(batch, is_real):
            spread = spreading.Spread("data", "queries", spreading.Parts(batch, is_real, 4))
            ask = lambda objective, query: objective(query)  # noqa: E731
            value_fn = lambda query, part: part[query] * jnp.array([1.0, 0.5])  # noqa: E731
            return spread.losses(ask, value_fn, 6, 1)

        return np.asarray(jax.jit(run)(jnp.asarray(losses.T), jnp.ones(4, bool)))

    one = mean((1, 1))
    np.testing.assert_allclose(one[:5, 0], losses[:5].mean(axis=1), rtol=2e-7)
    np.testing.assert_array_equal(one[:5, 1], one[:5, 0] / 2)
    assert np.isnan(one[5]).all()
    for shape in [(2, 2), (4, 1), (1, 4)]:
        assert mean(shape).tobytes() == one.tobytes()


# Arguments


@pytest.mark.parametrize("make", [*METHODS.values(), zq.spsa])
def test_axis_names_are_a_pair_and_the_old_name_still_works(make, untyped):
    with pytest.raises(ValueError, match=r"axis_names must be a pair .* got \('data',\)"):
        make(key=KEY, axis_names=("data",))
    with pytest.raises(ValueError, match="axis_names must be two names, got"):
        make(key=KEY, axis_names=("data", "data"))
    with pytest.warns(
        DeprecationWarning, match=r"axis_name='data' is now axis_names=\('data', None\)"
    ):
        make(key=KEY, axis_name="data")


def test_what_cannot_be_spread_is_refused():
    tx, params = zq.zoqo(1.0, 2.0, key=KEY), start()
    with pytest.raises(ValueError, match="queries must divide 1, the devices, got 2"):
        zq.distributed.mesh(2, jax.devices()[:1])
    other = Mesh(np.array(jax.devices()[:1]), ("x",))
    with pytest.raises(ValueError, match=r"mesh must have the axes .* got \('x',\)"):
        zq.distributed.spread(tx, other)
    spread = zq.distributed.spread(tx, mesh_of(1, 1), parts=5)
    with pytest.raises(ValueError, match="parts must divide 12, the examples of a batch, got 5"):
        spread.update(None, tx.init(params), params, value_fn=loss, batch=(X, Y))
    with pytest.raises(ValueError, match="batch must have arrays of as many examples each"):
        spread.update(None, tx.init(params), params, value_fn=loss, batch=(X, Y[:3]))


def test_a_batch_falls_into_parts_by_its_size_alone():
    of = zq.distributed._divided
    assert [of(jnp.zeros((n, 2)), None, 1)[2] for n in (12, 10, 7, 32, 11)] == [6, 5, 7, 8, 1]
    batch, is_real, count = of(jnp.arange(10), 5, 4)
    assert batch.shape == (8, 2) and is_real.tolist() == [True] * 5 + [False] * 3 and count == 5
