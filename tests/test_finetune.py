"""Fine-tuning from a file to a file: what changes, what is logged, and going on after a kill."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_model

import zoqo_jax as zq
from experiments.finetune import data, outputs, training
from experiments.finetune.config import Config
from experiments.finetune.models import loading
from zoqo_jax.interop import gguf, safetensors


@pytest.fixture(autouse=True, scope="module")
def _strict_promotion():
    """Optax's own schedules and Adam promote."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    model = tiny_model.write_model(folder / "tiny.gguf")
    return str(model), str(tiny_model.write_examples(folder / "examples.jsonl"))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def config(files, folder, **changes):
    settings = {
        "model": files[0], "data": files[1], "output": str(folder), "steps": 10, "batch_size": 8,
        "eval_every": 5, "checkpoint_every": 3, "density": 0.125, "dev_examples": 0,
    }  # fmt: skip
    return Config(**{**settings, **changes})


def run(chosen):
    checkpoint = loading.load(chosen.model)
    outcome = training.train(checkpoint, chosen, progress=False)
    outputs.write(checkpoint, chosen, outcome, 1.0)
    return checkpoint, outcome


def test_codes_are_trained_in_place_and_rebuilt_from_the_log(files, tmp_path):
    chosen = config(files, tmp_path, targets=("q", "down"))
    checkpoint, outcome = run(chosen)
    base, trained = (gguf.load(path) for path in (files[0], tmp_path / "model.gguf"))
    assert list(trained.tensors) == list(base.tensors)
    assert trained.metadata.keys() == base.metadata.keys()
    changed = {
        name.split(".")[2]
        for name, old in base.tensors.items()
        if zq.is_quantized(old) and (old.codes != trained.tensors[name].codes).any()
    }
    assert changed == {"attn_q", "ffn_down"}
    assert 0 < outcome.best_step <= 10

    log = np.load(tmp_path / "replay.npz")["log"]
    start = training.adapt(checkpoint, chosen)
    again = zq.replay(start, log, training.transformation(chosen))
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(outcome.params), strict=True):
        np.testing.assert_array_equal(one, other)
    assert "ZOQO, codes in place" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_codes_of_a_folder_are_trained_in_place(files, tmp_path):
    folder = tiny_model.write_folder(tmp_path / "tiny")
    chosen = config(files, tmp_path / "run", model=str(folder), targets=("q", "down"), steps=3)
    run(chosen)
    trained = tmp_path / "run" / "model"
    base, found = (safetensors.load(place) for place in (folder, trained))
    changed = {name.split(".", 3)[3] for name in base if (base[name] != found[name]).any()}
    assert base.keys() == found.keys()
    assert changed == {"self_attn.q_proj.weight", "mlp.down_proj.weight"}
    for name in ("config.json", "tokenizer.json"):
        assert (trained / name).read_bytes() == (folder / name).read_bytes()
    assert loading.load(trained).tokenizer is not None


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "zoqo"},
        slow({"method": "caq_zo", "train": "lora", "bits": 4, "structure": "dense"}),
        slow({"method": "adam", "train": "lora"}),
        slow({"method": "mezo", "train": "lora", "num_queries": 2}),
    ],
    ids=lambda changes: changes["method"],
)
def test_an_interrupted_run_goes_on_bit_for_bit(files, tmp_path, monkeypatch, changes):
    _, whole = run(config(files, tmp_path / "whole", **changes))
    chosen = config(files, tmp_path / "parts", **changes)
    advance = training._Run._advance
    for stop in (7,) if changes == {"method": "zoqo"} else (2, 7):

        def interrupted(self, now, bar, stop=stop):
            if now.step == stop:
                raise KeyboardInterrupt
            return advance(self, now, bar)

        monkeypatch.setattr(training._Run, "_advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(chosen)
    monkeypatch.setattr(training._Run, "_advance", advance)
    _, parts = run(chosen)
    for one, other in zip(
        jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(whole.log, parts.log)
    assert [line["dev_loss"] for line in whole.history] == [
        line["dev_loss"] for line in parts.history
    ]


@pytest.mark.parametrize(
    "changes",
    [{"method": "zo_signsgd"}, {"method": "zoqo", "bits": 8, "structure": "rank_one"}],
    ids=lambda changes: changes["method"],
)
def test_adapters_are_written_as_peft_reads_them(files, tmp_path, changes):
    from safetensors.numpy import load_file

    _, outcome = run(config(files, tmp_path, train="lora", rank=2, steps=5, **changes))
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(found) == 2 * 2 * tiny_model.DEPTH  # A and B of q and v
    v = outcome.params["layers"]["v"]["weight"]
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    np.testing.assert_array_equal(found[name], zq.dequantize(v.b)[1])


def test_a_folder_of_another_run_is_left_alone(files, tmp_path):
    run(config(files, tmp_path, steps=1))
    with pytest.raises(ValueError, match=r"another steps, 1 instead of 2"):
        run(config(files, tmp_path, steps=2))


def test_a_choice_of_two_tokens_is_refused(files):
    tokenizer = gguf.load(files[0]).tokenizer
    texts = data.Texts(["a"], (" bad", " awful"), [0], [])
    with pytest.raises(ValueError, match="' awful' is 6 to this tokenizer"):
        data.encode(texts, tokenizer, 8)
    with pytest.raises(ValueError, match="1 to 2 tokens"):
        data.encode(data.Texts(["abc"], (" bad",), [0], []), tokenizer, 2)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "", "empty"),
        ("a.tsv", "fine\t2\n", "line 1: not 'sentence TAB 0 or 1'"),
        ("a.jsonl", "{", "line 1: no JSON"),
        ("a.jsonl", '{"prompt": "a"}', "wants 'choices'"),
        ("a.jsonl", '{"prompt": "a", "choices": ["b"], "answer": "c"}', "answer must be one of"),
        ("a.jsonl", '{"text": "a"}', "wants a 'prompt'"),
    ],
)
def test_files_that_say_something_else_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        data.load(str(tmp_path / name), "train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "adam"}, "needs train='lora'"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"bits": 9}, r"bits must be in \[2, 8\], got 9"),
        ({"targets": ("w",)}, "targets must be of"),
        ({"decay": 0.0}, "decay must be positive"),
        ({"method": "sgd"}, "method must be one of"),
    ],
)
def test_settings_out_of_range_are_refused(files, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(files, tmp_path, **changes)


def test_what_does_not_fit_the_model_is_refused(files, tmp_path):
    checkpoint = loading.load_gguf(files[0])
    for changes, message in (
        ({"max_tokens": 65}, "max_tokens must be at most 64"),
        ({"batch_size": 1000}, "batch_size must be at most"),
        ({"max_tokens": 1}, "batch_size must be at most 0"),
    ):
        chosen = dataclasses.replace(config(files, tmp_path), **changes)
        with pytest.raises(ValueError, match=message):
            training.train(checkpoint, chosen, progress=False)
