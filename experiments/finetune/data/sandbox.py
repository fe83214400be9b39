"""Jinja, as chat templates want it: they are code of strangers, which may fill no memory.

Names and layout are those of transformers' apply_chat_template
(huggingface.co/docs/transformers/chat_templating_writing).
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable
from typing import Any

__all__ = ["MOST", "compiled"]

MOST = 4_000_000
"""Letters of a conversation, or of a string on the way to it."""


def compiled(
    source: str, marked: Callable[[str], str], now: datetime.datetime
) -> tuple[Any, type[Exception]]:
    """A template that can be rendered, and what it raises.

    Args:
      source: in Jinja, as transformers reads it.
      marked: what becomes of the text in a {% generation %} block.
      now: what it is told of the time.

    Raises:
      ValueError: it is no template.
      ImportError: the package jinja2 is missing.
    """
    try:
        import jinja2
        from jinja2 import ext, nodes, sandbox
    except ImportError as error:
        raise ImportError(
            "chat templates are read by jinja2: pip install 'zoqo_jax[experiments]'."
        ) from error

    class Generation(ext.Extension):
        """{% generation %} ... {% endgeneration %} stands round what an assistant says."""

        tags = {"generation"}  # noqa: RUF012, as Jinja reads it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_said"), [], [], body).set_lineno(line)

        def _said(self, caller: Callable[[], str]) -> str:
            return marked(caller())

    class Sandbox(sandbox.ImmutableSandboxedEnvironment):
        """A sandbox in which a few letters of template do not fill the memory."""

        intercepted_binops = frozenset({"*", "**"})

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(x) for x in (left, right) if isinstance(x, str | list | tuple)]
            counts = [abs(x) for x in (left, right) if isinstance(x, int | float)]
            is_large = max(counts, default=0) * max(sizes, default=0) > MOST
            if is_large or (operator == "**" and max(counts, default=0) > 1000):
                raise jinja2.exceptions.SecurityError(f"{operator} makes too much")
            return super().call_binop(context, operator, left, right)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def as_json(x: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, **layout)

    environment = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals.pop("lipsum", None)
    environment.globals |= {"raise_exception": refuse, "strftime_now": now.strftime}
    try:
        return environment.from_string(source), jinja2.TemplateError
    except (jinja2.TemplateError, RecursionError) as error:
        raise ValueError(f"the model's chat template is no Jinja: {error}.") from error
