"""What a conversation's assistant says, found in the text that a template makes of it.

Where an answer begins is where the text of all messages before it ends, with the template's own
beginning of an answer; and it ends where the text of it and the messages before it does. Nothing
is searched for, so that an answer may say anything.

A template may write a message otherwise once more messages follow: Qwen 3's drops what earlier
answers thought. Such a conversation becomes one example for each answer, as the model will read it.
"""

from itertools import takewhile
from typing import NamedTuple

from experiments.finetune.data.templates import Template
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

    def written(count: int, asks: bool = False) -> str:
        return template.write(
            chat.messages[:count], tools=chat.tools, asks=asks, variables=chat.variables
        ).text

    whole, marked = template.write(
        chat.messages[: learnt[-1] + 1], tools=chat.tools, variables=chat.variables
    )
    if marked is not None:
        return [Turns(whole, _of_marks(chat, learnt, marked))]
    turns = []
    for place in learnt:
        text = whole if place == learnt[-1] else written(place + 1)
        begin = written(place, asks=True)
        if not text.startswith(begin):
            common = sum(
                1 for _ in takewhile(lambda x: x[0] == x[1], zip(begin, text, strict=False))
            )
            raise ValueError(
                f"the model's chat template begins an answer with {begin[common:][:40]!r}, but "
                f"writes {text[common:][:40]!r} for message {place + 1}: what is learnt would not "
                "be what is asked. Write prompts and completions as text."
            )
        if len(text) == len(begin):
            raise ValueError(f"the model's chat template leaves out message {place + 1}.")
        turns.append(Turns(text, [(len(begin), len(text))]))
    if all(whole.startswith(turn.text) for turn in turns):
        return [Turns(whole, [span for turn in turns for span in turn.spans])]
    return turns


def _of_marks(
    chat: Chat, learnt: list[int], marked: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """The spans that the template marked, of the messages that are learnt."""
    messages = chat.messages[: learnt[-1] + 1]
    spoken = [place for place, one in enumerate(messages) if one["role"] == "assistant"]
    if len(marked) != len(spoken):
        raise ValueError(
            f"the model's chat template marks {len(marked)} answers of {len(spoken)}: there must "
            "be one {% generation %} block for each."
        )
    return [span for place, span in zip(spoken, marked, strict=True) if place in learnt]
