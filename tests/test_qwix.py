"""QArrays: beside their own formula and qwix itself, there and back."""

import dataclasses
import itertools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoqo_jax as zq
from zoqo_jax.interop import qwix

NF4 = np.array(zq.companders.nf4().levels, np.float32)
STORAGE = {"int2": "int4", "int3": "int4", "int5": "int8", "int6": "int8", "int7": "int8"}
RANGES = {f"int{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1)) for bits in range(2, 9)} | {
    "uint4": (0, 16), "uint8": (0, 256), "nf4": (0, 16),
}  # fmt: skip


@dataclasses.dataclass
class QArray:
    """The fields of qwix's."""

    qvalue: Any
    scale: Any
    zero_point: Any = None
    qtype: Any = None


def random_qarray(qtype, shape, tiles, dtype="float32", zero_point=None, seed=0):
    rng = np.random.default_rng(seed)
    storage = "uint4" if qtype == "nf4" else STORAGE.get(qtype, qtype)
    qvalue = jnp.asarray(rng.integers(*RANGES[qtype], shape), storage)
    scale = jnp.asarray(rng.uniform(0.01, 0.1, tiles), dtype)
    if zero_point == "different":
        zero_point = rng.integers(*RANGES[qtype], tiles)
    if zero_point is not None:
        zero_point = jnp.full(tiles, jnp.asarray(zero_point, storage))
    return QArray(qvalue, scale, zero_point, qtype)


def values(array):
    """(qvalue - zero_point) * scale in the dtype of scale, number by number."""
    dtype, shape = np.asarray(array.scale).dtype, array.qvalue.shape
    found = np.zeros(shape, dtype)
    for place in itertools.product(*map(range, shape)):
        tile = tuple(i * t // n for i, t, n in zip(place, array.scale.shape, shape, strict=True))
        q = int(array.qvalue[place])
        level = NF4[q] if array.qtype == "nf4" else q
        if array.zero_point is not None:
            level -= int(array.zero_point[tile])
        product = np.float32(dtype.type(level)) * np.float32(array.scale[tile])
        found[place] = product.astype(dtype)
    return found


def same(one, other):
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def there_and_back(array):
    codes = qwix.from_qwix(array)
    back = qwix.to_qwix(codes, make=QArray)
    same(back.qvalue, array.qvalue)
    same(back.scale, array.scale)
    assert back.qtype == (array.qvalue.dtype if array.qtype is None else array.qtype)
    assert (back.zero_point is None) == (array.zero_point is None)
    if array.zero_point is not None:
        same(back.zero_point, array.zero_point)
    return codes


@pytest.mark.parametrize(
    ("qtype", "tiles", "dtype"),
    [
        ("int8", (1, 1), "float32"),
        ("int8", (4, 1), "bfloat16"),
        ("int4", (4, 2), "float32"),
        ("int4", (2, 8), "float16"),
        ("uint8", (4, 8), "float32"),
        ("uint4", (1, 4), "bfloat16"),
        ("nf4", (4, 2), "float32"),
        ("nf4", (4, 2), "bfloat16"),
        ("nf4", (1, 1), "float16"),
        *((f"int{bits}", (1, 8), "float32") for bits in (2, 3, 5, 6, 7)),
    ],
)
def test_symmetric_qarrays_there_and_back(qtype, tiles, dtype):
    array = random_qarray(qtype, (4, 8), tiles, dtype)
    codes = there_and_back(array)
    found = zq.dequantize(codes)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, values(array))


@pytest.mark.parametrize(
    ("qtype", "dtype", "zero_point"),
    [
        ("int8", "float32", -7),  # the same everywhere: exact for any scale
        ("int4", "float32", 0),
        ("int3", "float32", 1),
        ("int8", "bfloat16", "different"),
        ("int4", "float16", "different"),
        ("int4", "bfloat16", -8),
        ("uint4", "bfloat16", 8),
        ("uint8", "float16", "different"),
    ],
)
def test_zero_points_there_and_back(qtype, dtype, zero_point):
    array = random_qarray(qtype, (4, 8), (4, 2), dtype, zero_point)
    codes = there_and_back(array)
    np.testing.assert_array_equal(zq.dequantize(codes), values(array))


def test_a_qtype_left_out_is_the_dtype_of_qvalue():
    array = random_qarray("int8", (2, 4), (2, 1))
    array.qtype = None
    there_and_back(array)


@pytest.mark.parametrize(
    ("quantizer", "dtype"),
    [
        (zq.Quantizer(8, range=0.5), "float32"),
        (zq.Quantizer(4, block=4), "float32"),
        (zq.Quantizer(4, block=4, scale_dtype=jnp.float16), "float32"),
        (zq.Quantizer(3, axis=0), "float32"),
        (zq.Quantizer(4, range="minmax", block=4), "float32"),
        (zq.Quantizer(6, range="minmax", axis=0), "float32"),
        (zq.nf4(block=4), "float32"),
        (zq.Quantizer(8, axis=-1, scale_dtype=jnp.bfloat16), "bfloat16"),
    ],
)
def test_codes_of_ours_there_and_back(quantizer, dtype):
    array = quantizer(jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), dtype))
    theirs = qwix.to_qwix(array, make=QArray)
    np.testing.assert_array_equal(values(theirs), zq.dequantize(array))
    again = qwix.from_qwix(theirs)
    np.testing.assert_array_equal(again.codes, array.codes)
    np.testing.assert_array_equal(again.scale.astype(jnp.float32), array.scale.astype(jnp.float32))
    np.testing.assert_array_equal(zq.dequantize(again), zq.dequantize(array))


def test_trees_keep_what_is_neither():
    tree = {"w": random_qarray("int8", (2, 4), (1, 1)), "b": jnp.ones(3), "n": None}
    params = qwix.from_qwix(tree)
    assert zq.is_quantized(params["w"])
    assert params["b"] is tree["b"]
    back = qwix.to_qwix(params, make=QArray)
    assert back["b"] is tree["b"]
    assert isinstance(back["w"], QArray)


def changed(qtype="int8", shape=(4, 8), tiles=(4, 2), dtype="float32", **changes):
    zero_point = changes.pop("zero", None)
    return dataclasses.replace(random_qarray(qtype, shape, tiles, dtype, zero_point), **changes)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (changed(qtype="int8", qvalue=jnp.ones((4, 8), jnp.int4)), "qvalue must be int8 for int8"),
        (dataclasses.replace(changed(), qtype="mxfp4"), "qtype must be one of int2, .*got mxfp4"),
        (dataclasses.replace(changed(), qtype=jnp.float8_e4m3fn), "got float8_e4m3fn"),
        (dataclasses.replace(changed("int4"), qtype="int3"), "numbers out of its range"),
        (changed(tiles=(2, 2)), r"tiles along one axis, got \(2, 2\)"),
        (changed(scale=jnp.ones((4, 3))), r"must divide qvalue's shape \(4, 8\), got \(4, 3\)"),
        (changed(scale=jnp.ones(4)), "must divide"),
        (changed(scale=np.ones((1, 1))), "got float64"),
        (changed(scale=jnp.full((1, 1), jnp.nan)), "scale must be finite"),
        (changed("nf4", zero=0), "zero_point must be None for nf4"),
        (changed(zero_point=jnp.zeros((1, 1), jnp.int8)), r"must be int8 \[4, 2\].* got int8 \[1"),
        (changed(zero="different"), "more than 16 significant bits, got 8 different ones"),
        (changed("uint4", zero=8), "the same everywhere"),
    ],
)
def test_qarrays_without_equal_are_refused_by_name(array, message):
    with pytest.raises(ValueError, match=message) as caught:
        qwix.from_qwix({"w": array})
    assert str(caught.value).startswith("leaf ['w']: ")


def ours(levels, scale=0.5, offset=None, shape=(2, 4), tiles=(1, 1), **settings):
    return zq.QuantizedArray.from_codes(
        jnp.zeros(shape, jnp.uint8),
        jnp.full(tiles, scale, settings.pop("dtype", jnp.float32)),
        None if offset is None else jnp.full(tiles, offset),
        zq.Grid(tuple(map(float, levels)), 0, len(levels) - 1),
        **settings,
    )


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (ours(np.arange(16) ** 2), "levels of a qtype"),
        (ours(range(10)), "levels of a qtype"),
        (ours(np.arange(16) - 0.5), "levels of a qtype"),
        (ours(range(16), value_dtype=jnp.bfloat16), "dtype of the values, bfloat16, got float32"),
        (ours(range(16), shape=(2, 6), tiles=(1, 2), block=(-1, 4)), "blocks of 4 must divide"),
        (ours(range(16), offset=0.3), "whole number of scales"),
        (ours(range(16), scale=0.1, offset=0.1), "16 significant bits"),
        (ours(range(16), scale=0.0, offset=1.0), "a scale that is not 0"),
        (ours(range(16), offset=8.0), "zero points must be uint4, got -16"),
        (ours(range(200, 456)), "zero points must be int8, got -328"),
    ],
)
def test_codes_without_equal_are_refused_by_name(array, message):
    with pytest.raises(ValueError, match=message) as caught:
        qwix.to_qwix({"w": array}, make=QArray)
    assert str(caught.value).startswith("leaf ['w']: ")


def test_a_qwix_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(ImportError, match=r"zoqo_jax\[interop\]"):
        qwix.to_qwix({})


# Without a zero point, whatever qwix quantizes; with different ones, what has short scales.
CASES = [
    *itertools.product(
        ("int8", "int4", "uint4", "uint8", "nf4", "int3", "int6"),
        ({}, {1: 32}),
        ("absmax",),
        ("float32", "bfloat16"),
    ),
    *itertools.product(("int8", "int4"), ({}, {1: 32}), ("minmax",), ("bfloat16", "float16")),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("qtype", "tiled", "method", "dtype"), CASES)
def test_qarrays_of_qwix_there_and_back(qtype, tiled, method, dtype):
    theirs = pytest.importorskip("qwix")
    settings = {"channelwise_axes": (0,), "tiled_axes": tiled, "calibration_method": method}
    with jax.numpy_dtype_promotion("standard"):
        x = jax.random.normal(jax.random.key(0), (16, 64)).astype(dtype)
        array = theirs.quantize(x, qtype, **settings)
        expected = theirs.dequantize(array)
    params = qwix.from_qwix({"w": array})
    found = zq.dequantize(params)["w"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, expected)

    back = qwix.to_qwix(params)["w"]
    assert isinstance(back, theirs.QArray)
    assert jax.tree.structure(back) == jax.tree.structure(array)
    jax.tree.map(same, back, array)
