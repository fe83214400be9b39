"""AWQ's folders, as AutoAWQ wrote them: its values, its bits, and what is refused."""

import jax.numpy as jnp
import numpy as np
import pytest
from folders import (
    FILES,
    changed_bits,
    content,
    copied,
    expected,
    rewrite,
    say,
    stored,
    survives,
)

import zoqo_jax as zq
from zoqo_jax.interop import folder

NAMES = sorted(path.name for path in (FILES / "awq").iterdir())
KEY = "model.layers.0.up_proj"


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_autoawq_bit_for_bit(name):
    loaded = folder.load(FILES / "awq" / name)
    values = expected("awq", name)
    assert loaded.format == "awq"
    assert {key for key, x in loaded.tensors.items() if zq.is_quantized(x)} == set(values)
    for key, theirs in values.items():
        array = loaded.tensors[key]
        assert array.bits == 4
        assert array.value_dtype == (jnp.bfloat16 if name == "no-zero-points" else jnp.float16)
        assert (array.offset is None) == (name == "no-zero-points")
        ours = zq.dequantize(array).astype(jnp.float32)
        np.testing.assert_array_equal(ours, theirs.astype(np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_and_saved_is_the_identical_folder(tmp_path, name):
    source = copied("awq", name, tmp_path)
    loaded = folder.load(source)
    folder.save(tmp_path / "again", loaded.tensors, loaded)
    assert content(tmp_path / "again") == content(source)


@pytest.mark.parametrize("place", [(0, 0), (5, 41), (31, 63), (26, 7)])
@pytest.mark.parametrize("name", NAMES)
def test_one_changed_code_changes_its_bits_alone(tmp_path, name, place):
    source = copied("awq", name, tmp_path)
    loaded = folder.load(source)
    array = loaded.tensors[f"{KEY}.weight"]
    codes = np.asarray(array.codes).copy()
    codes[place] ^= 15
    changed = loaded.tensors | {f"{KEY}.weight": array.with_codes(jnp.asarray(codes))}
    folder.save(tmp_path / "changed", changed, loaded)
    bits = changed_bits(stored(source), stored(tmp_path / "changed"))
    assert bits == {f"{KEY}.qweight": 4}
    there = folder.load(tmp_path / "changed").tensors[f"{KEY}.weight"]
    np.testing.assert_array_equal(there.codes, codes)


def test_the_older_words_for_settings_are_read(tmp_path):
    source = copied("awq", "zero-points", tmp_path)
    values = zq.dequantize(folder.load(source).tensors[f"{KEY}.weight"])
    say(source, quant_method=None, bits=None, group_size=None, w_bit=4, q_group_size=32)
    say(source, version="GEMM")
    again = folder.load(source)
    assert again.format == "awq"
    np.testing.assert_array_equal(zq.dequantize(again.tensors[f"{KEY}.weight"]), values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "bits must be 4, got 8"),
        ({"bits": "4"}, "bits must be 4, got '4'"),
        ({"version": "gemv"}, "version must be gemm, got 'gemv'"),
        ({"version": "gemv_fast"}, "version must be gemm"),
        ({"version": "marlin"}, "version must be gemm"),
        ({"version": ["gemm"]}, "version must be gemm"),
        ({"backend": "llm-awq"}, "version must be gemm"),
        ({"group_size": 16}, "do not fit one another in groups of 16"),
        ({"group_size": 48}, "do not fit one another in groups of 48"),
        ({"group_size": 0}, "group_size must be"),
        ({"group_size": None}, "group_size must be"),
    ],
)
def test_settings_that_are_not_read_are_refused(tmp_path, changes, message):
    source = copied("awq", "zero-points", tmp_path)
    say(source, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        folder.load(source)
    assert str(source) in str(caught.value)


def puts(end, change):
    def edit(tensors):
        array = change(tensors.pop(f"{KEY}.{end}"))
        if array is not None:
            tensors[f"{KEY}.{end}"] = array

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (puts("qzeros", lambda x: None), r"up_proj\.qzeros' is not there"),
        (puts("scales", lambda x: None), r"up_proj\.scales' is not there"),
        (puts("qweight", lambda x: None), r"there is no .*up_proj\.qweight beside it"),
        (puts("qweight", lambda x: x.astype(np.uint32)), "must be I32"),
        (puts("qweight", lambda x: x[:-1]), "do not fit one another"),
        (puts("qweight", lambda x: x[:0]), "do not fit one another"),
        (puts("qweight", lambda x: x.ravel()), "do not fit one another"),
        (puts("qzeros", lambda x: x[:1]), "do not fit one another"),
        (puts("scales", lambda x: x[:, :-8].copy()), "do not fit one another"),
        (puts("scales", lambda x: x.astype(np.float64)), "scales F16, BF16 or F32"),
        (puts("scales", lambda x: x / np.float16(0)), "a scale is NaN or infinite"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_parts_that_do_not_fit_are_refused_by_name(tmp_path, edit, message):
    source = copied("awq", "zero-points", tmp_path)
    rewrite(source, edit)
    with pytest.raises(ValueError, match=message) as caught:
        folder.load(source)
    assert str(source) in str(caught.value)


@pytest.mark.slow
def test_mutated_folders_are_read_or_refused_with_a_clear_error(tmp_path):
    read, refused = survives(
        folder.load, copied("awq", "zero-points", tmp_path), np.random.default_rng(0), 500
    )
    assert read > 50
    assert refused > 200


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_autoawq_reads_what_is_saved(tmp_path, name):
    """One changed code; AutoAWQ's unpacking alone is loaded, for it needs an older transformers."""
    import importlib.util

    pytest.importorskip("torch")
    found = importlib.util.find_spec("awq")
    if found is None:
        pytest.skip("could not import 'awq'")
    from safetensors.torch import load_file

    path = f"{found.submodule_search_locations[0]}/utils/packing_utils.py"
    spec = importlib.util.spec_from_file_location("packing_utils", path)
    packing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packing)

    loaded = folder.load(copied("awq", name, tmp_path))
    array = loaded.tensors[f"{KEY}.weight"]
    codes = np.asarray(array.codes).copy()
    codes[5, 41] ^= 5
    tensors = loaded.tensors | {f"{KEY}.weight": array.with_codes(jnp.asarray(codes))}
    folder.save(tmp_path / "saved", tensors, loaded)
    state = {}
    for file in (tmp_path / "saved").glob("*.safetensors"):
        state |= load_file(file)
    for key, array in tensors.items():
        if zq.is_quantized(array):
            module = key.removesuffix(".weight")
            parts = (state[f"{module}.{end}"] for end in ("qweight", "qzeros", "scales"))
            theirs = packing.dequantize_gemm(*parts, 4, 64 // array.scale.shape[1])
            ours = zq.dequantize(array).astype(jnp.float32)
            np.testing.assert_array_equal(ours, theirs.T.float().numpy())
