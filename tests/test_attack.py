"""The attack suite: it succeeds, it never leaves the ball, and its counts are honest."""

import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attacked import linear, recorder

from experiments.attack import data, methods, models, report
from experiments.attack.attack import _bucket, attack, margin_of
from experiments.attack.config import Config
from experiments.attack.methods.square import side
from experiments.attack.run import run

_ROOT = Path(__file__).parents[1]

_METHODS = {
    "coarse to fine": {"method": "zoqo"},
    "dense": {"method": "zoqo", "structure": "dense"},
    "sparse": {"method": "zoqo", "structure": "sparse", "num_queries": 2},
    "rank-one": {"method": "zoqo", "structure": "rank_one", "bits": 4},
    "zo_sign_sgd": {"method": "zo_sign_sgd"},
    "sign_hunter": {"method": "sign_hunter"},
    "square": {"method": "square"},
    "labels": {"method": "zoqo_labels"},
    "rays": {"method": "rays"},
    "sign_flip": {"method": "sign_flip"},
    "hop_skip_jump": {"method": "hop_skip_jump"},
}
_UNTARGETED = ("hop_skip_jump",)  # refuse targets


def each_method(*fast, but=()):
    """Settings of each method; those of the others than `fast` are for the slow tests."""
    return [
        pytest.param(settings, id=name, marks=() if name in fast else pytest.mark.slow)
        for name, settings in _METHODS.items()
        if name not in but
    ]


@pytest.fixture(scope="module")
def digits():
    """The network and the first 50 digits that it reads correctly."""
    logits_fn = jax.jit(models.load_classifier("mnist"))
    images, labels = data.load("mnist")
    right = np.asarray(logits_fn(jnp.asarray(images[:60])).argmax(-1)) == labels[:60]
    chosen = np.flatnonzero(right)[:50]
    return logits_fn, images[chosen], labels[chosen]


# --- what every method promises -------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    each_method("coarse to fine", "rank-one", "square"),
)
def test_what_is_found_is_misread_in_the_ball_and_on_the_grid(digits, settings):
    logits_fn, images, labels = (x if callable(x) else x[:16] for x in digits)
    config = Config(budget=300, epsilon=0.25, **settings)
    outcome = attack(logits_fn, images, labels, config)
    assert outcome.success.mean() > 0.3
    assert (outcome.queries <= 300).all()
    assert (outcome.queries >= 1).all()
    assert np.abs(outcome.perturbation).max() <= np.float32(0.25)
    shown = np.clip(images + outcome.perturbation, 0.0, 1.0)
    read_as = np.asarray(logits_fn(jnp.asarray(shown)).argmax(-1))
    np.testing.assert_array_equal(read_as != labels, outcome.success)
    if config.method in ("zoqo", "zoqo_labels"):
        step = 0.25 / (2 ** (config.bits - 1) - 1)
        codes = outcome.perturbation / step
        np.testing.assert_allclose(codes, np.round(codes), atol=1e-3)


_COUNTED = [
    ("coarse to fine", False),
    ("zo_sign_sgd", False),
    ("sign_hunter", False),
    ("square", True),
]


@pytest.mark.parametrize(
    ("settings", "targeted"),
    [
        # What a target changes is no part of a method, nor are zoqo's four structures what counts.
        pytest.param(
            settings,
            targeted,
            id=f"{name}{', targeted' * targeted}",
            marks=() if (name, targeted) in _COUNTED else pytest.mark.slow,
        )
        for targeted in (False, True)
        for name, settings in _METHODS.items()
        if not (targeted and name in _UNTARGETED)
    ],
)
def test_every_evaluation_is_counted_and_both_paths_agree(digits, settings, targeted):
    logits_fn, images, labels = (x if callable(x) else x[:12] for x in digits)
    targets = (labels + 1) % 10 if targeted else None
    config = Config(budget=66, epsilon=0.15, **settings)
    answer, shown = recorder(logits_fn)
    by_hand = attack(answer, images, labels, config, targets=targets, compiled=False)
    assert len(shown) == by_hand.queries.sum()
    compiled = attack(logits_fn, images, labels, config, targets=targets)
    for one, other in zip(by_hand, compiled, strict=True):
        np.testing.assert_array_equal(one, other)
    pixels = np.stack(shown)
    assert pixels.min() >= 0.0
    assert pixels.max() <= 1.0


@pytest.mark.parametrize("settings", each_method("zo_sign_sgd"))
def test_outcomes_depend_on_the_image_alone(digits, settings):
    logits_fn, images, labels = (x if callable(x) else x[:12] for x in digits)
    config = Config(budget=66, epsilon=0.15, **settings)  # a program of the test above
    whole = attack(logits_fn, images, labels, config)
    order = np.random.default_rng(0).permutation(12)[:9]
    other = dataclasses.replace(config, batch_size=4)
    some = attack(logits_fn, images[order], labels[order], other)
    for one, few in zip(whole, some, strict=True):
        np.testing.assert_array_equal(one[order], few)


@pytest.mark.parametrize("settings", each_method("coarse to fine", but=_UNTARGETED))
def test_a_targeted_attack_reaches_its_class(digits, settings):
    logits_fn, images, labels = digits
    targets = ((labels + 1) % 10).astype(np.int32)
    config = Config(budget=1_000, epsilon=0.4, **settings)
    outcome = attack(logits_fn, images[:16], labels[:16], config, targets=targets[:16])
    assert outcome.success.any()
    shown = np.clip(images[:16] + outcome.perturbation, 0.0, 1.0)
    read_as = np.asarray(logits_fn(jnp.asarray(shown)).argmax(-1))
    np.testing.assert_array_equal(read_as == targets[:16], outcome.success)


def test_cross_entropy_is_a_loss_too(digits):
    config = Config(budget=200, loss="cross_entropy")
    some = (x if callable(x) else x[:16] for x in digits)
    assert attack(*some, config).success.mean() > 0.9


def test_another_seed_asks_otherwise(digits):
    logits_fn, images, labels = (x if callable(x) else x[:12] for x in digits)
    config = Config(budget=66, epsilon=0.15, structure="dense")  # a program of a test above
    first, second = (
        attack(logits_fn, images, labels, dataclasses.replace(config, seed=seed)).perturbation
        for seed in (0, 1)
    )
    assert (first != second).any()


@pytest.mark.parametrize("settings", each_method("coarse to fine", "sign_hunter"))
def test_a_model_that_answers_nan_is_never_fooled(settings):
    def logits_fn(images):
        return jnp.full((len(images), 2), jnp.nan) + images.sum()

    images = np.full((3, 4, 4, 1), 0.5, np.float32)
    config = Config(budget=40, **settings)
    outcome = attack(logits_fn, images, np.zeros(3, int), config)
    assert not outcome.success.any()
    by_library = config.method == "hop_skip_jump"
    asks = 1 if by_library else methods.make(config, (4, 4, 1)).asks
    ends = 31 if config.method == "rays" else 40  # a stage of each length, and it is over
    assert (outcome.queries == ends // asks * asks).all()


# --- one method at a time -------------------------------------------------------------------------


def signs_by_hunting(weights, budget):
    """SignHunter's algorithm 2, on the loss sum(weights * signs), and the signs it asks about."""
    size = len(weights)
    asked = []

    def loss(signs):
        asked.append(signs.copy())
        return weights @ signs

    signs = np.ones(size)
    best = loss(signs)
    for level in range(int(np.ceil(np.log2(size))) + 1):
        length = -(-size // 2**level)
        for begin in range(0, size, length):
            if len(asked) == budget:
                return signs, asked
            flipped = signs.copy()
            flipped[begin : begin + length] *= -1
            if (found := loss(flipped)) <= best:
                signs, best = flipped, found
    return signs, asked


@pytest.mark.parametrize("size", [16, 20])
def test_sign_hunter_asks_what_its_algorithm_asks(size):
    weights = np.random.default_rng(size).integers(-9, 10, size) + 0.5
    image = np.full((1, size, 1, 1), 0.5, np.float32)
    questions = 2 * 2 ** int(np.ceil(np.log2(size)))  # enough for a round of every length
    signs, asked = signs_by_hunting(weights, questions)
    answer, shown = recorder(linear(weights, lead=1_000.0))
    config = Config(method="sign_hunter", epsilon=0.25, budget=len(asked))
    outcome = attack(answer, image, np.array([0]), config, compiled=False)
    np.testing.assert_array_equal(np.sign(np.stack(shown).reshape(-1, size) - 0.5), asked)
    np.testing.assert_array_equal(np.sign(outcome.perturbation.reshape(-1)), signs)
    np.testing.assert_array_equal(signs, -np.sign(weights))  # the optimum, within its bound
    assert len(asked) <= 2 * 2 ** int(np.ceil(np.log2(size)))


def test_sign_hunter_begins_anew_round_the_point_it_reached():
    weights = np.array([1.0, -1.0, 1.0, 1.0])
    image = np.full((1, 2, 2, 1), 0.5, np.float32)
    answer, shown = recorder(linear(weights, lead=100.0))
    config = Config(method="sign_hunter", epsilon=0.25, budget=10)
    attack(answer, image, np.array([0]), config, compiled=False)
    offsets = np.stack(shown).reshape(-1, 4) - 0.5
    np.testing.assert_array_equal(offsets[0], 0.25 * np.ones(4))
    reached = -0.25 * weights
    np.testing.assert_array_equal(offsets[8], np.clip(reached + 0.25, -0.25, 0.25))


@pytest.mark.parametrize("channels", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_square_attack_changes_one_square_at_a_time(channels):
    shape = (10, 10, channels)
    weights = np.random.default_rng(0).normal(size=shape)
    image = np.full((1, *shape), 0.5, np.float32)
    answer, shown = recorder(linear(weights, lead=1_000.0))
    config = Config(method="square", epsilon=0.25, budget=300, density=0.3)
    attack(answer, image, np.array([0]), config, compiled=False)
    signs = np.sign(np.stack(shown) - 0.5)
    assert set(np.unique(signs)) == {-1.0, 1.0}
    assert (signs[0] == signs[0][:1]).all()  # vertical stripes
    losses = (signs * weights).sum((1, 2, 3))
    steps = jnp.arange(len(signs) - 1)
    sides = jax.vmap(lambda i: side(i, config.density, shape, config.budget))(steps).tolist()
    best = 0
    for i in range(1, len(signs)):
        changed = signs[i] != signs[best]
        rows, columns, _ = np.nonzero(changed)
        assert changed.any()
        assert np.ptp(rows) < sides[i - 1]
        assert np.ptp(columns) < sides[i - 1]
        for channel in range(channels):
            assert len(np.unique(signs[i][..., channel][changed[..., channel]])) <= 1
        best = i if losses[i] < losses[best] else best
    assert losses[best] < 0.8 * losses[0] - 0.2 * np.abs(weights).sum()


def test_square_attack_shrinks_as_in_its_paper():
    shares = [0.8 / 2**k for k in range(10)]
    first = [0, 11, 51, 201, 501, 1_001, 2_001, 4_001, 6_001, 8_001]
    for iteration, share in zip(first, shares, strict=True):
        wanted = max(round(float(np.sqrt(share * 28 * 28))), 1)
        assert int(side(jnp.int32(iteration), 0.8, (28, 28, 1), 10_000)) == wanted


def test_zo_sign_sgd_steps_by_its_learning_rate():
    weights = np.random.default_rng(1).normal(size=(6, 6, 1))
    image = np.full((1, 6, 6, 1), 0.5, np.float32)
    answer, shown = recorder(linear(weights, lead=1_000.0))
    config = Config(method="zo_sign_sgd", epsilon=0.3, budget=44)
    attack(answer, image, np.array([0]), config, compiled=False)
    centres = np.stack(shown).reshape(4, 11, 36)[:, 0] - 0.5
    np.testing.assert_array_equal(centres[0], np.zeros(36))
    np.testing.assert_allclose(np.abs(np.diff(centres, axis=0)), 0.1, atol=1e-6)
    probes = np.stack(shown).reshape(4, 11, 36)[0, 1:] - 0.5
    assert 0.05 < np.linalg.norm(probes, axis=1).mean() < 0.15  # of length near 0.1


def test_zoqo_asks_for_both_ends_of_its_directions(digits):
    config = Config(structure="dense", num_queries=3, noise="uniform")
    method = methods.make(config, (28, 28, 1))
    state = jax.jit(method.init)(jax.random.key(0), jnp.asarray(digits[1][0]))
    asked = jax.jit(method.ask)(state)
    assert asked.shape == (6, 28, 28, 1)
    np.testing.assert_allclose(asked[0::2], -asked[1::2], atol=1e-7)
    after = jax.jit(method.tell)(state, jnp.array([1.0, 0.0, 2.0, 0.0, 0.0, 1.0]))
    assert after.perturbation.codes.dtype == jnp.uint8
    assert after.step.count == 1


# --- bad input ------------------------------------------------------------------------------------

_GOOD = {
    "logits_fn": linear(np.ones(16)),
    "images": np.full((2, 4, 4, 1), 0.5, np.float32),
    "labels": np.array([0, 1]),
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("images", np.full((2, 4, 4, 1), np.nan, np.float32), r"images must lie in \[0, 1\].*nan"),
        ("images", np.full((2, 4, 4, 1), 1.5, np.float32), r"images must lie in \[0, 1\].*1\.5"),
        ("images", np.zeros((2, 4, 4), np.float32), r"images must be floats of shape.*\(2, 4, 4\)"),
        ("images", np.zeros((2, 4, 4, 1), np.uint8), "images must be floats.*uint8"),
        ("images", np.zeros((0, 4, 4, 1), np.float32), "images must be floats of shape"),
        ("labels", np.array([0, 2]), "labels must be below 2.*got 2"),
        ("labels", np.array([0, -1]), "labels must not be negative, got -1"),
        ("labels", np.array([0.0, 1.0]), "labels must be 2 integers.*float64"),
        ("labels", np.array([0]), r"labels must be 2 integers.*\(1,\)"),
        ("targets", np.array([1, 1]), "targets must differ from labels, got 1 at 1"),
        ("targets", np.array([1, 7]), "labels must be below 2.*got 7"),
        ("logits_fn", lambda x: x, r"logits_fn must return shape \(16, classes\)"),
        ("logits_fn", lambda x: x.sum(), r"logits_fn must return shape.*got \(\)"),
        ("config", Config(method="zo_sign_sgd", budget=10), "budget must be at least 11.*got 10"),
    ],
)
def test_bad_input_is_refused_by_name(name, value, message):
    given = {**_GOOD, "config": Config(budget=20), name: value}
    positional = [given.pop(key) for key in ("logits_fn", "images", "labels", "config")]
    with pytest.raises(ValueError, match=message):
        attack(*positional, **given)


def test_a_served_model_is_checked_when_it_answers():
    images, labels = _GOOD["images"], _GOOD["labels"]
    for answer in (lambda x: np.zeros(3), lambda x: np.zeros((len(x), 1))):
        with pytest.raises(ValueError, match=r"logits_fn must return|labels must be below 1"):
            attack(answer, images, labels, Config(budget=20), compiled=False)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "magic"),
        ("structure", "none"),
        ("loss", "hinge"),
        ("bits", 9),
        ("weight_bits", 16),
        ("num_images", -1),
        ("budget", 1),
        ("batch_size", -1),
        ("model_batch", 0),
        ("epsilon", 0.0),
        ("density", 1.5),
        ("learning_rate", -1.0),
        ("radius", float("nan")),
    ],
)
def test_bad_settings_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} must.*{value}"):
        Config(**{name: value})


def test_too_many_images_are_refused():
    with pytest.raises(ValueError, match="num_images must be at most 9920"):
        run(Config(num_images=10_000))


# --- the machinery --------------------------------------------------------------------------------


def tracing(logits_fn):
    """A function that does the same, and the shapes that it was traced with."""
    traced = []

    def counted(images):
        traced.append(images.shape)
        return logits_fn(images)

    return counted, traced


def test_another_call_compiles_nothing_again(digits):
    logits_fn, images, labels = digits
    counted, traced = tracing(logits_fn)
    first = attack(counted, images[:20], labels[:20], Config(budget=400, batch_size=16))
    before = len(traced)
    again = attack(counted, images[:20], labels[:20], Config(budget=400, batch_size=16, seed=0))
    other = attack(counted, images[20:], labels[20:], Config(budget=400, batch_size=16, seed=1))
    assert len(traced) <= before + 2  # the check of its shape, each time
    np.testing.assert_array_equal(first.queries, again.queries)
    assert len(other.queries) == len(images) - 20


def test_no_program_is_compiled_for_an_image(digits):
    logits_fn, images, labels = digits
    counted, traced = tracing(logits_fn)
    attack(counted, images[:40], labels[:40], Config(budget=400, batch_size=16))
    assert set(traced) == {(16, 28, 28, 1)}
    assert len(traced) <= 4  # its shape, and one size of batch; tracing may visit a body twice


@pytest.mark.parametrize(("count", "size"), [(1, 16), (16, 16), (17, 64), (65, 128), (500, 128)])
def test_batches_are_powers_of_four(count, size):
    assert _bucket(count, 128) == size


def test_idle_places_are_not_asked_about():
    model, looks = linear(np.ones(16), lead=99.0), []

    def counted(images):
        jax.debug.callback(lambda: looks.append(len(images)))
        return model(images)

    images = np.full((3, 4, 4, 1), 0.5, np.float32)
    config = Config(budget=40, structure="dense", model_batch=4)
    attack(counted, images, np.zeros(3, int), config)
    jax.effects_barrier()
    assert looks == [4] * 40  # 20 steps of six questions, in a batch of 16 places


@pytest.mark.parametrize(
    "batch_size", [1, 3, *(pytest.param(size, marks=pytest.mark.slow) for size in (5, 100))]
)
def test_any_batch_size_comes_to_an_end(batch_size):
    images = np.full((7, 4, 4, 1), 0.5, np.float32)
    config = Config(method="square", budget=40, batch_size=batch_size, model_batch=2)
    outcome = attack(linear(np.ones(16), lead=99.0), images, np.zeros(7, int), config)
    assert (outcome.queries == 40).all()


def test_margins():
    logits = jnp.array([1.0, 3.0, 2.5])
    assert margin_of(logits, jnp.int32(1)) == 0.5
    assert margin_of(logits, jnp.int32(0)) == -2.0


# --- the command ----------------------------------------------------------------------------------


def _command(*flags):
    command = [sys.executable, "-m", "experiments.attack", *flags]
    return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)


def test_command_writes_a_table_and_a_figure(tmp_path):
    flags = ("--num_images=4", "--budget=60", "--bits=8", "--nobaseline")
    result = _command(*flags, "--structures=dense", f"--output={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert "| ZOQO, 8 bit" in result.stdout
    assert (tmp_path / "table.md").read_text() in result.stdout + "\n"
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert len((tmp_path / "images.csv").read_text().splitlines()) == 5


@pytest.mark.parametrize("flag", ["--bits=9", "--bits=x", "--dataset=/nowhere", "--epsilon=0"])
def test_command_names_what_is_wrong(flag):
    result = _command("--num_images=1", flag)
    assert result.returncode != 0
    assert flag.split("=")[0].strip("-") in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_table_survives_a_run_without_successes():
    metrics = run(Config(method="square", num_images=2, budget=2, epsilon=0.001))
    assert metrics.failure_rate == 1.0
    assert "nan" not in report.table([metrics])


@functools.cache
def _thousand(**settings):
    return run(Config(num_images=1_000, budget=10_000, **settings))


@pytest.mark.slow
def test_a_thousand_digits_all_fall_to_eight_bits():
    coarse, dense = _thousand(), _thousand(structure="dense")
    hunted = _thousand(method="sign_hunter")
    print(report.table([coarse, dense, hunted]))
    assert coarse.failure_rate == dense.failure_rate == 0.0
    assert dense.mean_queries <= 640
    assert coarse.mean_queries <= 0.85 * hunted.mean_queries
