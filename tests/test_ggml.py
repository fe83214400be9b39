"""ggml's block types: against the gguf package bit for bit, and one bit at a time."""

import tracemalloc

import gguf as reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoqo_jax as zq
from zoqo_jax.grids.scales import TwoLevel
from zoqo_jax.interop import ggml
from zoqo_jax.interop.ggml.types import TYPES

KINDS = {form.name: kind for kind, form in TYPES.items()}
EVERY = pytest.mark.parametrize("name", KINDS)


def legal_bytes(name, blocks, seed=0):
    """Random bytes, all bits of which vary, with finite scales and legal codes: (blocks, size)."""
    form, rng = TYPES[KINDS[name]], np.random.default_rng(seed)
    raw = rng.integers(0, 256, (blocks, form.size), np.uint8)
    for at in filter(None, (form.scale, form.minimum)):
        floats = raw[:, at.first : at.first + at.size]
        if at.largest is not None:
            np.minimum(floats, at.largest, out=floats)
        else:
            floats[:, 1][floats[:, 1] & 0x7C == 0x7C] ^= 0x40  # neither NaN nor infinite
    if name == "TQ2_0":
        high = raw[:, :64] & 0xAA
        raw[:, :64] &= ~(high >> 1) | 0xAA  # no code 3
    return raw


def dequantized(name, raw):
    """What the gguf package says."""
    with np.errstate(over="ignore"):
        return reference.quants.dequantize(raw, reference.GGMLQuantizationType[name])


def decoded(name, raw):
    """The array of blocks, one a row."""
    return ggml.decode(KINDS[name], (len(raw), TYPES[KINDS[name]].length), raw.ravel())


def encoded(array, name, before=None):
    parts = ggml.encoded(array, KINDS[name], before)
    return np.concatenate([np.ravel(part) for part in parts])


def values(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def normal(values):
    """Values with plus zero for what XLA may take for it: numbers that are subnormal in float32."""
    return np.where(np.abs(values) < 2.0**-126, np.float32(0), values)


@EVERY
@pytest.mark.parametrize("compiled", [False, True])
def test_values_are_those_of_the_gguf_package(name, compiled):
    raw = legal_bytes(name, 40)
    array, expected = decoded(name, raw), dequantized(name, raw)
    values = np.asarray((jax.jit(zq.dequantize) if compiled else zq.dequantize)(array))
    if name == "MXFP4":
        values, expected = normal(values), normal(expected)
        assert (expected != 0).mean() > 0.8
    np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))


@EVERY
def test_bytes_come_back(name):
    raw = legal_bytes(name, 40)
    array = decoded(name, raw)
    assert ggml.kind_of(array) == KINDS[name]
    np.testing.assert_array_equal(encoded(array, name, raw.ravel()), raw.ravel())
    if not TYPES[KINDS[name]].has_aliases:
        assert ggml.encode(array, KINDS[name]) == raw.tobytes()


@EVERY
def test_memory_is_what_it_is_in_the_file(name):
    raw = legal_bytes(name, 40)
    array = decoded(name, raw)
    assert array.bits == TYPES[KINDS[name]].bits
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(array)) <= 1.1 * raw.size + 4


@EVERY
def test_a_changed_code_changes_its_own_bits(name):
    """Row p of an array of equal blocks gets another code at p, for every p."""
    form = TYPES[KINDS[name]]
    block = legal_bytes(name, 1, seed=1)
    block[:, form.scale.first : form.scale.first + form.scale.size] = 60  # no scale is 0
    for piece in form.scale.inner:
        block[:, piece.first : piece.first + piece.count] |= 0x99
    raw = np.repeat(block, form.length, axis=0)
    array = decoded(name, raw)
    last, here = form.grid.high, np.arange(form.length)
    codes = np.array(array.codes)
    codes[here, here] = last - codes[here, here]
    if last % 2 == 0:  # with a code in the middle, that one stays
        codes[here, here] = np.where(codes[here, here] == last // 2, 0, codes[here, here])
    changed = encoded(array.with_codes(jnp.asarray(codes)), name, raw.ravel()).reshape(raw.shape)
    bits = np.unpackbits(raw ^ changed, axis=1)
    assert (bits.sum(axis=1) >= 1).all()
    assert (bits.sum(axis=1) <= form.bits).all()
    assert (bits.sum(axis=0) <= 1).all()  # no two codes share a bit
    if last % 2:
        expected = form.bits if not form.ranks else 1
        assert (bits.sum(axis=1) == expected).all()
    moved = dequantized(name, raw) != dequantized(name, changed)
    np.testing.assert_array_equal(moved, np.eye(form.length, dtype=bool))


@pytest.mark.parametrize("name", ["Q4_K", "Q5_0", "MXFP4"])
def test_shapes_of_one_to_four_axes(name):
    form = TYPES[KINDS[name]]
    raw = legal_bytes(name, 12)
    expected = dequantized(name, raw)
    for shape in ((12,), (2, 6), (3, 2, 2), (1, 3, 2, 2)):
        shape = (*shape[:-1], shape[-1] * form.length)
        array = ggml.decode(KINDS[name], shape, raw.ravel())
        assert array.shape == shape
        values = normal(np.asarray(zq.dequantize(array)))
        np.testing.assert_array_equal(values, normal(expected.reshape(shape)))
        np.testing.assert_array_equal(encoded(array, name, raw.ravel()), raw.ravel())


@pytest.mark.parametrize("name", ["Q4_K", "Q5_0", "IQ4_XS", "MXFP4"])
def test_an_implicit_product_is_that_of_the_values(name):
    raw = legal_bytes(name, 8)
    if name == "MXFP4":
        raw[:, 0] = 120 + np.arange(8)  # of a size that can be added
    array = decoded(name, raw)
    x = values(2, array.shape[1])
    product = jax.jit(zq.quaxify(lambda w: x @ w.T))(array)
    expected = np.asarray(x, np.float64) @ dequantized(name, raw).T.astype(np.float64)
    np.testing.assert_allclose(product, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", [name for name in KINDS if name not in ("MXFP4", "NVFP4")])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_scales_that_are_not_finite_are_refused(name, bad):
    for at in filter(None, (TYPES[KINDS[name]].scale, TYPES[KINDS[name]].minimum)):
        raw = legal_bytes(name, 3)
        raw[1, at.first : at.first + 2] = np.float16([bad]).view(np.uint8)
        with pytest.raises(ValueError, match="NaN or infinite"):
            decoded(name, raw)


@pytest.mark.parametrize(("name", "most"), [("MXFP4", 252), ("NVFP4", 126)])
def test_scales_of_8_bits_are_read_as_far_as_float32_and_the_format_have_numbers(name, most):
    raw = legal_bytes(name, 3)
    raw[1, 0] = most
    assert np.isfinite(zq.dequantize(decoded(name, raw))).all()
    raw[1, 0] = most + 1
    with pytest.raises(ValueError, match=f"at most {most}, got {most + 1}"):
        decoded(name, raw)


def test_a_ternary_code_must_be_one_of_three():
    raw = legal_bytes("TQ2_0", 3)
    raw[2, 5] = 0b11
    with pytest.raises(ValueError, match="below 3 in TQ2_0, got 3"):
        decoded("TQ2_0", raw)


@pytest.mark.parametrize("name", ["MXFP4", "NVFP4"])
def test_of_two_zeros_the_one_that_is_there_stays(name):
    form = TYPES[KINDS[name]]
    raw = legal_bytes(name, 4)
    array = decoded(name, raw)
    moved = array.with_codes(jnp.asarray(np.roll(array.codes, 1, axis=0)))
    old, new = raw, encoded(moved, name, raw.ravel()).reshape(raw.shape)
    numbers = [np.empty((4, form.length), np.uint8) for _ in range(2)]
    for at, found in zip((old, new), numbers, strict=True):
        nibbles = at[:, form.codes[0].first :].reshape(4, -1, 1, form.codes[0].run)
        found[:] = (nibbles >> np.uint8([0, 4])[:, None] & np.uint8(15)).reshape(4, -1)
    was, now = numbers
    same = np.asarray(array.codes) == np.asarray(moved.codes)
    np.testing.assert_array_equal(now[same], was[same])
    assert (was[same] == 8).any()
    assert not (now[~same] == 8).any()  # what became zero is plus zero
    np.testing.assert_array_equal(decoded(name, new).codes, moved.codes)
    without = decoded(name, encoded(array, name).reshape(raw.shape))
    np.testing.assert_array_equal(without.codes, array.codes)


def k_quant(**changes):
    """An array as Q4_K has it, or nearly."""
    array = decoded("Q4_K", legal_bytes("Q4_K", 2))
    for name, change in changes.items():
        array = zq.QuantizedArray.from_codes(
            array.codes,
            change(array.scale) if name == "scale" else array.scale,
            change(array.offset) if name == "offset" else array.offset,
            array.grid,
            changes.get("block", lambda block: block)(array.block),
        )
    return array


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": lambda x: None}, "no GGUF type"),
        ({"scale": lambda x: x.values()}, "no GGUF type"),
        ({"scale": lambda x: TwoLevel(x.outer, x.inner, divides=True)}, "no GGUF type"),
        ({"scale": lambda x: TwoLevel(x.outer, x.inner + 63)}, "inner scales must have 6 bits"),
        (
            {"scale": lambda x: TwoLevel(x.outer.astype(jnp.float32) + 1e-6, x.inner)},
            "float16 does not hold",
        ),
        ({"offset": lambda x: TwoLevel(jnp.repeat(x.outer, 2, -1), x.inner)}, "outer scale"),
        ({"block": lambda x: (-1, 16)}, "32 neighbours must share a scale in Q4_K"),
    ],
)
def test_what_the_type_does_not_hold_is_refused(changes, message):
    array = k_quant(**changes)
    with pytest.raises(ValueError, match=message):
        ggml.encode(array, ggml.kind_of(array))


def test_shared_scales_are_written_for_every_row():
    whole = decoded("Q4_K", np.repeat(legal_bytes("Q4_K", 1), 3, axis=0))
    scale, offset = (TwoLevel(x.outer[:1], x.inner[:1]) for x in (whole.scale, whole.offset))
    shared = zq.QuantizedArray.from_codes(whole.codes, scale, offset, whole.grid, whole.block)
    kind = ggml.kind_of(shared)
    assert ggml.encode(shared, kind) == ggml.encode(whole, kind)


def test_a_large_tensor_takes_no_more_than_its_own_size():
    raw = np.tile(legal_bytes("Q5_K", 8), (4096, 1)).ravel()  # 8 M codes
    tracemalloc.start()
    try:
        array = ggml.decode(KINDS["Q5_K"], (4096, 2048), raw)
        assert tracemalloc.get_traced_memory()[1] < 1.3 * raw.size
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        count = sum(part.size for part in ggml.encoded(array, KINDS["Q5_K"]))
        assert tracemalloc.get_traced_memory()[1] - before < 0.6 * raw.size
    finally:
        tracemalloc.stop()
    assert count == raw.size


@pytest.mark.parametrize("name", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS",
                                  "IQ3_S", "TQ1_0"])  # fmt: skip
def test_types_without_codes_are_decoded_to_floats(name):
    kind = reference.GGMLQuantizationType[name]
    _, size = reference.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 60, (3, size), np.uint8)
    values = ggml.decode(int(kind), (3, 256), raw.ravel())
    np.testing.assert_array_equal(values, reference.quants.dequantize(raw, kind))
    assert not ggml.is_exact(int(kind))


@pytest.mark.parametrize("name", ["Q8_1", "Q8_K", "Q1_0"])
def test_types_that_nobody_decodes_are_refused(name):
    kind = reference.GGMLQuantizationType[name]
    length, size = reference.GGML_QUANT_SIZES[kind]
    with pytest.raises(ValueError, match=f"{name} cannot be decoded"):
        ggml.decode(int(kind), (length,), np.zeros(size, np.uint8))
