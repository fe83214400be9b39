"""4-bit safetensors: beside the format's formulas and bitsandbytes itself, and against lies."""

import json
import math
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import zoqo_jax as zq
from zoqo_jax.interop import bitsandbytes, safetensors

NF4 = np.array(zq.companders.nf4().levels, np.float32)
HALF_OF_FP4 = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32) / 12
MAPS = {"nf4": NF4, "fp4": np.concatenate([HALF_OF_FP4, -HALF_OF_FP4])}
STATE = ".quant_state.bitsandbytes__"


def stored(name, shape, kind="nf4", nested=False, blocksize=64, dtype="float32", seed=0):
    """A random 4-bit tensor as it lies in a file."""
    rng, count = np.random.default_rng(seed), math.prod(shape)
    blocks = -(-count // blocksize)
    settings = {"quant_type": kind, "blocksize": blocksize, "dtype": dtype, "shape": shape}
    tensors = {
        name: rng.integers(0, 256, (count // 2, 1), np.uint8),
        f"{name}.absmax": rng.uniform(0.01, 0.1, blocks).astype(np.float32),
        f"{name}.quant_map": MAPS[kind],
    }
    if nested:
        nesting = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.1 + 1 / 3}
        settings |= nesting
        tensors[f"{name}.absmax"] = rng.integers(0, 256, blocks, np.uint8)
        tensors[f"{name}.nested_absmax"] = rng.uniform(0.2, 0.3, -(-blocks // 256)).astype("f4")
        tensors[f"{name}.nested_quant_map"] = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
    tensors[name + STATE + kind] = np.frombuffer(json.dumps(settings).encode(), np.uint8)
    return tensors


def decoded(name, tensors):
    """The values, code by code, from the module's docstring."""
    (key,) = (key for key in tensors if key.startswith(name + STATE))
    settings = json.loads(tensors[key].tobytes())
    scales = tensors[f"{name}.absmax"]
    if scales.dtype == np.uint8:
        outer, levels = tensors[f"{name}.nested_absmax"], tensors[f"{name}.nested_quant_map"]
        offset = np.float32(settings["nested_offset"])
        scales = [levels[byte] * outer[i // 256] + offset for i, byte in enumerate(scales)]
    codes = [half for byte in tensors[name].ravel() for half in (byte >> 4, byte & 15)]
    levels, size = tensors[f"{name}.quant_map"], settings["blocksize"]
    values = np.array([levels[code] * scales[i // size] for i, code in enumerate(codes)], "f4")
    return values.reshape(settings["shape"]).astype(np.dtype(settings["dtype"]))


def mixed():
    """A checkpoint with every kind of tensor."""
    return {
        **stored("a.weight", (4, 128), dtype="bfloat16"),
        **stored("b.weight", (3, 96), nested=True, seed=1),
        **stored("c.weight", (6, 64), kind="fp4", seed=2),
        "norm.weight": np.ones(5, ml_dtypes.bfloat16),
        "ids": np.array([2**40, 7]),
    }


def write(folder, tensors):
    path = folder / "model.safetensors"
    safetensors.save(path, tensors, {"format": "pt"})
    return path


@pytest.mark.parametrize(
    ("shape", "kind", "nested", "blocksize", "dtype"),
    [
        ((4, 128), "nf4", False, 64, "float32"),
        ((4, 128), "nf4", True, 64, "bfloat16"),
        ((4, 128), "fp4", True, 64, "float16"),
        ((5, 96), "nf4", True, 64, "float32"),  # blocks go on in the next row
        ((6, 16), "fp4", False, 64, "float32"),  # a block has several rows
        ((130,), "nf4", False, 32, "bfloat16"),  # the last block is short
        ((2, 3, 64), "nf4", False, 128, "float32"),
        ((520, 32), "nf4", True, 32, "float32"),  # 520 scales in three blocks of their own
    ],
)
def test_values_are_the_formulas(tmp_path, shape, kind, nested, blocksize, dtype):
    tensors = stored("w", shape, kind, nested, blocksize, dtype)
    array = bitsandbytes.load(write(tmp_path, tensors)).tensors["w"]
    assert isinstance(array, zq.QuantizedArray)
    values = zq.dequantize(array)
    assert values.dtype == dtype
    np.testing.assert_array_equal(values, decoded("w", tensors))


def test_what_is_loaded_and_saved_is_the_identical_file(tmp_path):
    path = write(tmp_path, mixed())
    tensors, companions = bitsandbytes.load(path)
    bitsandbytes.save(tmp_path / "again.safetensors", tensors, companions)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_training_changes_the_packed_codes_and_nothing_else(tmp_path):
    base = mixed()
    tensors, companions = bitsandbytes.load(write(tmp_path, base))
    params = {"b.weight": tensors["b.weight"]}
    tx = zq.zoqo(1e-9, 1e-9, key=jax.random.key(0), noise="rademacher", structure="sparse")

    @jax.jit
    def step(params, state):
        def distance(params):
            return jnp.abs(params["b.weight"] - 0.05).sum()

        updates, state = tx.update(None, state, params, value_fn=distance)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(5):
        params, state = step(params, state)
    bitsandbytes.save(tmp_path / "trained.safetensors", tensors | params, companions)
    found = safetensors.load(tmp_path / "trained.safetensors")
    changed = {name for name in base if not np.array_equal(found[name], base[name])}
    assert found.keys() == base.keys()
    assert changed == {"b.weight"}
    there = {key: np.asarray(x) for key, x in found.items()}
    np.testing.assert_array_equal(zq.dequantize(params["b.weight"]), decoded("b.weight", there))


@pytest.mark.parametrize(
    ("shape", "quantizer", "blocksize", "dtype"),
    [
        ((4, 128), zq.nf4(block=64), 64, "bfloat16"),
        ((4, 96), zq.nf4(block=32, scale_dtype=jnp.float16), 32, "float32"),
        ((2, 128), zq.nf4(block=None, axis=0), 64, "float32"),
        ((2, 384), zq.nf4(block=192), 64, "float16"),
    ],
)
def test_arrays_of_ours_lie_as_the_format_wants(tmp_path, shape, quantizer, blocksize, dtype):
    array = quantizer(jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype))
    bitsandbytes.save(tmp_path / "ours.safetensors", {"w": array})
    tensors = {k: np.asarray(x) for k, x in safetensors.load(tmp_path / "ours.safetensors").items()}
    assert {key: (str(x.dtype), x.ndim) for key, x in tensors.items()} == {
        "w": ("uint8", 2),
        "w.absmax": ("float32", 1),
        "w.quant_map": ("float32", 1),
        f"w{STATE}nf4": ("uint8", 1),
    }
    assert json.loads(tensors[f"w{STATE}nf4"].tobytes()) == {
        "quant_type": "nf4",
        "blocksize": blocksize,
        "dtype": dtype,
        "shape": list(shape),
    }
    np.testing.assert_array_equal(decoded("w", tensors), zq.dequantize(array))


def test_companions_may_lie_in_another_shard(tmp_path):
    tensors = stored("w", (4, 128))
    first, rest = {"w": tensors.pop("w")}, tensors
    safetensors.save(tmp_path / "1.safetensors", first)
    safetensors.save(tmp_path / "2.safetensors", rest)
    places = {"w": "1.safetensors", **dict.fromkeys(rest, "2.safetensors")}
    index = json.dumps({"weight_map": places})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    array = bitsandbytes.load(tmp_path).tensors["w"]
    np.testing.assert_array_equal(zq.dequantize(array), decoded("w", first | rest))


def says(**changes):
    """A change of what the JSON beside a tensor says; None leaves a word out."""

    def change(tensors):
        key = f"w{STATE}nf4"
        settings = json.loads(tensors[key].tobytes()) | changes
        settings = {name: value for name, value in settings.items() if value is not None}
        tensors[key] = np.frombuffer(json.dumps(settings).encode(), np.uint8)

    return change


def raw(content):
    return puts(f"{STATE}nf4", np.frombuffer(content, np.uint8))


def puts(end, array):
    """A change of a companion; None takes it away."""

    def change(tensors):
        if array is None:
            del tensors[f"w{end}"]
        else:
            tensors[f"w{end}"] = array

    return change


NAN = np.array([1, np.nan, 1, 1, 1, 1, 1, 1], np.float32)
LIES = [
    (says(shape=[2**40, 2**40]), r"absmax must be float32 \[18889465931478580854784\]"),
    (says(shape=[2, 2**48]), "shape must be 1 to 4 positive numbers"),
    (says(shape=[4, 130]), "absmax must be float32"),
    (says(shape=[4, 126]), r"must lie in uint8 \[252, 1\], got uint8 \[256, 1\]"),
    (says(shape=[-4, -128]), "shape must be 1 to 4 positive numbers"),
    (says(shape=[512, True]), "shape must be"),
    (says(shape=[3, 171]), "with an even product"),
    (says(shape=[512, 1, 1, 1, 1]), "shape must be 1 to 4"),
    (says(shape="512"), "shape must be"),
    (says(shape=None), "must say quant_type, blocksize, dtype, shape, got"),
    (says(more=1), "must say quant_type, blocksize, dtype, shape, got"),
    (says(blocksize=-64), "blocksize must be one of"),
    (says(blocksize=64.0), "blocksize must be one of"),
    (says(blocksize=10**400), "blocksize must be one of"),
    (says(dtype="float64"), "dtype must be float16 or bfloat16 or float32, got 'float64'"),
    (says(dtype=["float32"]), "dtype must be"),
    (says(quant_type="fp4"), "quant_type must be nf4, got fp4"),
    (says(quant_type="int4"), "quant_type must be nf4 or fp4"),
    (raw(b"[" * 60_000), "is no JSON"),
    (raw(b"\xff\xfe"), "is no JSON"),
    (raw(b"[]"), "must say"),
    (raw(b" " * 2**17), "at most 65536 bytes"),
    (puts(f"{STATE}nf4", np.zeros(9, np.float32)), "quant_state must be at most"),
    (puts(f"{STATE}fp4", np.zeros(9, np.uint8)), "must have one quant_state"),
    (puts("", np.zeros((256, 1), np.int8)), "must lie in uint8"),
    (puts("", np.zeros((1, 256), np.uint8)), "must lie in uint8"),
    (puts("", None), "'w' is not there"),
    (puts(".absmax", None), r"there is no w\.absmax"),
    (puts(".absmax", NAN), "a scale is NaN or infinite"),
    (puts(".absmax", np.ones(8)), r"absmax must be float32 \[8\], got float64 \[8\]"),
    (puts(".absmax", np.ones(8, np.uint8)), "absmax must be float32"),
    (puts(".quant_map", None), r"there is no w\.quant_map"),
    (puts(".quant_map", NF4[:15]), r"quant_map must be float32 \[16\]"),
    (puts(".quant_map", 2 * NF4), r"different numbers in \[-1, 1\]"),
    (puts(".quant_map", np.zeros(16, np.float32)), "different numbers"),
    (puts(".quant_map", np.full(16, np.nan, np.float32)), "different numbers"),
    (puts(".nested_absmax", np.ones(1, np.float32)), "must say .* nested_offset"),
    (puts(f"{STATE}nf4", None), r"'w\.(absmax|quant_map)' has no quant_state"),
    (puts(f".absmax{STATE}nf4", np.zeros(2, np.uint8)), r"'w\.absmax' is not there"),
]
NESTED_LIES = [
    (says(nested_blocksize=0), "nested_blocksize must be one of"),
    (says(nested_dtype="float16"), "nested_dtype must be float32"),
    (says(nested_offset=float("nan")), "nested_offset must be a float"),
    (says(nested_offset=1e300), "nested_offset must be a float"),
    (says(nested_offset="0.1"), "nested_offset must be a float"),
    (puts(".nested_absmax", None), r"there is no w\.nested_absmax"),
    (puts(".nested_quant_map", None), r"there is no w\.nested_quant_map"),
    (puts(".nested_absmax", np.ones(2, np.float32)), r"nested_absmax must be float32 \[1\]"),
    (puts(".nested_absmax", np.full(1, np.inf, np.float32)), "a scale is NaN or infinite"),
    (puts(".absmax", np.ones(8, np.float32)), "absmax must be uint8"),
]


@pytest.mark.parametrize(
    ("nested", "change", "message"),
    [(False, *lie) for lie in LIES] + [(True, *lie) for lie in NESTED_LIES],
)
def test_companions_that_lie_are_refused_by_name(tmp_path, nested, change, message):
    tensors = stored("w", (4, 128), nested=nested)
    change(tensors)
    path = write(tmp_path, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        bitsandbytes.load(path)
    assert str(path) in str(caught.value)


def test_what_a_file_says_is_not_allocated_before_it_is_checked(tmp_path):
    tensors = stored("w", (4, 128))
    says(shape=[2**20, 2**20])(tensors)
    path = write(tmp_path, tensors)
    tracemalloc.start()
    with pytest.raises(ValueError, match="absmax must be"):
        bitsandbytes.load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def hostile(tensors, rng):
    """One lie of any kind in one of a checkpoint's tensors."""
    key = rng.choice(sorted(tensors))
    array = tensors[key]
    match rng.integers(0, 7):
        case 0:
            del tensors[key]
        case 1:
            tensors[key] = array[: rng.integers(0, len(array) + 1)]
        case 2:
            with np.errstate(all="ignore"):
                tensors[key] = array.astype(rng.choice(["u1", "f4", "f2", "i8", "?"]))
        case 3:
            content = bytearray(array.tobytes())
            for _ in range(rng.integers(1, 4)):
                content[rng.integers(0, len(content))] = rng.integers(0, 256)
            tensors[key] = np.frombuffer(content, array.dtype).reshape(array.shape)
        case 4:
            tensors[key] = array.reshape((-1,) if array.ndim > 1 else (1, -1))
        case 5:
            tensors[rng.choice(sorted(tensors))] = array
        case _:
            key = rng.choice([key for key in tensors if ".quant_state" in key])
            settings = json.loads(tensors[key].tobytes())
            values = [0, -1, 2**63, 2**31, 1e300, None, "nf4", [], [2**40], {"a": [[]]}, True]
            settings[rng.choice(sorted(settings))] = values[rng.integers(0, len(values))]
            tensors[key] = np.frombuffer(json.dumps(settings).encode(), np.uint8)


def test_mutated_files_are_read_or_refused_with_a_clear_error(tmp_path):
    """500 files: half with bytes changed or cut off, half whole files with a lie in them."""
    whole, rng = write(tmp_path, mixed()).read_bytes(), np.random.default_rng(0)
    refused, read = 0, 0
    for number in range(500):
        path = tmp_path / "model.safetensors"
        if number % 2:
            tensors = mixed()
            hostile(tensors, rng)
            write(tmp_path, tensors)
        else:
            content = bytearray(whole)
            place = rng.integers(0, len(whole))
            match number % 3:
                case 0:
                    del content[place:]
                case 1:
                    content[place] ^= 1 << rng.integers(0, 8)
                case _:
                    content[place : place + 4] = rng.integers(0, 256, 4, np.uint8).tobytes()
            path.write_bytes(content)
        try:
            bitsandbytes.load(path)
            read += 1
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > 300
    assert read > 50


def nf4(shape, scale, block=None, offset=None):
    codes = jnp.zeros(shape, jnp.uint8)
    return zq.QuantizedArray.from_codes(codes, jnp.asarray(scale), offset, zq.nf4().grid, block)


ONE = np.ones((1, 1), np.float32)
RISING = np.arange(1, 5, dtype=np.float32).reshape(2, 2)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (zq.Quantizer(4)(jnp.ones((4, 128))), "companions' levels and no offset"),
        (nf4((4, 128), ONE), "has other scales than its companions say"),
        (nf4((8, 64), ONE), r"the shape \(4, 128\) of its companions"),
        (jnp.ones((4, 128)), "belongs to no quantized tensor"),
    ],
)
def test_companions_of_another_tensor_are_refused(tmp_path, array, message):
    companions = bitsandbytes.load(write(tmp_path, stored("w", (4, 128)))).companions
    with pytest.raises(ValueError, match=message):
        bitsandbytes.save(tmp_path / "a", {"w": array}, companions)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (zq.Quantizer(4)(jnp.ones((2, 64))), "must have NF4's levels and no offset"),
        (nf4((2, 64), ONE, offset=jnp.ones((1, 1))), "NF4.* with offset"),
        (nf4((3, 3), ONE), "even product"),
        (nf4((), ONE[0, 0]), "must have 1 to 4"),
        (nf4((2, 64), np.full((1, 1), np.nan, np.float32)), "a scale is NaN"),
        (nf4((2, 96), RISING, (-1, 64)), "64 neighbours .* must share a scale"),
        (nf4((64, 2), RISING, (-2, 32)), "64 neighbours .* must share a scale"),
    ],
)
def test_what_the_format_does_not_hold_is_refused_and_the_old_file_stays(tmp_path, array, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        bitsandbytes.save(path, {"w": array})
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_name_is_written_once(tmp_path):
    tensors = {"w": nf4((2, 64), ONE), "w.absmax": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"'w\.absmax' is another tensor's companion"):
        bitsandbytes.save(tmp_path / "a.safetensors", tensors)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shape", [(48, 128), (40, 96), (1024, 576)])
def test_values_are_those_of_bitsandbytes(tmp_path, shape, dtype, kind, nested):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    values = (0.05 * torch.randn(shape)).to(getattr(torch, dtype))
    codes, state = functional.quantize_4bit(
        values, blocksize=64, compress_statistics=nested, quant_type=kind
    )
    beside = {f"w.{key}": x for key, x in state.as_dict(packed=True).items()}
    path = tmp_path / "theirs.safetensors"
    save_file({"w": codes, **beside}, path, {"format": "pt"})
    # As one row: its CPU kernel (0.50.2) takes wrong scales where a block goes on in the next row.
    state.shape = torch.Size((1, values.numel()))
    expected = functional.dequantize_4bit(codes, state).reshape(shape)

    tensors, companions = bitsandbytes.load(path)
    found = zq.dequantize(tensors["w"])
    assert str(found.dtype) == dtype
    np.testing.assert_array_equal(found.astype(jnp.float32), expected.float().numpy())
    bitsandbytes.save(tmp_path / "again.safetensors", tensors, companions)
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_bitsandbytes_reads_arrays_of_ours(tmp_path):
    torch = pytest.importorskip("torch")
    functional = pytest.importorskip("bitsandbytes.functional")
    from safetensors.torch import load_file

    array = zq.nf4()(jnp.asarray(np.random.default_rng(0).normal(size=(32, 192)), jnp.float32))
    bitsandbytes.save(tmp_path / "ours.safetensors", {"w": array})
    tensors = load_file(tmp_path / "ours.safetensors")
    codes = tensors.pop("w")
    beside = {key.removeprefix("w."): x for key, x in tensors.items()}
    state = functional.QuantState.from_dict(beside, torch.device("cpu"))
    found = functional.dequantize_4bit(codes, state)
    np.testing.assert_array_equal(found.numpy(), zq.dequantize(array))
