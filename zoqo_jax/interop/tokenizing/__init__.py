"""Tokenizers from the metadata of GGUF files, made with the `tokenizers` package.

Byte-level byte-pair encoding ("gpt2": SmolLM2, Llama 3, Qwen 2 and 3, Mistral's "tekken") and
SentencePiece's ("llama": Llama 2, TinyLlama, Gemma, the first Mistral). Words are split, and tokens
of beginning and end added, as llama.cpp does it (src/llama-vocab.cpp): its defaults hold where the
metadata say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoqo_jax.interop.tokenizing import merges

__all__ = ["from_folder", "from_gguf"]

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # token types
_ENDS = {"gpt2": {"bos": 11, "eos": 11}, "llama": {"bos": 1, "eos": 2}}
"""The numbers of the tokens of beginning and end, by kind, where the metadata name none."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTIONS = "'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_BIG, _SMALL = r"[\p{L}&&[^a-z]]", r"[\p{L}&&[^A-Z]]"  # of ASCII's; all other letters are both
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_BIG}*{_SMALL}+|[^\r\n\p{{L}}\p{{N}}]?{_BIG}+{_SMALL}*|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"


class _Split(NamedTuple):
    """How text becomes words: what each pattern finds stands alone, and so does what is between."""

    patterns: tuple[str, ...]
    whole_words: bool = False  # a word that is a token is not put together of merges
    adds_bos: bool = False


_SPLITS = {
    "default": _Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _Split((_GPT2,)),
    "smollm": _Split((r"\p{N}", _GPT2)),
    "llama-bpe": _Split((_LLAMA3,), whole_words=True, adds_bos=True),
    "smaug-bpe": _Split((_LLAMA3,)),
    "qwen2": _Split((_QWEN2,)),
    "tekken": _Split((_TEKKEN,), whole_words=True, adds_bos=True),
}
_SPLITS |= {
    same: _SPLITS[name]
    for name, others in {
        "default": ("",),
        "smollm": ("starcoder", "refact", "command-r"),
        "llama-bpe": ("llama3", "llama-v3", "falcon3"),
        "qwen2": ("deepseek-r1-qwen", "stablelm2"),
    }.items()
    for same in others
}


def from_gguf(metadata: Mapping[str, Any]) -> Any:
    """The tokenizer that GGUF metadata describe, a `tokenizers.Tokenizer`; None if there is none.

    Of SentencePiece's tokens that have the same score, the one whose parts have smaller numbers is
    put together first, where llama.cpp takes the leftmost in the text; where all scores are the
    same, that would be every time, and the metadata are refused.

    Raises:
        ValueError: metadata that contradict each other, or a kind that is not read.
        ImportError: the `tokenizers` package is missing.

    Examples:
        >>> tokenizer = from_gguf({
        ...     "tokenizer.ggml.model": "gpt2",
        ...     "tokenizer.ggml.tokens": ["o", "n", "e", "on"],
        ...     "tokenizer.ggml.merges": ["o n"],
        ... })
        >>> tokenizer.encode("one").ids
        [3, 2]
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "no_vocab", "none"):
        return None
    if kind not in _ENDS:
        raise ValueError(f"tokenizer.ggml.model must be one of {tuple(_ENDS)}, got {kind!r:.40}.")
    package = _package()
    texts = _texts(metadata, "tokenizer.ggml.tokens")
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(texts)]
    if len(set(tokens)) < len(tokens):
        raise ValueError("tokenizer.ggml.tokens holds a token twice.")
    if kind == "gpt2":
        split = _split(metadata)
        tokenizer, adds_bos = _byte_level(package, metadata, tokens, split), split.adds_bos
    else:
        tokenizer, adds_bos = _sentence_piece(package, metadata, tokens), True
    types = _numbers(metadata, "tokenizer.ggml.token_type", len(tokens))
    special = [tokens[i] for i in np.flatnonzero((types == _CONTROL) | (types == _UNKNOWN))]
    added = [tokens[i] for i in np.flatnonzero(types == _USER_DEFINED)]
    plain = package.AddedToken
    tokenizer.add_special_tokens([plain(text, normalized=False, special=True) for text in special])
    tokenizer.add_tokens([plain(text, normalized=False) for text in added])
    ends = {
        name: number
        for name, adds in (("bos", adds_bos), ("eos", False))
        if (number := _end(metadata, name, adds, _ENDS[kind][name], len(tokens))) is not None
    }
    if ends:
        before, after = (["bos"] if "bos" in ends else []), (["eos"] if "eos" in ends else [])
        tokenizer.post_processor = package.processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", "$B:1", *after],
            special_tokens=[
                {"id": name, "ids": [number], "tokens": [tokens[number]]}
                for name, number in ends.items()
            ],
        )
    return tokenizer


def from_folder(path: Path) -> Any:
    """The tokenizer of a folder's `tokenizer.json`, a `tokenizers.Tokenizer`; None without one.

    Args:
        path: of the folder, or of a file in it.

    Raises:
        ValueError: the file describes no tokenizer.
        ImportError: the `tokenizers` package is missing.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     from_folder(Path(folder)) is None
        True
    """
    file = (path if path.is_dir() else path.parent) / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        return _package().Tokenizer.from_file(str(file))
    except ImportError:
        raise
    except Exception as error:  # the package raises bare exceptions
        raise ValueError(f"{file}: no tokenizer: {error}.") from error


def _end(
    metadata: Mapping[str, Any], name: str, otherwise: bool, usual: int, count: int
) -> int | None:
    """The number of the token of beginning ("bos") or end ("eos"), if texts get one."""
    asks, key = f"tokenizer.ggml.add_{name}_token", f"tokenizer.ggml.{name}_token_id"
    if not _flag(metadata, asks, otherwise):
        return None
    if key not in metadata and usual >= count:
        raise ValueError(f"{asks} is true, but there is no {key}.")
    return _number(metadata, key, count, usual)


def _split(metadata: Mapping[str, Any]) -> _Split:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _SPLITS:
        raise ValueError(
            f"tokenizer.ggml.pre must be one of {tuple(filter(None, _SPLITS))}, got {name!r:.40}."
        )
    return _SPLITS[name]


def _byte_level(
    package: Any, metadata: Mapping[str, Any], tokens: Sequence[str], split: _Split
) -> Any:
    pairs = []
    for line in _texts(metadata, "tokenizer.ggml.merges"):
        left, _, right = line.partition(" ")
        pairs.append((left, right))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = _checked(package, vocabulary, pairs, ignore_merges=split.whole_words)
    makers = package.pre_tokenizers
    steps = [makers.Split(package.Regex(pattern), "isolated") for pattern in split.patterns]
    steps.append(makers.ByteLevel(add_prefix_space=False, use_regex=False))
    tokenizer.pre_tokenizer = makers.Sequence(steps)
    tokenizer.decoder = package.decoders.ByteLevel()
    return tokenizer


def _sentence_piece(package: Any, metadata: Mapping[str, Any], tokens: Sequence[str]) -> Any:
    scores = _numbers(metadata, "tokenizer.ggml.scores", len(tokens))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = merges.of_scores(tokens, scores)
    unknown = tokens[_number(metadata, "tokenizer.ggml.unknown_token_id", len(tokens))]
    tokenizer = _checked(
        package, vocabulary, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    normal, decode = package.normalizers, package.decoders
    prefixed = _flag(metadata, "tokenizer.ggml.add_space_prefix", True)
    tokenizer.normalizer = normal.Sequence(
        [*([normal.Prepend("▁")] if prefixed else []), normal.Replace(" ", "▁")]
    )
    tokenizer.decoder = decode.Sequence(
        [
            decode.Replace("▁", " "),
            decode.ByteFallback(),
            decode.Fuse(),
            *([decode.Strip(" ", 1, 0)] if prefixed else []),
        ]
    )
    return tokenizer


def _checked(package: Any, vocabulary: dict[str, int], merges: Any, **settings: Any) -> Any:
    try:
        return package.Tokenizer(package.models.BPE(vocabulary, merges, **settings))
    except Exception as error:  # the package raises bare exceptions
        raise ValueError(f"the tokenizer's merges do not fit its tokens: {error}.") from error


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    texts = metadata.get(key)
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{key} must be a list of UTF-8 strings.")
    return texts


def _numbers(metadata: Mapping[str, Any], key: str, count: int) -> np.ndarray:
    numbers = metadata.get(key, np.zeros(count, np.int32))
    if not isinstance(numbers, np.ndarray) or numbers.shape != (count,):
        raise ValueError(f"{key} must hold {count} numbers, one for each token.")
    return numbers


def _number(metadata: Mapping[str, Any], key: str, count: int, otherwise: int = 0) -> int:
    number = metadata.get(key, otherwise)
    if not isinstance(number, int | np.integer) or not 0 <= number < count:
        raise ValueError(f"{key} must be the number of one of {count} tokens, got {number!r:.40}.")
    return int(number)


def _flag(metadata: Mapping[str, Any], key: str, otherwise: bool) -> bool:
    flag = metadata.get(key, otherwise)
    if not isinstance(flag, bool | np.bool_):
        raise ValueError(f"{key} must be a bool, got {flag!r:.40}.")
    return bool(flag)


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "tokenizers are made by the tokenizers package: pip install 'zoqo_jax[interop]' (or "
            "load with tokenizer=False)."
        ) from error
    return tokenizers
