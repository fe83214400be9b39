"""Folders that the libraries of their formats wrote, trained, and read by the libraries again.

Their packages are found in this environment, or in another's that PYTHONPATH names after this one's
folders. `library_folders.py` says who writes and reads what.
"""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import library_folders
import numpy as np
import pytest
import tiny_model

import zoqo_jax as zq
from experiments.finetune import __main__ as finetune
from experiments.finetune import replay, score
from experiments.finetune.config import Config
from experiments.finetune.models import loading
from zoqo_jax.interop.folder import shards

CODES = (".qweight", ".weight_packed", ".weight")
TOKENS = np.random.default_rng(0).integers(2, 250, (3, 24))
# The largest difference of logits, of their largest magnitude, as the libraries compute.
CLOSE = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 5e-2}
FAMILIES = {
    "gptq": "Llama", "gptq act-order": "Qwen3", "awq": "Qwen3", "int4": "Llama",
    "int4 asymmetric": "Gemma3Text", "nvfp4": "Qwen3", "affine": "Gemma3Text",
    "affine of 16 bits": "Qwen3", "mxfp4": "Llama", "nf4": "Gemma3Text",
}  # fmt: skip
PACKAGES = {
    library_folders.by_gptqmodel: "gptqmodel",
    library_folders.by_compressed_tensors: "compressed_tensors",
    library_folders.by_mlx: "mlx_lm",
    library_folders.by_bitsandbytes: "bitsandbytes",
}


def library(*arguments):
    """`library_folders.py` in a process of its own; what it says, if it fails."""
    command = [sys.executable, library_folders.__file__, *map(str, arguments)]
    paths = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    """The format's name, and a folder as its library wrote it."""
    name = request.param
    for package in ("transformers", PACKAGES[library_folders.FORMATS[name][1]]):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"could not import {package!r}")
    folder = tmp_path_factory.mktemp("written") / "model"
    library("write", name, FAMILIES[name], folder)
    return name, folder


@pytest.fixture
def settings(source, tmp_path):
    return {
        "model": str(source[1]),
        "data": str(tiny_model.write_examples(tmp_path / "examples.jsonl")),
        "output": str(tmp_path / "run"),
        "steps": 3, "eval_every": 3, "batch_size": 8, "density": 0.1,
    }  # fmt: skip


def bytes_of(folder):
    """The content of each stored tensor, and of each file that has none."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    tensors = {}
    for name, place in shards.places(folder).items():
        tensors[name] = files[place.file.name][place.begin :][: place.size]
    for place in shards.places(folder).values():
        files.pop(place.file.name, None)
    return tensors, files


def changed(source, trained):
    """The names of stored tensors that are other than they were; files are not."""
    (before, files), (after, others) = bytes_of(source), bytes_of(trained)
    assert files == others and list(before) == list(after)
    return {name for name in before if before[name] != after[name]}


def logits(folder):
    checkpoint = loading.load(folder)

    def read(params):
        return checkpoint.decoder.apply({"params": params}, jnp.asarray(TOKENS))

    with jax.default_matmul_precision("highest"):
        return np.asarray(jax.jit(zq.quaxify(read))(checkpoint.params))


def apart(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_library_reads_what_was_trained(source, settings, tmp_path):
    name, folder = source
    finetune.main(Config(**settings))
    trained = tmp_path / "run" / "model"
    moved = changed(folder, trained)
    assert moved and all(one.endswith(CODES) for one in moved)

    replay.main(replay.Places(str(tmp_path / "run/replay.npz"), str(folder), str(tmp_path / "b")))
    assert not changed(trained, tmp_path / "b" / "model")

    np.save(tmp_path / "tokens.npy", TOKENS)
    library("read", name, trained, tmp_path / "tokens.npy", tmp_path / "logits.npy")
    expected, (dtype, by, *_) = np.load(tmp_path / "logits.npy"), library_folders.FORMATS[name]
    close = CLOSE["float32" if by is library_folders.by_mlx else dtype]
    found = apart(logits(trained), expected)
    print(f"{name}, {FAMILIES[name]}: {found:.1e}")
    assert found < close < apart(logits(folder), expected) / 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_last_layer_and_adapters_train_and_are_scored(source, settings, tmp_path):
    name, folder = source
    if name not in ("gptq act-order", "int4 asymmetric", "affine of 16 bits", "nf4"):
        pytest.skip("one format of each library is enough: what follows knows nothing of them")
    depth = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    finetune.main(Config(**settings, layers=1))
    trained = tmp_path / "run" / "model"
    moved = changed(folder, trained)
    assert moved and all(f".layers.{depth - 1}." in one for one in moved)

    found = score.lines(score.Asked(str(trained), settings["data"]), progress=False)
    assert len(found) == 120 and np.isfinite([one["loss"] for one in found]).all()

    finetune.main(Config(**settings | {"output": str(tmp_path / "lora")}, train="lora"))
    again = replay.Places(str(tmp_path / "lora/replay.npz"), str(folder), str(tmp_path / "b"))
    replay.main(again)
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "lora" / adapter).read_bytes() == (tmp_path / "b" / adapter).read_bytes()
