"""Messages as a template reads them: not all read a system message, parts of text, or JSON text.

Where they do not, messages are put as llama.cpp puts them
(github.com/ggml-org/llama.cpp/blob/master/common/chat.cpp).
"""

import json
from typing import Any

__all__ = ["put", "with_objects", "without_system"]


def put(message: dict[str, Any], how: str) -> dict[str, Any]:
    """A message with its content as "text", as "parts", or as it is ("both").

    Example:
      >>> put({"role": "user", "content": "Hi"}, "parts")
      {'role': 'user', 'content': [{'type': 'text', 'text': 'Hi'}]}
    """
    content = message["content"]
    if how == "text" and isinstance(content, list):
        return {**message, "content": "\n".join(part["text"] for part in content)}
    if how == "parts" and isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    return message


def without_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    r"""Messages with what the system says before what the user says next.

    Example:
      >>> without_system([{"role": "system", "content": "Be brief."},
      ...                 {"role": "user", "content": "Hi"}])
      [{'role': 'user', 'content': 'Be brief.\nHi'}]
    """
    found, said = [], ""
    for message in messages:
        text = put(message, "text")["content"]
        if message["role"] in ("system", "developer"):
            said += f"{text}\n"
        elif said and message["role"] == "user":
            found.append({**message, "content": f"{said}{text}"})
            said = ""
        else:
            found.append(message)
    if said:
        found.append({"role": "user", "content": said[:-1]})
    return found


def with_objects(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose calls have their arguments as objects: OpenAI's have them as JSON text.

    Example:
      >>> call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
      >>> message = {"role": "assistant", "content": "", "tool_calls": [call]}
      >>> with_objects([message])[0]["tool_calls"][0]["function"]
      {'name': 'add', 'arguments': {'a': 1}}
    """

    def read(call: Any) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
            return call
        try:
            arguments = json.loads(function["arguments"])
        except ValueError:
            return call
        return {**call, "function": {**function, "arguments": arguments}}

    return [
        {**one, "tool_calls": list(map(read, one["tool_calls"]))} if "tool_calls" in one else one
        for one in messages
    ]
