"""What is true of every format of quantized tensors in safetensors files, as checks.

They read the files by a few lines of their own and compare with what the format's own library made
of them, so that neither the package's reading of files nor its arithmetic checks itself.
"""

import copy
import dataclasses
import json
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import zoqo_jax as zq
from zoqo_jax.interop import folder
from zoqo_jax.interop.formats.protocol import Stored

DTYPES = {
    "I8": np.int8, "U8": np.uint8, "I32": np.int32, "U32": np.uint32, "I64": np.int64,
    "F16": np.float16, "F32": np.float32, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}  # fmt: skip
NAMES = {np.dtype(dtype).name: name for name, dtype in DTYPES.items()}


def read(folder):
    """A folder's tensors by name, its config, and the values that its library gave."""
    raw = (Path(folder) / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    tensors = {}
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = (8 + length + n for n in entry["data_offsets"])
            flat = np.frombuffer(raw[begin:end], DTYPES[entry["dtype"]])  # read-only, as a file is
            tensors[name] = flat.reshape(entry["shape"])
    config = json.loads((Path(folder) / "config.json").read_text())
    with np.load(Path(folder) / "expected.npz") as found:
        expected = dict(found)
    return tensors, config, expected


def stored(tensors):
    return {name: Stored(NAMES[x.dtype.name], x.shape) for name, x in tensors.items()}


def decoded(form, tensors, config):
    """By name: the array, its parts, and the settings."""
    settings = form.settings(config)
    if settings is None:  # a folder of some other format
        return {}
    found = {}
    for name, parts in form.names(stored(tensors), settings).items():
        own = {part: tensors[part] for part in parts}
        found[name] = form.decode(name, own, settings), own, settings
    return found


def values(array):
    return np.asarray(zq.dequantize(array)).astype(np.float32)


def tensor(torch, x):
    """A tensor of torch with an array's bits."""
    kinds = {"bfloat16": torch.bfloat16, "float8_e4m3fn": torch.float8_e4m3fn}
    if x.dtype.name in kinds:
        whole = {1: np.uint8, 2: np.int16}[x.dtype.itemsize]
        return torch.from_numpy(x.view(whole).copy()).view(kinds[x.dtype.name])
    return torch.from_numpy(x.copy())


def check_encoding(form, name, array, parts, settings):
    """Unchanged codes give the identical bytes of the tensors that hold codes; returns those."""
    new = form.encode(name, array, parts, settings)
    assert set(new) <= set(parts)
    for part, x in new.items():
        assert (x.dtype, x.shape) == (parts[part].dtype, parts[part].shape)
        assert x.tobytes() == parts[part].tobytes()
    return new


def check_folder(source, target):
    """A folder is loaded and saved as the identical one; a changed code changes one file's bits."""
    loaded = folder.load(source)
    folder.save(target, loaded.tensors, loaded)
    before = {path.name: path.read_bytes() for path in Path(source).iterdir()}
    assert {path.name: path.read_bytes() for path in Path(target).iterdir()} == before
    tensors = dict(loaded.tensors)
    name = next(name for name, x in tensors.items() if zq.is_quantized(x))
    quantized = {name: x for name, x in tensors.items() if zq.is_quantized(x)}
    still = optax.apply_updates(quantized, jax.tree.map(jnp.zeros_like, quantized))
    for new, old in zip(jax.tree.leaves(still), jax.tree.leaves(quantized), strict=True):
        assert new.tobytes() == old.tobytes()  # as e8m0, which has no zero, is not
    codes = np.array(tensors[name].codes)
    codes.flat[-1] = (int(codes.flat[-1]) + 1) % (tensors[name].grid.high + 1)
    tensors[name] = tensors[name].with_codes(jnp.asarray(codes))
    folder.save(target, tensors, loaded)
    after = {path.name: path.read_bytes() for path in Path(target).iterdir()}
    assert {path for path in before if after[path] != before[path]} == {"model.safetensors"}
    np.testing.assert_array_equal(folder.load(target).tensors[name].codes, codes)
    other = dataclasses.replace(tensors[name], scale=jnp.ones(1))
    with pytest.raises(ValueError, match=r"(as in|of) the file"):
        folder.save(target, {**tensors, name: other}, loaded)
    return loaded.format


def check_one_code(form, name, found, bits, row, column, code):
    """A changed code changes bits of its own place in the row's stream, and of no other.

    Args:
        form: the format.
        name: of the tensor.
        found: its entry in `decoded`.
        bits: width of a code in the file.
        row: of the tensor seen as a matrix, reduced modulo its number.
        column: reduced likewise.
        code: the new one, reduced likewise.
    """
    array, parts, settings = found
    codes = np.array(array.codes).reshape(-1, array.shape[-1])
    row, column = row % codes.shape[0], column % codes.shape[1]
    before, code = codes[row, column], code % (array.grid.high + 1)
    codes[row, column] = code
    changed = array.with_codes(jnp.asarray(codes.reshape(array.shape)))
    new = form.encode(name, changed, parts, settings)
    (part,) = new
    places = np.unpackbits(
        np.frombuffer(new[part].tobytes(), np.uint8)
        ^ np.frombuffer(parts[part].tobytes(), np.uint8),
        bitorder="little",
    ).reshape(codes.shape[0], -1)
    own = np.zeros_like(places)
    own[row, column * bits : (column + 1) * bits] = 1
    assert not (places & ~own & 1).any()
    assert places.any() == (code != before)
    again = form.decode(name, {**parts, **new}, settings)
    np.testing.assert_array_equal(again.codes, changed.codes)


def check_mutations(form, folders, count=500):
    """Damaged folders are refused with a ValueError, or read as something whole; how many were.

    Args:
        form: the format.
        folders: (tensors, config) to damage.
        count: how many damaged ones to try.
    """
    refused = 0
    for seed in range(count):
        rng = np.random.default_rng(seed)
        tensors, config = folders[seed % len(folders)]
        tensors, config = _damaged(rng, tensors, config)
        try:
            for name, (array, parts, settings) in decoded(form, tensors, config).items():
                assert array.codes.max() <= array.grid.high, (seed, name)
                traced = jax.eval_shape(zq.dequantize, array)  # without compiling for its shapes
                assert array.shape == traced.shape, (seed, name)
                check_encoding(form, name, array, parts, settings)
        except ValueError as error:
            assert str(error) and not str(error).startswith("cannot reshape"), seed
            refused += 1
    return refused


def _damaged(rng, tensors, config):
    tensors, config = dict(tensors), copy.deepcopy(config)
    name = sorted(tensors)[rng.integers(len(tensors))]
    x = tensors[name]
    kind = rng.integers(7)
    if kind == 0:
        del tensors[name]
    elif kind == 1:  # other bits
        raw = np.frombuffer(x.tobytes(), np.uint8).copy()
        raw[rng.integers(raw.size)] = rng.choice([0, 127, 128, 255])
        tensors[name] = raw.view(x.dtype).reshape(x.shape)
    elif kind == 2:  # a shape of as many numbers
        shapes = [(x.size,), (1, x.size), (x.size, 1), x.shape[::-1], (*x.shape, 1), (1, *x.shape)]
        tensors[name] = x.reshape(shapes[rng.integers(len(shapes))])
    elif kind == 3:  # fewer or more numbers
        axis, length = rng.integers(x.ndim), rng.choice([0, 1, 3])
        tensors[name] = np.resize(x, [*x.shape[:axis], length, *x.shape[axis + 1 :]])
    elif kind == 4:  # another dtype
        dtype = np.dtype(list(DTYPES.values())[rng.integers(len(DTYPES))])
        tensors[name] = np.zeros(x.shape, dtype)
    elif kind == 5:  # under another name
        tensors[f"{name}_{rng.choice(['packed', 'scale', 'blocks', 'scales'])}"] = tensors.pop(name)
    else:
        junk = [None, -1, 0, 3, 10**30, "x", "group", [], {}, 1.5, True, float("nan")]
        table = config
        while True:
            key = list(table)[rng.integers(len(table))]
            if not isinstance(table[key], dict) or not table[key] or rng.integers(4) == 0:
                break
            table = table[key]
        table[key] = junk[rng.integers(len(junk))]
    return tensors, config
