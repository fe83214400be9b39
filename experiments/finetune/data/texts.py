"""Examples as text: prompts with a choice of answers, prompts to be completed, conversations."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

__all__ = ["SENTIMENT", "Chat", "Split", "Texts"]

Split = Literal["train", "dev", "test"]

SENTIMENT = (" terrible", " great")
"""The words that follow "SENTENCE It was", as in MeZO (Malladi et al., 2023, arXiv 2305.17333)."""


class Chat(NamedTuple):
    """A conversation.

    Attributes:
      messages: {"role": ..., "content": ...} each, and whatever else the model's template reads.
      learnt: of each message, whether it is an answer to learn.
      tools: JSON schemas of functions that the assistant may call; None where there are none.
      variables: what else the template is given, by name.
      place: the file and the line, for messages about it.
    """

    messages: list[dict[str, Any]]
    learnt: list[bool]
    tools: list[Any] | None = None
    variables: dict[str, Any] = {}  # noqa: RUF012, a NamedTuple's default that nobody changes
    place: str = "conversation"


class Texts(NamedTuple):
    """Examples as text, all of one kind.

    Attributes:
      prompts: what the model reads; of a conversation its messages, a line each.
      choices: the texts of which one is right, where they are the same for all prompts; else empty.
      answers: the number of the right one, for each prompt; empty without choices.
      completions: what should follow each prompt; empty for other kinds.
      options: the choices of each prompt, where they differ; else empty.
      chats: the conversations; empty for other kinds.
    """

    prompts: list[str]
    choices: tuple[str, ...]
    answers: list[int]
    completions: list[str]
    options: Sequence[tuple[str, ...]] = ()
    chats: Sequence[Chat] = ()

    @property
    def kind(self) -> str:
        """What the examples are: "choices", "conversations" or "completions"."""
        if self.chats:
            return "conversations"
        return "choices" if self.choices or self.options else "completions"

    def of(self, place: int) -> tuple[str, ...]:
        """The choices of one prompt.

        Example:
          >>> Texts(["2 + 2 =", "sky"], (), [0, 1], [], [(" 4", " 5"), (" red", " blue")]).of(1)
          (' red', ' blue')
        """
        return self.options[place] if self.options else self.choices

    def sample(self, count: int, seed: int = 0) -> "Texts":
        """So many examples at random, as files are often sorted by label; 0: all, in order."""
        if not count:
            return self
        order = np.random.default_rng(seed).permutation(len(self.prompts))
        return self.take(order[:count])

    def take(self, places: Sequence[int] | np.ndarray) -> "Texts":
        """Some of the examples."""

        def some(values: Sequence[Any]) -> list[Any]:
            return [values[i] for i in places] if values else []

        answers, completions = some(self.answers), some(self.completions)
        options, chats = some(self.options), some(self.chats)
        prompts = [self.prompts[i] for i in places]
        return Texts(prompts, self.choices, answers, completions, options or (), chats or ())

    def compared(self, before: Sequence[int], after: Sequence[int]) -> dict[str, list[int]]:
        """The places where answers became right, became wrong, and stayed wrong.

        Args:
          before: the numbers of the choices that a model made.
          after: and later.
        """
        groups: dict[str, list[int]] = {"learned": [], "forgotten": [], "still wrong": []}
        for place, (was, now, right) in enumerate(zip(before, after, self.answers, strict=False)):
            if now == right != was:
                groups["learned"].append(place)
            elif now != right:
                groups["forgotten" if was == right else "still wrong"].append(place)
        return groups
