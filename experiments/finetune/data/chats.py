"""Conversations, a JSON object each, as OpenAI's fine-tuning and Hugging Face's TRL have them.

- {"messages": [{"role", "content"}, ...]}, with "weight": 0 at answers that are not to be learnt
  and "tools" beside the messages (platform.openai.com/docs/guides/supervised-fine-tuning);
- {"prompt": [messages], "completion": [messages]}, of which the completion's answers are learnt
  (huggingface.co/docs/trl/dataset_formats), "chat_template_kwargs" beside them;
- {"conversations": [{"from": "human" or "gpt", "value"}, ...]}, as ShareGPT's were kept.
"""

import json
from typing import Any

from experiments.finetune.data.texts import Chat

__all__ = ["is_chat", "of", "told"]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SPEAKERS = {"human": "user", "gpt": "assistant", "system": "system", "tool": "tool"}
_NOT_READ = {
    "functions": "describe them in 'tools'",
    "function_call": "describe it in 'tool_calls'",
    "chosen": "preferences are not learnt here",
    "rejected": "preferences are not learnt here",
    "images": "only text is read",
    "audio": "only text is read",
}


def is_chat(one: dict[str, Any]) -> bool:
    """Whether a JSON object is a conversation.

    Example:
      >>> is_chat({"prompt": [{"role": "user", "content": "Hi"}]}), is_chat({"prompt": "Hi"})
      (True, False)
    """
    if "messages" in one or "conversations" in one:
        return True
    return any(isinstance(one.get(name), list) for name in ("prompt", "completion"))


def of(one: dict[str, Any], place: str) -> Chat:
    """The conversation of a JSON object, checked. Names that say nothing of it are read over.

    Args:
      one: the object.
      place: the file and the line, for messages about it.

    Raises:
      ValueError: it is none of the three, or has no answer to learn.

    Example:
      >>> chat = of({"messages": [{"role": "user", "content": "2 + 2?"},
      ...                         {"role": "assistant", "content": "4"}]}, "a.jsonl, line 1")
      >>> chat.learnt
      [False, True]
    """
    for name, instead in _NOT_READ.items():
        if one.get(name) is not None:
            raise ValueError(f"{place}: {name!r} is not read: {instead}.")
    # Some data sets keep a prompt as text beside its messages, too.
    names = ("messages", "conversations", "prompt", "completion")
    kinds = [name for name in names if isinstance(one.get(name), list)]
    if len(kinds) > 1 and kinds != ["prompt", "completion"]:
        raise ValueError(f"{place}: has {kinds[0]!r} and {kinds[1]!r}: give one of them.")
    if {"prompt", "completion"} & set(kinds):
        before = _messages(one, "prompt", place)
        after = _messages(one, "completion", place)
        if before[-1]["role"] == "assistant":
            raise ValueError(f"{place}: the prompt's last message must not be the assistant's.")
        messages, at_least = before + after, len(before)
    else:
        messages, at_least = _messages(one, (*kinds, "messages")[0], place), 0
    learnt = [
        _weight(message, place, number) and number > at_least
        for number, message in enumerate(messages, 1)
    ]
    if not any(learnt):
        raise ValueError(f"{place}: wants a message of the assistant to learn, and has none.")
    variables = one.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise ValueError(f"{place}: chat_template_kwargs must be an object, got {variables!r:.60}.")
    return Chat(messages, learnt, _tools(one.get("tools"), place), variables, place)


def told(chat: Chat) -> str:
    """The messages of a conversation, a line each, for a reader.

    Example:
      >>> told(Chat([{"role": "user", "content": "2 + 2?"}], [False]))
      'user: 2 + 2?'
    """
    lines = []
    for message in chat.messages:
        content = message["content"]
        if isinstance(content, list):
            content = "\n".join(part["text"] for part in content)
        calls = message.get("tool_calls")
        more = f" {json.dumps(calls, ensure_ascii=False)}" if calls else ""
        lines.append(f"{message['role']}: {content}{more}")
    return "\n".join(lines)


def _messages(one: dict[str, Any], name: str, place: str) -> list[dict[str, Any]]:
    given = one.get(name)
    if not isinstance(given, list) or not given:
        raise ValueError(f"{place}: {name!r} must be a list of messages, got {given!r:.60}.")
    return [_message(x, f"{place}, {name} {i}") for i, x in enumerate(given, 1)]


def _message(given: Any, place: str) -> dict[str, Any]:
    """A message with a role, a content that is a string or parts of text, and no empty names."""
    if not isinstance(given, dict):
        raise ValueError(f"{place}: wants an object with 'role' and 'content', got {given!r:.60}.")
    one = {name: x for name, x in given.items() if x is not None}
    if "role" not in one and "from" in one:
        role = one.pop("from")
        one = {"role": _SPEAKERS.get(role, role) if isinstance(role, str) else role, **one}
        one["content"] = one.pop("value", None)
    if one.get("role") not in _ROLES:
        raise ValueError(f"{place}: role must be one of {_ROLES}, got {one.get('role')!r:.60}.")
    calls = one.get("tool_calls")
    if calls is not None and (not isinstance(calls, list) or not calls):
        raise ValueError(f"{place}: tool_calls must be a list of calls, got {calls!r:.60}.")
    content = one.get("content", "" if calls else None)
    if isinstance(content, list):
        content = [_part(part, place) for part in content]
        is_empty = not any(part["text"] for part in content)
    elif isinstance(content, str):
        is_empty = not content
    else:
        raise ValueError(f"{place}: content must be text, got {content!r:.60}.")
    if is_empty and one["role"] == "assistant" and not calls:
        raise ValueError(f"{place}: the assistant says nothing.")
    return {**one, "content": content}


def _part(part: Any, place: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, dict) else part
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"{place}: parts of a content must be text, got {kind!r:.60}.")
    return {"type": "text", "text": part["text"]}


def _weight(message: dict[str, Any], place: str, number: int) -> bool:
    """Whether a message is to be learnt; its weight is taken out."""
    weight = message.pop("weight", 1)
    if weight not in (0, 1) or isinstance(weight, str):
        raise ValueError(f"{place}, message {number}: weight must be 0 or 1, got {weight!r:.60}.")
    return message["role"] == "assistant" and bool(weight)


def _tools(given: Any, place: str) -> list[Any] | None:
    """A list of JSON schemas, which tables of columns keep as text."""
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise ValueError(f"{place}: tools hold no JSON: {error}.") from error
    if given is not None and not isinstance(given, list):
        raise ValueError(f"{place}: tools must be a list, got {given!r:.60}.")
    return given or None
