"""Examples of text as tokens.

A tokenizer may put a space before all that it reads, as SentencePiece's do, or join the end of a
prompt and what follows. Both are therefore read together, as llama.cpp reads them, and a completion
begins with the first token that holds any of it.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from experiments.finetune.data import answers, model_templates
from experiments.finetune.data.texts import Texts
from experiments.finetune.data.tokens import Tokens, checked

__all__ = ["Normalise", "encode", "encode_for"]

Normalise = Literal["none", "tokens", "letters"]


def encode_for(texts: Texts, model: Any, normalise: Normalise = "none") -> Tokens:
    """Examples as tokens of a model, which writes conversations by its own template.

    Args:
      texts: the examples.
      model: a `Checkpoint`.
      normalise: as of `encode`.

    Raises:
      ValueError: as `encode`, or conversations for a model without a template.
    """
    if model.tokenizer is None:
        raise ValueError("model: it comes without a tokenizer.")
    templates = None
    if texts.chats:
        templates = model_templates.of(model.path, model.metadata, model.tokenizer)
    window = model.architecture.context
    return encode(texts, model.tokenizer, window, normalise=normalise, templates=templates)


def encode(
    texts: Texts,
    tokenizer: Any,
    window: int,
    *,
    normalise: Normalise = "none",
    templates: model_templates.Templates | None = None,
) -> Tokens:
    """Examples as tokens, those of prompt and completion, or choice, as one text.

    Choices that are one token each, the same after each prompt, are chosen from at the prompt's
    end; all others are read apart, each after its prompt.

    Args:
      texts: the examples.
      tokenizer: a `tokenizers.Tokenizer`.
      window: the most tokens that the model reads.
      normalise: what the log-probability of a choice is divided by: nothing, its "tokens", or its
        "letters" (white space round it not counted).
      templates: the model's, for conversations.

    Raises:
      ValueError: no tokenizer, choices that are the same tokens, a conversation that the template
        refuses, or an example longer than the window; named.
    """
    if tokenizer is None:
        raise ValueError("model: it comes without a tokenizer.")
    if texts.kind == "conversations":
        if templates is None:
            raise ValueError("templates must be given for conversations.")
        return answers.of(texts, tokenizer, window, templates)
    if texts.kind == "completions":
        pairs = list(zip(texts.prompts, texts.completions, strict=True))
        return checked(texts.prompts, *_joined(pairs, tokenizer), window)
    if texts.choices and normalise != "letters" and (found := _words(texts, tokenizer)):
        sequences, words = found
        begins = [len(ids) for ids in sequences]
        tokens = checked(texts.prompts, sequences, begins, window, is_prompt=True)
        right = np.array(texts.answers, np.int32)
        return dataclasses.replace(tokens, answers=right, words=np.array(words, np.int32))
    return _apart(texts, tokenizer, window, normalise)


def _words(texts: Texts, tokenizer: Any) -> tuple[list[list[int]], list[int]] | None:
    """Prompts as tokens, and the token of each choice; None where choices are not one token each.

    Raises:
      ValueError: two choices are the same token.
    """
    sequences: list[list[int]] = []
    words = []
    for choice in texts.choices:
        joined, begins = _joined(
            [(prompt, choice) for prompt in texts.prompts], tokenizer, ends=False
        )
        if any(len(ids) - begin != 1 for ids, begin in zip(joined, begins, strict=True)):
            return None
        found = {ids[-1] for ids in joined}
        before = [ids[:-1] for ids in joined]
        sequences = sequences or before
        if len(found) > 1 or before != sequences:
            return None
        words += found
    if len(set(words)) < len(words):
        raise ValueError(f"choices must be different tokens, got {texts.choices}.")
    return sequences, words


def _apart(texts: Texts, tokenizer: Any, window: int, normalise: Normalise) -> Tokens:
    """Prompts with each of their choices."""
    counts = [len(texts.of(i)) for i in range(len(texts.prompts))]
    pairs = [(prompt, one) for i, prompt in enumerate(texts.prompts) for one in texts.of(i)]
    tokens = checked(
        [prompt for prompt, _ in pairs], *_joined(pairs, tokenizer, ends=False), window
    )
    firsts = np.cumsum([0, *counts], dtype=np.int32)
    for i, prompt in enumerate(texts.prompts):
        rows = tokens.sequences[firsts[i] : firsts[i + 1]]
        if len({ids.tobytes() for ids in rows}) < len(rows):
            raise ValueError(
                f"choices must be different tokens, got {texts.of(i)} after {prompt[-40:]!r}."
            )
    sizes = np.ones(len(pairs))
    if normalise == "tokens":
        sizes = np.array([len(ids) for ids in tokens.sequences]) - tokens.begins
    elif normalise == "letters":
        sizes = np.array([max(1, len(one.strip())) for _, one in pairs])
    right, weights = np.array(texts.answers, np.int32), (1 / sizes).astype(np.float32)
    return dataclasses.replace(tokens, answers=right, firsts=firsts, weights=weights)


def _joined(
    pairs: Sequence[tuple[str, str]], tokenizer: Any, *, ends: bool = True
) -> tuple[list[list[int]], list[int]]:
    """Prompts with what follows them as tokens, and where that begins.

    Without `ends`, a token that the tokenizer puts after every text is left out.
    """
    sequences, begins = [], []
    encodings = tokenizer.encode_batch([prompt + rest for prompt, rest in pairs])
    for (prompt, _), encoding in zip(pairs, encodings, strict=True):
        stops = [stop for _, stop in encoding.offsets]
        ours = [i for i, added in enumerate(encoding.special_tokens_mask) if not added]
        last = ours[-1] + 1 if ours else 0
        of_rest = [i for i in ours if stops[i] > len(prompt)]
        sequences.append(encoding.ids if ends else encoding.ids[:last])
        begins.append(of_rest[0] if of_rest else last)
    return sequences, begins
