"""Folders and files of safetensors: whole, in shards, in the hub's cache, and out to do harm."""

import json
import os
import struct
import subprocess
import sys
import textwrap

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from folders import FILES, changed_bits, content, copied, mutated, say, stored
from test_bitsandbytes import decoded, mixed

import zoqo_jax as zq
from zoqo_jax.interop import folder, safetensors
from zoqo_jax.interop.formats import FORMATS
from zoqo_jax.interop.formats.protocol import Format

BITSANDBYTES = {"quant_method": "bitsandbytes"}
KEY = "model.layers.0.up_proj.weight"


def floats():
    """Tensors of no quantization, in dtypes of all kinds."""
    rng = np.random.default_rng(0)
    return {
        "a.weight": rng.normal(size=(4, 6)).astype(ml_dtypes.bfloat16),
        "b.weight": rng.normal(size=(3, 5)).astype(np.float16),
        "eighths": rng.normal(size=(2, 8)).astype(ml_dtypes.float8_e4m3fn),
        "ids": np.array([2**40, -1]),
        "mask": np.array([True, False, True]),
        "none": np.zeros((0, 7), np.float32),
        "one": np.array(0.5, np.float32),
    }


def model(path, tensors=None, **config):
    """A folder of one file, with files and folders beside it."""
    (path / "assets" / "deep").mkdir(parents=True)
    safetensors.save(path / "model.safetensors", tensors or floats(), {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_bytes(b"\x00\xff not JSON")
    (path / "assets" / "deep" / "extra.safetensors").write_bytes(b"anything")
    (path / "assets" / "run.sh").write_text("exit 0")
    (path / "assets" / "run.sh").chmod(0o755)
    return path


def flipped(array, place=(5, 41)):
    """The same array with one other code."""
    codes = np.asarray(array.codes).copy()
    codes[place] ^= 1
    return array.with_codes(jnp.asarray(codes))


def trained(loaded, key=KEY):
    return loaded.tensors | {key: flipped(loaded.tensors[key])}


def test_formats_are_of_one_shape_and_have_names_of_their_own():
    assert all(isinstance(format, Format) for format in FORMATS)
    assert len({format.name for format in FORMATS}) == len(FORMATS)


def test_a_folder_without_quantization_comes_back_byte_for_byte(tmp_path):
    source = model(tmp_path / "model", model_type="llama")
    loaded = folder.load(source)
    assert (loaded.format, loaded.config) == (None, {"model_type": "llama"})
    for name, array in floats().items():
        assert loaded.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded.tensors[name], array)
    folder.save(tmp_path / "again", loaded.tensors, loaded)
    assert content(tmp_path / "again") == content(source)
    assert os.access(tmp_path / "again" / "assets" / "run.sh", os.X_OK)


def test_floats_that_changed_are_written_and_nothing_else(tmp_path):
    source = model(tmp_path / "model")
    loaded = folder.load(source)
    folder.save(tmp_path / "new", {"b.weight": loaded.tensors["b.weight"] * 2}, loaded)
    there = stored(tmp_path / "new")
    np.testing.assert_array_equal(there.pop("b.weight"), floats()["b.weight"] * 2)
    for name, array in there.items():
        assert array.tobytes() == floats()[name].tobytes()
    assert {**content(tmp_path / "new"), "model.safetensors": 0} == {
        **content(source),
        "model.safetensors": 0,
    }


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"c.weight": np.ones(2)}, "there was no 'c.weight'"),
        ({"b.weight": np.ones((3, 5), np.float32)}, r"must be float16 \[3, 5\] .* got float32"),
        ({"b.weight": np.ones((5, 3), np.float16)}, r"must be float16 \[3, 5\] .* \[5, 3\]"),
        ({"b.weight": [[1.0]]}, "must be float16"),
        ({"a.weight": zq.nf4()(jnp.ones((1, 64)))}, "must be bfloat16"),
    ],
)
def test_tensors_of_another_kind_are_refused_and_nothing_is_written(tmp_path, tensors, message):
    loaded = folder.load(model(tmp_path / "model"))
    with pytest.raises(ValueError, match=message):
        folder.save(tmp_path / "new", tensors, loaded)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_working_folder_may_change_between_loading_and_saving(tmp_path, monkeypatch):
    copied("awq", "shards", tmp_path)
    monkeypatch.chdir(tmp_path)
    loaded = folder.load("shards")
    monkeypatch.chdir(tmp_path.parent)
    folder.save(tmp_path / "new", loaded.tensors, loaded)
    assert content(tmp_path / "new") == content(tmp_path / "shards")


def test_a_file_is_loaded_and_saved_as_a_file(tmp_path):
    source = copied("awq", "zero-points", tmp_path)
    loaded = folder.load(source / "model.safetensors")
    assert loaded.format == "awq"
    folder.save(tmp_path / "same.safetensors", loaded.tensors, loaded)
    whole = (source / "model.safetensors").read_bytes()
    assert (tmp_path / "same.safetensors").read_bytes() == whole
    folder.save(source / "model.safetensors", trained(loaded), loaded)
    there = folder.load(source)
    assert int(jnp.sum(there.tensors[KEY].codes != loaded.tensors[KEY].codes)) == 1
    assert sorted(path.name for path in source.iterdir()) == ["config.json", "model.safetensors"]
    with pytest.raises(ValueError, match="a file was loaded, and this is a folder"):
        folder.save(source, loaded.tensors, loaded)


def test_the_folder_that_was_loaded_can_be_saved_to_again_and_again(tmp_path):
    source = copied("gptq", "shards", tmp_path)
    before, loaded = content(source), folder.load(source)
    unchanged = {file: os.stat(source / file).st_ino for file in before}
    folder.save(source, loaded.tensors, loaded)
    assert {file: os.stat(source / file).st_ino for file in before} == unchanged
    folder.save(source, trained(loaded), loaded)
    after = content(source)
    assert [name for name in before if before[name] != after[name]] == [
        "model-00001-of-00002.safetensors"
    ]
    folder.save(source, loaded.tensors, loaded)
    assert content(source) == before
    assert [path.name for path in tmp_path.iterdir()] == ["shards"]


def test_an_earlier_save_is_replaced_and_other_folders_are_not(tmp_path):
    source = copied("gptq", "shards", tmp_path)
    loaded = folder.load(source)
    (tmp_path / "new").mkdir()
    folder.save(tmp_path / "new", trained(loaded), loaded)
    folder.save(tmp_path / "new", loaded.tensors, loaded)
    assert content(tmp_path / "new") == content(source)
    (tmp_path / "new" / "mine.txt").write_text("mine")
    before = content(tmp_path / "new")
    with pytest.raises(ValueError, match=r"it holds mine\.txt, which is none of the files"):
        folder.save(tmp_path / "new", trained(loaded), loaded)
    assert content(tmp_path / "new") == before
    for path, message in [
        (source / "inner", "lies in the folder that was loaded"),
        (source / "config.json", "lies in|this is a file"),
        (tmp_path, "none of the files that are saved"),
        (tmp_path / "a.safetensors", "must not end so"),
    ]:
        with pytest.raises(ValueError, match=message):
            folder.save(path, loaded.tensors, loaded)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere to save in"):
        folder.save(tmp_path / "nowhere" / "new", loaded.tensors, loaded)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "shards"]


@pytest.mark.parametrize("is_in_place", [True, False])
def test_a_save_that_fails_leaves_what_was_there(tmp_path, monkeypatch, is_in_place):
    """The disk is full, or gone, at the n-th move of a file to its place."""
    source = copied("gptq", "shards", tmp_path)
    loaded = folder.load(source)
    target = source if is_in_place else tmp_path / "new"
    folder.save(target, loaded.tensors, loaded)
    before = content(target)
    all_flipped = {
        key: flipped(x) if zq.is_quantized(x) else x for key, x in loaded.tensors.items()
    }
    replace, failures = os.replace, 0
    for last in range(20):
        moves = 0

        def failing(a, b, last=last):
            nonlocal moves
            moves += 1
            if moves - 1 == last:
                raise OSError("no space left")
            replace(a, b)

        monkeypatch.setattr(os, "replace", failing)
        try:
            folder.save(target, all_flipped, loaded)
        except OSError:
            failures += 1
            assert content(target) == before
        else:
            assert content(target) != before
            break
        finally:
            monkeypatch.setattr(os, "replace", replace)
    assert failures == (4 if is_in_place else 2 * len(before))
    assert {path.name for path in tmp_path.iterdir()} == {"shards", target.name}


def test_a_source_that_changed_or_vanished_is_an_error(tmp_path):
    source = copied("awq", "shards", tmp_path)
    loaded = folder.load(source)
    first = source / "model-00001-of-00002.safetensors"
    whole = first.read_bytes()
    os.utime(first, ns=(0, 0))
    with pytest.raises(ValueError, match=r"00001-of-00002\.safetensors: it has changed since"):
        folder.save(tmp_path / "new", trained(loaded), loaded)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=r"00001-of.*is not there any more"):
        folder.save(tmp_path / "new", trained(loaded), loaded)
    first.write_bytes(whole)
    with pytest.raises(ValueError, match="it has changed"):
        folder.save(source, trained(loaded), loaded)
    folder.save(tmp_path / "new", loaded.tensors, folder.load(source))
    assert content(tmp_path / "new") == content(source)


def cached(tmp_path, name="shards"):
    """A folder as the hub's cache has it: links to blobs."""
    source = copied("gptq", name, tmp_path)
    (source / "onnx").mkdir()
    (source / "onnx" / "model.onnx").write_bytes(b"another format")
    repository = tmp_path / "hub" / "models--me--it"
    snapshot = repository / "snapshots" / "0123abc"
    (repository / "blobs").mkdir(parents=True)
    for file in [path for path in source.rglob("*") if path.is_file()]:
        link = snapshot / file.relative_to(source)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = repository / "blobs" / f"{hash(str(link)):x}"
        file.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_snapshot_of_the_hub_is_read_and_its_blobs_are_left_alone(tmp_path):
    snapshot = cached(tmp_path)
    blobs = snapshot.parent.parent / "blobs"
    before, whole = content(blobs), content(snapshot)
    loaded = folder.load(snapshot)
    folder.save(tmp_path / "new", loaded.tensors, loaded)
    assert content(tmp_path / "new") == whole
    assert not any(path.is_symlink() for path in (tmp_path / "new").rglob("*"))
    folder.save(snapshot, trained(loaded), loaded)
    assert content(blobs) == before
    assert folder.load(snapshot).tensors[KEY].codes[5, 41] != loaded.tensors[KEY].codes[5, 41]
    (snapshot.parent / "main").symlink_to(snapshot)
    assert folder.load(snapshot.parent / "main").format == "gptq"


def test_links_out_of_the_folder_are_refused(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text('{"key": "value"}')
    for name in (
        "config.json",
        "quantize_config.json",
        "README.md",
        "model.safetensors.index.json",
    ):
        source = copied("gptq", "shards", tmp_path)
        (source / name).unlink(missing_ok=True)
        (source / name).symlink_to("../secret")
        with pytest.raises(ValueError, match="is a link out of its folder"):
            loaded = folder.load(source)
            folder.save(tmp_path / "new", loaded.tensors, loaded)
        source.rename(tmp_path / f"done-{name}")
    source = copied("gptq", "shards", tmp_path)
    shard = source / "model-00001-of-00002.safetensors"
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match="is a link out of its folder"):
        folder.load(source)
    shard.unlink()
    shard.symlink_to(shard.name)
    with pytest.raises((ValueError, FileNotFoundError), match="model-00001-of-00002"):
        folder.load(source)
    (source / "loop").symlink_to(source)
    (tmp_path / "elsewhere.safetensors").rename(tmp_path / "moved")
    shard.unlink()
    (tmp_path / "moved").rename(shard)
    loaded = folder.load(source)
    with pytest.raises(ValueError, match="a link to a folder is not copied"):
        folder.save(tmp_path / "new", loaded.tensors, loaded)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "place",
    ["../awq/model.safetensors", "/etc/passwd", "a/../b", "", ".", "..", "a\0b", 3, None],
)
def test_an_index_that_points_elsewhere_is_refused(tmp_path, place):
    source = copied("awq", "shards", tmp_path)
    index = source / "model.safetensors.index.json"
    said = json.loads(index.read_text())
    said["weight_map"][next(iter(said["weight_map"]))] = place
    index.write_text(json.dumps(said))
    with pytest.raises((ValueError, FileNotFoundError), match=r"index\.json") as caught:
        folder.load(source)
    assert "must lie beside" in str(caught.value) or "no index of tensors" in str(caught.value)


def test_names_that_stand_twice_are_refused(tmp_path):
    source = copied("awq", "shards", tmp_path)
    index = source / "model.safetensors.index.json"
    text = index.read_text()
    name = next(iter(json.loads(text)["weight_map"]))
    index.write_text(text.replace('"weight_map": {', f'"weight_map": {{"{name}": "b.safetensors",'))
    with pytest.raises(ValueError, match=f"the key '{name}' stands twice"):
        folder.load(source)
    index.write_text(text)
    first = (source / "model-00001-of-00002.safetensors").read_bytes()
    (source / "model-00002-of-00002.safetensors").write_bytes(first)
    with pytest.raises(ValueError, match=r"there is no tensor|another file has a tensor"):
        folder.load(source)


def write_header(path, header, data=b"\0" * 16):
    raw = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"a": entry([2**40, 2**40], 0, 16)},
        {"a": entry([2**62, 4], 0, 16)},
        {"a": entry([2**63], 0, 16)},
        {"a": entry([2**40, 0], 0, 0), "b": entry([4], 0, 16)},
        {"a": entry([1] * 40 + [4], 0, 16)},
        {"a": entry([5], 0, 20)},
        {"a": entry([2], 0, 8)},
        {"a": entry([2], 8, 16)},
        {"a": entry([2], 0, 8), "b": entry([1], 12, 16)},
        {"a": entry([4], 0, 16), "b": entry([2], 8, 16)},
        {"a": entry([4], 16, 0)},
        {"a": entry([-4], 0, 16)},
        {"a": entry([4.0], 0, 16)},
        {"a": entry([True] * 4, 0, 16)},
        {"a": entry([4], 0, 16, "F33")},
        {"a": entry([4], 0, 16, None)},
        {"a": entry([32], 0, 16, "F4")},
        {"a": entry("4", 0, 16)},
        {"a": {"dtype": "F32"}},
        {"a": None},
        {"a": []},
        [],
        "[" * 100_000,
        "{",
        "",
        '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}, '
        '"a": {"dtype": "I32", "shape": [4], "data_offsets": [0, 16]}}',
        '{"a": {"dtype": "F32", "shape": [9' + "9" * 5000 + '], "data_offsets": [0, 16]}}',
    ],
)
def test_headers_that_lie_are_refused(tmp_path, header):
    path = write_header(tmp_path / "a.safetensors", header)
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        folder.load(path)


@pytest.mark.parametrize("length", [0, 1, 7, 2**62, 2**64 - 1])
def test_lengths_of_headers_that_lie_are_refused(tmp_path, length):
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        folder.load(path)
    path.write_bytes(b"\0" * min(length, 7))
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        folder.load(path)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", r"config\.json: it is no JSON"),
        (b"[" * 100_000, r"config\.json: it is no JSON"),
        (b"\xff", r"config\.json: it is no JSON"),
        (b"[]", r"config\.json: it must be a JSON object"),
        (b" " * (2**24 + 1), r"config\.json: it must be at most"),
        (b'{"quantization_config": {"quant_method": "fp8"}}', "only .* are read, got .*fp8"),
        (b'{"quantization_config": 3}', "only .* are read, got 3"),
    ],
)
def test_configs_that_are_not_read_are_refused(tmp_path, raw, message):
    source = model(tmp_path / "model")
    (source / "config.json").write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        folder.load(source)


@pytest.mark.parametrize(
    "name",
    [str(path.parent.relative_to(FILES)) for path in sorted(FILES.glob("*/**/config.json"))],
)
def test_folders_of_all_formats_come_back_byte_for_byte(tmp_path, name):
    """And one changed code changes only tensors of the matrix that it belongs to."""
    kind, _, own = name.rpartition("/")
    source = copied(kind, own, tmp_path)
    loaded = folder.load(source)
    assert loaded.format is not None
    folder.save(tmp_path / "new", loaded.tensors, loaded)
    assert content(tmp_path / "new") == content(source)
    before = stored(source)
    for key, array in loaded.tensors.items():
        if zq.is_quantized(array):
            codes = np.asarray(array.codes).copy()
            place = tuple(n - 1 for n in codes.shape)
            code = int(codes[place])
            codes[place] = code + 1 if code < array.grid.high else code - 1
            changed = array.with_codes(jnp.asarray(codes))
            folder.save(tmp_path / "new", loaded.tensors | {key: changed}, loaded)
            after = stored(tmp_path / "new")
            assert len(changed_bits(before, after)) == 1
            values = zq.dequantize(folder.load(tmp_path / "new").tensors[key])
            np.testing.assert_array_equal(*bits_of(values, zq.dequantize(changed)))


def bits_of(*arrays):
    """Floats of any kind as float32, which holds them all."""
    return [np.asarray(array).astype(np.float32) for array in arrays]


def test_bitsandbytes_is_one_of_the_formats(tmp_path):
    source = model(
        tmp_path / "model", mixed(), quantization_config={"quant_method": "bitsandbytes"}
    )
    loaded = folder.load(source)
    assert loaded.format == "bitsandbytes"
    for name in ("a.weight", "b.weight", "c.weight"):
        values = np.asarray(zq.dequantize(loaded.tensors[name]))
        np.testing.assert_array_equal(values, decoded(name, mixed()))
    assert sorted(set(loaded.tensors) - {"a.weight", "b.weight", "c.weight"}) == [
        "ids",
        "norm.weight",
    ]
    folder.save(tmp_path / "again", loaded.tensors, loaded)
    assert content(tmp_path / "again") == content(source)
    changed = loaded.tensors | {"c.weight": flipped(loaded.tensors["c.weight"], (0, 0))}
    folder.save(source, changed, loaded)
    assert list(changed_bits(mixed(), stored(source))) == ["c.weight"]
    say(source, load_in_8bit=True)
    with pytest.raises(ValueError, match="load_in_8bit"):
        folder.load(source)


@pytest.mark.slow
def test_bitsandbytes_folders_are_read_or_refused_with_a_clear_error(tmp_path):
    source = model(
        tmp_path / "model", mixed(), quantization_config={"quant_method": "bitsandbytes"}
    )
    before, rng, read = content(source), np.random.default_rng(0), 0
    for _ in range(500):
        for name, raw in before.items():
            (source / name).write_bytes(raw)
        mutated(source, rng)
        try:
            folder.load(source)
            read += 1
        except ValueError as error:
            assert str(source) in str(error)
    assert 50 < read < 300


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_loading_takes_the_files_size_once(tmp_path):
    """A 160 MB file of 4 bits and floats: less than 1.1 times its size beyond the process."""
    script = textwrap.dedent("""
        import sys
        import jax, numpy as np
        from zoqo_jax.interop import folder, safetensors

        def memory(what):
            with open("/proc/self/status") as lines:
                return next(int(line.split()[1]) for line in lines if line.startswith(what))

        path, rng = sys.argv[1], np.random.default_rng(0)
        if sys.argv[2] == "write":
            tensors = {"embed": rng.integers(0, 2**16, (2**14, 1024), np.uint16).view(np.float16)}
            for i in range(64):
                tensors[f"{i}.qweight"] = rng.integers(-2**31, 2**31, (128, 4096), np.int32)
                tensors[f"{i}.qzeros"] = rng.integers(-2**31, 2**31, (8, 512), np.int32)
                tensors[f"{i}.scales"] = np.ones((8, 4096), np.float16)
                tensors[f"{i}.g_idx"] = np.arange(1024, dtype=np.int32) // 128
            safetensors.save(f"{path}/model.safetensors", tensors)
        else:
            small = folder.load(sys.argv[3])  # what is loaded once: JAX, its backend
            begin = memory("VmRSS")
            with open("/proc/self/clear_refs", "w") as peak:
                peak.write("5")  # the peak is now
            loaded = folder.load(path)
            jax.block_until_ready(loaded.tensors)
            print(memory("VmHWM") - begin)
    """)
    said = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": said}))
    small = copied("gptq", "4-bits-gptq", tmp_path / "small")

    def run(what):
        command = [sys.executable, "-c", script, str(tmp_path), what, str(small)]
        # Not with the tests' four devices, which have threads and memory of their own.
        own = {key: x for key, x in os.environ.items() if not key.startswith(("XLA", "JAX"))}
        env = own | {"JAX_PLATFORMS": "cpu"}
        return subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout

    run("write")
    size = (tmp_path / "model.safetensors").stat().st_size
    kilobytes = int(run("read"))
    assert 0.9 * size < kilobytes * 1024 < 1.1 * size
