"""Attacks that see only labels: what they ask, what they see, and linear models of known answer."""

import dataclasses

import attacked
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attacked import recorder

from experiments.attack import methods
from experiments.attack.attack import _program as program
from experiments.attack.attack import attack
from experiments.attack.config import LABEL_METHODS, Config

_SHAPE = (4, 3, 2)  # of small images, channels last


def linear(weights, lead):
    """Class 0 leads by `lead` plus a linear function of how far the image is from grey."""
    return attacked.linear(weights, lead, origin=0.5)


def drawn_weights(seed):
    """Weights without a zero, mostly positive, so that black is misread, and their l1 norm."""
    drawn = np.random.default_rng(seed).integers(-5, 10, _SHAPE) + 0.5
    return drawn, np.abs(drawn).sum()


GREY = np.full((1, *_SHAPE), 0.5, np.float32)
LABEL = np.array([0])


def known(method, seed, epsilon, budget=4_000):
    """Attack a linear model whose best direction needs a radius of 0.1."""
    weights, norm = drawn_weights(seed)
    answer, shown = recorder(linear(weights, lead=0.1 * norm))
    config = Config(method=method, epsilon=epsilon, budget=budget)
    outcome = attack(answer, GREY, LABEL, config, compiled=False)
    return outcome, np.stack(shown), weights


def each_method(*fast):
    """The methods; those of the others than `fast` are for the slow tests."""
    return [
        pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in LABEL_METHODS
    ]


# --- what all of them promise ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "epsilon"),
    [
        ("zoqo_labels", 0.102),
        ("rays", 0.102),
        pytest.param("sign_flip", 0.14, marks=pytest.mark.slow),
    ],
)
def test_the_least_radius_of_a_linear_model_is_found_and_none_below_it(method, epsilon):
    weights, norm = drawn_weights(0)
    model = linear(weights, lead=0.1 * norm)
    config = Config(method=method, epsilon=epsilon, budget=4_000)
    outcome = attack(model, GREY, LABEL, config)
    assert outcome.success.all()
    against = np.sign(outcome.perturbation[0]) == -np.sign(weights)
    assert np.abs(weights)[against].sum() > 0.8 * norm
    below = dataclasses.replace(config, epsilon=0.0995, budget=400)
    assert not attack(model, GREY, LABEL, below).success.any()


@pytest.mark.parametrize("method", each_method("zoqo_labels"))
def test_nothing_but_labels_is_seen(method):
    """A model that answers with labels is asked the same questions as one with logits."""
    weights, norm = drawn_weights(1)
    model = linear(weights, lead=0.1 * norm)
    config = Config(method=method, epsilon=0.103, budget=70)
    asked = []
    for one in (model, lambda images: 3 * model(images).argmax(-1)):  # classes 0 and 3
        answer, shown = recorder(one)
        attack(answer, GREY, LABEL, config, compiled=False)
        asked.append(np.stack(shown))
    np.testing.assert_array_equal(*asked)


@pytest.mark.parametrize("method", each_method("rays"))
def test_the_loss_makes_no_difference(method):
    settings = {"method": method, "epsilon": 0.103, "budget": 60}
    model = linear(drawn_weights(2)[0], lead=0.1 * drawn_weights(2)[1])
    one, other = (
        attack(model, GREY, LABEL, Config(loss=loss, **settings))
        for loss in ("margin", "cross_entropy")
    )
    np.testing.assert_array_equal(one.queries, other.queries)
    np.testing.assert_array_equal(one.perturbation, other.perturbation)


def test_labels_for_logits_are_taken_where_nothing_else_is_seen():
    def answer(images):
        return np.full(len(images), -1)

    config = Config(method="rays", budget=20)
    with pytest.raises(ValueError, match="labels that are not negative, got -1"):
        attack(answer, GREY, LABEL, config, compiled=False)
    config = Config(method="square", budget=20)
    with pytest.raises(ValueError, match=r"logits_fn must return shape \(1, classes\), got \(1,\)"):
        attack(answer, GREY, LABEL, config, compiled=False)


# --- ZOQO -----------------------------------------------------------------------------------------


def codes_asked(bits, epsilon, budget, seed=6):
    """The codes that are asked about on a linear model, and whether each question is misread.

    The best direction needs a radius of 0.02: nothing that is asked about is black or white.
    """
    weights, norm = drawn_weights(seed)
    answer, shown = recorder(linear(weights, lead=0.02 * norm))
    config = Config(method="zoqo_labels", epsilon=epsilon, budget=budget, bits=bits)
    attack(answer, GREY, LABEL, config, compiled=False)
    offsets = np.stack(shown).astype(np.float64) - 0.5
    codes = offsets / epsilon * (2 ** (bits - 1) - 1)
    return codes, 0.02 * norm + (offsets * weights).sum((1, 2, 3)) < 0


@pytest.fixture
def whole_codes(monkeypatch):
    """Radii of whole codes, which can be read off what is shown."""
    monkeypatch.setattr(methods.labels, "_FINE", 127)
    program.cache_clear()
    yield
    program.cache_clear()


def test_labels_takes_a_nearer_radius_with_every_flip_that_stays(whole_codes):
    codes, misread = codes_asked(8, epsilon=0.018, budget=90)
    np.testing.assert_allclose(codes, np.round(codes), atol=0.01)
    codes = np.round(codes).astype(int)
    radii = np.abs(codes).max((1, 2, 3))
    np.testing.assert_array_equal(np.abs(codes).min((1, 2, 3)), radii)
    signs = np.sign(codes)
    patterns = np.asarray(methods.coarse_to_fine.patterns(jnp.asarray(GREY[0])))
    _, places = np.unique(patterns, axis=0, return_index=True)
    places = np.sort(places)
    first = int(np.argmax(misread))
    ever_larger = [0, 127, 190, 285, 427, 640, 960]
    for i in range(first + 1):
        np.testing.assert_array_equal(signs[i], patterns[places[i % len(places)]])
        assert radii[i] == ever_larger[i // len(places) + 1]
    here, radius, low = signs[first], radii[first], ever_larger[first // len(places)]
    i = first + 1
    while radius - low > radius // 16:
        assert radii[i] == (low + radius) // 2
        np.testing.assert_array_equal(signs[i], here)
        low, radius = (low, radii[i]) if misread[i] else (radii[i], radius)
        i += 1
    step, changes = radius // 16, []
    while i < first + 20:
        assert radii[i] == radius - max(round(float(step)), 1)
        changes.append((signs[i] != here).any(-1))
        assert ((signs[i] != here).all(-1) == changes[-1]).all()  # in both channels
        if misread[i]:
            here, radius = signs[i], radii[i]
            step = min(step * 1.5, radius / 4)
        else:
            step = max(step * 1.5**-0.5, 1)
        i += 1
    # Squares of four sides, 4 x 3 pixels: two by two, then single ones.
    assert sorted(int(x.sum()) for x in changes[:4]) == [2, 2, 4, 4]
    np.testing.assert_array_equal(sum(x.astype(int) for x in changes[:4]), np.ones((4, 3)))


@pytest.mark.parametrize("bits", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_labels_round_a_radius_between_two_codes_up_and_down(bits):
    codes, _ = codes_asked(bits, epsilon=0.018, budget=90)
    np.testing.assert_allclose(codes, np.round(codes), atol=0.01)
    sizes = np.abs(np.round(codes)).reshape(len(codes), -1)
    spread = sizes.max(1) - sizes.min(1)
    assert set(spread) == {0.0, 1.0}
    between = sizes[spread > 0]
    order = np.argsort(sizes.mean(1))
    # Thresholds are the same at every radius: a larger one makes no value smaller.
    assert (np.diff(sizes[order], axis=0) >= 0).all()
    assert len(np.unique(between.mean(1))) > 3


def test_few_codes_are_no_hindrance():
    weights, norm = drawn_weights(0)
    config = Config(method="zoqo_labels", epsilon=0.102, budget=2_000, bits=2)
    assert attack(linear(weights, lead=0.1 * norm), GREY, LABEL, config).success.all()


# --- RayS -----------------------------------------------------------------------------------------


def rays_by_hand(is_misread, size, count):
    """Algorithms 2 and 3 of RayS: the (signs, radius) that the first questions ask about."""
    asked = []

    def look(signs, radius):
        asked.append((signs, radius))
        return is_misread(signs, radius)

    signs, best = np.ones(size), np.inf
    stage = 0
    while len(asked) < count:
        length = max(-(-size // 2**stage), 1)
        for begin in range(0, size, length):
            flipped = signs.copy()
            flipped[begin : begin + length] *= -1
            low, high = np.float32(0), np.float32(min(best, 1.0))
            if not look(flipped, high):
                continue
            while high - low > 1e-3 / np.sqrt(size):
                middle = (low + high) / np.float32(2)
                low, high = (low, middle) if look(flipped, middle) else (middle, high)
            if high < best:
                signs, best = flipped, high
        stage += 1
    return asked[:count]


def test_rays_asks_what_its_algorithm_asks():
    _, shown, weights = known("rays", 3, epsilon=0.0995, budget=400)
    assert len(shown) > 150
    lead = 0.1 * np.abs(weights).sum()
    flat = np.moveaxis(weights, -1, 0).reshape(-1)  # channel by channel

    def is_misread(signs, radius):
        reached = np.clip(radius * signs, -0.5, 0.5)
        return lead + flat @ reached < 0

    asked = rays_by_hand(is_misread, flat.size, len(shown))
    expected = [np.clip(0.5 + radius * signs, 0.0, 1.0) for signs, radius in asked]
    seen = np.moveaxis(shown, -1, 1).reshape(len(shown), -1)
    np.testing.assert_allclose(seen, expected, atol=1e-6)


def test_rays_ends_where_it_would_ask_the_same_for_ever():
    outcome, _, _ = known("rays", 4, epsilon=0.05, budget=4_000)
    assert outcome.queries[0] < 1_000


# --- HopSkipJump ----------------------------------------------------------------------------------


def test_hop_skip_jump_walks_along_the_boundary_and_is_the_same_for_a_seed():
    weights, norm = drawn_weights(3)
    model = linear(weights, lead=0.1 * norm)
    config = Config(method="hop_skip_jump", epsilon=0.115, budget=4_000, model_batch=64)
    before = np.random.get_state()[1].copy()
    one, other = (attack(model, GREY, LABEL, config) for _ in range(2))
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    assert one.success.all()
    assert 100 < one.queries[0] < 4_000  # not by noise, but by its estimates of the normal
    np.testing.assert_array_equal(one.perturbation, other.perturbation)
    against = np.sign(one.perturbation[0]) == -np.sign(weights)
    assert np.abs(weights)[against].sum() > 0.8 * norm


def test_hop_skip_jump_begins_at_coarser_noise_where_fine_noise_is_read_rightly():
    def is_fine(images):  # class 0: neighbours differ; 1: flat squares
        rough = jnp.abs(images[:, 1:] - images[:, :-1]).mean((1, 2, 3))
        return jnp.stack([rough, jnp.full(len(images), 0.2)], -1)

    images = np.tile(np.float32([[0.0], [1.0]]), (4, 4))[None, ..., None]
    answer, shown = recorder(is_fine)
    config = Config(method="hop_skip_jump", epsilon=0.45, budget=2_000)
    outcome = attack(answer, images, LABEL, config, compiled=False)
    assert outcome.success.all()
    coarse = next(i for i, one in enumerate(shown) if is_fine(one[None])[0].argmax() == 1)
    assert 1 <= coarse <= 3
    np.testing.assert_array_equal(shown[coarse][::2], shown[coarse][1::2])


def test_hop_skip_jump_has_no_targets_and_no_more_than_its_budget():
    config = Config(method="hop_skip_jump", epsilon=0.001, budget=150)
    weights, norm = drawn_weights(4)
    answer, shown = recorder(linear(weights, lead=0.1 * norm))
    with pytest.raises(ValueError, match="targets must be None for hop_skip_jump"):
        attack(answer, GREY, LABEL, config, targets=np.array([1]), compiled=False)
    outcome = attack(answer, GREY, LABEL, config, compiled=False)
    assert not outcome.success.any()
    assert outcome.queries[0] == len(shown) == 150


# --- SignFlip -------------------------------------------------------------------------------------


def test_sign_flip_projects_and_flips_by_turns_as_its_algorithm_does():
    _, shown, weights = known("sign_flip", 5, epsilon=0.05, budget=400)
    offsets = (shown - 0.5).astype(np.float64)
    lead = 0.1 * np.abs(weights).sum()
    misread = lead + (offsets * weights).sum((1, 2, 3)) < 0
    first = int(np.argmax(misread))  # images of noise until then
    assert np.abs(offsets[: first + 1]).max() > 0.3
    noise, low, high = offsets[first], 0.0, np.abs(offsets[first]).max()
    for i in range(first + 1, first + 11):
        middle = (low + high) / 2
        np.testing.assert_allclose(offsets[i], np.clip(noise, -middle, middle), atol=1e-6)
        low, high = (low, middle) if misread[i] else (middle, high)
    here, alpha = np.clip(noise, -high, high), 0.004
    stayed = [0, 0]
    begin = first + 11
    for i in range(begin, len(offsets)):
        turn = (i - begin) % 2
        if turn == 0:
            radius = np.abs(here).max() - alpha
            assert np.abs(offsets[i]).max() <= radius + 1e-6
            assert np.abs(offsets[i] - np.clip(here, -radius, radius)).max() <= alpha + 1e-6
        else:
            np.testing.assert_allclose(np.abs(offsets[i]), np.abs(here), atol=1e-6)
        if misread[i]:
            here, stayed[turn] = offsets[i], stayed[turn] + 1
        if (i - begin) % 20 == 19:
            alpha *= 1.5 if stayed[0] > 7 else 1 / 1.5 if stayed[0] < 3 else 1.0
            stayed = [0, 0]
    assert np.abs(here).max() < 0.8 * high


def test_sign_flip_flips_few_signs_and_learns_which():
    config = Config(method="sign_flip")
    shape = (32, 32, 3)
    method = methods.make(config, shape)
    state = method.init(jax.random.key(0), jnp.full(shape, 0.5))
    state = state._replace(perturbation=jnp.full(shape, 0.2), step=jnp.int32(11))
    asked = method.ask(state)[0]
    flipped = np.asarray(asked) < 0
    assert 0 < flipped.sum() < 12  # of 3,072, each with probability 0.001
    after = method.tell(state, jnp.array([True]))
    np.testing.assert_array_equal(after.perturbation, asked)
    kept = np.asarray(after.kept)
    assert (kept[flipped] > kept[~flipped].max()).all()
    before = method.tell(state, jnp.array([False]))
    np.testing.assert_array_equal(before.perturbation, state.perturbation)
    np.testing.assert_array_equal(before.kept, state.kept)


@pytest.mark.parametrize("method", ["zoqo", "zoqo_labels"])
def test_a_search_may_begin_without_patterns(method):
    config = Config(method=method, patterns=False)
    one = methods.make(config, GREY[0].shape)
    (question,) = one.ask(one.init(jax.random.key(0), jnp.asarray(GREY[0])))
    np.testing.assert_allclose(question, config.epsilon, rtol=1e-5)
