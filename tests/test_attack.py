"""The attack experiment: it succeeds, it never leaves the ball, and its counts are honest."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.attack import batching, data, methods, models, report
from experiments.attack.config import Config
from experiments.attack.run import run

_ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def digits():
    """The network and the first 50 digits that it reads correctly."""
    logits_fn = models.load_classifier()
    images, labels = data.load("mnist")
    right = np.asarray(logits_fn(jnp.asarray(images[:60])).argmax(-1)) == labels[:60]
    chosen = np.flatnonzero(right)[:50]
    return logits_fn, images[chosen], labels[chosen]


@pytest.fixture(scope="module")
def attacked(digits):
    return batching.attack(*digits, Config(num_images=50, budget=10_000))


def test_eight_bits_fool_the_network_on_every_digit(attacked):
    assert attacked.success.all()
    assert attacked.queries.mean() <= 640


def test_perturbed_digits_are_misread(digits, attacked):
    logits_fn, images, labels = digits
    adversarial = np.clip(images + attacked.perturbation, 0, 1)
    read_as = np.asarray(logits_fn(jnp.asarray(adversarial)).argmax(-1))
    np.testing.assert_array_equal(read_as != labels, attacked.success)


@pytest.mark.parametrize(
    ("bits", "noise"), [(2, "uniform"), (3, "gaussian"), (4, "rademacher"), (8, "gaussian")]
)
def test_the_attack_never_leaves_the_ball(digits, bits, noise):
    logits_fn, images, labels = digits
    config = Config(num_images=16, budget=60, bits=bits, noise=noise, epsilon=0.1)
    outcome = batching.attack(logits_fn, images[:16], labels[:16], config)
    assert np.abs(outcome.perturbation).max() <= np.float32(0.1)
    assert np.abs(outcome.perturbation).max() > 0


def test_every_evaluation_is_counted():
    evaluated = []

    def logits_fn(images):
        jax.debug.callback(
            lambda _: evaluated.append(1), images.sum()
        )  # once for each mapped image
        return jnp.stack([jnp.ones(len(images)), jnp.zeros(len(images))], axis=-1)  # never fooled

    images, labels = np.full((1, 4, 4, 1), 0.5, np.float32), np.zeros(1, np.int32)
    for method, per_step in (("zoqo", 6), ("zo_sign_sgd", 4)):
        config = Config(method=method, num_images=1, budget=25, num_queries=3, batch_size=1)
        evaluated.clear()
        outcome = batching.attack(logits_fn, images, labels, config)
        jax.effects_barrier()
        assert outcome.queries.tolist() == [25 // per_step * per_step]
        assert sum(evaluated) == outcome.queries[0]
        assert not outcome.success.any()


def test_outcomes_do_not_depend_on_the_batch(digits, attacked):
    logits_fn, images, labels = digits
    config = Config(num_images=20, budget=10_000, batch_size=16)
    few = batching.attack(logits_fn, images[:20], labels[:20], config)
    # A batch's size may order the sums in a convolution, so a near tie may turn out otherwise.
    assert (few.queries == attacked.queries[:20]).mean() >= 0.8
    assert few.success.all()


def test_the_same_seed_gives_the_same_attack(digits, attacked):
    again = batching.attack(*digits, Config(num_images=50, budget=10_000))
    for first, second in zip(attacked, again, strict=True):
        np.testing.assert_array_equal(first, second)


def test_no_program_is_compiled_for_an_image(digits):
    logits_fn, images, labels = digits
    traced = []

    def counted(images):
        traced.append(images.shape)
        return logits_fn(images)

    config = Config(num_images=40, budget=400, batch_size=16)
    batching.attack(counted, images[:40], labels[:40], config)
    assert len(traced) <= 2  # one size of batch; tracing may visit a loop's body twice


@pytest.mark.parametrize(("count", "size"), [(1, 16), (16, 16), (17, 32), (33, 64), (500, 128)])
def test_batches_are_powers_of_two(count, size):
    assert batching._bucket(count, 128) == size


def test_float_baseline_stays_in_the_ball_and_mostly_succeeds(digits):
    outcome = batching.attack(*digits, Config(method="zo_sign_sgd", num_images=50, budget=1_000))
    assert np.abs(outcome.perturbation).max() <= np.float32(0.3)
    assert outcome.success.mean() > 0.7


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "magic"),
        ("bits", 9),
        ("num_images", 0),
        ("budget", 0),
        ("batch_size", -1),
        ("epsilon", 0.0),
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


def test_command_writes_a_table_and_a_figure(tmp_path):
    command = [sys.executable, "-m", "experiments.attack", "--num_images=4", "--budget=300"]
    result = subprocess.run(
        [*command, "--bits=8", "--nobaseline", f"--output={tmp_path}"],
        cwd=_ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "| ZOQO, 8 bit |" in result.stdout
    assert (tmp_path / "table.md").read_text() in result.stdout + "\n"
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert len((tmp_path / "images.csv").read_text().splitlines()) == 5


@pytest.mark.parametrize("flag", ["--bits=9", "--bits=x", "--dataset=/nowhere"])
def test_command_names_what_is_wrong(flag):
    command = [sys.executable, "-m", "experiments.attack", "--num_images=1", flag]
    result = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert flag.split("=")[0].strip("-") in result.stdout + result.stderr
    assert "Traceback" not in result.stderr


def test_table_survives_a_run_without_successes():
    metrics = run(Config(num_images=2, budget=2, epsilon=0.001))
    assert metrics.failure_rate == 1.0
    assert "nan" in report.table([metrics])


def test_the_method_steps_by_whole_codes(digits):
    logits_fn, images, labels = digits
    method = methods.make(Config(), 784)
    perturbation, state = method.init(jax.random.key(0))

    def margin(values):
        image = jnp.asarray(images[0]) + values.reshape(28, 28, 1)
        return batching.margin_of(logits_fn(image[None])[0], jnp.asarray(labels[0]))

    step = method.step(margin, perturbation, state)
    assert step.perturbation.codes.dtype == jnp.uint8
    assert step.state.queries == method.queries_per_step == 2


@pytest.mark.slow
def test_a_thousand_digits_all_fall_to_eight_bits():
    metrics = run(Config(num_images=1_000, budget=10_000))
    print(report.table([metrics]))
    assert metrics.failure_rate == 0.0
    assert metrics.mean_queries <= 640
