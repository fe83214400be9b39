"""Examples of text, of JSON objects as lines of JSON or rows of a table hold them."""

from collections.abc import Iterable
from typing import Any

from experiments.finetune.data import chats
from experiments.finetune.data.texts import Chat, Texts

__all__ = ["collect", "is_text"]


def collect(objects: Iterable[tuple[str, Any]]) -> Texts:
    """Examples of JSON objects, all of one kind.

    Args:
      objects: of each the file and the line, and the object: {"prompt", "completion"}, {"prompt",
        "choices", "answer"}, or a conversation, see `chats`.

    Raises:
      ValueError: an object says something else, or is of another kind than the first.

    Example:
      >>> collect([("line 1", {"prompt": "2 + 2 =", "choices": [" 4", " five"], "answer": 0})])
      Texts(prompts=['2 + 2 ='], choices=(' 4', ' five'), answers=[0], completions=[], options=(),
            chats=())
    """
    found: dict[str, list[Any]] = {"completions": [], "choices": [], "conversations": []}
    first = ""
    for place, one in objects:
        kind, example = _example(one, place)
        first = first or kind
        if kind != first:
            raise ValueError(f"{place}: has {kind}, where the lines before have {first}.")
        found[kind].append(example)
    if found["conversations"]:
        told = list(map(chats.told, found["conversations"]))
        return Texts(told, (), [], [], chats=found["conversations"])
    if found["choices"]:
        prompts, options, answers = map(list, zip(*found["choices"], strict=True))
        shared = options[0] if len(set(options)) == 1 else ()
        return Texts(prompts, shared, answers, [], options=() if shared else options)
    prompts, completions = map(list, zip(*found["completions"], strict=True))
    return Texts(prompts, (), [], completions)


def is_text(text: Any) -> bool:
    """Whether something is a string that UTF-8 holds: JSON may name half of a character.

    Example:
      >>> is_text("film"), is_text(chr(0xD800)), is_text(3)
      (True, False, False)
    """
    return isinstance(text, str) and not any("\ud800" <= letter <= "\udfff" for letter in text)


def _example(one: Any, place: str) -> tuple[str, Chat | tuple[Any, ...]]:
    """The kind of an object, and what it holds."""
    if isinstance(one, dict) and chats.is_chat(one):
        if not _is_utf_8(one):
            raise ValueError(f"{place}: holds half of a character, which is no UTF-8 text.")
        return "conversations", chats.of(one, place)
    if not isinstance(one, dict) or not is_text(one.get("prompt")):
        raise ValueError(f"{place}: wants a 'prompt', a string, or 'messages': {one!r:.60}.")
    if not one["prompt"].strip():
        raise ValueError(f"{place}: the prompt is empty.")
    choices = _choices(one, place)
    if choices:
        if "completion" in one:
            raise ValueError(f"{place}: has 'choices' and a 'completion': give one of them.")
        return "choices", (one["prompt"], choices, _answer(one.get("answer"), choices, place))
    if not is_text(one.get("completion")):
        raise ValueError(f"{place}: wants 'choices' and an 'answer', or a 'completion'.")
    if not one["completion"]:
        raise ValueError(f"{place}: the completion is empty.")
    return "completions", (one["prompt"], one["completion"])


def _choices(one: dict[str, Any], place: str) -> tuple[str, ...]:
    given = one.get("choices")
    if given is None or given == []:
        return ()
    if not isinstance(given, list) or not all(map(is_text, given)):
        raise ValueError(f"{place}: choices must be a list of strings, got {given!r:.60}.")
    if len(set(given)) < len(given) or not all(given):
        raise ValueError(f"{place}: choices must be different words, got {given!r:.60}.")
    return tuple(given)


def _answer(given: Any, choices: tuple[str, ...], place: str) -> int:
    """The number of the right choice, which is given as such or as its text."""
    if isinstance(given, str) and given in choices:
        return choices.index(given)
    if type(given) is not int or not 0 <= given < len(choices):
        raise ValueError(f"{place}: answer must be one of {choices}, got {given!r}.")
    return given


def _is_utf_8(one: Any) -> bool:
    """Whether all strings in a JSON object are text."""
    if isinstance(one, dict):
        return all(map(_is_utf_8, (*one, *one.values())))
    if isinstance(one, list):
        return all(map(_is_utf_8, one))
    return not isinstance(one, str) or is_text(one)
