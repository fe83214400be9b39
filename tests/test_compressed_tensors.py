"""compressed-tensors: beside the library that wrote the files, bit for bit, and damaged files."""

from pathlib import Path

import format_checks as checks
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoqo_jax.interop.formats import compressed_tensors as form

FILES = Path(__file__).parent / "files" / "compressed_tensors"
FOLDERS = sorted(path.name for path in FILES.iterdir())


def width(array, parts):
    """Bits of a code in the file."""
    if any(part.dtype == np.int8 and part.ndim > 1 for part in parts.values()):
        return 8
    return (len(array.grid.levels) - 1).bit_length()


def folder(name):
    return checks.read(FILES / name)[:2]


ALL = {
    (name, matrix): found
    for name in FOLDERS
    for matrix, found in checks.decoded(form, *folder(name)).items()
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_values_are_those_of_the_library(folder):
    tensors, config, expected = checks.read(FILES / folder)
    found = checks.decoded(form, tensors, config)
    assert set(found) == set(expected)
    for name, (array, parts, _) in found.items():
        scale = parts[f"{name}_scale"]
        if scale.dtype == np.float32 and f"{name}_zero_point" in parts:
            # scale * q and scale * z are rounded before they are subtracted: the larger's ulp.
            largest = np.abs(scale).max() * array.grid.high
            np.testing.assert_allclose(
                checks.values(array), expected[name], rtol=0, atol=np.spacing(largest)
            )
        else:
            np.testing.assert_array_equal(checks.values(array), expected[name])


@pytest.mark.parametrize("key", ALL)
def test_unchanged_codes_give_the_identical_bytes(key):
    assert len(checks.check_encoding(form, key[1], *ALL[key])) == 1


@given(st.sampled_from(sorted(ALL)), *[st.integers(0, 1 << 20)] * 3)
@settings(deadline=None, max_examples=60)
def test_a_changed_code_changes_its_own_bits_alone(key, row, column, code):
    array, parts, _ = ALL[key]
    checks.check_one_code(form, key[1], ALL[key], width(array, parts), row, column, code)


def test_padding_behind_the_codes_stays_as_it_is():
    array, parts, schemes = ALL["channels", "model.rows.weight"]
    packed = parts["model.rows.weight_packed"].copy()
    packed[:, -1] |= np.int32(-1) << 16  # two codes of 8 bits are left for the last word
    parts = {**parts, "model.rows.weight_packed": packed}
    checks.check_encoding(form, "model.rows.weight", array, parts, schemes)


def test_minus_zeros_stay_until_their_code_changes():
    for name in ("nvfp4", "mxfp4"):
        array, parts, schemes = ALL[name, "model.q.weight"]
        packed = parts["model.q.weight_packed"]
        assert (packed & 15 == 8).any() and (packed & 15 == 0).any()
        new = form.encode("model.q.weight", array, parts, schemes)["model.q.weight_packed"]
        np.testing.assert_array_equal(new, packed)


def test_groups_by_activation_order_are_kept_as_groups():
    array, parts, _ = ALL["act_order", "model.mixed.weight"]
    np.testing.assert_array_equal(array.block_of[0], parts["model.mixed.weight_g_idx"])
    assert array.block is None
    assert ALL["act_order", "model.none.weight"][0].block == (-1, 32)


def test_stacks_have_three_axes_and_scales_take_what_they_take_in_the_file():
    assert ALL["channels", "model.experts.weight"][0].shape == (3, 5, 50)
    array, parts, _ = ALL["nvfp4", "model.q.weight"]
    assert array.scale.inner.nbytes == parts["model.q.weight_scale"].nbytes
    assert array.scale.outer.size == 1 and array.scale.divides
    assert array.packed.nbytes == parts["model.q.weight_packed"].nbytes


@pytest.mark.parametrize(
    "name, missing",
    [
        ("int4", "model.q.weight_scale"),
        ("int4", "model.q.weight_shape"),
        ("int4", "model.q.weight_packed"),
        ("nvfp4", "model.q.weight_scale"),
        ("int8", "model.rows.weight"),
    ],
)
def test_a_missing_part_is_named(name, missing):
    tensors, config = folder(name)
    fewer = {key: x for key, x in tensors.items() if key != missing}
    with pytest.raises(ValueError, match=f"{missing}.* is missing") as error:
        checks.decoded(form, fewer, config)
    assert "needs it" in str(error.value)


@pytest.mark.parametrize(
    "name, part, damaged, message",
    [
        ("int4", "_scale", np.ones((6, 3), np.float16), "_scale must be"),
        ("int4", "_scale", np.full((6, 2), np.nan, np.float16), "a scale is NaN or infinite"),
        ("int4", "_scale", np.full((6, 2), 0x7F81, np.int16).view(ml_dtypes.bfloat16), "is NaN"),
        ("int4", "_scale", np.ones((6, 2), np.int32), "_scale must be BF16 or F16 or F32, got I32"),
        ("int4", "_scale", np.ones((6, 4), np.float16), "no scheme of config_groups fits"),
        ("int4", "_shape", np.array([6, 2**62]), "no scheme of config_groups fits"),
        ("int4", "_shape", np.array([6, -64]), "_shape must fit"),
        ("int4", "_shape", np.array([7, 64]), "_shape must fit"),
        ("int4", "_packed", np.zeros((6, 8, 1, 1), np.int32), "2 or 3 axes"),
        ("int4", "_packed", np.zeros((6, 8), np.uint32), "dtype U32 fits no format"),
        ("int4", "_zero_point", np.zeros((1, 2), np.int32), "no scheme of config_groups fits"),
        ("int4", "_g_idx", np.full(64, 2, np.int32), "_g_idx must be 0 to 1, got 2 to 2"),
        ("int4", "_g_idx", np.zeros(63, np.int32), "_g_idx must have shape"),
        ("int4_asymmetric", "_zero_point", np.zeros((1, 2), np.int32), "_zero_point must have"),
        ("nvfp4", "_global_scale", np.zeros(1, np.float32), "one finite number, not 0"),
        ("nvfp4", "_global_scale", np.ones(6, np.float32), "one finite number, not 0"),
        ("nvfp4", "_scale", np.zeros((6, 2), np.uint8), "no scheme of config_groups has group"),
        ("mxfp4", "_scale", np.full((6, 2), 255, np.uint8), "a scale is NaN"),
        ("mxfp4", "_scale", np.zeros((6, 4), np.uint8), "_scale must be one for each 32 of"),
        ("mxfp4", "_global_scale", np.ones(1, np.float32), "powers of two have none"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(name, part, damaged, message):
    tensors, config = folder(name)
    tensors[f"model.q.weight{part}"] = damaged
    with pytest.raises(ValueError, match=f"model.q.weight.*{message}|{message}") as error:
        checks.decoded(form, tensors, config)
    assert "model.q.weight" in str(error.value)


def test_codes_of_naive_bytes_must_have_the_width_of_their_scheme():
    tensors, config = folder("naive")
    tensors["model.few.weight"] = np.full((6, 50), 8, np.int8)
    with pytest.raises(ValueError, match=r"model.few.weight: a code has more than 4 bits"):
        checks.decoded(form, tensors, config)


def test_two_schemes_that_fit_are_refused():
    tensors, config = folder("int8")
    groups = config["quantization_config"]["config_groups"]
    groups["other"] = {
        "format": "naive-quantized",
        "weights": {"num_bits": 4, "type": "int", "strategy": "channel"},
    }
    with pytest.raises(ValueError, match="more than one scheme"):
        checks.decoded(form, tensors, config)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "float-quantized"}, "got 'float-quantized'"),
        ({"format": "marlin-24"}, "got 'marlin-24'"),
        ({"num_bits": 16}, "num_bits 16"),
        ({"num_bits": 1}, "num_bits 1"),
        ({"type": "float"}, "type 'float' is not read"),
        ({"strategy": "block"}, "strategy 'block'"),
        ({"group_size": -2}, "group_size must be -1 or positive"),
        ({"config_groups": []}, "config_groups must be a table"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse formats are not read"),
    ],
)
def test_settings_that_are_not_read_are_refused(change, message):
    config = folder("int4")[1]
    found = config["quantization_config"]
    group = found["config_groups"]["group_0"]
    for key, value in change.items():
        if key in ("config_groups", "sparsity_config"):
            found[key] = value
        elif key == "format":
            group[key] = value
        else:
            group["weights"][key] = value
    with pytest.raises(ValueError, match=message):
        form.settings(config)


@pytest.mark.parametrize("config", [{}, {"quantization_config": None}, {"quantization_config": 3},
                                    {"quantization_config": {"quant_method": "gptq"}}])  # fmt: skip
def test_other_methods_are_not_of_this_format(config):
    assert form.settings(config) is None


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_are_saved_as_they_were(folder, tmp_path):
    assert checks.check_folder(FILES / folder, tmp_path / "new") == form.name


SMALL = ["act_order", "int4", "naive", "nvfp4", "mxfp4"]


@pytest.mark.parametrize(
    "names", [SMALL, pytest.param(sorted(set(FOLDERS) - set(SMALL)), marks=pytest.mark.slow)]
)
def test_damaged_folders_are_refused_or_read_whole(names):
    assert checks.check_mutations(form, [folder(name) for name in names]) > 200


@pytest.mark.slow
@pytest.mark.parametrize("key", [key for key in ALL if key[0] != "act_order"])
def test_the_library_reads_what_is_saved_with_other_codes(key):
    torch = pytest.importorskip("torch")
    library = pytest.importorskip("compressed_tensors")
    array, parts, schemes = ALL[key]
    codes = np.random.default_rng(1).integers(0, array.grid.high + 1, array.shape)
    changed = array.with_codes(jnp.asarray(codes, jnp.uint8))
    saved = {**parts, **form.encode(key[1], changed, parts, schemes)}
    state = {
        part.removeprefix(key[1].removesuffix("weight")): checks.tensor(torch, x)
        for part, x in saved.items()
    }
    groups = checks.read(FILES / key[0])[1]["quantization_config"]["config_groups"].values()
    ends = (key[1].removesuffix(".weight"), "Linear")
    (group,) = [group for group in groups if group["targets"][0].endswith(ends)]
    scheme = library.quantization.QuantizationScheme(**group)
    compressor = library.compressors.BaseCompressor.get_value_from_registry(scheme.format)
    theirs = compressor.decompress(state, scheme)["weight"].float().numpy()
    atol = 0.0
    if parts[f"{key[1]}_scale"].dtype == np.float32 and f"{key[1]}_zero_point" in parts:
        atol = np.spacing(np.abs(parts[f"{key[1]}_scale"]).max() * array.grid.high)
    np.testing.assert_allclose(checks.values(changed), theirs, rtol=0, atol=atol)
