"""Tokenizers of GGUF files, beside llama.cpp: words, and tokens of beginning and end.

Reported of kindred projects: ggml-org/llama.cpp 3966 and 4040 (tokens of beginning and end),
ggml-org/llama.cpp 4081 and karpathy/llama2.c 180 (spaces of SentencePiece).
"""

import json
import urllib.request

import numpy as np
import pytest
import tiny_model

from zoqo_jax.interop import gguf, tokenizing

GGML = "tokenizer.ggml."
TEXTS = (
    "", "It was great", "  two  spaces ", "tab\there\n\n\nlines \r\n x\n y", "12345 67 and 890123",
    "don't DON'T it's IT'S we'Ll ſ 'ſ", "日本語 🙂 café", "$1+2=3 <a>^~|`x` !!!...??", "½٣٤Ⅻ²",
    "<s>hi</s> yo<s>z", "<unk> a", " ", " a", "a ", " nbsp em ", "x\n", "\n", "a\t\tb  \n  c",
    "it's (good), isn't-it?",
)  # fmt: skip


def byte_level(**changes):
    """Tokens of all bytes, of a few merges, "<s>", 263, and "</s>", 264."""
    from tokenizers.pre_tokenizers import ByteLevel

    merges = ["Ġ a", "1 2", "12 3", "' s", "! !", ". .", ". ..", "Ċ Ċ"]
    tokens = sorted(ByteLevel.alphabet())
    tokens += [*(merge.replace(" ", "") for merge in merges[:-1]), "<s>", "</s>", "ĊĊ"]
    types = np.ones(len(tokens), np.int32)
    types[-3:-1] = 3
    named = {f"{GGML}{name}": value for name, value in changes.items() if value is not None}
    return {
        f"{GGML}model": "gpt2", f"{GGML}tokens": tokens, f"{GGML}token_type": types,
        f"{GGML}merges": merges, **named,
    }  # fmt: skip


def sentence_piece(**changes):
    named = {f"{GGML}{name}": value for name, value in changes.items() if value is not None}
    return tiny_model.sentence_piece_metadata() | named


BOS, EOS = np.uint32(263), np.uint32(264)
IDS = {"bos_token_id": BOS, "eos_token_id": EOS}
SETTINGS = {
    "no pre": byte_level(),
    "empty pre": byte_level(pre=""),
    **{name: byte_level(pre=name, **IDS) for name in tokenizing._SPLITS if name},
    "without a bos id": byte_level(pre="llama-bpe"),
    "bos off": byte_level(pre="llama-bpe", add_bos_token=False, **IDS),
    "eos on": byte_level(pre="llama-bpe", add_eos_token=True, **IDS),
    "both on": byte_level(pre="smollm", add_bos_token=True, add_eos_token=True, **IDS),
    "both on, no ids": byte_level(pre="smollm", add_bos_token=True, add_eos_token=True),
    "sentence piece": sentence_piece(bos_token_id=np.uint32(1)),
    "sentence piece without a bos id": sentence_piece(),
    "sentence piece, bos off": sentence_piece(add_bos_token=False),
    "sentence piece, eos on": sentence_piece(add_eos_token=True),
    "sentence piece, no space": sentence_piece(add_space_prefix=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_tokens_are_those_of_llama_cpp(name, tmp_path):
    pytest.importorskip("xllamacpp")
    from experiments.finetune import llama_cpp

    path = tiny_model.write_model(tmp_path / "tiny.gguf", words=SETTINGS[name])
    server = llama_cpp.serve(str(path))  # which ends with its last reference
    ours = gguf.load(path).tokenizer

    def asked(text):
        question = {"content": text, "add_special": True, "parse_special": True}
        address = f"{server.listening_address}/tokenize"
        request = urllib.request.Request(address, json.dumps(question).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["tokens"]

    assert {text: ours.encode(text).ids for text in TEXTS} == {text: asked(text) for text in TEXTS}


def encoded(metadata, text):
    return tokenizing.from_gguf(metadata).encode(text).ids


def test_tokens_of_beginning_and_end_are_added_where_llama_cpp_adds_them():
    """llama.cpp #4040 and #7898."""
    a = encoded(byte_level(), "a")
    assert len(a) == 1
    for name, expected in {
        "llama-bpe": [BOS, *a],
        "without a bos id": [11, *a],  # llama.cpp's default
        "bos off": a,
        "eos on": [BOS, *a, EOS],
        "smollm": a,
        "qwen2": a,
        "both on": [BOS, *a, EOS],
        "both on, no ids": [11, *a, 11],
    }.items():
        assert encoded(SETTINGS[name], "a") == expected, name
    piece = sentence_piece()[f"{GGML}tokens"].index
    for name, expected in {
        "sentence piece": [1, piece("▁"), piece("a")],
        "sentence piece without a bos id": [1, piece("▁"), piece("a")],  # and never <unk>, 0
        "sentence piece, bos off": [piece("▁"), piece("a")],
        "sentence piece, eos on": [1, piece("▁"), piece("a"), 2],
        "sentence piece, no space": [1, piece("a")],
    }.items():
        assert encoded(SETTINGS[name], "a") == expected, name
    without = tokenizing.from_gguf(SETTINGS["both on"]).encode("a", add_special_tokens=False)
    assert without.ids == a


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no pre", ["it", "'", "s", "Ġ", "123", "45", "!?"]),
        ("default", ["it", "'", "s", "Ġ", "123", "45", "!?"]),
        ("gpt-2", ["it", "'s", "Ġ12345", "!?"]),
        ("smollm", ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "!?"]),
        ("llama-bpe", ["it", "'s", "Ġ", "123", "45", "!?"]),
        ("qwen2", ["it", "'s", "Ġ", "1", "2", "3", "4", "5", "!?"]),
    ],
)
def test_words_are_split_as_llama_cpp_splits_them(name, words):
    splitter = tokenizing.from_gguf(SETTINGS[name]).pre_tokenizer
    assert [word for word, _ in splitter.pre_tokenize_str("it's 12345!?")] == words


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (byte_level(add_bos_token=np.uint8(1)), "add_bos_token must be a bool, got np.uint8"),
        (sentence_piece(add_space_prefix="no"), "add_space_prefix must be a bool, got 'no'"),
        (byte_level(pre="llama-bpe", bos_token_id=np.uint32(999)), "one of 266 tokens, got"),
        (sentence_piece(scores=np.zeros(372, np.float32)), "scores must differ"),
    ],
)
def test_metadata_of_tokenizers_that_are_not_clear_are_refused(metadata, message):
    with pytest.raises(ValueError, match=message):
        tokenizing.from_gguf(metadata)


def test_a_token_of_beginning_that_no_vocabulary_has_is_refused():
    words = {
        f"{GGML}model": "gpt2", f"{GGML}pre": "llama-bpe", f"{GGML}tokens": ["a"],
        f"{GGML}merges": [],
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"add_bos_token is true, but there is no .*bos_token_id"):
        tokenizing.from_gguf(words)
    words[f"{GGML}add_bos_token"] = False
    assert encoded(words, "a") == [0]
