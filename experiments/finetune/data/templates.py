"""Chat templates: how a model's makers write a conversation as text, in Jinja.

What a template is told, and how a conversation is put that it does not read as it is, follow
llama.cpp's server, so that a trained file reads there what it was trained on.
"""

from __future__ import annotations

import datetime
import secrets
from typing import Any, NamedTuple

from experiments.finetune.data.fitting import put, with_objects, without_system
from experiments.finetune.data.sandbox import MOST, compiled

__all__ = ["NOW", "Template", "Written"]

NOW = datetime.datetime(2024, 7, 26)
"""The day that templates are told it is, so that a run which goes on tomorrow reads the same: the
one that Llama 3's templates name themselves where nobody tells them."""

_WORD = "needle"
_NEEDLE = {"role": "user", "content": _WORD}


class Written(NamedTuple):
    """A conversation as text.

    Attributes:
      text: all of it.
      marked: where each answer begins and ends, if the template marks them; else None.
    """

    text: str
    marked: list[tuple[int, int]] | None


class Template:
    """A model's chat template.

    Args:
      source: in Jinja.
      bos: the text of the token of beginning, "" where the model has none.
      eos: of the token of end.
      now: what a template is told of the time.

    Raises:
      ValueError: it is no template.
      ImportError: the package jinja2 is missing.

    Example:
      >>> template = Template("{% for m in messages %}[{{ m.role }}] {{ m.content }}{{ eos_token }}"
      ...                     "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}",
      ...                     eos="<end>")
      >>> template.write([{"role": "user", "content": "Hi"}], asks=True).text
      '[user] Hi<end>[assistant] '
    """

    def __init__(
        self, source: str, bos: str = "", eos: str = "", now: datetime.datetime = NOW
    ) -> None:
        self._variables = {"bos_token": bos, "eos_token": eos, "enable_thinking": True}
        self._variables["date_string"] = now.strftime("%d %b %Y")
        self._mark = secrets.token_hex(8)
        self._template, self._error = compiled(source, self._marked, now)
        self._reads_parts: str | None = None  # found at the first conversation
        self._reads_system = True

    def write(
        self,
        messages: list[dict[str, Any]],
        *,
        tools: list[Any] | None = None,
        asks: bool = False,
        variables: dict[str, Any] | None = None,
    ) -> Written:
        """A conversation as text.

        Args:
          messages: {"role", "content"} each.
          tools: JSON schemas of functions.
          asks: whether the text goes on to where the assistant's next message begins.
          variables: what else the template is given.

        Raises:
          ValueError: the template refuses the conversation, or fails.
        """
        given = {"tools": tools, "add_generation_prompt": asks, **(variables or {})}
        fitting = self._fitting(messages)
        try:
            text = self._render(with_objects(fitting), given)
        except ValueError:
            if fitting == with_objects(fitting):
                raise
            text = self._render(fitting, given)  # which reads a call's arguments as text
        pieces = text.split(self._mark)
        if len(pieces) == 1:
            return Written(text, None)
        ends = [sum(map(len, pieces[:i])) for i in range(1, len(pieces))]
        return Written("".join(pieces), list(zip(ends[::2], ends[1::2], strict=True)))

    def _marked(self, text: str) -> str:
        """What stands in a template's {% generation %} block, with marks round it."""
        return f"{self._mark}{text}{self._mark}"

    def _render(self, messages: list[dict[str, Any]], given: dict[str, Any]) -> str:
        pieces, length = [], 0
        try:
            for piece in self._template.generate(messages=messages, **{**self._variables, **given}):
                pieces.append(piece)
                length += len(piece)
                if length > MOST:
                    raise ValueError(f"it writes more than {MOST:,} letters")
        except (self._error, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
                RecursionError) as error:  # fmt: skip
            words = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"the model's chat template refuses it: {words[:200]}.") from error
        return "".join(pieces)

    def _fitting(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages as the template reads them: contents, and who may speak."""
        if self._reads_parts is None:
            self._reads_parts = self._find_parts()
            self._reads_system = self._find_system()
        if not self._reads_system:
            messages = without_system(messages)
        return [put(message, self._reads_parts) for message in messages]

    def _find_parts(self) -> str:
        """What contents may be: "text", "parts" or "both"."""
        as_text, as_parts = (self._tried([put(_NEEDLE, how)]) for how in ("text", "parts"))
        is_read = _WORD in as_parts and "'text'" not in as_parts and '"text"' not in as_parts
        if not is_read:
            return "text"
        return "both" if _WORD in as_text else "parts"

    def _find_system(self) -> bool:
        """Whether it reads a system message. Of templates that refuse all it is of no matter."""
        how = self._reads_parts
        user = put({**_NEEDLE, "content": "Hi"}, how)
        system = {**put(_NEEDLE, how), "role": "system"}
        return not self._tried([user]) or _WORD in self._tried([system, user])

    def _tried(self, messages: list[dict[str, Any]]) -> str:
        try:
            return self._render(messages, {"tools": None, "add_generation_prompt": True})
        except ValueError:
            return ""
