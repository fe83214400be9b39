"""Where a model's chat template is, and the tokens of beginning and end that it writes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from experiments.finetune.data.templates import Template
from experiments.finetune.data.texts import Chat

__all__ = ["Templates", "of"]

_KEY = "tokenizer.chat_template"
_USUAL = {"gpt2": (11, 11), "llama": (1, 2), "gemma4": (2, 1)}
"""llama.cpp's tokens of beginning and end, by the tokenizer's kind, where metadata name none."""


class Templates(NamedTuple):
    """A model's chat templates.

    Attributes:
      usual: of conversations.
      with_tools: of those with functions to call; None where it is the same.
    """

    usual: Template
    with_tools: Template | None

    def fitting(self, chat: Chat) -> Template:
        """The template of a conversation."""
        return self.with_tools if self.with_tools is not None and chat.tools else self.usual


def of(path: Path, metadata: Mapping[str, Any], tokenizer: Any) -> Templates:
    """The chat templates of a model.

    Args:
      path: of its GGUF file, or of its folder, which has them in chat_template.jinja, or in
        tokenizer_config.json or chat_template.json.
      metadata: of the GGUF file, which has them as tokenizer.chat_template.
      tokenizer: a `tokenizers.Tokenizer`.

    Raises:
      ValueError: there is none, or what is there is none.
    """
    sources, (bos, eos) = _of_folder(path) if path.is_dir() else _of_gguf(metadata)
    if isinstance(bos, int):
        bos = tokenizer.id_to_token(bos) or ""
    if isinstance(eos, int):
        eos = tokenizer.id_to_token(eos) or ""
    if "default" not in sources:
        named = f" but {', '.join(map(repr, sorted(sources)))}" if sources else ""
        raise ValueError(
            f"model: {path} has no chat template{named}, which conversations need: take the "
            "model's instruct version, or write prompts and completions as text, "
            '{"prompt": ..., "completion": ...}.'
        )
    for name, source in sources.items():
        if not isinstance(source, str):
            raise ValueError(f"model: {path}: chat template {name!r} is no text: {source!r:.60}.")
    with_tools = sources.get("tool_use")
    return Templates(
        Template(sources["default"], bos, eos),
        None if with_tools is None else Template(with_tools, bos, eos),
    )


def _of_gguf(metadata: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Any, Any]]:
    """Templates by name, and the tokens of beginning and end."""
    sources = {
        key.removeprefix(f"{_KEY}."): value
        for key, value in metadata.items()
        if key.startswith(f"{_KEY}.")
    }
    if _KEY in metadata:
        sources["default"] = metadata[_KEY]
    usual = _USUAL.get(metadata.get("tokenizer.ggml.model", ""), (None, None))
    ends = []
    for name, otherwise in zip(("bos", "eos"), usual, strict=True):
        number = metadata.get(f"tokenizer.ggml.{name}_token_id", otherwise)
        tokens = metadata.get("tokenizer.ggml.tokens", ())
        is_one = number is not None and 0 <= int(number) < len(tokens)
        ends.append(tokens[int(number)] if is_one else "")
    return sources, (ends[0], ends[1])


def _of_folder(folder: Path) -> tuple[dict[str, Any], tuple[Any, Any]]:
    """The same of a folder, as transformers finds it."""
    settings = _json(folder / "tokenizer_config.json")
    sources: dict[str, Any] = {}
    given = settings.get("chat_template") or _json(folder / "chat_template.json").get(
        "chat_template"
    )
    if isinstance(given, list):
        for one in given:
            if not isinstance(one, dict) or not isinstance(one.get("name"), str):
                raise ValueError(f"{folder}: a chat_template has no name: {one!r:.60}.")
            sources[one["name"]] = one.get("template")
    elif given is not None:
        sources["default"] = given
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        sources[path.stem] = _text(path)
    if (folder / "chat_template.jinja").is_file():
        sources["default"] = _text(folder / "chat_template.jinja")
    numbers = _json(folder / "config.json")
    ends = []
    for name in ("bos_token", "eos_token"):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        number = numbers.get(f"{name}_id")
        number = number[0] if isinstance(number, list) and number else number
        ends.append(token if isinstance(token, str) else number if type(number) is int else "")
    return sources, (ends[0], ends[1])


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be an object, got {found!r:.60}.")
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: no UTF-8 text.") from error
