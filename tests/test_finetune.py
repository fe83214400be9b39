"""Fine-tuning from a file to a file: what changes, what is logged, and going on after a kill."""

import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_model

import zoqo_jax as zq
from experiments import settings
from experiments.finetune import (
    data,
    llama_cpp,
    objective,
    outputs,
    replay,
    seed_log,
    training,
)
from experiments.finetune.config import Config
from experiments.finetune.models import loading
from experiments.finetune.parts import adapt
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
    usual = {
        "model": files[0], "data": files[1], "output": str(folder), "steps": 10, "batch_size": 8,
        "eval_every": 5, "checkpoint_every": 3, "density": 0.125, "dev_examples": 0,
    }  # fmt: skip
    return Config(**{**usual, **changes})


def run(chosen):
    checkpoint = loading.load(chosen.model)
    outcome = training.train(checkpoint, chosen, progress=False)
    outputs.write(chosen, outcome, 1.0)
    return outcome


def changed_by(folder, files):
    """The names of the tensors whose codes a run moved."""
    base, trained = (gguf.load(path).tensors for path in (files[0], folder / "model.gguf"))
    assert list(trained) == list(base)
    return {
        name.removesuffix(".weight")
        for name, old in base.items()
        if zq.is_quantized(old) and (old.codes != trained[name].codes).any()
    }


def assert_log_rebuilds(outcome, chosen):
    folder = Path(chosen.output)
    settings, model, again = seed_log.rebuild(folder / "replay.npz", chosen.model)
    assert (settings.method, model.span) == (chosen.method, outcome.model.span)
    for one, other in zip(jax.tree.leaves(again), jax.tree.leaves(outcome.params), strict=True):
        np.testing.assert_array_equal(one, other)


CODES = {"method": "zoqo", "targets": ("q", "down"), "eval_every": 1}
ADAPTERS = {"train": "lora", "method": "zoqo", "structure": "rank_one", "rank": 2, "steps": 5}


@pytest.fixture(scope="module")
def codes_run(files, tmp_path_factory):
    """The settings and the outcome of a run that trained codes; tests only read its folder."""
    chosen = config(files, tmp_path_factory.mktemp("codes"), **CODES)
    return chosen, run(chosen)


@pytest.fixture(scope="module")
def adapters_run(files, tmp_path_factory):
    """The same of a run that trained adapters of 8 bits."""
    chosen = config(files, tmp_path_factory.mktemp("adapters"), **ADAPTERS)
    return chosen, run(chosen)


def test_codes_are_trained_in_place_and_rebuilt_from_the_log(files, codes_run):
    chosen, outcome = codes_run
    folder = Path(chosen.output)
    assert {name.split(".")[2] for name in changed_by(folder, files)} == {"attn_q", "ffn_down"}
    best = max(outcome.history, key=lambda line: (line["dev_accuracy"], -line["dev_loss"]))
    assert outcome.best_step == best["step"]
    assert_log_rebuilds(outcome, chosen)
    assert "ZOQO, codes in place" in (folder / "report.md").read_text()
    assert (folder / "curves.png").stat().st_size > 1000


def test_codes_are_trained_in_bfloat16_and_the_file_stays_of_its_kind(files, tmp_path, codes_run):
    chosen = config(files, tmp_path, **CODES, dtype="bfloat16")
    outcome = run(chosen)
    assert {name.split(".")[2] for name in changed_by(tmp_path, files)} == {"attn_q", "ffn_down"}
    assert_log_rebuilds(outcome, chosen)
    in_float32 = codes_run[1]
    assert outcome.before.loss != in_float32.before.loss
    np.testing.assert_allclose(outcome.before.loss, in_float32.before.loss, rtol=1e-2)


def test_without_steps_a_run_only_reads(files, tmp_path):
    chosen = config(files, tmp_path, steps=0)
    for _ in range(2):  # the second time it finds what it read
        outcome = run(chosen)
        assert outcome.before == outcome.after and outcome.history == []
        assert not changed_by(tmp_path, files)


@pytest.mark.slow
def test_the_last_layers_are_trained_on_what_those_below_say(files, tmp_path):
    chosen = config(files, tmp_path, layers=1)
    outcome = run(chosen)
    changed = changed_by(tmp_path, files)
    assert changed and all(name.startswith("blk.1.") for name in changed)
    assert_log_rebuilds(outcome, chosen)
    assert len(list((tmp_path / "states").iterdir())) == 3  # of train, dev and test

    # What a whole model of the trained file says is what the last layer said.
    whole = loading.load_gguf(tmp_path / "model.gguf")
    tokens = data.encode(data.load(files[1], "test"), whole.tokenizer, 64)
    scores = objective.evaluator(whole.decoder)(whole.params, tokens)
    np.testing.assert_allclose(scores[:2], outcome.after[:2], rtol=1e-5)
    assert scores.said == tuple(outcome.after.said)


@pytest.fixture(scope="module")
def mixed(files, tmp_path_factory):
    """A model whose values and down-projections have more bits in two of four layers."""

    def bits_of(name, layer):
        return {"attn_v": 8, "ffn_down": 5}.get(name, 4) if layer in (0, 2) else 4

    path = tmp_path_factory.mktemp("mixed") / "mixed.gguf"
    model = tiny_model.write_model(path, bits_of=bits_of, depth=4)
    return str(model), files[1]


@pytest.mark.parametrize("layers", [0, slow(3)])
def test_all_matrices_of_a_file_of_several_types_are_trained(mixed, tmp_path, layers):
    chosen = config(mixed, tmp_path, steps=3, density=0.5, layers=layers)
    outcome = run(chosen)
    kinds = {0: (0, 1, 0, 1), 3: (0, 1, 0)}[layers]
    assert outcome.model.types == (("v", kinds), ("down", kinds))
    trained = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
    expected = {f"blk.{i}.{name}" for i in range(4 - (layers or 4), 4) for name in trained}
    assert changed_by(tmp_path, mixed) == expected
    assert_log_rebuilds(outcome, chosen)

    # The file that was written holds, in each layer's place, what was trained.
    whole = loading.load(tmp_path / "model.gguf")
    again = loading.split(whole, layers)[1].params
    for one, other in zip(
        jax.tree.leaves(outcome.params), jax.tree.leaves(adapt_like(again, chosen)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def adapt_like(params, chosen):
    """Parameters with what does not train frozen, as a run has them."""
    whole = loading.load(chosen.model)
    return adapt(loading.split(whole, chosen.layers)[1]._replace(params=params), chosen)


@pytest.mark.slow
def test_adapters_of_a_file_of_several_types_have_their_layers_names(mixed, tmp_path):
    from safetensors.numpy import load_file

    chosen = config(mixed, tmp_path, **ADAPTERS)
    outcome = run(chosen)
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(found) == 2 * 2 * 4  # A and B of q and v
    for layer in range(4):
        v = outcome.params["types"]["v"][str(layer % 2)]
        name = f"base_model.model.model.layers.{layer}.self_attn.v_proj.lora_B.weight"
        np.testing.assert_array_equal(found[name], zq.dequantize(v.b)[layer // 2])


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
        CODES,
        slow({"method": "zoqo"}),
        slow({"method": "caq_zo", "train": "lora", "bits": 4, "structure": "dense"}),
        slow({"method": "adam", "train": "lora"}),
        slow({"method": "mezo", "train": "lora", "num_queries": 2}),
    ],
    ids=["two modules", "zoqo", "caq_zo", "adam", "mezo"],
)
def test_an_interrupted_run_goes_on_bit_for_bit(files, codes_run, tmp_path, monkeypatch, changes):
    is_made = changes is CODES
    whole = codes_run[1] if is_made else run(config(files, tmp_path / "whole", **changes))
    chosen = config(files, tmp_path / "parts", **changes)
    advance = training._Run._advance
    for stop in (7,) if is_made else (2, 7):

        def interrupted(self, now, *rest, stop=stop):
            if now.step == stop:
                raise KeyboardInterrupt
            return advance(self, now, *rest)

        monkeypatch.setattr(training._Run, "_advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(chosen)
    monkeypatch.setattr(training._Run, "_advance", advance)
    parts = run(chosen)
    for one, other in zip(
        jax.tree.leaves(whole.params), jax.tree.leaves(parts.params), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(whole.log, parts.log)
    assert [line["dev_loss"] for line in whole.history] == [
        line["dev_loss"] for line in parts.history
    ]


@pytest.mark.slow
def test_scales_are_trained_and_codes_left_alone(files, tmp_path):
    chosen = config(files, tmp_path, method="qzo", train="scales", learning_rate=1e-4, steps=3)
    outcome = run(chosen)
    assert changed_by(tmp_path, files) == set()
    base, trained = (gguf.load(path).tensors for path in (files[0], tmp_path / "model.gguf"))
    name = "blk.1.ffn_up.weight"
    assert (base[name].scale != trained[name].scale).any()
    assert (base["token_embd.weight"].scale == trained["token_embd.weight"].scale).all()
    assert_log_rebuilds(outcome, chosen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"method": "caq_zo", "grid": "nf4", "query": "off_grid", "bits": 4},
        {"method": "caq_zo", "grid": "nf4", "bits": 4},
        {"method": "caq_zo", "rounding": "error_feedback", "bits": 4},
        {"method": "quzo", "bits": 4},
        {"method": "qes", "bits": 4},
        {"method": "zoqo", "bits": 2, "step_rule": "dithered"},
        {"method": "zoqo", "bits": 3, "structure": "sparse", "decay": 0.1},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_method_trains_adapters(files, tmp_path, changes):
    chosen = config(files, tmp_path, train="lora", rank=2, steps=3, learning_rate=10.0, **changes)
    outcome = run(chosen)
    before = jax.tree.leaves(adapt(loading.load(chosen.model), chosen))
    moved = [
        (one != other).any()
        for one, other in zip(before, jax.tree.leaves(outcome.params), strict=True)
    ]
    assert any(moved)
    assert_log_rebuilds(outcome, chosen)


@pytest.mark.slow
def test_a_run_that_is_killed_three_times_goes_on_bit_for_bit(files, tmp_path):
    def start(name):
        chosen = config(files, tmp_path / name, steps=300, eval_every=50)
        command = [sys.executable, "-m", "experiments.finetune", *settings.arguments(chosen)]
        return subprocess.Popen(command, cwd=Path(__file__).parents[1])

    def kept():
        steps = [path.name for path in (tmp_path / "parts" / "checkpoints").glob("*")]
        return max((int(step) for step in steps if step.isdigit()), default=-1)

    assert start("whole").wait() == 0
    moments = np.random.default_rng(0).uniform(0.0, 1.0, 3)
    for moment in moments:
        before, child = kept(), start("parts")
        while kept() == before and child.poll() is None:
            time.sleep(0.01)
        time.sleep(moment)
        child.kill()
        assert child.wait() == -signal.SIGKILL, "it had ended before it was killed"
    assert start("parts").wait() == 0
    for name in ("model.gguf", "before.json", "after.json"):
        whole, parts = (tmp_path / one / name for one in ("whole", "parts"))
        assert whole.read_bytes() == parts.read_bytes()
    logs = [np.load(tmp_path / one / "replay.npz")["log"] for one in ("whole", "parts")]
    np.testing.assert_array_equal(*logs)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["zoqo", slow("zo_signsgd")])
def test_adapters_are_written_as_peft_reads_them(files, adapters_run, tmp_path, method):
    from safetensors.numpy import load_file

    if method == "zoqo":
        chosen, outcome = adapters_run
    else:
        chosen = config(files, tmp_path, train="lora", rank=2, steps=5, method=method)
        outcome = run(chosen)
    found = load_file(Path(chosen.output) / "adapter" / "adapter_model.safetensors")
    assert len(found) == 2 * 2 * tiny_model.DEPTH  # A and B of q and v
    v = outcome.params["layers"]["v"]["weight"]
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    np.testing.assert_array_equal(found[name], zq.dequantize(v.b)[1])


@pytest.mark.parametrize(
    ("made", "name"),
    [("codes_run", "model.gguf"), ("adapters_run", "adapter/adapter_model.safetensors")],
)
def test_the_log_makes_the_same_file_again(files, tmp_path, request, made, name):
    folder = Path(request.getfixturevalue(made)[0].output)
    log, again = tmp_path / "replay.npz", tmp_path / "again"
    shutil.copy(folder / "replay.npz", log)
    replay.main(replay.Places(str(log), files[0], str(again)))
    assert (again / name).read_bytes() == (folder / name).read_bytes()
    other = tiny_model.write_model(tmp_path / "other.gguf", seed=1)
    with pytest.raises(ValueError, match=r"output: .* holds other things"):
        replay.main(replay.Places(str(log), files[0], str(again)))
    again = tmp_path / "refused"
    with pytest.raises(ValueError, match=r"model: .*other.gguf has digest"):
        replay.main(replay.Places(str(log), str(other), str(again)))
    log.write_bytes(log.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"log: .* is no seed log"):
        replay.main(replay.Places(str(log), files[0], str(again)))
    assert not again.exists()


def test_a_folder_of_another_run_is_left_alone(files, codes_run):
    with pytest.raises(ValueError, match=r"another steps, 10 instead of 2"):
        run(config(files, codes_run[0].output, **CODES, steps=2))


def test_examples_longer_than_the_window_are_refused(files):
    tokenizer = gguf.load(files[0]).tokenizer
    with pytest.raises(ValueError, match="1 to 2 tokens"):
        data.encode(data.Texts(["abc"], (" bad",), [0], []), tokenizer, 2)


def test_a_sample_of_all_keeps_the_order():
    texts = data.Texts(list("abcd"), (" bad", " good"), [0, 1, 0, 1], [])
    assert texts.sample(0, seed=1) == texts
    assert sorted(texts.sample(2, seed=1).prompts) != texts.sample(4, seed=1).prompts
    assert sorted(texts.sample(4, seed=1).prompts) == texts.prompts


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
        ({"method": "qzo"}, "needs train='scales', got 'codes'"),
        ({"train": "scales"}, "moves codes, not scales"),
        ({"grid": "nf4", "train": "lora"}, "bits must be 4 with grid='nf4', got 8"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"bits": 9}, r"bits must be in \[2, 8\], got 9"),
        ({"targets": ("w",)}, "targets must be of"),
        ({"decay": 0.0}, "decay must be positive"),
        ({"method": "sgd"}, "method must be one of"),
        ({"sized": True}, "density is for steps of sized=False, got 0.125"),
        ({"sized": True, "method": "adam", "train": "lora"}, "sized is for methods of"),
        ({"structure": "columns", "sized": False}, "structure='columns' needs sized=True"),
        ({"dtype": "float16"}, "dtype must be one of"),
        ({"dtype": "bfloat16", "train": "lora"}, "dtype must be 'float32' with train='lora'"),
    ],
)
def test_settings_out_of_range_are_refused(files, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(files, tmp_path, **changes)


@pytest.mark.parametrize(
    ("given", "sized", "queries", "layers"),
    [
        ({}, True, 4, (2, 4)),
        ({"layers": 0, "num_queries": 2}, True, 2, (0, 0)),
        ({"density": 0.125}, False, 1, (0, 0)),
        ({"sized": False, "layers": 3}, False, 1, (3, 3)),
        ({"structure": "columns", "density": 0.5}, True, 4, (2, 4)),
        ({"train": "lora"}, False, 1, (0, 0)),
        ({"train": "lora", "sized": True}, True, 4, (2, 4)),
        ({"train": "scales", "method": "qzo"}, False, 1, (0, 0)),
    ],
)
def test_steps_size_themselves_unless_a_number_is_given(given, sized, queries, layers):
    made = Config(model="m", output="o", **given)
    assert (made.sized, made.num_queries) == (sized, queries)
    assert (made.layers_of(2), made.layers_of(30)) == layers


def test_help_leaves_what_is_rarely_needed_to_helpfull():
    short, full = (settings.Line([word], [Config]).help("") for word in ("--help", "--helpfull"))
    assert "  --[no]sized" in short and "  --density=" not in short
    assert "density" in short.partition("--helpfull lists 18 more: ")[2]
    assert all(f"{field.name}" in full for field in fields(Config))
    assert "  --density=" in full and "--helpfull" not in full


def test_what_does_not_fit_the_model_is_refused(files, tmp_path):
    checkpoint = loading.load_gguf(files[0])
    for changes, message in (
        ({"max_tokens": 65}, "max_tokens must be at most 64"),
        ({"batch_size": 1000}, "batch_size must be at most"),
        ({"max_tokens": 1}, "batch_size must be at most 0"),
        ({"layers": 3}, "layers must be at most 2, the model's, got 3"),
    ):
        chosen = config(files, tmp_path, **changes)
        with pytest.raises(ValueError, match=message):
            training.train(checkpoint, chosen, progress=False)


def test_llama_cpp_is_compared_answer_by_answer(files, monkeypatch):
    asked = llama_cpp.Asked(files[0], data=files[1], examples=0)
    texts = data.load(files[1], "dev")
    checkpoint = loading.load(files[0])
    tokens = data.encode(texts, checkpoint.tokenizer, 64)
    said = list(objective.evaluator(checkpoint.decoder)(checkpoint.params, tokens).said)
    theirs = [1 - said[0], *said[1:]]  # one answer is another
    monkeypatch.setattr(llama_cpp, "answers", lambda *_, **__: theirs)
    both = llama_cpp.compare(asked, progress=False)
    n = len(texts.prompts)
    assert both.count == n
    assert both.same == pytest.approx((n - 1) / n)
    assert abs(both.ours - both.theirs) == pytest.approx(1 / n)


def test_without_llama_cpp_its_package_is_named(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(SystemExit, match="pip install xllamacpp"):
        llama_cpp.main(llama_cpp.Asked(files[0], data=files[1]))


def test_only_the_best_step_and_the_last_are_left_on_disk(codes_run):
    chosen, outcome = codes_run
    steps = {path.name for path in (Path(chosen.output) / "checkpoints").iterdir()}
    assert steps == {str(outcome.best_step), "10"}
