"""`zq.load` and `zq.save` on files that other libraries wrote: identical, trained, and back."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoqo_jax as zq
from zoqo_jax.interop import gguf

FILES = Path(__file__).parent / "files"
FOLDERS = sorted({path.parent for path in FILES.rglob("*.safetensors")})
SOURCES = {**{str(path.relative_to(FILES)): path for path in FOLDERS}, "gguf": "gguf"}
# Of each format one file, and of mlx none of its FP4: the other two formats' are trained.
TRAINED = ("gptq/4-bits-gptq", "awq/zero-points", "compressed_tensors/int4_asymmetric",
           "compressed_tensors/nvfp4", "mxfp4", "mlx/affine", "gguf")  # fmt: skip
TRAINED_TOO = ("gptq/4-bits-gptq_v2", "compressed_tensors/mxfp4", "mlx/mxfp4", "mlx/nvfp4")


def content(path):
    """The bytes of a file, or of all files of a folder by their names."""
    if path.is_file():
        return path.read_bytes()
    return {str(x.relative_to(path)): x.read_bytes() for x in path.rglob("*") if x.is_file()}


@pytest.fixture(params=SOURCES.values(), ids=SOURCES)
def source(request, tmp_path):
    """A copy of a folder, or a GGUF file of a few types."""
    if request.param != "gguf":
        return Path(shutil.copytree(request.param, tmp_path / "source"))
    values = jnp.asarray(np.random.default_rng(0).normal(size=(4, 64)), jnp.float32)
    tensors = {
        f"w{bits}": zq.Quantizer(bits, block=32, scale_dtype=jnp.float16)(values)
        for bits in (4, 5, 8)
    }
    gguf.save(tmp_path / "source.gguf", {**tensors, "b": values[0]}, {"general.name": "some"})
    return tmp_path / "source.gguf"


def loss(tensors):
    """Bounded: MXFP4's file has every exponent there is."""
    clipped = (jnp.clip(leaf.astype(jnp.float32), -1.0, 1.0) for leaf in tensors.values())
    return sum(jnp.abs(leaf).mean() for leaf in clipped)


def test_a_model_is_the_same_when_nothing_changed(source, tmp_path):
    model = zq.load(source)
    target = tmp_path / f"again{source.suffix}"
    zq.save(target, model.tensors, model)
    assert content(target) == content(source)


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(SOURCES[name], id=name, marks=() if name in TRAINED else pytest.mark.slow)
        for name in TRAINED + TRAINED_TOO
    ],
    indirect=True,
)
def test_a_model_trains_in_place(source, tmp_path):
    model = zq.load(source)
    quantized = [name for name, x in model.tensors.items() if zq.is_quantized(x)]
    params = {name: model.tensors[name] for name in quantized[:1]}
    assert params
    tx = zq.zoqo(key=jax.random.key(0))
    state = tx.init(params)
    step = jax.jit(lambda params, state: tx.update(None, state, params, value_fn=loss))
    for _ in range(2):
        updates, state = step(params, state)
        params = zq.apply_updates(params, updates)
    trained = tmp_path / f"trained{source.suffix}"
    zq.save(trained, params, model)
    again = zq.load(trained)
    moved = 0
    for name, before in model.tensors.items():
        after = again.tensors[name]
        if name not in params:
            np.testing.assert_array_equal(after, before)
            continue
        np.testing.assert_array_equal(after.codes, params[name].codes)
        for ours, theirs in zip(
            *(jax.tree.leaves((x.scale, x.offset, x.block_of)) for x in (after, before)),
            strict=True,
        ):
            np.testing.assert_array_equal(ours, theirs)
        moved += int((after.codes != before.codes).sum())
    assert moved


def test_a_tensor_that_is_not_there_is_named(source):
    model = zq.load(source, tokenizer=False)
    with pytest.raises(ValueError, match="tensors: the model has no 'nothing'"):
        zq.save(source, {"nothing": jnp.ones(1)}, model)


def test_a_folder_of_one_gguf_file_is_that_file(tmp_path):
    gguf.save(tmp_path / "a.gguf", {"w": jnp.ones(2)}, {"general.name": "one"})
    assert zq.load(tmp_path).metadata["general.name"] == "one"
    gguf.save(tmp_path / "b.gguf", {"w": jnp.ones(2)}, {"general.name": "two"})
    with pytest.raises(ValueError, match=r"holds 2 GGUF files, such as a\.gguf: name one"):
        zq.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="none"):
        zq.load(tmp_path / "none")
