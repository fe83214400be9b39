"""Data as people have them: conversations, choices of several tokens, CSV, files of their own."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny_model

import zoqo_jax as zq
from experiments.finetune import config as settings
from experiments.finetune import data, objective, outputs, score, states, training
from experiments.finetune.config import Config
from experiments.finetune.data import encoding
from experiments.finetune.folder import Folder
from experiments.finetune.models import loading
from zoqo_jax.interop import tokenizing


@pytest.fixture(autouse=True, scope="module")
def _strict_promotion():
    """Optax's own schedules promote."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def lines(*examples):
    return "".join(f"{json.dumps(one)}\n" for one in examples)


def written(path, *examples):
    path.write_text(lines(*examples))
    return str(path)


# --- CSV


def read_csv(tmp_path, content, name="a.csv"):
    (tmp_path / name).write_bytes(content.encode())
    return data.load_whole(str(tmp_path / name))


def test_a_table_of_prompts_and_completions(tmp_path):
    texts = read_csv(
        tmp_path, 'id,Prompt,completion\r\n1,"one,\ntwo ""3""", four\r\n\r\n2,five, six\r\n'
    )
    assert texts == data.Texts(['one,\ntwo "3"', "five"], (), [], [" four", " six"])


def test_a_table_of_texts_and_labels(tmp_path):
    reviews = read_csv(tmp_path, "\ufefflabel,sentence\n1,A fine film.\n0,Dull.\n")
    assert reviews.choices == data.SENTIMENT and reviews.answers == [1, 0]
    assert reviews.prompts == ["A fine film. It was", "Dull. It was"]
    mails = read_csv(tmp_path, "text;label\nWin, now!;spam\nSee you;ham\n")
    assert mails == data.Texts(
        ["Win, now!\nLabel:", "See you\nLabel:"], (" ham", " spam"), [1, 0], []
    )


def test_a_table_of_choices(tmp_path):
    texts = read_csv(
        tmp_path,
        'prompt,choices,answer\n1 + 1 =,"[""two"", ""3""]",0\n2 + 1 =,"[""3"", ""4""]",3\n',
    )
    assert texts.options == [("two", "3"), ("3", "4")] and texts.answers == [0, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"the file is empty"),
        ("text,label\n", r"the file is empty, but for a header"),
        ("question,reply\na,b\n", r"line 1: wants a header with .*got 'question', 'reply'"),
        ("text,text,label\na,b,1\n", r"line 1: a column is named twice"),
        ('prompt,completion\n"a\nb",c\nd\n', r"line 4: 1 fields, the header has 2"),
        ('prompt,completion\na,b\n"c,d\n', r"line 3: no CSV"),
        ("prompt,completion\na,b\n,d\n", r"line 3: the prompt is empty"),
        ("text,label\na,1\nb,\n", r"line 3: the label is empty"),
        ("prompt,choices,answer\na,b|c,0\n", r"line 2: choices must be a list as"),
        ('prompt,choices,answer\na,"[""b"", ""c""]",d\n', r"line 2: answer must be one of"),
        ("text,label\n" + "".join(f"a,{i}\n" for i in range(101)), r"101 different labels"),
    ],
)
def test_tables_that_say_something_else_are_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=rf"a\.csv.*{message}"):
        read_csv(tmp_path, content)


# --- Splits


def rated(count, start=0):
    return [{"prompt": f"film {i}", "choices": [" bad", " good"], "answer": i % 2}
            for i in range(start, start + count)]  # fmt: skip


def test_dev_and_test_may_be_files_of_their_own(tmp_path):
    source = written(tmp_path / "all.jsonl", *rated(30))
    other = written(tmp_path / "other.jsonl", *rated(4, 100))
    cut = data.load_all(source)

    found = data.load_all(source, dev=other)
    assert found["dev"].prompts == [f"film {i}" for i in range(100, 104)]
    assert found["test"] == cut["test"]  # the same tenth, and dev's is trained on
    assert sorted(found["train"].prompts) == sorted(cut["train"].prompts + cut["dev"].prompts)

    found = data.load_all(other, dev=source, test=source)  # of few examples none is cut off
    assert sorted(found["train"].prompts) == [f"film {i}" for i in range(100, 104)]
    assert len(found["dev"].prompts) == len(found["test"].prompts) == 30
    with pytest.raises(ValueError, match="4 examples are too few, as a tenth each is for test:"):
        data.load_all(other, dev=source)
    with pytest.raises(FileNotFoundError, match="no file"):
        data.load_all(source, dev=str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"text\.jsonl: dev has completions to choose from, train"):
        text = written(tmp_path / "text.jsonl", {"prompt": "a", "completion": "b"})
        data.load_all(source, dev=text)


def test_a_file_without_one_of_the_labels_is_read_with_all(tmp_path):
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,y\nc,z\n")
    (tmp_path / "dev.csv").write_text("text,label\nd,z\n")
    (tmp_path / "test.csv").write_text("text,label\ne,y\nf,z\n")
    found = data.load_all(str(tmp_path))
    assert found["dev"].choices == found["test"].choices == (" x", " y", " z")
    assert (found["dev"].answers, found["test"].answers) == ([2], [1, 2])


# --- Conversations

U, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}


def test_conversations_as_others_keep_them(tmp_path):
    parts = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    texts = data.load_whole(written(
        tmp_path / "a.jsonl",
        {"id": 3, "messages": [{**U, "name": None}, A, U, {**A, "weight": 0}], "source": "x"},
        {"prompt": [parts, A, U], "completion": [A], "chat_template_kwargs": {"day": 1}},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes?"}]},
        {"prompt": "Hi", "messages": [U, A], "tools": "[{\"type\": \"function\"}]"},
    ))  # fmt: skip
    assert texts.kind == "conversations"
    first, second, third, fourth = texts.chats
    assert (first.messages, first.learnt) == ([U, A, U, A], [False, True, False, False])
    assert second.learnt == [False, False, False, True]
    assert second.messages[0] == parts and second.variables == {"day": 1}
    assert (third.messages, third.tools) == ([U, A], None)
    assert fourth.tools == [{"type": "function"}]
    assert texts.prompts[2] == "user: Hi\nassistant: Yes?"
    assert texts.take([2]).chats == [third]


@pytest.mark.parametrize(
    ("one", "message"),
    [
        ({"messages": "Hi"}, "'messages' must be a list of messages, got 'Hi'"),
        ({"messages": []}, "'messages' must be a list of messages"),
        ({"messages": [U]}, "wants a message of the assistant to learn"),
        ({"messages": [U, {**A, "weight": 0}]}, "wants a message of the assistant to learn"),
        ({"messages": [U, {**A, "weight": 0.5}]}, "message 2: weight must be 0 or 1, got 0.5"),
        ({"messages": [U, {**A, "role": "bot"}]}, "messages 2: role must be one of .*got 'bot'"),
        ({"messages": [U, {**A, "content": 3}]}, "messages 2: content must be text, got 3"),
        ({"messages": [U, {**A, "content": ""}]}, "messages 2: the assistant says nothing"),
        ({"messages": [U, "Yes?"]}, "messages 2: wants an object with 'role'"),
        ({"messages": [{**U, "content": [{"type": "image_url"}]}, A]}, "must be text, got 'image_"),
        ({"messages": [U, A], "tools": {}}, "tools must be a list"),
        ({"messages": [U, A], "tools": "["}, "tools hold no JSON"),
        ({"messages": [U, A], "functions": [{}]}, "'functions' is not read: describe them in 'too"),
        ({"messages": [U, A], "prompt": [U], "completion": [A]}, "has 'messages' and 'prompt'"),
        ({"prompt": [U], "completion": "Yes?"}, "'completion' must be a list of messages"),
        ({"prompt": [U, A], "completion": [A]}, "the prompt's last message must not be the assi"),
        ({"chosen": [U, A], "messages": [U, A]}, "'chosen' is not read"),
        ({"messages": [U, {**A, "content": "\ud800"}]}, "half of a character"),
    ],
)  # fmt: skip
def test_conversations_that_say_something_else_are_refused(tmp_path, one, message):
    path = written(tmp_path / "a.jsonl", {"messages": [U, A]}, one)
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2.*{message}"):
        data.load_whole(path)
    path = written(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, {"messages": [U, A]})
    with pytest.raises(ValueError, match="line 2: has conversations, where the lines before have"):
        data.load_whole(path)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}({{ m.role[0] }}){{ m.content }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}(a){% endif %}"
)


def sentence_piece(path, template=TEMPLATE, **changes):
    """A tiny model whose tokenizer puts <s> before all that it reads."""
    more = {"tokenizer.chat_template": template} if template else {}
    more |= {"llama.context_length": 256, **changes}
    return tiny_model.write_model(path, words=tiny_model.sentence_piece_metadata(), **more)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("writes_bos", [True, False])
def test_one_token_of_beginning_and_answers_to_their_ends(tmp_path, adds_bos, writes_bos):
    template = TEMPLATE if writes_bos else TEMPLATE.replace("{{ bos_token }}", "")
    model = loading.load(sentence_piece(
        tmp_path / "a.gguf", template, **{"tokenizer.ggml.add_bos_token": adds_bos}
    ))  # fmt: skip
    talk = {"messages": [U, A, {"role": "user", "content": "It was"}, {**A, "content": "was </s>"}]}
    texts = data.load_whole(written(tmp_path / "a.jsonl", talk))
    tokens = data.encode_for(texts, model)
    (ids,), (learnt,) = tokens.sequences, tokens.learnt
    names = [model.tokenizer.id_to_token(int(i)) for i in ids]
    assert names[0] == ("<s>" if adds_bos or writes_bos else "▁")
    assert names.count("<s>") == (adds_bos or writes_bos)
    said = [names[i] for i in np.flatnonzero(learnt)]
    assert "".join(said) == "Yes?</s>▁was▁</s></s>".replace("▁was", "was")
    assert tokens.begins.tolist() == [np.flatnonzero(learnt)[0]]


def test_an_end_that_the_tokenizer_adds_is_there_once_and_learnt(tmp_path):
    template = "{% for m in messages %}({{ m.role[0] }}){{ m.content }}{% endfor %}{{ eos_token }}"
    template = template.replace("{{ eos_token }}", "{% if add_generation_prompt %}(a){% endif %}")
    model = loading.load(sentence_piece(
        tmp_path / "a.gguf", template, **{"tokenizer.ggml.add_eos_token": True}
    ))  # fmt: skip
    texts = data.load_whole(written(tmp_path / "a.jsonl", {"messages": [U, A]}))
    tokens = data.encode_for(texts, model)
    names = [model.tokenizer.id_to_token(int(i)) for i in tokens.sequences[0]]
    assert names.count("</s>") == 1 and tokens.learnt[0][-1]


def test_a_model_without_a_template_says_what_to_do(tmp_path):
    model = loading.load(sentence_piece(tmp_path / "a.gguf", ""))
    texts = data.load_whole(written(tmp_path / "a.jsonl", {"messages": [U, A]}))
    with pytest.raises(ValueError, match=r"has no chat template, .* take the model's instruct ver"):
        data.encode_for(texts, model)
    longer = data.load_whole(
        written(tmp_path / "b.jsonl", {"messages": [U, {**A, "content": "a" * 300}]})
    )
    model = loading.load(sentence_piece(tmp_path / "b.gguf"))
    with pytest.raises(ValueError, match=r"b\.jsonl, line 1: .* 1 to 256 tokens.* got 316"):
        data.encode_for(longer, model)


# --- Choices of several tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return loading.load(sentence_piece(tmp_path_factory.mktemp("data") / "tiny.gguf"))


QUESTIONS = [
    {"prompt": "It was", "choices": [" great", " great fun", " x"], "answer": 1},
    {"prompt": "a + b", "choices": [" = c", " terrible"], "answer": " = c"},
    {"prompt": "It", "choices": [" was terrible", " is", " = 5", " or so"], "answer": 2},
]


def by_hand(model, texts, normalise):
    """Log-probabilities of each choice, one sequence at a time, from all logits."""
    read = jax.jit(
        lambda params, ids: jax.nn.log_softmax(
            zq.quaxify(lambda p: model.decoder.apply({"params": p}, ids))(params)
        )
    )
    found = []
    for i, prompt in enumerate(texts.prompts):
        before = model.tokenizer.encode(prompt).ids
        row = []
        for choice in texts.of(i):
            ids = model.tokenizer.encode(prompt + choice).ids
            assert ids[: len(before)] == before
            table = np.asarray(read(model.params, np.array([ids + [0] * (64 - len(ids))])))[0]
            total = sum(table[at - 1, ids[at]] for at in range(len(before), len(ids)))
            by = {"none": 1, "tokens": len(ids) - len(before), "letters": len(choice.strip())}
            row.append(total / by[normalise])
        found.append(np.array(row))
    return found


@pytest.mark.parametrize(
    "normalise",
    [
        pytest.param("none", marks=pytest.mark.slow),
        "tokens",
        pytest.param("letters", marks=pytest.mark.slow),
    ],
)
def test_choices_of_several_tokens_have_the_log_probabilities_of_all(model, tmp_path, normalise):
    texts = data.load_whole(written(tmp_path / "a.jsonl", *QUESTIONS))
    tokens = data.encode_for(texts, model, normalise)
    assert len(tokens) == 3 and tokens.counts.tolist() == [3, 2, 4]
    expected = by_hand(model, texts, normalise)
    losses = [np.logaddexp.reduce(row) - row[i] for row, i in zip(expected, [1, 0, 2], strict=True)]
    said = tuple(int(row.argmax()) for row in expected)

    scores = objective.evaluator(model.decoder, batch_size=4)(model.params, tokens)
    np.testing.assert_allclose(scores.loss, np.mean(losses), rtol=1e-4)
    assert scores.said == said
    assert scores.accuracy == pytest.approx(np.mean(np.array(said) == [1, 0, 2]))
    loss = zq.quaxify(
        lambda p: objective.loss_fn(model.decoder)(p, objective.batch_of(tokens, np.arange(3)))
    )
    np.testing.assert_allclose(jax.jit(loss)(model.params), np.mean(losses), rtol=1e-4)
    asked = score.Asked(
        str(model.path), data=str(tmp_path / "a.jsonl"), normalise=normalise, batch_size=4
    )
    for line, row, answer in zip(score.lines(asked, progress=False), expected, [1, 0, 2],
                                 strict=True):  # fmt: skip
        assert (line["said"], line["answer"]) == (int(row.argmax()), answer)
        by = {"none": 1, "tokens": np.array(line["tokens"]),
              "letters": [len(one.strip()) for one in line["choices"]]}[normalise]  # fmt: skip
        np.testing.assert_allclose(line["log_probabilities"], row * by, rtol=1e-4)


def test_single_words_are_chosen_at_one_position_or_apart_alike(model):
    texts = data.Texts(["It was", "a"], (" great", " terrible"), [1, 0], [])
    tokens = data.encode_for(texts, model, "tokens")
    assert len(tokens.words) == 2 and tokens.firsts is None
    apart = encoding._apart(texts, model.tokenizer, 64, "none")
    evaluate = objective.evaluator(model.decoder)
    one, other = evaluate(model.params, tokens), evaluate(model.params, apart)
    assert one.said == other.said
    np.testing.assert_allclose(one.loss, other.loss, rtol=1e-5)
    by_letters = data.encode_for(texts, model, "letters")
    assert by_letters.firsts is not None
    np.testing.assert_allclose(by_letters.weights, [1 / 5, 1 / 8, 1 / 5, 1 / 8], rtol=1e-6)


def test_choices_that_are_the_same_tokens_are_refused(model):
    from tokenizers import normalizers

    texts = data.Texts(["a"], (), [0], [], [("b", " b", "b ")])
    assert len(data.encode_for(texts, model).sequences) == 3
    tokenizer = tokenizing.from_gguf(tiny_model.sentence_piece_metadata())
    tokenizer.normalizer = normalizers.Lowercase()
    same = data.Texts(["a"], (), [0], [], [("b", "B")])
    with pytest.raises(ValueError, match=r"choices must be different tokens, got \('b', 'B'\)"):
        data.encode(same, tokenizer, 64)


def test_some_of_the_examples_keep_their_choices(model, tmp_path):
    texts = data.load_whole(written(tmp_path / "a.jsonl", *QUESTIONS))
    tokens = data.encode_for(texts, model)
    some, apart = tokens.take([2, 0]), data.encode_for(texts.take([2, 0]), model)
    for field in dataclasses.fields(tokens):
        one, other = getattr(some, field.name), getattr(apart, field.name)
        assert (one is None) == (other is None)
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert some.lengths.tolist() == tokens.lengths[[2, 0]].tolist()


@pytest.mark.slow
def test_states_of_frozen_layers_stand_for_every_choice_and_answer(model, tmp_path):
    questions = data.load_whole(written(tmp_path / "a.jsonl", *QUESTIONS))
    talks = data.load_whole(written(tmp_path / "b.jsonl", {"messages": [U, A, U, A]}))
    below, above = loading.split(model, 1)
    for texts in (questions, talks):
        tokens = data.encode_for(texts, model)
        cached = states.with_states(below, tokens, tmp_path / "states", progress=False)
        whole = objective.evaluator(model.decoder)(model.params, tokens)
        last = objective.evaluator(above.decoder)(above.params, cached.take(range(len(tokens))))
        np.testing.assert_allclose(last.loss, whole.loss, rtol=1e-5)
        assert last.said == whole.said


def test_states_are_computed_of_what_is_asked_for(model, tmp_path):
    texts = data.load_whole(written(tmp_path / "a.jsonl", *questions(6)))
    tokens, (below, _) = data.encode_for(texts, model), loading.split(model, 1)

    def with_states(folder, *batches):
        asked = [np.array(batch) for batch in batches] or None
        return states.with_states(below, tokens, tmp_path / folder, asked, progress=False).states

    few, more = with_states("few", [4, 1]), with_states("more", [4, 1], [1, 3])
    every = with_states("every")
    for place in tokens.rows([4, 1]):
        np.testing.assert_array_equal(few[place], more[place])  # a longer run reads the same bits
        np.testing.assert_allclose(few[place], every[place], rtol=1e-4, atol=1e-5)
        assert few[place].shape == (len(tokens.sequences[place]), every.width)
    for place in tokens.rows([3]):
        assert more[place].any()
        with pytest.raises(
            IndexError, match=f"must be of a sequence that was asked for, got {place}"
        ):
            few[place]


# --- Runs


def config(model, source, folder, **changes):
    usual = {
        "steps": 2, "batch_size": 4, "max_tokens": 64, "eval_every": 1, "density": 0.125,
        "checkpoint_every": 1, "dev_examples": 0, "test_examples": 0,
    }  # fmt: skip
    return Config(str(model.path), str(folder), data=source, **{**usual, **changes})


def talks(count):
    return [{"messages": [U, {**A, "content": f"was {i}"}, U, A]} for i in range(count)]


def questions(count):
    return [{**QUESTIONS[i % 3], "prompt": f"It {i}"} for i in range(count)]


@pytest.mark.parametrize("examples", [talks, pytest.param(questions, marks=pytest.mark.slow)])
def test_a_run_learns_and_reports(model, tmp_path, examples):
    source = written(tmp_path / "a.jsonl", *examples(12))
    dev = written(tmp_path / "dev.jsonl", *examples(3))
    chosen = config(model, source, tmp_path / "run", dev=dev, normalise="tokens")
    outcome = training.train(model, chosen, progress=False)
    outputs.write(chosen, outcome, 1.0)
    assert outcome.examples == {"train": 11, "dev": 3, "test": 1}
    assert np.isfinite(outcome.after.loss)
    assert bool(outcome.after.said) == (examples is questions)
    used = json.loads((tmp_path / "run" / "outcome.json").read_text())["settings"]
    assert (used["dev"], used["normalise"]) == (dev, "tokens") and "test" not in used
    assert (tmp_path / "run" / "report.md").is_file()


def test_a_run_from_before_a_setting_was_there_goes_on(model, tmp_path):
    chosen = config(model, "reviews", tmp_path / "run")
    with Folder(chosen) as folder:
        folder.begin()
    path = tmp_path / "run" / "config.json"
    older = json.loads(path.read_text())
    for name in ("dev", "test", "normalise"):
        del older[name]
    path.write_text(json.dumps(older))
    with Folder(chosen):
        pass
    changed = dataclasses.replace(chosen, normalise="tokens")
    with (
        pytest.raises(ValueError, match="another normalise, 'none' instead of 'tokens'"),
        Folder(changed),
    ):
        pass


def test_the_scoring_command_says_and_writes(model, tmp_path, capsys):
    source, output = written(tmp_path / "a.jsonl", *QUESTIONS), tmp_path / "out" / "b.jsonl"
    score.main(score.Asked(str(model.path), data=source, output=str(output)))
    found = [json.loads(line) for line in output.read_text().splitlines()]
    right = np.mean([one["right"] for one in found])
    loss = np.mean([one["loss"] for one in found])
    assert f"3 examples of {source}: {right:.1%} of the answers right, mean loss {loss:.4f}" in (
        capsys.readouterr().out
    )
    assert [one["prompt"] for one in found] == ["It was", "a + b", "It"]

    words = written(
        tmp_path / "c.jsonl", {"prompt": "It was", "choices": [" great", " terrible"], "answer": 0}
    )
    (line,) = score.lines(score.Asked(str(model.path), data=words), progress=False)
    texts = data.load_whole(words)
    np.testing.assert_allclose(
        line["log_probabilities"], by_hand(model, texts, "none")[0], rtol=1e-4
    )
    assert line["tokens"] == [1, 1]

    for one in ({"prompt": "It", "completion": " was great"}, {"messages": [U, A]}):
        source = written(tmp_path / "d.jsonl", one)
        (line,) = score.lines(score.Asked(str(model.path), data=source), progress=False)
        tokens = data.encode_for(data.load_whole(source), model)
        scores = objective.evaluator(model.decoder)(model.params, tokens)
        np.testing.assert_allclose((line["right"], line["loss"]), scores[:2], rtol=1e-5)
        counted = len(tokens.sequences[0]) - tokens.begins[0]
        assert line["tokens"] == (2 if "prompt" in one else tokens.learnt[0].sum()) <= counted


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_damaged_files_are_read_or_refused(tmp_path, name):
    table = 'prompt,choices,answer\n"a\nb","[""c"", ""d""]",1\n'
    talk = {"messages": [U, {**A, "weight": 1}], "tools": [{}], "chat_template_kwargs": {}}
    whole = (table if name == "a.csv" else lines(talk, talk)).encode()
    rng, refused = np.random.default_rng(0), 0
    for _ in range(500):
        content = bytearray(whole)
        for place in rng.integers(0, len(whole), rng.integers(1, 4)):
            content[place] = rng.choice(list(b'{}[]":,0\n\\x\xff\x00'))
        (tmp_path / name).write_bytes(content[: rng.integers(1, len(content) + 40)])
        try:
            data.load_whole(str(tmp_path / name))
        except ValueError as error:
            refused += 1
            assert name in str(error)
    assert refused > 100


def test_settings_name_what_the_data_know():
    assert settings.Normalise == data.Normalise
