"""Folders that other libraries wrote (tests/files), copied, changed and damaged for tests."""

import json
import shutil
from pathlib import Path

import numpy as np

from zoqo_jax.interop import safetensors
from zoqo_jax.interop.folder import shards

FILES = Path(__file__).parent / "files"


def copied(kind, name, to):
    """A copy of a folder of tests/files, without the expected values."""
    folder = Path(to) / name
    shutil.copytree(FILES / kind / name, folder, ignore=shutil.ignore_patterns("expected.npz"))
    return folder


def expected(kind, name):
    """The values that the format's own library has for a folder's matrices, by name."""
    with np.load(FILES / kind / name / "expected.npz") as file:
        return dict(file)


def content(folder):
    """The bytes of all files of a folder, by their paths in it."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stored(folder):
    """All stored tensors of a folder, by name."""
    return {name: np.asarray(x) for name, x in safetensors.load(folder).items()}


def changed_bits(before, after):
    """Which bits of which stored tensors differ: {name: count}."""
    return {
        name: int(np.unpackbits(np.bitwise_xor(_bytes(before[name]), _bytes(after[name]))).sum())
        for name in before
        if before[name].tobytes() != after[name].tobytes()
    }


def _bytes(array):
    return np.frombuffer(array.tobytes(), np.uint8)


def rewrite(folder, change):
    """Put other stored tensors in a folder of one file: `change` edits them by name."""
    tensors = stored(folder)
    change(tensors)
    safetensors.save(folder / "model.safetensors", tensors, {"format": "pt"})


def say(folder, **changes):
    """Change what config.json says of the quantization; None leaves a word out."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    said = config["quantization_config"] | changes
    config["quantization_config"] = {key: x for key, x in said.items() if x is not None}
    path.write_text(json.dumps(config))


def mutated(folder, rng):
    """Damage a folder of one file in a random way: its bytes, its tensors or its config."""
    path = folder / "model.safetensors"
    match rng.integers(0, 4):
        case 0:
            whole = bytearray(path.read_bytes())
            place = rng.integers(0, len(whole))
            if rng.integers(0, 3):
                header = 8 + int.from_bytes(whole[:8], "little")
                place = rng.integers(0, header) if rng.integers(0, 2) else place
                new = rng.integers(0, 256, rng.integers(1, 5), np.uint8).tobytes()
                whole[place : place + len(new)] = new
            else:
                del whole[place:]
            path.write_bytes(whole)
        case 1:
            config = json.loads((folder / "config.json").read_text())
            said = config["quantization_config"]
            values = [0, -1, 3, 5, 2**63, 1e300, None, "gptq", [], {"a": []}, True, "4", 16, 64]
            said[rng.choice(sorted(said))] = values[rng.integers(0, len(values))]
            (folder / "config.json").write_text(json.dumps(config))
        case _:
            rewrite(folder, lambda tensors: _lie(tensors, rng))


def _lie(tensors, rng):
    """One lie of any kind in one of a checkpoint's tensors."""
    key = rng.choice(sorted(tensors))
    array = tensors[key]
    match rng.integers(0, 6):
        case 0:
            del tensors[key]
        case 1:
            tensors[key] = array[: rng.integers(0, len(array) + 1)]
        case 2:
            with np.errstate(all="ignore"):
                dtype = rng.choice(["u1", "f4", "f2", "i8", "i4", "?"])
                tensors[key] = array.astype(np.float32).astype(dtype)
        case 3:
            raw = bytearray(array.tobytes())
            for _ in range(rng.integers(1, 4)):
                raw[rng.integers(0, len(raw))] = rng.integers(0, 256)
            tensors[key] = np.frombuffer(raw, array.dtype).reshape(array.shape)
        case 4:
            tensors[key] = array.T if array.ndim > 1 else array.reshape(1, -1)
        case _:
            tensors[rng.choice(sorted(tensors))] = array


def survives(load, folder, rng, count):
    """How many of `count` damaged copies of a folder are read, and how many refused.

    Those that are refused must say where: a ValueError or FileNotFoundError with the path.
    """
    before, read = content(folder), 0
    for _ in range(count):
        for name, raw in before.items():
            (folder / name).write_bytes(raw)
        mutated(folder, rng)
        try:
            load(folder)
            read += 1
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error), error
    for name, raw in before.items():
        (folder / name).write_bytes(raw)
    return read, count - read


def first_shard(folder):
    """The file that the first stored tensor lies in."""
    return next(iter(shards.places(Path(folder)).values())).file
