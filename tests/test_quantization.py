"""Codes and values: the papers' quantizers in NumPy, bit for bit, and what no code may do."""

import dataclasses
import itertools
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from choosing import by_turns

import zoqo_jax as zq
from zoqo_jax import Grid, Quantizer
from zoqo_jax.grids import companders

GIVEN = [(-0.3, 0.3), (-1.0, 1.0), (0.0, 1.0), (0.0, 0.9), (-1.0, 2.0), (-0.3, 0.6), (-2.5, 0.75)]
NAMED = ["absmax", "minmax", "percentile", "mse"]
SHAPED = [
    companders.mu_law(),
    companders.a_law(),
    companders.power(),
    companders.gaussian(),
    companders.nf4(),
    companders.fp4(),
]


def normal(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def ints(codes):
    return np.asarray(codes).astype(np.int32)


def legal_codes(quantizer):
    grid = quantizer.grid
    return np.arange(grid.low, grid.high + 1)


def legal_values(quantizer):
    """The value of every legal code of a quantizer whose range is given."""
    legal = legal_codes(quantizer)
    padded = np.resize(legal, 256)  # one shape compiles once
    array = quantizer(jnp.zeros(256, jnp.float32))
    return np.asarray(array.decode(jnp.asarray(padded)))[: legal.size]


def with_values(quantizer):
    """To compile both at once: cheaper than a kernel for every operation and shape."""

    def quantize(x):
        array = quantizer(x)
        return array, array.materialise()

    return quantize


def assert_identical(one, other):
    """Same structure, shapes, dtypes and bits."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# The uniform quantizer


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("bounds", GIVEN)
def test_uniform_codes_are_the_papers(bounds, bits):
    """s = (Rmax - Rmin) / (2^b - 1), z = round(-Rmin / s), n = clamp(round(x / s) + z), exactly."""
    lo, hi = (Fraction(str(bound)) for bound in bounds)
    top = 2**bits - 1
    step = (hi - lo) / top
    zero, s = round(-lo / step), float(step)
    inside = [n for n in range(top + 1) if lo <= step * (n - zero) <= hi]
    # Both sides of every border between cells and beyond both ends; exact ties have their own test.
    k = np.resize(np.arange(-3, top + 4), 264) - zero
    x = (np.concatenate([k, k + 0.4999, k - 0.4999, k + 0.1]) * s).astype(np.float32)
    expected = np.clip(np.rint(x.astype(np.float64) / s) + zero, inside[0], inside[-1])

    array = Quantizer(bits, range=bounds)(jnp.asarray(x))
    assert (array.grid.low, array.grid.high) == (inside[0], inside[-1])
    np.testing.assert_array_equal(ints(array.codes), expected)
    # One float32 less where the nearest would push a bound that is a level out of the range.
    assert array.scale.item() in (np.float32(s), np.nextafter(np.float32(s), np.float32(0)))
    values = np.asarray(array.scale) * (expected - zero).astype(np.float32)
    np.testing.assert_array_equal(array.materialise(), values)


@pytest.mark.parametrize(("radius", "bits"), by_turns([0.3, 8 / 255, 0.1, 1.0], range(2, 9)))
def test_symmetric_range_has_the_papers_step_and_loses_one_code(radius, bits):
    quantizer = Quantizer(bits, range=radius)
    array = quantizer(jnp.zeros(3, jnp.float32))
    assert array.scale.item() == np.float32(2 * radius / (2**bits - 1))
    assert quantizer.grid.high - quantizer.grid.low + 1 == 2**bits - 1
    values = legal_values(quantizer)
    assert (np.abs(values) <= np.float32(radius)).all()
    np.testing.assert_array_equal(values, -values[::-1])


def test_ties_round_to_even_in_x_over_s():
    s = 2.0**-7
    for lo in (-0.5, -0.5 + s):  # an even and an odd zero point
        quantizer = Quantizer(8, range=(lo, lo + 255 * s))
        zero = round(-lo / s)
        x = (np.arange(-40, 40) + 0.5) * s
        codes = quantizer(jnp.asarray(x, jnp.float32)).codes
        np.testing.assert_array_equal(ints(codes), np.rint(x / s) + zero)


@pytest.mark.parametrize(
    ("bounds", "dtype"),
    by_turns([*GIVEN[2:], (-1.04, 0.2), 0.3], [jnp.float32, jnp.bfloat16, jnp.float16]),
)
def test_no_legal_value_leaves_a_given_range(bounds, dtype):
    lo, hi = np.float32(bounds if isinstance(bounds, tuple) else (-bounds, bounds))
    grids = [(bits, companders.identity()) for bits in range(2, 9)]
    grids += [(8, compander) for compander in SHAPED]
    for bits, compander in grids:
        values = legal_values(Quantizer(bits, compander, range=bounds, scale_dtype=dtype))
        assert lo <= values.min() and values.max() <= hi, (bits, compander)


def test_a_bound_that_is_a_level_is_kept():
    whole = [((0.0, 1.0), range(2, 9)), ((0.0, 0.9), range(2, 9)), ((-1.0, 2.0), (2, 4, 6, 8))]
    for bounds, bits in ((bounds, bits) for bounds, widths in whole for bits in widths):
        quantizer = Quantizer(bits, range=bounds)
        assert legal_codes(quantizer).size == 2**bits
        np.testing.assert_allclose(legal_values(quantizer)[[0, -1]], bounds, rtol=2e-7)


@pytest.mark.parametrize("range_", [*NAMED, *GIVEN[3:6]], ids=str)
def test_zero_is_exactly_a_level(range_):
    x = np.asarray(normal(300, 17)) + np.linspace(-2, 2, 300, dtype=np.float32)[:, None]
    x[:, ::4] = 0
    for bits in (4, 8):
        array = Quantizer(bits, range=range_, axis=0)(jnp.asarray(x))
        for values in (array.materialise(), jax.jit(zq.dequantize)(array)):
            assert (np.asarray(values)[:, ::4] == 0).all()


@pytest.mark.parametrize("bits", [2, 5, 8])
def test_minmax_spans_the_values_and_uses_every_code(bits):
    """The span is the data's, moved by less than half a step; scales have 16 significant bits."""
    x = np.asarray(normal(300, 17)) + np.linspace(-2, 2, 300, dtype=np.float32)[:, None]
    array = Quantizer(bits, range="minmax", axis=0)(jnp.asarray(x))
    lo, hi = np.minimum(x.min(1), 0), np.maximum(x.max(1), 0)
    top, s = 2**bits - 1, np.asarray(array.scale)[:, 0]
    np.testing.assert_allclose(s, (hi - lo) / top, rtol=2.0**-16)
    np.testing.assert_array_equal(s, (s.view(np.uint32) & 0xFFFFFF00).view(np.float32))
    zero = np.rint(-lo / s)
    np.testing.assert_array_equal(np.asarray(array.offset)[:, 0], -zero * s)
    assert (array.grid.low, array.grid.high) == (0, top)
    expected = np.clip(np.rint(x / s[:, None].astype(np.float64)) + zero[:, None], 0, top)
    np.testing.assert_array_equal(ints(array.codes), expected)
    for end, code in ((lo, 0), (hi, top)):
        assert (np.abs(s * (code - zero) - end) <= s * 0.51).all()


BITWISE = {
    "absmax": Quantizer(8),
    "pair": Quantizer(8, range=(-0.3, 0.7)),
    "minmax by blocks": Quantizer(5, range="minmax", block=5, axis=0, scale_dtype=jnp.bfloat16),
    "nf4": zq.nf4(block=8),
}
OTHERS = {
    "percentile": Quantizer(4, range="percentile", axis=0),
    "mse": Quantizer(4, range="mse"),
    "mu_law": Quantizer(8, companders.mu_law(), axis=0),
}


@pytest.mark.parametrize("quantizer", BITWISE.values(), ids=BITWISE)
def test_compiled_vectorised_and_plain_calls_give_the_same_bits(quantizer):
    stack = normal(5, 40, 65)
    # Midpoints and ulps around them, where a reciprocal or a fused product could tip the balance.
    levels = np.asarray(quantizer.grid.levels, np.float32)
    midway = (levels[:-1] + levels[1:]) / 2 * np.float32(1 / 255 if quantizer.bits == 8 else 0.3)
    ties = np.concatenate([midway, np.nextafter(midway, np.float32(9)), np.nextafter(midway, -9)])
    stack = stack.at[:, 1:30].set(jnp.resize(jnp.asarray(ties, jnp.float32), (29, 65)))
    compiled = jax.jit(with_values(quantizer))
    stacked = jax.jit(jax.vmap(with_values(quantizer)))(stack)
    for i, x in enumerate(stack):
        plain = with_values(quantizer)(x)
        assert_identical(compiled(x), plain)
        assert_identical(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), plain)


@pytest.mark.parametrize("quantizer", OTHERS.values(), ids=OTHERS)
def test_64_bit_mode_changes_nothing(quantizer):
    x = normal(40, 65)
    plain = jax.jit(with_values(quantizer))(x)
    with jax.enable_x64(True):
        assert_identical(jax.jit(with_values(quantizer))(x), plain)


@pytest.mark.parametrize("compander", SHAPED[:4], ids=repr)
def test_a_first_call_may_be_compiled(compander):
    assert jax.jit(Quantizer(3, compander))(jnp.ones((), jnp.float32)).codes == 7


# Nearest, and again


@pytest.mark.parametrize(
    ("compander", "bits"),
    [(companders.identity(), bits) for bits in (2, 3, 4, 8)]
    + [(compander, bits) for compander in SHAPED[-2:] for bits in (4, 8)],
)
def test_rounding_is_to_the_nearest_legal_level(compander, bits):
    quantizer = Quantizer(bits, compander, range=1.0)
    legal = legal_values(quantizer).astype(np.float64)
    x = np.linspace(-1.1, 1.1, 5001, dtype=np.float32)
    array = quantizer(jnp.asarray(x))
    values = np.asarray(array.materialise(), np.float64)
    assert (ints(array.codes) >= array.grid.low).all() and (
        ints(array.codes) <= array.grid.high
    ).all()
    best = np.abs(x[:, None].astype(np.float64) - legal).min(axis=1)
    np.testing.assert_allclose(np.abs(x - values), best, rtol=0, atol=2e-7)
    cell = np.searchsorted(legal, x)
    inner = (cell > 0) & (cell < len(legal))
    half = np.diff(legal)[cell[inner] - 1] / 2
    assert (np.abs(x - values)[inner] <= half + 2e-7).all()


@pytest.mark.parametrize("compander", SHAPED[:4], ids=repr)
def test_parametric_companders_round_in_z(compander):
    """Q = inverse . U . forward: the code is the one nearest in the coordinate z.

    The last code lies half a step before the end of [-1, 1]; it stands for the range.
    """
    bits, radius = 6, 0.7
    top = 2**bits - 1
    last = float(compander.inverse(jnp.float32((top - 1) / top)))
    quantizer = Quantizer(bits, compander, range=radius)
    x = np.linspace(-0.75, 0.75, 4001, dtype=np.float32)
    z = (
        np.asarray(compander.forward(jnp.clip(jnp.asarray(x) / radius * last, -1, 1)), np.float64)
        * top
        / 2
    )
    clear = np.abs(z - np.floor(z) - 0.5) > 1e-3
    expected = np.clip(np.rint(z) + 2 ** (bits - 1), 1, top)
    np.testing.assert_array_equal(
        ints(jax.jit(quantizer)(jnp.asarray(x)).codes)[clear], expected[clear]
    )
    levels = compander.inverse(
        jnp.asarray((np.arange(1, top + 1) - 2 ** (bits - 1)) * 2 / top, jnp.float32)
    )
    np.testing.assert_allclose(
        legal_values(quantizer), np.float32(radius / last) * np.asarray(levels), rtol=1e-6
    )
    np.testing.assert_allclose(legal_values(quantizer)[[0, -1]], [-radius, radius], rtol=1e-6)


@pytest.mark.parametrize(
    ("compander", "bounds"),
    by_turns([companders.identity(), *SHAPED], [0.3, (-1.0, 2.0)]),
    ids=repr,
)
def test_quantizing_again_with_the_given_range_changes_no_code(compander, bounds):
    for bits in (4, 8):
        quantizer = Quantizer(bits, compander, range=bounds)
        every = np.resize(legal_codes(quantizer), 256)
        array = quantizer(jnp.zeros(256, jnp.float32)).with_codes(jnp.asarray(every))
        np.testing.assert_array_equal(ints(quantizer(array.materialise()).codes), every)


@pytest.mark.parametrize(
    ("radius", "collapsed", "clean"), [(0.03, 16, 0), (0.05, 8, 6), (0.10, 2, 12), (0.15, 1, 4)]
)
def test_no_fixed_radius_probes_every_nf4_cell(radius, collapsed, clean):
    """Probe each level at +- radius * absmax and round to the nearest level.

    A code collapses when both end points round back to it: the query compares a loss with itself
    (beyond the outermost levels an end point always does). It is clean when they round to its two
    neighbours, one step up and one step down.
    """
    quantizer = Quantizer(4, companders.nf4(), range=1.0)
    code = np.arange(16)
    level = jnp.asarray(quantizer.grid.levels, jnp.float32)
    up, down = ints(quantizer(level + radius).codes), ints(quantizer(level - radius).codes)
    assert ((up == code) & (down == code)).sum() == collapsed
    assert ((up == code + 1) & (down == code - 1)).sum() == clean


# Where the range comes from


def test_absmax_scale_is_the_largest_magnitude():
    x = normal(4, 20)
    largest = np.abs(np.asarray(x)).max()
    np.testing.assert_allclose(Quantizer(8)(x).scale, [[2 * largest / 255]], rtol=1.2e-7)
    assert Quantizer(4, companders.nf4())(x).scale.item() == largest


@pytest.mark.parametrize(("percentile", "axis"), [(99.0, None), (50.0, 0), (100.0, 1)])
def test_percentile_scale_is_the_percentile_of_the_magnitude(percentile, axis):
    x = normal(5, 301)
    quantizer = Quantizer(8, range="percentile", percentile=percentile, axis=axis)
    reduced = {None: (0, 1), 0: 1, 1: 0}[axis]
    radius = np.percentile(np.abs(np.asarray(x)), percentile, axis=reduced, keepdims=True)
    np.testing.assert_allclose(jax.jit(quantizer)(x).scale, radius * 2 / 255, rtol=1e-5)


@pytest.mark.parametrize(
    ("compander", "bits"),
    [(companders.identity(), 2), (companders.nf4(), 4), (companders.mu_law(), 4)],
)
def test_mse_range_errs_no_more_than_absmax_and_than_other_ranges(compander, bits):
    x = normal(4, 400, seed=3)

    def error(range_, axis=0):
        values = Quantizer(bits, compander, range=range_, axis=axis)(x).materialise()
        return np.mean((np.asarray(values, np.float64) - np.asarray(x)) ** 2, axis=1)

    best = error("mse")
    assert (best <= error("absmax") * (1 + 1e-6)).all()
    for radius in np.linspace(0.25, 1.0, 7) * np.abs(np.asarray(x)).max():
        assert (best <= error(float(radius)) * 1.01).all()


@pytest.mark.parametrize("bounds", [0.25, (-0.5, 1.0)], ids=str)
def test_a_given_range_does_not_look_at_the_values(bounds):
    one, other = (
        Quantizer(8, range=bounds)(normal(256)),
        Quantizer(8, range=bounds)(normal(256) * 50),
    )
    assert_identical(one.scale, other.scale)
    assert one.offset is None and other.offset is None  # uniform levels already count from zero


# One scale a tensor, channel or block


def blocks(x, axes, block):
    """(where the scale stands, the elements it serves), by plain loops."""
    spans = []
    for axis, length in enumerate(x.shape):
        width = (block if axis == axes[-1] and block else 1) if axis in axes or block else length
        spans.append([slice(i, min(i + width, length)) for i in range(0, length, width)])
    for place in itertools.product(*(range(len(span)) for span in spans)):
        yield place, tuple(span[i] for span, i in zip(spans, place, strict=True))


@pytest.mark.parametrize(
    ("shape", "axis", "block", "range_", "scales"),
    [
        ((7, 13), None, None, "absmax", (1, 1)),
        ((7, 13), 0, None, "absmax", (7, 1)),
        ((7, 13), -1, None, "minmax", (1, 13)),
        ((3, 4, 10), (0, -1), None, "absmax", (3, 1, 10)),
        ((13,), None, 5, "absmax", (3,)),
        ((7, 13), None, 5, "absmax", (7, 3)),
        ((7, 13), None, 5, "minmax", (7, 3)),
        ((7, 13), 0, 5, "absmax", (2, 13)),
        ((7, 13), -1, 1, "absmax", (7, 13)),
        ((7, 13), -1, 64, "absmax", (7, 1)),
        ((3, 4, 10), 1, 3, "minmax", (3, 2, 10)),
        ((), None, 4, "absmax", ()),
        ((), -1, None, "minmax", ()),
    ],
)
def test_every_tensor_channel_and_block_has_its_own_scale(shape, axis, block, range_, scales):
    x = np.asarray(normal(*shape, seed=7)) + 0.25
    quantizer = Quantizer(8, range=range_, axis=axis, block=block)
    array, values = jax.jit(with_values(quantizer))(jnp.asarray(x, jnp.float32))
    assert array.scale.shape == scales
    assert array.shape == shape
    if range_ == "minmax":
        assert array.offset.shape == scales
    if not shape:
        return
    axes = [a % len(shape) for a in ((axis,) if isinstance(axis, int) else axis or ())]
    axes = axes or ([len(shape) - 1] if block else [])
    values = np.asarray(values)
    seen = 0
    for place, span in blocks(x, axes, block):
        part = x[span].astype(np.float32)
        seen += part.size
        if range_ == "absmax":
            expected = 2 * np.abs(part).max() / 255
        else:
            expected = (max(part.max(), 0) - min(part.min(), 0)) / 255
        scale = np.asarray(array.scale)[place]
        np.testing.assert_allclose(scale, expected, rtol=2.0**-16)
        assert np.abs(values[span] - part).max() <= scale * 0.51
    assert seen == x.size


@pytest.mark.parametrize("range_", [*NAMED, (-0.1, 0.5)], ids=str)
def test_empty_scalar_and_constant_arrays(range_):
    layouts = [(None, 3)] if range_ != "absmax" else [(None, None), (None, 3), (0, 3)]
    shapes = [(0,), (0, 5), (5, 0), (), (7,)]
    for (axis, block), shape in itertools.product(layouts, shapes):
        quantizer = Quantizer(8, range=range_, axis=axis, block=block)
        compiled = jax.jit(with_values(quantizer))
        for value in (0.0, 0.25):
            array, values = compiled(jnp.full(shape, value, jnp.float32))
            assert array.shape == values.shape == shape
            np.testing.assert_allclose(values, value, rtol=0.005)
            assert np.isin(ints(array.codes), legal_codes(quantizer)).all()


def test_a_block_of_zeros_stays_zero_beside_others():
    x = normal(2, 128).at[:, 64:].set(0.0)
    for quantizer in (zq.nf4(), Quantizer(8, range="minmax", block=64)):
        array, values = jax.jit(with_values(quantizer))(x)
        assert (np.asarray(array.scale)[:, 1] == 0).all()
        assert (np.asarray(values)[:, 64:] == 0).all()
        assert np.abs(np.asarray(values)[:, :64] - np.asarray(x)[:, :64]).max() < 0.5


@pytest.mark.parametrize("size", [1e-30, 1e-38, 1e-40, 1e-45, 1e30])
def test_tiny_and_huge_values_stay_finite(size):
    x = jnp.asarray(np.resize(np.float32([size, -size / 2, 0.0]), 256))
    for quantizer in (
        Quantizer(8),
        Quantizer(8, range="minmax"),
        zq.nf4(),
        Quantizer(4, SHAPED[0]),
    ):
        values = np.asarray(quantizer(x).materialise())
        assert np.isfinite(values).all() and (np.abs(values) <= np.float32(size) * 1.01).all()


# Storage


@pytest.mark.parametrize("bits", range(2, 9))
def test_up_to_4_levels_share_a_byte_by_four_up_to_16_by_two(bits):
    """Where the last axis of a matrix or a stack divides; else by fewer."""
    together = {2: 4, 3: 2, 4: 2}.get(bits, 1)
    arrays = {shape: Quantizer(bits)(normal(*shape)) for shape in [(3, 256), (2, 3, 8)]}
    if bits >= 4:
        arrays[5, 8] = Quantizer(bits, companders.nf4())(normal(5, 8))
    for shape, array in arrays.items():
        per_byte = 2 if shape == (5, 8) else together
        assert array.per_byte == per_byte
        assert array.packed.shape == (*shape[:-1], shape[-1] // per_byte)
        assert array.packed.dtype == array.codes.dtype == jnp.uint8
        assert array.shape == array.codes.shape == shape
    for shape, per_byte in {(3, 6): min(together, 2), (3, 7): 1, (256,): 1, (): 1}.items():
        array = Quantizer(bits)(normal(*shape))
        assert array.per_byte == per_byte
        assert array.shape == array.codes.shape == shape and array.packed.dtype == jnp.uint8


SHARED = {  # scales that parts of the last axis divide among them, and some that they cut
    "tensor": (Quantizer(4), (3, 24)),
    "row": (Quantizer(2, axis=0), (3, 24)),
    "column": (Quantizer(4, range="minmax", axis=1), (3, 24)),
    "whole blocks": (zq.nf4(block=6), (3, 24)),
    "cut blocks": (Quantizer(2, range="minmax", block=5), (2, 3, 24)),
    "halved blocks": (zq.nf4(block=8), (3, 24)),
    "one block": (zq.nf4(block=64), (3, 24)),
    "blocks of rows": (Quantizer(2, range="minmax", block=2, axis=0), (3, 24)),
}


@pytest.mark.parametrize(("quantizer", "shape"), SHARED.values(), ids=SHARED)
def test_codes_that_share_bytes_are_the_parts_of_the_last_axis(quantizer, shape):
    """Byte j holds the j-th code of each part, the first part's lowest."""
    n = np.random.default_rng(0).integers(quantizer.grid.low, quantizer.grid.high + 1, shape)

    @jax.jit
    def both(n, x):
        array = quantizer(x).with_codes(n)
        return array, array.materialise(), [part.materialise() for part in array.parts]

    array, values, values_of_parts = both(jnp.asarray(n), normal(*shape))
    width = 8 // array.per_byte
    assert array.per_byte == (4 if quantizer.bits == 2 else 2)
    cut = np.split(n, array.per_byte, axis=-1)
    expected = sum(part << (i * width) for i, part in enumerate(cut))
    np.testing.assert_array_equal(array.packed, expected)
    np.testing.assert_array_equal(array.codes, n)
    for part, codes in zip(array.parts, cut, strict=True):
        assert part.per_byte == 1 and part.shape == codes.shape
        np.testing.assert_array_equal(part.packed, codes)
    np.testing.assert_array_equal(np.concatenate(values_of_parts, axis=-1), values)
    spread = np.broadcast_to(array.broadcast_scales(array.scale), shape)
    cuts = [
        np.broadcast_to(part.broadcast_scales(array.part_of(array.scale, i)), part.shape)
        for i, part in enumerate(array.parts)
    ]
    np.testing.assert_array_equal(np.concatenate(cuts, axis=-1), spread)
    rebuilt = zq.QuantizedArray.from_codes(
        jnp.asarray(n), array.scale, array.offset, array.grid, array.block, array.dtype
    )
    assert_identical(rebuilt, array)


def test_a_block_in_two_parts_is_halved_and_no_more():
    """So that parts have no scale for every code."""
    array = zq.nf4(block=64)(normal(2, 27 * 64))
    assert array.scale.shape == (2, 27)
    for part in array.parts:
        assert part.block == (-1, 32) and part.scale.shape == (2, 27)


@pytest.mark.parametrize(
    ("dtype", "scales"),
    [
        (jnp.float16, jnp.float16),
        (jnp.bfloat16, jnp.bfloat16),
        (jnp.float32, jnp.float32),
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.float16),
    ],
)
def test_a_value_is_computed_in_float32_and_rounded_once(dtype, scales):
    """Bit for bit: products with a zero point are exact, so fused or not they give the same."""
    uniform = Quantizer(4, range="minmax", block=16, scale_dtype=scales)
    shaped = zq.nf4(block=16, scale_dtype=scales)
    for quantizer in (uniform, shaped) if dtype == scales else (uniform,):
        array, values = jax.jit(with_values(quantizer))(normal(4, 20, dtype=dtype))
        assert array.scale.dtype == scales
        assert array.dtype == values.dtype == dtype
        scale = np.repeat(np.float32(array.scale), 16, axis=1)[:, :20]
        expected = scale * np.float32(array.grid.levels)[ints(array.codes)]
        if array.offset is not None:
            expected = expected + np.repeat(np.float32(array.offset), 16, axis=1)[:, :20]
        np.testing.assert_array_equal(np.asarray(values), expected.astype(dtype))


@pytest.mark.parametrize("range_", ["minmax", (-0.5, 1.5)], ids=str)
def test_companded_levels_span_a_lopsided_range(range_):
    x = normal(4, 20)
    quantizer = Quantizer(4, companders.nf4(), range=range_)
    lo, hi = (float(x.min()), float(x.max())) if range_ == "minmax" else range_
    codes = jnp.resize(jnp.arange(16), x.shape)
    values = np.asarray(quantizer(x).decode(codes))[0, :16]
    expected = (hi - lo) / 2 * np.array(quantizer.grid.levels) + (hi + lo) / 2
    np.testing.assert_allclose(values, expected, atol=3e-7)


def test_a_grid_knows_its_spacing_and_whether_it_is_uniform():
    assert Quantizer(8, range=1.0).grid.is_uniform
    assert Quantizer(8, range=1.0).grid.spacing == 1.0
    assert not companders_grid().is_uniform
    assert companders_grid().spacing == pytest.approx(2 / 15)
    assert Quantizer(4, range=1.0).grid == Quantizer(4, range=3.0).grid
    assert hash(Quantizer(4, range=1.0).grid) == hash(Quantizer(4).grid)
    assert Grid((0.0, 1.0), 0, 1) != Grid((0.0, 1.0), 0, 0)


def companders_grid():
    return Quantizer(4, companders.nf4()).grid


def test_step_is_the_mean_distance_between_legal_values():
    for quantizer in (Quantizer(8, range=0.3), Quantizer(4, companders.mu_law(), range=0.3)):
        legal = legal_values(quantizer).astype(np.float64)
        step = quantizer(jnp.zeros((2, 2), jnp.float32)).step
        np.testing.assert_allclose(step, np.diff(legal).mean(), rtol=1e-6)


# A value like any other in JAX


@pytest.fixture(scope="module")
def params():
    x = normal(4, 20)
    return {"w": zq.nf4(block=8)(x), "v": Quantizer(8, range="minmax")(x), "b": x}


def test_jit_and_tree_map_keep_the_array_intact(params):
    assert_identical(jax.jit(lambda tree: tree)(params), params)
    assert_identical(jax.tree.map(lambda leaf: leaf, params), params)
    leaves, treedef = jax.tree.flatten(params)
    assert len(leaves) == 1 + 3 + 2  # b; packed, scale, offset; packed, scale
    assert_identical(treedef.unflatten(leaves), params)
    again = jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf, tree))(params)
    assert again["w"].block == (-1, 8) and again["w"].grid == params["w"].grid
    assert again["v"].dtype == jnp.float32


def test_vmap_runs_over_a_stack_of_arrays():
    stack = normal(5, 4, 20)
    arrays = jax.jit(jax.vmap(zq.nf4(block=8)))(stack)
    assert arrays.codes.shape == (5, 4, 20) and arrays.scale.shape == (5, 4, 3)
    values = jax.vmap(lambda array: array.materialise())(arrays)
    alone = jax.jit(lambda x: zq.nf4(block=8)(x).materialise())
    for one, value in zip(stack, values, strict=True):
        np.testing.assert_array_equal(value, alone(one))


def test_donated_codes_are_updated_in_place(params):
    array = jax.tree.map(jnp.copy, params["v"])
    expected = (ints(array.codes) + 1) % 256
    buffer = array.packed.unsafe_buffer_pointer()

    def advance(array):
        return dataclasses.replace(array, packed=array.packed + jnp.ones_like(array.packed))

    moved = jax.jit(advance, donate_argnums=0)(array)
    assert array.packed.is_deleted()
    assert moved.packed.unsafe_buffer_pointer() == buffer
    assert (moved.grid, moved.block) == (array.grid, array.block)
    np.testing.assert_array_equal(ints(moved.codes), expected)


def test_a_second_call_does_not_recompile():
    traces = []

    @jax.jit
    def values(array):
        traces.append(array.shape)
        return array.materialise()

    for seed in range(3):  # grids equal in value, made anew each time
        values(Quantizer(8, range="minmax")(normal(4, 20, seed=seed)))
        values(zq.nf4(block=8)(normal(4, 20, seed=seed)))
    assert len(traces) == 2
    assert values._cache_size() == 2


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_step_from_every_code_survives_apply_updates(bits):
    """Deltas of bytes are modulo 256: a byte plus its delta is exactly the codes' clipped sums."""
    quantizers = [Quantizer(bits, range="minmax"), Quantizer(bits, range=1.0)]  # 0 may be illegal
    for quantizer in quantizers:
        low, high = quantizer.grid.low, quantizer.grid.high
        reach = 2**bits
        steps = [-1000, -256, *range(-reach, reach + 1), 255, 1000]
        n, step = (grid.ravel() for grid in np.meshgrid(np.arange(low, high + 1), steps))
        # Every pair stands once in each part of the bytes, beside another.
        together = 8 // bits
        n, step = (np.stack([np.roll(x, 17 * i) for i in range(together)], -1) for x in (n, step))
        start = quantizer(jnp.zeros(n.shape, jnp.float32)).with_codes(jnp.asarray(n))
        assert start.per_byte == together

        def move(array, step):
            steps = jnp.split(step, array.per_byte, axis=-1)
            zeros = jax.tree.map(jnp.zeros_like, array)
            delta = array.stepped(steps).packed - array.packed
            return optax.apply_updates(array, dataclasses.replace(zeros, packed=delta))

        target = np.clip(n + step, low, high)
        for apply in (move, jax.jit(move)) if bits == 4 else (jax.jit(move),):
            moved = apply(start, jnp.asarray(step, jnp.int32))
            assert moved.packed.dtype == jnp.uint8
            np.testing.assert_array_equal(ints(moved.codes), target)
            assert_identical(moved.scale, start.scale)


@pytest.mark.parametrize("bits", [5, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_sum_of_bytes_wraps_where_its_values_are_reduced_at_once(bits, dtype):
    """XLA's CPU backend fuses the sum with what reads it, and would not wrap bytes made floats."""
    values = jnp.asarray(normal(1000, 32), dtype)
    start, end = Quantizer(bits, range="minmax")(values), Quantizer(bits, range="minmax")(-values)
    zeros = jax.tree.map(jnp.zeros_like, start)
    delta = dataclasses.replace(zeros, packed=end.packed - start.packed)
    end = dataclasses.replace(start, packed=end.packed)

    def total(array):
        return array.materialise().astype(jnp.float32).sum(1)

    sums = jax.jit(lambda array, delta: total(optax.apply_updates(array, delta)))(start, delta)
    np.testing.assert_allclose(sums, jax.jit(total)(end), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_move_between_any_two_codes_is_a_step(bits):
    codes = np.arange(2**bits)
    n, target = (
        np.resize(grid, (4 ** (bits - 1), 4)) for grid in np.meshgrid(codes, codes, indexing="ij")
    )
    array = Quantizer(bits, range="minmax")(jnp.zeros(n.shape, jnp.float32))
    array = array.with_codes(jnp.asarray(n))
    assert array.per_byte == 8 // bits
    steps = jnp.split(jnp.asarray(target - n), array.per_byte, axis=-1)
    np.testing.assert_array_equal(ints(array.stepped(steps).codes), target)


# Trees


def test_where_chooses_leaves_by_path_and_leaf():
    tree = {
        "attention": {"q": normal(4, 20), "k": normal(4, 20)},
        "mlp": [normal(4, 20), normal(4)],
    }

    def is_query(path, leaf):
        return jax.tree_util.keystr(path) == "['attention']['q']" and leaf.ndim == 2

    quantized = zq.quantize(tree, Quantizer(4), where=is_query)
    assert zq.is_quantized(quantized["attention"]["q"])
    assert quantized["attention"]["k"] is tree["attention"]["k"]
    assert quantized["mlp"][0] is tree["mlp"][0]
    values = zq.dequantize(quantized)
    assert jax.tree.structure(values) == jax.tree.structure(tree)
    assert_identical(values["attention"]["q"], Quantizer(4)(tree["attention"]["q"]).materialise())


def test_matrices_are_chosen_unless_they_are_named_as_biases_or_scales():
    stack = {name: normal(4, 20) for name in ("kernel", "bias", "scale")}
    stack["steps"] = jnp.ones((2, 2), jnp.int32)
    quantized = zq.quantize({"layers": stack, "head": normal(4)}, Quantizer(8))
    chosen = {name for name, leaf in quantized["layers"].items() if zq.is_quantized(leaf)}
    assert chosen == {"kernel"}
    assert not zq.is_quantized(quantized["head"])


def test_what_is_quantized_already_stays_as_it_is():
    tree = {"a": normal(4, 20), "b": normal(4, 20)}
    first = zq.quantize(tree, zq.nf4(block=8), where=lambda path, _: path[0].key == "a")
    second = zq.quantize(first, Quantizer(8))
    assert second["a"] is first["a"]
    assert second["b"].grid == Quantizer(8).grid and second["b"].per_byte == 1


# What is refused


def empty():
    return jnp.zeros(3, jnp.float32)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantizer(1), r"bits must be a whole number in \[2, 8\], got 1\."),
        (lambda: Quantizer(9), r"bits must be a whole number in \[2, 8\], got 9\."),
        (lambda: Quantizer(3, companders.nf4()), r"bits=3 holds 8 codes, too few for the 16 .*nf4"),
        (lambda: Quantizer(range="max"), r"range must be one of .*absmax.*, got 'max'\."),
        (lambda: Quantizer(range=0.0), r"range must be positive and finite, got 0\.0\."),
        (lambda: Quantizer(range=math.nan), r"range must be positive and finite, got nan\."),
        (lambda: Quantizer(range=(1.0, -1.0)), r"range .* lo < hi, got \(1\.0, -1\.0\)\."),
        (
            lambda: Quantizer(range=(0.0, math.inf)),
            r"range must be a finite pair .* got \(0\.0, inf\)",
        ),
        (lambda: Quantizer(block=0), r"block must be a positive whole number, got 0\."),
        (lambda: Quantizer(axis=(0, 1), block=4), r"axis must be one axis .* got \(0, 1\)\."),
        (lambda: Quantizer(percentile=0.0), r"percentile must be in \(0, 100\], got 0\.0\."),
        (lambda: Quantizer(scale_dtype=jnp.int8), r"scale_dtype must be float16, .* got .*int8"),
        (lambda: Quantizer(axis=1)(empty()), r"axis must be in \[-1, 1\), got 1\."),
        (lambda: Quantizer(axis=-2, block=4)(empty()), r"axis must be in \[-1, 1\), got -2\."),
        (
            lambda: Quantizer()(empty().at[1].set(jnp.nan)),
            r"values must be finite, got NaN or inf\.",
        ),
        (
            lambda: Quantizer()(empty().at[1].set(-jnp.inf)),
            r"values must be finite, got NaN or inf",
        ),
        (
            lambda: Quantizer(scale_dtype=jnp.float16)(empty() + 1e9),
            r"scale_dtype must hold the scales, got one beyond float16\.",
        ),
        (
            lambda: zq.quantize({"w": empty()}, Quantizer(), where=lambda path, leaf: False),
            r"where=<.*lambda.*> chose none of the 1 leaves",
        ),
        (lambda: zq.quantize({"w": empty()}, Quantizer()), r"chose none of the 1 leaves"),
        (
            lambda: zq.quantize({"w": [jnp.full((2, 2), jnp.nan)]}, Quantizer()),
            r"leaf \['w'\]\[0\]: values must be finite",
        ),
    ],
)
def test_bad_arguments_are_named_with_their_value(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_integers_are_refused(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for a user
    tree = {"w": jnp.ones((2, 2), jnp.int32)}
    message = r"leaf \['w'\]: values must be float16, bfloat16, float32 or float64, got int32\."
    with pytest.raises(ValueError, match=message):
        zq.quantize(tree, Quantizer(), where=lambda *_: True)
