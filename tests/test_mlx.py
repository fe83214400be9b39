"""MLX's folders: beside `mx.dequantize` on a CPU, and damaged files."""

from pathlib import Path

import format_checks as checks
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoqo_jax.interop.formats import mlx as form
from zoqo_jax.interop.formats.mlx_layers import Layer

FILES = Path(__file__).parent / "files" / "mlx"
FOLDERS = sorted(path.name for path in FILES.iterdir())


def folder(name):
    return checks.read(FILES / name)[:2]


ALL = {
    (name, matrix): found
    for name in FOLDERS
    for matrix, found in checks.decoded(form, *folder(name)).items()
}
AFFINE = [key for key, found in ALL.items() if found[2].of(key[1]).mode == "affine"]


def expected(key):
    return checks.read(FILES / key[0])[2][key[1]]


def rounded_twice(array, parts, length):
    """scale * q rounded to the scale's dtype, and the sum with the bias: MLX on a CPU."""
    scales, biases = (
        np.repeat(x, length, axis=-1)
        for end in ("scales", "biases")
        for name, x in parts.items()
        if name.endswith(end)
    )
    products = (scales.astype(np.float32) * np.asarray(array.codes)).astype(scales.dtype)
    sums = (products.astype(np.float32) + biases.astype(np.float32)).astype(scales.dtype)
    largest = np.maximum(np.abs(products.astype(np.float32)), np.abs(sums.astype(np.float32)))
    ulp = ml_dtypes.finfo(scales.dtype).eps * 2.0 ** np.floor(np.log2(np.maximum(largest, 1e-30)))
    return sums.astype(np.float32), np.asarray(ulp, np.float64)


def test_the_files_have_every_matrix_and_negative_scales():
    for name in FOLDERS:
        assert {key[1] for key in ALL if key[0] == name} == set(checks.read(FILES / name)[2])
    assert any((np.asarray(ALL[key][0].scale, np.float32) < 0).any() for key in AFFINE)
    assert {ALL[key][2].of(key[1]).bits for key in AFFINE} == {2, 3, 4, 5, 6, 8}
    assert {ALL[key][2].of(key[1]).length for key in AFFINE} == {32, 64, 128}


@pytest.mark.parametrize("key", [key for key in ALL if key not in AFFINE])
def test_values_of_float_modes_are_those_of_mlx(key):
    array, parts, _ = ALL[key]
    np.testing.assert_array_equal(checks.values(array), expected(key))
    scales = parts[key[1].replace(".weight", ".scales")]
    assert array.scale.size == scales.size
    assert array.packed.nbytes == parts[key[1]].nbytes


@pytest.mark.parametrize("key", AFFINE)
def test_affine_values_are_those_of_mlx_but_for_its_two_roundings(key):
    array, parts, found = ALL[key]
    twice, ulp = rounded_twice(array, parts, found.of(key[1]).length)
    np.testing.assert_array_equal(twice, expected(key))  # so it is this that MLX computes
    assert (np.abs(checks.values(array).astype(np.float64) - twice) <= 1.5 * ulp).all()
    if array.value_dtype == jnp.float32:
        np.testing.assert_array_equal(checks.values(array), expected(key))


@pytest.mark.parametrize("key", ALL)
def test_unchanged_codes_give_the_identical_bytes(key):
    assert set(checks.check_encoding(form, key[1], *ALL[key])) == {key[1]}


@given(st.sampled_from(sorted(ALL)), *[st.integers(0, 1 << 20)] * 3)
@settings(deadline=None, max_examples=60)
def test_a_changed_code_changes_its_own_bits_alone(key, row, column, code):
    bits = ALL[key][2].of(key[1]).bits
    checks.check_one_code(form, key[1], ALL[key], bits, row, column, code)


def test_minus_zeros_stay_until_their_code_changes():
    for name, bits, minus in (("mxfp4", 4, 8), ("nvfp4", 4, 8), ("mxfp8", 8, 128)):
        array, parts, found = ALL[name, "model.q.weight"]
        raw = parts["model.q.weight"].view(np.uint8).copy()
        raw[0, :2] = minus | minus << 4 if bits == 4 else minus
        parts = {**parts, "model.q.weight": raw.view(np.uint32)}
        array = form.decode("model.q.weight", parts, found)
        assert checks.values(array)[0, 0] == 0
        checks.check_encoding(form, "model.q.weight", array, parts, found)


def test_modules_may_have_settings_of_their_own():
    found = form.settings(folder("mxfp4")[1])
    assert found.of("model.q.weight") == Layer("mxfp4", 32, 4)
    assert found.of("model.embed.weight") == Layer("affine", 64, 6)
    assert ALL["mxfp4", "model.experts.weight"][0].shape == (2, 3, 32)


@pytest.mark.parametrize("missing", ["model.q.weight", "model.q.scales", "model.q.biases"])
def test_a_missing_part_is_named(missing):
    tensors, config = folder("affine")
    del tensors[missing]
    with pytest.raises(ValueError, match=f"^{missing} is missing"):
        checks.decoded(form, tensors, config)


@pytest.mark.parametrize(
    "name, part, damaged, message",
    [
        ("affine", "scales", np.ones((4, 1), ml_dtypes.bfloat16), "a number for each 64 codes of"),
        ("affine", "scales", np.ones((4, 2), np.float16), "biases must have the dtype of"),
        ("affine", "scales", np.ones((4, 2), np.uint8), "scales of mode affine got dtype U8"),
        ("affine", "biases", np.ones((2, 4), ml_dtypes.bfloat16), "a number for each 64 codes of"),
        ("affine", "biases", np.full((4, 2), np.inf, ml_dtypes.bfloat16), "a scale is NaN or inf"),
        ("affine", "scales", np.full((4, 2), np.nan, ml_dtypes.bfloat16), "a scale is NaN or inf"),
        ("affine", "weight", np.zeros((4, 8), np.uint32), "a number for each 64 codes of 4 bits"),
        ("affine", "weight", np.zeros((4, 16), np.int32), "weight is missing, or not U32"),
        ("affine", "weight", np.zeros(64, np.uint32), "must be a matrix or stack"),
        ("affine", "weight", np.zeros((4, 0), np.uint32), "must be a matrix or stack"),
        ("mxfp4", "biases", np.ones((4, 2), np.uint8), "mode mxfp4 has none"),
        ("mxfp4", "scales", np.full((4, 2), 255, np.uint8), "a scale is NaN or infinite"),
        ("nvfp4", "scales", np.full((4, 4), 127, np.uint8), "a scale is NaN or infinite"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name, part, damaged, message):
    tensors, config = folder(name)
    tensors[f"model.q.{part}"] = damaged
    with pytest.raises(ValueError, match=message) as error:
        checks.decoded(form, tensors, config)
    assert "model.q." in str(error.value)


def test_an_8_bit_float_that_is_nan_is_refused_by_name():
    tensors, config = folder("mxfp8")
    tensors["model.q.weight"] = np.full((4, 16), 0x7F, np.uint32)
    with pytest.raises(ValueError, match=r"model.q.weight: one of its e4m3 values is NaN"):
        checks.decoded(form, tensors, config)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 7}, "quantization: bits 7 of mode affine is not read"),
        ({"bits": 1}, "bits 1"),
        ({"bits": True}, "bits True"),
        ({"group_size": 16}, "group_size 16"),
        ({"mode": "nf4"}, "mode must be one of affine, mxfp4, mxfp8, nvfp4, got 'nf4'"),
        ({"mode": []}, "mode must be one of"),
        ({"lm_head": {"bits": 9}}, "lm_head: bits 9"),
    ],
)
def test_settings_that_are_not_read_are_refused(change, message):
    config = {"quantization": {"group_size": 64, "bits": 4, **change}}
    with pytest.raises(ValueError, match=message):
        form.settings(config)


@pytest.mark.parametrize("config", [{}, {"quantization": 3}, {"quantization": {"bits": 4}}])
def test_other_configs_are_not_of_this_format(config):
    assert form.settings(config) is None


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_are_saved_as_they_were(folder, tmp_path):
    assert checks.check_folder(FILES / folder, tmp_path / "new") == form.name


@pytest.mark.slow
def test_damaged_folders_are_refused_or_read_whole():
    few = {name: x for name, x in folder("affine")[0].items() if "experts" not in name}
    folders = [(few, folder("affine")[1]), *(folder(n) for n in ("nvfp4", "mxfp8"))]
    assert checks.check_mutations(form, folders) > 150


@pytest.mark.slow
@pytest.mark.parametrize("key", ALL)
def test_mlx_reads_what_is_saved_with_other_codes(key, tmp_path):
    mx = pytest.importorskip("mlx.core")
    from safetensors.numpy import save_file

    array, parts, found = ALL[key]
    codes = np.random.default_rng(1).integers(0, array.grid.high + 1, array.shape)
    changed = array.with_codes(jnp.asarray(codes, jnp.uint8))
    saved = {**parts, **form.encode(key[1], changed, parts, found)}
    save_file({name: x.copy() for name, x in saved.items()}, tmp_path / "a.safetensors")
    tensors = mx.load(str(tmp_path / "a.safetensors"))
    mode, length, bits = found.of(key[1])
    base = key[1].removesuffix("weight")
    theirs = mx.dequantize(
        tensors[key[1]], tensors[f"{base}scales"], tensors.get(f"{base}biases"),
        length, bits, mode,
    )  # fmt: skip
    theirs = np.array(theirs.astype(mx.float32))
    if key in AFFINE:
        twice, ulp = rounded_twice(changed, parts, length)
        np.testing.assert_array_equal(twice, theirs)
        assert (np.abs(checks.values(changed).astype(np.float64) - twice) <= 1.5 * ulp).all()
    else:
        np.testing.assert_array_equal(checks.values(changed), theirs)
