"""Conversations as tokens: which of them hold an assistant's answers.

A template may write the token of beginning, and the tokenizer add it: llama.cpp's server takes the
template's away then, and so is it done here, so that there is one.
"""

import dataclasses
from typing import Any

import numpy as np

from experiments.finetune.data import model_templates, turns
from experiments.finetune.data.texts import Texts
from experiments.finetune.data.tokens import Tokens, checked

__all__ = ["of"]


def of(texts: Texts, tokenizer: Any, window: int, templates: model_templates.Templates) -> Tokens:
    """Conversations as tokens, of which answers are learnt.

    Args:
      texts: the examples.
      tokenizer: a `tokenizers.Tokenizer`.
      window: the most tokens that the model reads.
      templates: the model's.

    Raises:
      ValueError: a conversation that the template refuses, or that is longer than the window.
    """
    chats = texts.chats
    written = [turns.of(templates.fitting(chat), chat) for chat in chats]
    origins = [i for i, some in enumerate(written) for _ in some]
    flat = [_bare(one, *_added(tokenizer)) for some in written for one in some]
    encodings = tokenizer.encode_batch([one.text for one in flat])
    added = tokenizer.get_added_tokens_decoder().items()
    ends = np.array([number for number, token in added if token.special], int)
    learnt = [_learnt(encoding, one, ends) for encoding, one in zip(encodings, flat, strict=True)]
    for i, some in zip(origins, learnt, strict=True):
        if not some.any():
            raise ValueError(f"{chats[i].place}: answers must have tokens, and have none.")
    begins = [int(np.flatnonzero(some)[0]) for some in learnt]
    prompts, places = ([x[i] for i in origins] for x in (texts.prompts, [c.place for c in chats]))
    ids = [one.ids for one in encodings]
    tokens = checked(prompts, ids, begins, window, places=places)
    return dataclasses.replace(tokens, learnt=learnt, origins=np.array(origins, np.int32))


def _added(tokenizer: Any) -> tuple[str, str]:
    """The texts of the tokens that a tokenizer puts before and after all that it reads."""
    encoding = tokenizer.encode("a")
    is_added = np.array(encoding.special_tokens_mask, bool)
    texts, last = encoding.tokens, len(is_added) - 1
    before = texts[0] if is_added[0] and last else ""
    return before, texts[last] if is_added[last] and last else ""


def _bare(one: turns.Turns, before: str, after: str) -> turns.Turns:
    """A text without the token of beginning, and of end, that the tokenizer adds: there is one."""
    text, spans = one
    if before and text.startswith(before):
        text = text.removeprefix(before)
        spans = [(max(0, a - len(before)), b - len(before)) for a, b in spans]
    if after and text.endswith(after):
        text = text.removesuffix(after)
    return turns.Turns(text, spans)


def _learnt(encoding: Any, one: turns.Turns, ends: np.ndarray) -> np.ndarray:
    """Of each token whether it holds any of an answer, with the token that ends its turn.

    White space after that token is the template's, and nothing that a model is asked to write.
    """
    offsets, is_added = np.array(encoding.offsets), np.array(encoding.special_tokens_mask, bool)
    is_end = np.isin(encoding.ids, ends)
    found = np.zeros(len(offsets), bool)
    for begin, end in one.spans:
        places = np.flatnonzero((offsets[:, 1] > begin) & (offsets[:, 0] < end) & ~is_added)
        last = places[is_end[places]][-1:]
        if len(last) and not one.text[offsets[last[0], 1] : end].strip():
            places = places[places <= last[0]]
        found[places] = True
    if is_added[-1] and one.spans[-1][1] >= len(one.text):
        found[-1] = True
    return found
