"""Random bits: Threefry to the bit, fair and independent across words, rows, streams and parts."""

import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from statistical import assert_binomial, assert_identity_covariance, random_words

from zoqo_jax.xla import random_bits

KEY = jax.random.key(0)
PROBABILITIES = [0.0, 2.0**-24, 1e-5, 2.0**-11, 0.01, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1 - 2.0**-11, 1.0]


def bits(words):
    """(..., words) -> (..., 32 * words), each -1 or 1."""
    words = np.asarray(words)
    unpacked = (words[..., None] >> np.arange(32, dtype=np.uint32)) & 1
    return 2.0 * unpacked.reshape(*words.shape[:-1], -1) - 1


# The generator


def pair(*key_and_counter):
    """Both words that the generator makes of a counter."""
    which = np.array([True, False])
    return jax.jit(jax.vmap(random_bits._threefry, (None,) * 4 + (0,)))(*key_and_counter, which)


def test_threefry_is_jaxs():
    rng = np.random.default_rng(0)
    key0, key1, x0, x1 = rng.integers(0, 2**32, (4, 20, 1), np.uint32)
    x0, x1 = (x + np.arange(50, dtype=np.uint32) for x in (x0, x1))
    y0, y1 = pair(key0, key1, x0, x1)
    for i in range(20):
        expected = jax.extend.random.threefry_2x32(
            jnp.concatenate([key0[i], key1[i]]), jnp.concatenate([x0[i], x1[i]])
        )
        np.testing.assert_array_equal(np.concatenate([y0[i], y1[i]]), expected)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_known_answers_of_its_authors(key, counter, expected):
    words = pair(*(jnp.uint32(word) for word in (*key, *counter)))
    assert tuple(word.item() for word in words) == expected


def test_a_word_is_a_function_of_key_row_stream_and_place():
    """Row i's place p in a stream is the counter (i, stream * 2^26 + p): two words."""
    rows = random_bits.rows(KEY, (3, 4))
    words = np.asarray(random_bits.words(rows, 10, 63, 7))
    for row, i in enumerate(np.ndindex(3, 4)):
        place = 63 * 2**26 + 7 + np.arange(5)
        counter = np.concatenate([np.full(5, row), place]).astype(np.uint32)
        expected = jax.extend.random.threefry_2x32(jax.random.key_data(KEY), jnp.asarray(counter))
        np.testing.assert_array_equal(words[i], expected)
    np.testing.assert_array_equal(random_bits.words(rows, 9, 63, 7), words[..., [*range(9)]])


def test_a_row_has_its_bits_whatever_others_there_are():
    # So many words that a CPU keeps those of signs in memory.
    rows = random_bits.rows(KEY, (3, 200))
    makes = [
        lambda of: random_bits.words(of, 5, 2),
        lambda of: random_bits.signs(of, 50, 2),
        lambda of: random_bits.below(of, 7, 5, 2),
        lambda of: random_bits.bernoulli(of, 0.3, 50, 2),
        lambda of: random_bits.bernoulli(of, 0.3, 5, 2),
    ]
    for make in map(jax.jit, makes):
        all_rows = make(rows)
        one = jax.tree.map(lambda field: field[1, 2], rows)
        np.testing.assert_array_equal(make(one), all_rows[1, 2])
        many = jax.vmap(jax.vmap(make))(rows)
        np.testing.assert_array_equal(many, all_rows)
        with jax.enable_x64(True):
            np.testing.assert_array_equal(make(rows), all_rows)


@pytest.mark.parametrize("kind", ["rbg", "unsafe_rbg"])
def test_keys_of_other_generators_serve(kind):
    one, same, other = (jax.random.key(seed, impl=kind) for seed in (1, 1, 2))
    signs = [random_bits.signs(random_bits.rows(key, (4,)), 64, 0) for key in (one, same, other)]
    np.testing.assert_array_equal(signs[0], signs[1])
    assert (signs[0] != signs[2]).any()


# Fair and independent


def test_signs_are_fair_and_uncorrelated_within_and_between_words():
    signs = np.asarray(random_bits.signs(random_bits.rows(KEY, ()), 64 * 20_000, 0)).reshape(-1, 64)
    assert set(np.unique(signs)) == {-1, 1}
    assert_binomial((signs > 0).sum(), signs.size, 0.5)
    assert_identity_covariance(signs.astype(float))


@pytest.mark.parametrize("count", [1, 31, 64, 77])
def test_signs_are_uncorrelated_within_a_row_of_any_length(count):
    signs = np.asarray(random_bits.signs(random_bits.rows(KEY, (20_000,)), count, 1))
    assert signs.shape == (20_000, count) and signs.dtype == np.int8
    assert_binomial((signs > 0).sum(), signs.size, 0.5)
    assert_identity_covariance(signs.astype(float))


KINDS = {
    "words": lambda of, stream: bits(random_bits.words(of, 1, stream)),
    "signs": lambda of, stream: np.asarray(random_bits.signs(of, 32, stream), float),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_rows_are_independent(kind):
    """Neighbouring rows, rows of neighbouring matrices, and a row and what all rows share."""
    of = random_bits.rows(KEY, (20_000, 2))
    mine = kind(of, 0).reshape(20_000, 64)
    assert_identity_covariance(mine)
    rekeyed = random_bits.rows(jax.random.key(1), (20_000,))
    shared = jax.vmap(lambda key: random_bits.shared(random_bits.rows(key, (2,))))
    keys = jax.random.split(KEY, 20_000)
    both = np.concatenate(
        [
            kind(jax.vmap(lambda key: random_bits.rows(key, (2,)))(keys), 0)[:, 0],
            kind(shared(keys), 0)[:, 0],
            kind(rekeyed, 0),
        ],
        axis=-1,
    )
    assert_identity_covariance(both)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_streams_are_independent(kind):
    of = random_bits.rows(KEY, (20_000,))
    assert_identity_covariance(np.concatenate([kind(of, i) for i in (0, 1, 2, 63)], axis=-1))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("count", [2, 4])
def test_parts_are_independent(kind, count):
    of = random_bits.rows(KEY, (20_000,))
    drawn = [kind(random_bits.part(of, i), 0) for i in range(count)]
    assert_identity_covariance(np.concatenate(drawn, axis=-1))


def test_a_part_knows_its_whole_and_what_its_rows_share():
    of = random_bits.rows(KEY, (3, 4))
    for i in range(4):
        part = random_bits.part(of, i)
        np.testing.assert_array_equal(part.index, np.asarray(of.index, np.int64) + (i << 30))
        jax.tree.map(np.testing.assert_array_equal, random_bits.whole(part), of)
        shared = random_bits.shared(part)
        assert shared.index.tolist() == [[(i << 30) + 2**30 - 1]]
        later = jax.tree.map(lambda field: field[1:], part)
        jax.tree.map(np.testing.assert_array_equal, random_bits.shared(later), shared)


def test_keys_of_neighbouring_steps_give_independent_bits():
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(20_000))
    words = jax.vmap(lambda key: random_bits.words(random_bits.rows(key, ()), 2, 0))(keys)
    assert_identity_covariance(bits(words))
    serial = bits(words)[:, :16]
    assert_identity_covariance(np.concatenate([serial[:-1], serial[1:]], axis=-1))


@pytest.mark.parametrize(
    ("count", "words"), [(0, 0), (1, 1), (32, 1), (33, 2), (65, 3), (1000, 32)]
)
def test_a_word_makes_32_signs(count, words, monkeypatch):

    def make(key):
        return random_bits.signs(random_bits.rows(key, ()), count, 0)

    assert random_words(make, KEY, monkeypatch=monkeypatch) == words
    assert jax.eval_shape(make, KEY).shape == (count,)


# Whole numbers


@pytest.mark.parametrize("bound", [1, 2, 3, 100, 2**11, 2**16 - 1, 2**16])
def test_whole_numbers_below_a_bound_are_uniform_and_exact(bound):
    of = random_bits.rows(KEY, (100,))
    numbers = np.asarray(random_bits.below(of, bound, 4_000, 5))
    words = np.asarray(random_bits.words(of, 4_000, 5), np.uint64)
    np.testing.assert_array_equal(numbers, (words * bound) >> np.uint64(32))
    assert numbers.min() >= 0 and numbers.max() < bound
    classes = min(bound, 128)
    if classes > 1:
        edges = np.arange(classes + 1) * bound // classes
        counts = np.histogram(numbers, edges)[0]
        expected = np.diff(edges) / bound * numbers.size
        assert stats.chisquare(counts, expected).pvalue > 1e-4


# Bernoulli draws


@pytest.mark.parametrize(("columns", "shared"), [(33, True), (64, False)], ids=str)
def test_bernoulli_draws_have_their_probabilities(columns, shared):
    """By bit slicing where a long row shares one probability, a word each elsewhere."""
    rows = -(-32_768 // columns)
    p = jnp.asarray(PROBABILITIES, jnp.float32)
    of = random_bits.rows(KEY, (rows, p.size))
    probability = p[:, None] if shared else jnp.broadcast_to(p[:, None], (p.size, columns))
    draw = jax.jit(random_bits.bernoulli, static_argnums=(2, 3))
    drawn = np.asarray(draw(of, probability, columns, 0))
    assert drawn.shape == (rows, p.size, columns)
    for i, probability in enumerate(PROBABILITIES):
        assert_binomial(drawn[:, i].sum(), drawn[:, i].size, probability)


@pytest.mark.parametrize("shared", [True, False])
def test_bernoulli_draws_are_independent(shared):
    probability = 0.3 if shared else jnp.full(64, 0.3)
    drawn = random_bits.bernoulli(random_bits.rows(KEY, (20_000,)), probability, 64, 3)
    assert_identity_covariance((np.asarray(drawn) - 0.3) / np.sqrt(0.21))


def test_bit_sliced_draws_are_exact_in_their_words():
    """Each is true where the number that 24 words spell in its bit's place is below p."""
    of, p = random_bits.rows(KEY, (5,)), 0.3
    drawn = np.asarray(random_bits.bernoulli(of, p, 80, 3))
    words = np.stack([np.asarray(random_bits.words(of, 3, 3, digit * 3)) for digit in range(24)])
    digits = (bits(words)[..., :80] > 0).astype(np.int64)  # of lowest weight first
    number = (digits * 2 ** np.arange(24).reshape(-1, 1, 1)).sum(axis=0)
    flipped = 2**24 - 1 - number
    np.testing.assert_array_equal(drawn, flipped < np.rint(np.float32(p) * 2.0**24))


def test_a_few_digits_suffice_for_a_dyadic_probability(monkeypatch):
    def draw(key):
        return random_bits.bernoulli(random_bits.rows(key, ()), 5 / 8, 320_000, 0, 3)

    assert_binomial(np.asarray(draw(KEY)).sum(), 320_000, 5 / 8)
    assert random_words(draw, KEY, monkeypatch=monkeypatch, rounds=3) == 3 * 10_000


@functools.cache
def independent_kinds():
    """Signs, numbers and draws of one row, each from its stream."""
    of = random_bits.rows(KEY, (20_000,))
    place = (np.asarray(random_bits.below(of, 2**16, 8, 2)) - (2**16 - 1) / 2) / (
        2**16 / np.sqrt(12)
    )
    support = (np.asarray(random_bits.bernoulli(of, 0.25, 32, 3)) - 0.25) / np.sqrt(3 / 16)
    return np.concatenate([np.asarray(random_bits.signs(of, 32, 1)), place, support], axis=-1)


def test_signs_places_and_supports_of_a_row_are_uncorrelated():
    assert_identity_covariance(independent_kinds())
