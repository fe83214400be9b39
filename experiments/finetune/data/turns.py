"""What a conversation's assistant says, found in the text that a template makes of it.

Where an answer begins is where the text of all messages before it ends, with the template's own
beginning of an answer; and it ends where the text of it and the messages before it does. Nothing
is searched for, so that an answer may say anything.

A template may write a message otherwise once more messages follow: Qwen 3's drops what earlier
answers thought. Such a conversation becomes one example for each answer, as the model will read it.
"""

from itertools import takewhile
from typing import Any, NamedTuple

from experiments.finetune.data.templates import Template, Written
from experiments.finetune.data.texts import Chat

__all__ = ["Turns", "of"]


class Turns(NamedTuple):
    """A conversation as text.

    Attributes:
      text: all of it, to the end of its last answer that is learnt.
      spans: where each answer that is learnt begins and ends.
    """

    text: str
    spans: list[tuple[int, int]]


def of(template: Template, chat: Chat) -> list[Turns]:
    """A conversation as text: one, or one for each answer, see above.

    Args:
      template: of the model.
      chat: the conversation.

    Raises:
      ValueError: the template refuses it, or begins an answer otherwise than it writes one.

    Example:
      >>> template = Template("{% for m in messages %}[{{ m.role }}] {{ m.content }};{% endfor %}"
      ...                     "{% if add_generation_prompt %}[assistant] {% endif %}")
      >>> chat = Chat([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}],
      ...             [False, True])
      >>> of(template, chat)
      [Turns(text='[user] Hi;[assistant] Yes?;', spans=[(22, 27)])]
    """
    try:
        return _of(template, chat)
    except ValueError as error:
        raise ValueError(f"{chat.place}: {error}") from error


def _of(template: Template, chat: Chat) -> list[Turns]:
    learnt = [place for place, is_learnt in enumerate(chat.learnt) if is_learnt]

    def written(count: int, asks: bool = False, **variables: Any) -> Written:
        messages, variables = chat.messages[:count], variables | chat.variables
        return template.write(messages, tools=chat.tools, asks=asks, variables=variables)

    whole, marked = written(learnt[-1] + 1)
    if marked is not None:
        return [Turns(whole, _of_marks(chat, learnt, marked))]
    turns = []
    for place in learnt:
        text = whole if place == learnt[-1] else written(place + 1).text
        begin = written(place, asks=True).text
        if not text.startswith(begin):  # answers without thoughts may begin otherwise
            unthinking = written(place, asks=True, enable_thinking=False).text
            begin = unthinking if text.startswith(unthinking) else begin
        turns.append(Turns(text, [(_checked(begin, text, place + 1), len(text))]))
    if all(whole.startswith(turn.text) for turn in turns):
        return [Turns(whole, [span for turn in turns for span in turn.spans])]
    return turns


def _checked(begin: str, text: str, number: int) -> int:
    """Where a message begins in a text, which must go on from where the message is asked for."""
    if not text.startswith(begin):
        same = takewhile(lambda pair: pair[0] == pair[1], zip(begin, text, strict=False))
        common = sum(1 for _ in same)
        raise ValueError(
            f"the model's chat template begins an answer with {begin[common:][:40]!r}, but writes "
            f"{text[common:][:40]!r} for message {number}: what is learnt would not be what is "
            "asked. Write prompts and completions as text."
        )
    if len(text) == len(begin):
        raise ValueError(f"the model's chat template leaves out message {number}.")
    return len(begin)


def _of_marks(
    chat: Chat, learnt: list[int], marked: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The spans that the template marked, of the messages that are learnt."""
    messages = chat.messages[: learnt[-1] + 1]
    spoken = [place for place, one in enumerate(messages) if one["role"] == "assistant"]
    if spoken == learnt:
        return marked
    if len(marked) != len(spoken):
        raise ValueError(
            f"the model's chat template marks {len(marked)} spans in {len(spoken)} answers, so "
            "that those with weight 0 cannot be told from the others."
        )
    return [span for place, span in zip(spoken, marked, strict=True) if place in learnt]
