"""Tokenizers from the metadata of GGUF files, made with the `tokenizers` package.

Byte-level byte-pair encoding ("gpt2": SmolLM2, Llama 3, Qwen2) and SentencePiece's ("llama": Llama
2, TinyLlama), split into words as llama.cpp splits them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

__all__ = ["from_gguf"]

_CONTROL, _USER_DEFINED = 3, 4  # token types
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}"
_WORDS: dict[str, tuple[str | None, bool]] = {
    # How words are split (None: as GPT-2 does), and whether digits stand alone.
    "default": (None, False),
    "gpt-2": (None, False),
    "smollm": (None, True),
    "llama-bpe": (_LLAMA3, False),
    "llama3": (_LLAMA3, False),
    "qwen2": (_QWEN2, False),
}


def from_gguf(metadata: Mapping[str, Any]) -> Any:
    """The tokenizer that GGUF metadata describe, a `tokenizers.Tokenizer`; None if there is none.

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
    if kind is None or kind == "no_vocab":
        return None
    makers = {"gpt2": _byte_level, "llama": _sentence_piece}
    if kind not in makers:
        raise ValueError(f"tokenizer.ggml.model must be one of {tuple(makers)}, got {kind!r:.40}.")
    package = _package()
    tokens = _texts(metadata, "tokenizer.ggml.tokens")
    if len(set(tokens)) < len(tokens):
        raise ValueError("tokenizer.ggml.tokens holds a token twice.")
    tokenizer = makers[kind](package, metadata, tokens)
    types = _numbers(metadata, "tokenizer.ggml.token_type", len(tokens))
    special = [tokens[i] for i in np.flatnonzero(types == _CONTROL)]
    added = [tokens[i] for i in np.flatnonzero(types == _USER_DEFINED)]
    plain = package.AddedToken
    tokenizer.add_special_tokens([plain(text, normalized=False, special=True) for text in special])
    tokenizer.add_tokens([plain(text, normalized=False) for text in added])
    if metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        number = _number(metadata, "tokenizer.ggml.bos_token_id", len(tokens))
        bos = tokens[number]
        tokenizer.post_processor = package.processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", "$B:1"], special_tokens=[(bos, number)]
        )
    return tokenizer


def _byte_level(package: Any, metadata: Mapping[str, Any], tokens: Sequence[str]) -> Any:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if name not in _WORDS:
        raise ValueError(f"tokenizer.ggml.pre must be one of {tuple(_WORDS)}, got {name!r:.40}.")
    merges = []
    for line in _texts(metadata, "tokenizer.ggml.merges"):
        left, _, right = line.partition(" ")
        merges.append((left, right))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = _checked(package, vocabulary, merges, ignore_merges=name in ("llama-bpe", "llama3"))
    pattern, digits = _WORDS[name]
    split = package.pre_tokenizers
    steps = [split.Digits(individual_digits=True)] if digits else []
    if pattern is not None:
        steps.append(split.Split(package.Regex(pattern), "isolated"))
    steps.append(split.ByteLevel(add_prefix_space=False, use_regex=pattern is None))
    tokenizer.pre_tokenizer = split.Sequence(steps)
    tokenizer.decoder = package.decoders.ByteLevel()
    return tokenizer


def _sentence_piece(package: Any, metadata: Mapping[str, Any], tokens: Sequence[str]) -> Any:
    scores = _numbers(metadata, "tokenizer.ggml.scores", len(tokens))
    vocabulary = {token: i for i, token in enumerate(tokens)}
    found = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):  # every way of making the token of two others
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                found.append((-score, vocabulary[left], vocabulary[right], left, right))
    merges = [pair[3:] for pair in sorted(found)]
    unknown = tokens[_number(metadata, "tokenizer.ggml.unknown_token_id", len(tokens))]
    tokenizer = _checked(
        package, vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True
    )
    normal, decode = package.normalizers, package.decoders
    prefixed = metadata.get("tokenizer.ggml.add_space_prefix", True)
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


def _number(metadata: Mapping[str, Any], key: str, count: int) -> int:
    number = metadata.get(key, 0)
    if not isinstance(number, int | np.integer) or not 0 <= number < count:
        raise ValueError(f"{key} must be the number of one of {count} tokens, got {number!r:.40}.")
    return int(number)


def _package() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "tokenizers are made by the tokenizers package: pip install 'zoqo_jax[interop]' (or "
            "load with tokenizer=False)."
        ) from error
    return tokenizers
