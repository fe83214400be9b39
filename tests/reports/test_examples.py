"""Examples of fine-tuning: what is read together, refused, and told beside a score.

Reported of kindred projects: fastai/fastai 2339, ludwig-ai/ludwig 2621 (empty parts of small data,
and their nan).
"""

import json

import numpy as np
import pytest
import tiny_model

from experiments import settings
from experiments.finetune import __main__ as command
from experiments.finetune import data, llama_cpp, objective, outputs, training
from experiments.finetune.config import Config
from experiments.finetune.data import Texts
from experiments.finetune.models import loading
from zoqo_jax.interop import tokenizing

CHOICES = {"choices": [" bad", " good"], "answer": " bad"}


def tokenizer(**changes):
    """A SentencePiece tokenizer that knows "▁great", "▁terrible", "▁It" and "▁was"."""
    named = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    return tokenizing.from_gguf(tiny_model.sentence_piece_metadata() | named)


def words(tokens, tokenizer):
    return [tokenizer.id_to_token(int(i)) for i in tokens]


# transformers #26273: what is read apart begins with a space, token 29871 of Llama 2.
def test_a_completion_is_read_together_with_its_prompt():
    model = tokenizer()
    found = data.encode(Texts(["It was"] * 2, (), [], [" great", "great"]), model, 64)
    assert words(found.sequences[0], model) == ["<s>", "▁It", "▁was", "▁great"]
    assert found.begins.tolist() == [3, 3]
    assert words(found.sequences[1], model)[2:] == ["▁was", *"great"]


def test_a_token_that_holds_an_end_and_a_beginning_is_the_completions():
    model = tokenizer()
    found = data.encode(Texts(["It was "], (), [], ["great It"]), model, 64)
    assert words(found.sequences[0], model) == ["<s>", "▁It", "▁was", "▁great", "▁It"]
    assert found.begins.tolist() == [3]


def test_an_end_that_the_metadata_ask_for_is_learnt_and_follows_no_prompt():
    model = tokenizer(add_eos_token=True)
    found = data.encode(Texts(["It was"], (), [], [" great"]), model, 64)
    assert words(found.sequences[0], model) == ["<s>", "▁It", "▁was", "▁great", "</s>"]
    asked = data.encode(Texts(["It was"], data.SENTIMENT, [1], []), model, 64)
    assert words(asked.sequences[0], model) == ["<s>", "▁It", "▁was"]


@pytest.mark.parametrize("changes", [{}, {"add_bos_token": False}, {"add_space_prefix": False}])
def test_the_default_choices_are_one_token_of_sentence_piece(changes):
    model = tokenizer(**changes)
    found = data.encode(data.load("reviews", "dev").take(range(50)), model, 512)
    assert words(found.words, model) == ["▁terrible", "▁great"]
    assert all(words(ids[-2:], model) == ["▁It", "▁was"] for ids in found.sequences)


def test_choices_after_a_space_are_the_words_that_follow_it():
    model = tokenizer()
    found = data.encode(Texts(["It was "], ("terrible", "great"), [1], []), model, 64)
    assert words(found.words, model) == ["▁terrible", "▁great"]
    assert words(found.sequences[0], model) == ["<s>", "▁It", "▁was"]
    mixed = Texts(["It was ", "It was("], ("g", "t"), [1, 0], [])
    assert not len(data.encode(mixed, model, 64).words)  # other tokens after another prompt
    with pytest.raises(ValueError, match="model: it comes without a tokenizer"):
        data.encode(mixed, None, 64)


@pytest.mark.slow
def test_sentence_piece_is_fine_tuned_on_the_default_examples(tmp_path):
    path = tiny_model.write_model(
        tmp_path / "a.gguf", words=tiny_model.sentence_piece_metadata(),
        **{"llama.context_length": 512},
    )  # fmt: skip
    config = Config(
        str(path), str(tmp_path / "run"), steps=1, batch_size=2, max_tokens=64, dev_examples=4,
        test_examples=4, density=0.1,
    )  # fmt: skip
    outcome = training.train(loading.load(path), config, progress=False)
    assert np.isfinite(outcome.after.loss)


@pytest.mark.slow
def test_llama_cpp_reads_prompt_and_completion_alike(tmp_path):
    pytest.importorskip("xllamacpp")
    path = tiny_model.write_model(tmp_path / "a.gguf", words=tiny_model.sentence_piece_metadata())
    server = llama_cpp.serve(str(path))
    for prompt, rest in (("It was", " great"), ("It was ", "great"), ("It", "was"), ("a", "b c")):
        answer = server.handle_completions({"prompt": prompt + rest, "n_predict": 1})
        ids = data.encode(Texts([prompt], (), [], [rest]), tokenizer(), 64).sequences[0]
        assert answer["usage"]["prompt_tokens"] == len(ids)
    path = tiny_model.write_model(
        tmp_path / "b.gguf", words=tiny_model.sentence_piece_metadata(),
        **{"llama.context_length": 512},
    )  # fmt: skip
    both = llama_cpp.compare(llama_cpp.Asked(str(path), examples=40), progress=False)
    assert both.same >= 0.9


def lines(*examples):
    return "".join(f"{json.dumps(one)}\n" for one in examples)


FINE = {"prompt": "a", "completion": "b"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", lines(FINE, {**FINE, "prompt": ""}), "line 2: the prompt is empty"),
        ("a.jsonl", lines({**FINE, "prompt": " \t"}), "line 1: the prompt is empty"),
        ("a.jsonl", lines({**FINE, "completion": ""}), "line 1: the completion is empty"),
        ("a.jsonl", lines({"prompt": "a", "text": "b"}), "line 1: wants 'choices' and an 'answer'"),
        ("a.jsonl", lines({"prompt": "a", **CHOICES}, FINE), "line 2: has completions, where"),
        ("a.jsonl", lines({**FINE, **CHOICES}), "line 1: has 'choices' and a 'completion'"),
        ("a.jsonl", lines({"prompt": "a", "choices": "ab", "answer": 0}), "must be a list of str"),
        ("a.jsonl", lines({"prompt": "a", "choices": 5, "answer": 0}), "must be a list of str"),
        ("a.jsonl", lines({"prompt": "a", "choices": [" b", 1], "answer": 0}), "must be a list of"),
        ("a.jsonl", lines({"prompt": "a", "choices": [" b"] * 2, "answer": 0}), "be different"),
        ("a.jsonl", lines({"prompt": "a", **CHOICES, "answer": " so"}), "line 1: answer must be"),
        ("a.jsonl", lines({"prompt": "a", **CHOICES, "answer": True}), "line 1: answer must be"),
        ("a.jsonl", '{"prompt": "\\ud800", "completion": "b"}', "line 1: wants a 'prompt'"),
        ("a.jsonl", "[" * 100_000, "line 1: no JSON"),
        ("a.tsv", "sentence\tlabel\nfine\t1\n", "line 1: not 'sentence TAB 0 or 1'"),
        ("a.tsv", "fine\t1\n \t1\n", "line 2: not 'sentence"),
        ("a.tsv", "fine\t1\nfine\n", "line 2: not 'sentence"),
        ("a.tsv", "fine\t1\nfine\tgood\n", "line 2: not 'sentence"),
    ],
)
def test_lines_that_say_something_else_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}, {message}|{name}, line 1: .*{message}"):
        data.load(str(tmp_path / name), "train")


def test_what_is_no_utf_8_is_named_by_its_line(tmp_path):
    (tmp_path / "a.tsv").write_bytes("gut\t1\n\nschön\t1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.tsv, line 3: no UTF-8 text"):
        data.load(str(tmp_path / "a.tsv"), "train")


def test_marks_and_line_ends_of_other_systems_are_read_over(tmp_path):
    plain = "".join(f"film {i}\t{i % 2}\n" for i in range(10))
    for name, content in (
        ("a", plain), ("b", plain.replace("\n", "\r\n")), ("c", f"\ufeff{plain}"),
        ("d", plain.replace("\n", "\r")),
    ):  # fmt: skip
        (tmp_path / f"{name}.tsv").write_bytes(content.encode())
        assert data.load_all(str(tmp_path / f"{name}.tsv")) == data.load_all(
            str(tmp_path / "a.tsv")
        )


# neuracore #793 and ludwig #2623: splits that are empty, and scores that are NaN.
@pytest.mark.parametrize("count", [1, 9])
def test_a_file_of_too_few_examples_is_refused(tmp_path, count, capsys):
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"film {i}\t{i % 2}\n" for i in range(count)))
    with pytest.raises(ValueError, match=rf"a\.tsv: {count} examples are too few.*at least 10"):
        data.load(str(path), "train")
    model = tiny_model.write_model(tmp_path / "a.gguf")
    with pytest.raises(ValueError, match=rf"a\.tsv: {count} examples are too few"):
        command.main(Config(str(model), str(tmp_path / "run"), data=str(path)))
    assert not (tmp_path / "run").exists()


def test_ten_examples_are_enough(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("".join(f"film {i}\t{i % 2}\n" for i in range(10)))
    counts = {split: len(one.prompts) for split, one in data.load_all(str(path)).items()}
    assert counts == {"train": 8, "dev": 1, "test": 1}


def test_no_examples_have_no_score(tmp_path):
    checkpoint = loading.load(tiny_model.write_model(tmp_path / "a.gguf"))
    none = np.zeros(0, np.int32)
    with pytest.raises(ValueError, match="there are no examples"):
        objective.evaluator(checkpoint.decoder)(
            checkpoint.params, data.Tokens([], none, none, np.array([1, 2], np.int32))
        )


def write_splits(folder, **splits):
    folder.mkdir(exist_ok=True)
    for split, examples in splits.items():
        (folder / f"{split}.jsonl").write_text(lines(*examples))
    return str(folder)


def test_splits_that_do_not_fit_each_other_are_refused(tmp_path):
    rated = [{"prompt": letter, **CHOICES, "answer": i % 2} for i, letter in enumerate("abcd")]
    other = [{**one, "choices": [" good", " bad"]} for one in rated]
    for splits, message in (
        ({"train": rated, "dev": other, "test": rated}, "dev has .* to choose from, train"),
        ({"train": rated, "dev": rated, "test": [FINE]}, "test has completions to choose"),
        ({"train": rated[::2], "dev": rated, "test": rated}, "all 2 training .* answer ' bad'"),
    ):
        with pytest.raises(ValueError, match=message):
            data.load_all(write_splits(tmp_path / "data", **splits))
    (tmp_path / "data" / "train.tsv").write_text("fine\t1\n")
    with pytest.raises(ValueError, match=r"has both train\.tsv and train\.jsonl"):
        data.load_all(str(tmp_path / "data"))


def test_examples_of_two_splits_are_told_on_the_screen_and_in_the_report(tmp_path, capsys):
    def rated(*prompts):
        return [{"prompt": one, **CHOICES, "answer": i % 2} for i, one in enumerate(prompts)]

    source = write_splits(
        tmp_path / "data", train=rated(*"abcdef"), dev=rated("x", "b"),
        test=rated("  c ", "y", "x", "d"),
    )  # fmt: skip
    expected = [
        "1 of 2 dev examples is in train, too.",
        "2 of 4 test examples are in train, too.",
        "1 of 4 test examples is in dev, too.",
    ]
    assert data.remarks(data.load_all(source)) == expected
    model = tiny_model.write_model(tmp_path / "a.gguf")
    config = Config(
        str(model), str(tmp_path / "run"), data=source, steps=0, batch_size=2, density=0.1
    )
    outcome = training.train(loading.load(model), config, progress=False)
    outputs.write(config, outcome, 1.0)
    said, report = capsys.readouterr().err, (tmp_path / "run" / "report.md").read_text()
    figures = json.loads((tmp_path / "run" / "outcome.json").read_text())
    assert all(f"data: {one}" in said and one in report for one in expected)
    assert figures["remarks"] == expected
    assert settings.arguments(config)


def test_completions_are_the_same_with_their_prompts():
    train = Texts(["a", "a"], (), [], ["b", "c"])
    test = Texts(["a", "a"], (), [], ["d", "c"])
    assert data.remarks({"train": train, "test": test}) == [
        "1 of 2 test examples is in train, too."
    ]


def test_a_split_of_one_answer_is_told():
    train = Texts(["a", "b"], ("no", "yes"), [0, 1], [])
    test = Texts(["c", "d"], ("no", "yes"), [1, 1], [])
    assert data.remarks({"train": train, "test": test}) == [
        "All 2 test examples have the answer 'yes'."
    ]
