"""GPTQ's folders, as GPTQModel wrote them: its values, its bits, and what is refused."""

import dataclasses

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

NAMES = sorted(path.name for path in (FILES / "gptq").iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_values_are_those_of_gptqmodel_bit_for_bit(name):
    loaded = folder.load(FILES / "gptq" / name)
    values = expected("gptq", name)
    assert loaded.format == "gptq"
    quantized = {key for key, x in loaded.tensors.items() if zq.is_quantized(x)}
    assert quantized == set(values)
    for key, theirs in values.items():
        ours = zq.dequantize(loaded.tensors[key])
        assert ours.dtype == (jnp.bfloat16 if name == "shards" else jnp.float16)
        np.testing.assert_array_equal(ours.astype(jnp.float32), theirs.astype(np.float32))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_loaded_and_saved_is_the_identical_folder(tmp_path, name):
    source = copied("gptq", name, tmp_path)
    loaded = folder.load(source)
    folder.save(tmp_path / "again", loaded.tensors, loaded)
    assert content(tmp_path / "again") == content(source)


@pytest.mark.parametrize("name", NAMES)
def test_one_changed_code_changes_its_bits_alone(tmp_path, name):
    source = copied("gptq", name, tmp_path)
    loaded = folder.load(source)
    for key, array in loaded.tensors.items():
        if not zq.is_quantized(array):
            continue
        codes = np.asarray(array.codes).copy()
        before, place = int(codes[5, 41]), (5, 41)
        codes[place] = (before + 1) % len(array.grid.levels)
        changed = loaded.tensors | {key: array.with_codes(jnp.asarray(codes))}
        folder.save(tmp_path / "changed", changed, loaded)
        bits = changed_bits(stored(source), stored(tmp_path / "changed"))
        flipped = (before ^ int(codes[place])).bit_count()
        assert bits == {key.removesuffix("weight") + "qweight": flipped}
        there = folder.load(tmp_path / "changed").tensors[key]
        np.testing.assert_array_equal(there.codes, codes)


def test_every_code_can_be_written(tmp_path):
    """All codes of all widths turned round, and back again in place: the folder that was."""
    for name in ("2-bits-gptq", "3-bits-gptq_v2", "4-bits-gptq", "8-bits-gptq_v2", "int16"):
        source = copied("gptq", name, tmp_path)
        before, loaded = content(source), folder.load(source)

        def turned(tensors):
            return {
                key: x.with_codes(x.grid.high - x.codes) if zq.is_quantized(x) else x
                for key, x in tensors.items()
            }

        folder.save(source, turned(loaded.tensors), loaded)
        there = folder.load(source)
        for key, array in there.tensors.items():
            if zq.is_quantized(array):
                other = loaded.tensors[key]
                np.testing.assert_array_equal(array.codes, other.grid.high - other.codes)
        assert content(source) != before
        folder.save(source, loaded.tensors, loaded)
        assert content(source) == before


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_arrays_keep_widths_groups_and_zero_points(bits, version):
    tensors = folder.load(FILES / "gptq" / f"{bits}-bits-{version}").tensors
    asymmetric, act_order, symmetric = (
        tensors[f"model.layers.0.{kind}.weight"]
        for kind in ("asymmetric", "act_order", "symmetric")
    )
    assert asymmetric.bits == act_order.bits == symmetric.bits == bits
    assert asymmetric.packed.size == 64 * 32 * bits // 8
    assert (asymmetric.block, asymmetric.block_of) == ((-1, 32), None)
    assert act_order.block is None
    assert act_order.block_of.shape == (1, 64)
    assert sorted(act_order.block_of[0].tolist()) == [0] * 32 + [1] * 32
    assert asymmetric.offset.numbers().dtype == jnp.uint8
    assert asymmetric.offset.numbers().min() == 0
    assert symmetric.offset is None
    assert symmetric.grid.levels == tuple(float(n - 2 ** (bits - 1)) for n in range(2**bits))


def test_shapes_say_which_bits_and_groups_layers_have():
    tensors = folder.load(FILES / "gptq" / "dynamic").tensors
    assert (tensors["lm_head.weight"].bits, tensors["lm_head.weight"].block) == (8, (-1, 16))
    other = tensors["model.layers.0.up_proj.weight"]
    assert (other.bits, other.block) == (4, (-1, 32))


def test_without_g_idx_groups_are_of_neighbours(tmp_path):
    source = copied("gptq", "int16", tmp_path)
    values = zq.dequantize(folder.load(source).tensors["model.up_proj.weight"])
    rewrite(source, lambda tensors: tensors.pop("model.up_proj.g_idx"))
    array = folder.load(source).tensors["model.up_proj.weight"]
    np.testing.assert_array_equal(zq.dequantize(array), values)


def test_the_last_group_may_be_short(tmp_path):
    """64 inputs in groups of 48: the index says it, and so does the config alone."""
    source = copied("gptq", "int16", tmp_path)
    key = "model.up_proj"

    def regroup(tensors):
        tensors[f"{key}.g_idx"] = np.arange(64, dtype=np.int32) // 48

    rewrite(source, regroup)
    say(source, group_size=48)
    first = folder.load(source).tensors[f"{key}.weight"]
    assert first.block == (-1, 48)
    there = stored(source)
    scales = np.repeat(there[f"{key}.scales"].T, 48, axis=1)[:, :64]
    zeros = np.repeat(np.asarray(first.offset.numbers()), 48, axis=1)[:, :64].astype(np.float32)
    codes = np.asarray(first.codes, np.float32)
    exact = (scales.astype(np.float32) * (codes - zeros)).astype(np.float16)
    np.testing.assert_array_equal(zq.dequantize(first), exact)
    rewrite(source, lambda tensors: tensors.pop(f"{key}.g_idx"))
    second = folder.load(source).tensors[f"{key}.weight"]
    np.testing.assert_array_equal(zq.dequantize(second), exact)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 5}, "bits must be 2, 3 .* got 5"),
        ({"bits": 4.0}, "bits must be"),
        ({"bits": 8}, r"qzeros has 4 columns .* not 8 bits each"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format must be gptq or gptq_v2"),
        ({"checkpoint_format": "gptq_p", "bits": 3}, "3 .not in gptq_p"),
        ({"is_marlin_format": True}, "checkpoint_format must be"),
        ({"group_size": 0}, "group_size must be"),
        ({"group_size": 16}, "do not fit 64 inputs of 4 bits in groups of 16"),
        ({"dynamic": {".*": {"format": "gptq"}}}, "no format of their own"),
        ({"dynamic": [1]}, "dynamic must"),
        ({"quant_method": "hqq"}, "only gptq, awq, .* are read, got"),
    ],
)
def test_settings_that_are_not_read_are_refused(tmp_path, changes, message):
    source = copied("gptq", "4-bits-gptq", tmp_path)
    say(source, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        folder.load(source)
    assert str(source) in str(caught.value)


KEY = "model.layers.0.act_order"


def puts(end, change):
    def edit(tensors):
        array = change(tensors.pop(f"{KEY}.{end}"))
        if array is not None:
            tensors[f"{KEY}.{end}"] = array

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (puts("qzeros", lambda x: None), r"act_order\.qzeros must be a matrix .* got none"),
        (puts("scales", lambda x: None), r"act_order\.scales must be a matrix .* got none"),
        (puts("qweight", lambda x: None), r"there is no .*act_order\.qweight beside it"),
        (puts("qweight", lambda x: x.astype(np.int64)), "must be I32"),
        (puts("qweight", lambda x: x[:-1]), "do not fit 64 inputs"),
        (puts("qweight", lambda x: x.T.copy()), "do not fit 64 inputs"),
        (puts("qzeros", lambda x: x[:1]), "do not fit 64 inputs"),
        (puts("qzeros", lambda x: x[:, :-1].copy()), "3 columns"),
        (puts("scales", lambda x: x[:, :-8].copy()), "do not fit|columns"),
        (puts("scales", lambda x: x.astype(np.float64)), "scales F16, BF16 or F32"),
        (puts("scales", lambda x: x * np.float16("nan")), "a scale is NaN or infinite"),
        (puts("g_idx", lambda x: x[:-8]), "do not fit 56 inputs"),
        (puts("g_idx", lambda x: x + 1), r"g_idx must be in \[0, 1\]"),
        (puts("g_idx", lambda x: x - 1), r"g_idx must be in \[0, 1\]"),
        (puts("g_idx", lambda x: x.astype(np.int64)), "g_idx must be I32"),
        (
            lambda t: t.update({f"{KEY}.weight": np.zeros((1, 1), np.float32)}),
            "stored both as such and as",
        ),
        (
            lambda t: t.update({"embed_tokens.qweight": np.zeros((8, 8), np.int32)}),
            "quantized embeddings are not read",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(tmp_path, edit, message):
    source = copied("gptq", "4-bits-gptq", tmp_path)
    rewrite(source, edit)
    with pytest.raises(ValueError, match=message) as caught:
        folder.load(source)
    assert str(source) in str(caught.value)


def test_other_scales_than_the_files_are_refused(tmp_path):
    loaded = folder.load(copied("gptq", "4-bits-gptq", tmp_path))
    array = loaded.tensors[f"{KEY}.weight"]
    for other in (
        dataclasses.replace(array, scale=array.scale * 2),
        dataclasses.replace(array, offset=None),
        dataclasses.replace(array, block_of=array.block_of[:, ::-1]),
        zq.Quantizer(4)(jnp.ones((32, 64))),
        jnp.ones((32, 64)),
    ):
        with pytest.raises(ValueError, match=f"'{KEY}.weight' must"):
            folder.save(tmp_path / "new", loaded.tensors | {f"{KEY}.weight": other}, loaded)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["3-bits-gptq", pytest.param("dynamic", marks=pytest.mark.slow)])
def test_mutated_folders_are_read_or_refused_with_a_clear_error(tmp_path, name):
    read, refused = survives(
        folder.load, copied("gptq", name, tmp_path), np.random.default_rng(0), 250
    )
    assert read > 25
    assert refused > 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NAMES)
def test_gptqmodel_reads_what_is_saved(tmp_path, name):
    pytest.importorskip("torch")
    kernels = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    convert = pytest.importorskip("gptqmodel.utils.model").convert_gptq_v1_to_v2_format_module
    from safetensors.torch import load_file

    loaded = folder.load(copied("gptq", name, tmp_path))
    rng, tensors = np.random.default_rng(0), {}
    for key, array in loaded.tensors.items():
        tensors[key] = array
        if zq.is_quantized(array):
            codes = rng.integers(0, len(array.grid.levels), array.shape, np.uint8)
            tensors[key] = array.with_codes(jnp.asarray(codes))
    folder.save(tmp_path / "saved", tensors, loaded)
    state = {}
    for file in (tmp_path / "saved").glob("*.safetensors"):
        state |= load_file(file)
    for key, array in tensors.items():
        if not zq.is_quantized(array):
            continue
        module = key.removesuffix(".weight")
        words = state[f"{module}.qweight"].dtype
        groups = array.scale.shape[1]
        layer = kernels.TorchLinear(
            bits=array.bits, group_size=64 // groups, sym=True, desc_act=True, in_features=64,
            out_features=32, bias=True, pack_dtype=words, register_buffers=True,
        )  # fmt: skip
        parts = ("qweight", "qzeros", "scales", "g_idx", "bias")
        own = {end: state[f"{module}.{end}"] for end in parts}
        layer.scales, layer.bias = own["scales"], own["bias"]
        layer.load_state_dict(own)
        if name == "shards" or name.endswith("-gptq"):
            convert(layer, array.bits, words)
        layer.eval()
        theirs = layer.dequantize_weight().T.float().numpy()
        np.testing.assert_array_equal(zq.dequantize(array).astype(jnp.float32), theirs)
