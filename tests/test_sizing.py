"""Steps that size themselves: they train, whatever the units, and a run is replayed exactly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoqo_jax as zq

METHODS = {
    "zoqo": zq.zoqo,
    "caq_zo": zq.caq_zo,
    "caq_zo, error feedback": functools.partial(zq.caq_zo, rounding="error_feedback"),
    "quzo": zq.quzo,
    "qes": functools.partial(zq.qes, window=5),
    "zoqo, rank-one": functools.partial(zq.zoqo, structure="rank_one"),
    "zoqo, paired": functools.partial(zq.zoqo, structure="paired"),
    "zoqo, a density given": functools.partial(zq.zoqo, density=0.125, structure="sparse"),
    "qzo": zq.qzo,
    "zoqo, a radius given": functools.partial(zq.zoqo, radius=0.2),
}
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (512, 8))
TRUE = jax.random.normal(jax.random.key(2), (8, 4))
Y = (X @ TRUE).argmax(axis=1)
START = {"w": jax.random.normal(jax.random.key(3), (8, 4)) * 0.5}


def cross_entropy(params, batch=slice(None), scale=1.0):
    """A logistic regression, whose loss and weights may be in any unit."""
    logits = X[batch] @ params["w"]
    return scale * optax.softmax_cross_entropy_with_integer_labels(logits, Y[batch]).mean()


def run(tx, params, loss, steps=300):
    """The parameters and what each step told, compiled as a scan; `loss(params, step)`."""

    def step(carry, t):
        params, state = carry
        updates, state = tx.update(None, state, params, value_fn=lambda p: loss(p, t))
        return (optax.apply_updates(params, updates), state), state.info

    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(steps)))
    (params, _), told = scan((params, tx.init(params)))
    return params, told


# Each method is in a minute trained by the first test below or replayed by the second; the rest of
# both is slow.
TRAINED = ("zoqo", "caq_zo", "quzo", "qzo", "zoqo, a radius given")
slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("zoqo", 8),
        slow("zoqo", 4),
        *(
            (pytest.param if name in TRAINED else slow)(name, 8 if "rank" in name else 4)
            for name in list(METHODS)[1:]
        ),
    ],
)
def test_a_method_trains_without_a_number(name, bits):
    """From its key alone, or from what else is given, a method halves the loss.

    Of few bits, rank-one directions, of one code at least in every coordinate, are too long.
    """
    start = zq.quantize(START, zq.Quantizer(bits=bits))
    tx = METHODS[name](key=KEY, num_queries=4)
    trained, told = run(tx, start, lambda p, t: cross_entropy(p))
    before, after = (cross_entropy(zq.dequantize(p)) for p in (start, trained))
    assert after < before / 2 or (name == "qzo" and after < before)
    assert told.losses.shape == (300, 4, 2)


@pytest.mark.parametrize("name", [slow(x) if x in TRAINED else x for x in METHODS])
def test_a_run_is_replayed_bit_for_bit_from_its_log(name):
    """`info.log` holds all that steps follow from, second looks of the step before too."""
    start = zq.quantize(START, zq.Quantizer(bits=8))
    tx = METHODS[name](key=KEY, num_queries=3)
    batch = lambda t: (jnp.arange(32) + 32 * t) % 512  # noqa: E731
    trained, told = run(tx, start, lambda p, t: cross_entropy(p, batch(t)), steps=40)
    assert told.log.shape == (40, 3, 2)
    assert (told.record[..., 1] < 0).any(), "no direction was looked along twice"
    again = zq.replay(start, told.log, tx)
    np.testing.assert_array_equal(again["w"].codes, trained["w"].codes)
    np.testing.assert_array_equal(again["w"].scale, trained["w"].scale)


def test_the_unit_of_the_loss_changes_nothing():
    """Codes are the same bit for bit for a loss that is a power of two as large."""
    start = zq.quantize(START, zq.Quantizer(bits=4))
    tx = zq.zoqo(key=KEY, num_queries=4)
    units = jnp.array([1.0, 2.0**-20, 2.0**20])
    trained = jax.vmap(lambda unit: run(tx, start, lambda p, t: cross_entropy(p, scale=unit))[0])(
        units
    )
    codes = trained["w"].codes
    np.testing.assert_array_equal(codes, codes[:1].repeat(3, axis=0))


@pytest.mark.parametrize(
    ("tx", "form"),
    [
        (zq.zoqo(key=KEY, num_queries=4), lambda p: zq.quantize(p, zq.Quantizer(bits=4))),
        (zq.spsa(key=KEY, num_queries=4), lambda p: p),
    ],
    ids=["codes", "floats"],
)
def test_the_unit_of_the_weights_changes_nothing(tx, form):
    """Likewise for weights in another unit, of codes and of floats."""

    def trained(unit):
        start = form(jax.tree.map(lambda w: w * unit, START))
        loss = lambda p, t: cross_entropy(jax.tree.map(lambda w: w / unit, p))  # noqa: E731
        return zq.dequantize(run(tx, start, loss, steps=100)[0])["w"] / unit

    found = jax.vmap(trained)(jnp.array([1.0, 2.0**-10, 2.0**10]))
    np.testing.assert_array_equal(found, found[:1].repeat(3, axis=0))


def test_floats_train_without_a_number():
    """`spsa` with a key alone makes steps, not gradients."""
    trained, _ = run(zq.spsa(key=KEY, num_queries=4), START, lambda p, t: cross_entropy(p))
    assert cross_entropy(trained) < cross_entropy(START) / 2


@pytest.mark.parametrize("optimum", [1e-3, 1.0, 1e3])
def test_floats_train_from_zero(optimum):
    """Where no entry says how large entries are, steps find out."""
    far = optimum * jax.random.normal(jax.random.key(4), (32,))
    loss = lambda x, t: jnp.sum((x - far) ** 2)  # noqa: E731
    trained, _ = run(zq.spsa(key=KEY, num_queries=4), jnp.zeros(32), loss, steps=400)
    assert loss(trained, 0) < 1e-3 * loss(jnp.zeros(32), 0)


def test_floats_that_begin_at_zero_beside_others_train():
    """As an adapter's halves do, however small the other is: no standstill, and few leaps up."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(64, 16), (16, 2), (2, 16), (16, 2)]
    x, a, b, small = (jax.random.normal(*one) for one in zip(keys, shapes, strict=True))
    loss = lambda p, t: jnp.mean((x @ p["a"] @ p["b"] - x @ a @ b / 4) ** 2)  # noqa: E731

    def losses(scale, key):
        params = {"a": scale * small, "b": jnp.zeros((2, 16))}
        _, told = run(zq.spsa(key=key, num_queries=4), params, loss, steps=400)
        return told.losses.mean(axis=(1, 2))

    scales, seeds = jnp.array([2e-3, 2e-2, 2e-1]), jax.random.split(jax.random.key(0), 40)
    of_runs = jax.vmap(jax.vmap(losses, (None, 0)), (0, None))(scales, seeds)
    assert (of_runs[..., -1] < 0.1 * of_runs[..., 0]).all(), of_runs[..., -1]
    leaps = of_runs.max(axis=-1) > 1.2 * of_runs[..., 0]  # of sizes that grew fast 34 of 120 did
    assert leaps.sum() <= 10, leaps.sum(axis=1)


def test_noise_is_told_from_what_is_true():
    """Of slopes that differ from batch to batch and mean nothing, little is held to be true."""
    start = zq.quantize({"w": jnp.zeros((8, 8))}, zq.Quantizer(bits=8, range=1.0))
    noise = jax.random.normal(jax.random.key(5), (600, 8, 8))
    shares = [
        run(
            zq.zoqo(key=KEY, num_queries=2),
            start,
            lambda p, t, share=share: jnp.sum((p["w"] - 0.5) ** 2 + share * noise[t] * p["w"]),
            steps=600,
        )[1].true_share[-1]
        for share in (0.0, 30.0)
    ]
    assert shares[0] > 0.7 and shares[1] < 0.1


@pytest.mark.parametrize("size", [1, slow(32), 1024])
def test_a_batch_of_any_size_trains(size):
    """Noise is most of what a batch of one says, and next to nothing of one of 1,024."""

    def loss(params, t):
        chosen = jax.random.randint(jax.random.fold_in(KEY, t), (size,), 0, len(X))
        return cross_entropy(params, chosen)

    start = zq.quantize(START, zq.Quantizer(bits=4))
    trained, told = run(zq.zoqo(key=KEY, num_queries=4), start, loss, steps=600)
    before, after = (float(cross_entropy(zq.dequantize(p))) for p in (start, trained))
    assert after < before * {1: 0.6, 32: 0.3, 1024: 0.3}[size]
    assert (told.true_share[-1] > 0.5) == (size == 1024)


def test_a_jump_of_the_data_does_not_end_a_run():
    """Labels change their meaning half way: the loss falls once more."""
    other = (Y + 1) % 4

    def loss(params, t):
        labels = jnp.where(t < 300, Y, other)
        logits = X @ params["w"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    start = zq.quantize(START, zq.Quantizer(bits=8))
    trained, told = run(zq.zoqo(key=KEY, num_queries=8), start, loss, steps=900)
    after_jump = float(told.losses[300:310].mean())
    assert float(loss(zq.dequantize(trained), 900)) < after_jump / 3


def test_a_loss_that_is_no_number_is_survived():
    """Where every query is NaN nothing moves; the run goes on when losses are numbers again."""
    start = zq.quantize(START, zq.Quantizer(bits=4))
    loss = lambda p, t: jnp.where((t > 20) & (t < 60), jnp.nan, cross_entropy(p))  # noqa: E731
    trained, told = run(zq.zoqo(key=KEY, num_queries=2), start, loss)
    assert not told.codes_moved[21:60].any()
    assert int(told.skipped[-1]) == 2 * 39
    assert cross_entropy(zq.dequantize(trained)) < cross_entropy(zq.dequantize(start)) / 2


def test_problems_vmapped_are_the_problems_one_by_one():
    """Under vmap each problem has sizes of its own."""
    starts = [zq.quantize(START, zq.Quantizer(bits=4)) for _ in range(2)]
    tx = zq.zoqo(key=KEY, num_queries=2)
    keys = jax.random.split(KEY, 2)

    def trained(params, key):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(None, state, params, value_fn=cross_entropy)
            return (optax.apply_updates(params, updates), state), None

        state = tx.init(params)._replace(key=key)
        return jax.lax.scan(step, (params, state), length=30)[0][0]["w"].codes

    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *starts)
    together = jax.jit(jax.vmap(trained))(stacked, keys)
    for problem, (start, key) in enumerate(zip(starts, keys, strict=True)):
        np.testing.assert_array_equal(together[problem], jax.jit(trained)(start, key))


def test_a_step_costs_a_twentieth_more_than_its_queries_at_most():
    """Looks at the curvature take two evaluations, as seldom as that."""
    start = zq.quantize(START, zq.Quantizer(bits=4))
    for queries in (1, 8):
        _, told = run(zq.zoqo(key=KEY, num_queries=queries), start, lambda p, t: cross_entropy(p))
        assert int(told.evaluations[-1] - told.evaluations[99]) <= 1.05 * 200 * 2 * queries


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: zq.zoqo("fast", key=KEY), "learning_rate must be a number, a schedule or 'auto'"),
        (lambda: zq.zoqo(radius="far", key=KEY), "radius must be a number, a schedule or 'auto'"),
        (lambda: zq.quzo(density="low", key=KEY), "density must be a number, a schedule or 'auto'"),
        (lambda: zq.spsa("far", key=KEY), "radius must be one of"),
        (lambda: zq.spsa(1e-3, key=KEY, learning_rate="auto"), "radius must be 'auto'"),
        (lambda: zq.caq_zo(key=KEY, rounding="significant"), "learning_rate must be a number"),
        (lambda: zq.zoqo(-1.0, key=KEY), "learning_rate must be positive"),
    ],
)
def test_what_cannot_size_itself_is_refused(make, words):
    """Errors name the argument."""
    with pytest.raises(ValueError, match=words):
        make()


def test_comparisons_need_a_given_step():
    """Which side is better does not say how far to go."""
    params = zq.Quantizer(bits=4)(jnp.ones((4, 4)))
    tx = zq.zoqo(key=KEY)
    with pytest.raises(ValueError, match="learning_rate must be a number or a schedule with"):
        tx.update(
            None, tx.init(params), params, compare_fn=lambda a, b: jnp.sign(a.sum() - b.sum())
        )
    tx = zq.caq_zo(key=KEY, structure="per_example")
    with pytest.raises(ValueError, match="where directions are of examples"):
        tx.init(params)
