"""gpt-oss' MXFP4: beside transformers' decoder, bit for bit, and damaged files."""

from pathlib import Path

import format_checks as checks
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoqo_jax.interop.formats import mxfp4 as form

FOLDER = Path(__file__).parent / "files" / "mxfp4"
TENSORS, CONFIG, EXPECTED = checks.read(FOLDER)
ALL = checks.decoded(form, TENSORS, CONFIG)
EXPERTS = "model.layers.0.mlp.experts."


def check_values(ours, theirs, parts, name):
    is_normal = np.repeat(parts[f"{name}_scales"] > 1, 32, axis=-1)
    np.testing.assert_array_equal(ours[is_normal], theirs[is_normal])
    # XLA takes subnormal floats for zero: byte 0 is one itself, byte 1 gives one for 0.5.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=6 * 2.0**-127)


@pytest.mark.parametrize("name", EXPECTED)
def test_values_are_those_of_transformers(name):
    assert set(ALL) == set(EXPECTED)
    array, parts, _ = ALL[name]
    assert array.ndim == 3 and array.value_dtype == jnp.bfloat16
    assert array.packed.nbytes == parts[f"{name}_blocks"].nbytes
    check_values(checks.values(array), EXPECTED[name], parts, name)


def test_the_file_has_minus_zeros_and_every_scale():
    blocks = TENSORS[f"{EXPERTS}gate_up_proj_blocks"]
    assert (blocks & 15 == 8).any() and (blocks & 15 == 0).any()
    assert set(TENSORS[f"{EXPERTS}down_proj_scales"].ravel()) == set(range(255))


@pytest.mark.parametrize("name", EXPECTED)
def test_unchanged_codes_give_the_identical_bytes(name):
    assert set(checks.check_encoding(form, name, *ALL[name])) == {f"{name}_blocks"}


@given(st.sampled_from(sorted(ALL)), *[st.integers(0, 1 << 20)] * 3)
@settings(deadline=None, max_examples=60)
def test_a_changed_code_changes_its_own_bits_alone(name, row, column, code):
    checks.check_one_code(form, name, ALL[name], 4, row, column, code)


@pytest.mark.parametrize("end", ["_blocks", "_scales"])
def test_a_missing_part_is_named(end):
    fewer = {name: x for name, x in TENSORS.items() if name != f"{EXPERTS}down_proj{end}"}
    with pytest.raises(ValueError, match=f"^{EXPERTS}down_proj{end} is missing"):
        checks.decoded(form, fewer, CONFIG)


@pytest.mark.parametrize(
    "end, damaged, message",
    [
        ("_blocks", np.zeros((3, 6, 2, 8), np.uint8), r"must be \(experts, outputs, groups, 16\)"),
        ("_blocks", np.zeros((3, 6, 0, 16), np.uint8), r"must be \(experts, outputs, groups, 16\)"),
        ("_blocks", np.zeros((3, 6, 2, 16), np.int8), "must have dtype U8, got I8"),
        ("_blocks", np.zeros((3, 5, 2, 16), np.uint8), "must have shape"),
        ("_scales", np.zeros((3, 6, 2), np.float16), "must have dtype U8, got F16"),
        ("_scales", np.zeros((3, 6, 1), np.uint8), r"must have shape \(3, 6, 2\), got \(3, 6, 1\)"),
        ("_scales", np.full((3, 6, 2), 255, np.uint8), "a scale is NaN"),
        ("", np.zeros((3, 6, 64), np.float16), "is there twice"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(end, damaged, message):
    tensors = {**TENSORS, f"{EXPERTS}gate_up_proj{end}": damaged}
    with pytest.raises(ValueError, match=rf"{EXPERTS}gate_up_proj.*{message}"):
        checks.decoded(form, tensors, CONFIG)


@pytest.mark.parametrize("config", [{}, {"quantization_config": 3},
                                    {"quantization_config": {"quant_method": "gptq"}}])  # fmt: skip
def test_other_methods_are_not_of_this_format(config):
    assert form.settings(config) is None


def test_the_folder_is_saved_as_it_was(tmp_path):
    assert checks.check_folder(FOLDER, tmp_path / "new") == form.name


def test_damaged_folders_are_refused_or_read_whole():
    few = {name: x for name, x in TENSORS.items() if "gate_up" in name}
    assert checks.check_mutations(form, [(few, CONFIG)]) > 150


@pytest.mark.slow
def test_transformers_reads_what_is_saved_with_other_codes():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers.integrations.mxfp4")
    for name, (array, parts, found) in ALL.items():
        codes = np.random.default_rng(1).integers(0, 15, array.shape)
        changed = array.with_codes(jnp.asarray(codes, jnp.uint8))
        saved = {**parts, **form.encode(name, changed, parts, found)}
        theirs = transformers.convert_moe_packed_tensors(
            *(checks.tensor(torch, saved[f"{name}{end}"]) for end in ("_blocks", "_scales"))
        )
        check_values(checks.values(changed), theirs.transpose(1, 2).float().numpy(), parts, name)
