"""How likely a model finds answers that are given: lists of choices, completions, conversations.

    python -m experiments.finetune.score --model=run/model.gguf --data=questions.jsonl

reads {"prompt", "choices", "answer"} a line, where a choice may be several words and every line may
have its own, and says how often the likeliest is the right one, and the mean loss (cross-entropy
among the choices). Of {"prompt", "completion"} and of conversations it says how often the likeliest
token is the right one, and the mean loss over a completion's tokens.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments import command, settings
from experiments.command import say
from experiments.finetune.config import Normalise

__all__ = ["Asked", "lines", "main"]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What to score.

    Attributes:
      model: a GGUF file, a folder of safetensors, or a name, as for `experiments.finetune`.
      data: a file of examples, of which all are read; or another source of examples, as for
        `experiments.finetune`, whose test examples are.
      output: a file for the figures of every example, a line of JSON each; empty: none.
      normalise: what the log-probability of a choice is divided by before choices are compared:
        "none", its "tokens", or its "letters".
      examples: how many, at random; 0: all.
      seed: of which.
      batch_size: sequences that are read at once; each choice of several tokens is one.

    Raises:
      ValueError: a setting outside what is said above.
    """

    model: str
    data: str = "reviews"
    output: str = ""
    normalise: Normalise = "none"
    examples: int = 0
    seed: int = 0
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Refuse what nothing later would refuse."""
        settings.check(self, least={"examples": 0, "seed": 0, "batch_size": 1})


def lines(asked: Asked, *, progress: bool = True) -> list[dict[str, Any]]:
    """What there is to say of every example.

    Args:
      asked: what to score.
      progress: whether to show a progress bar.

    Returns:
      Of each example "right" (1 or 0; of completions the fraction of tokens that are the
      likeliest) and "loss", nats. Beside them what was asked and, of choices, "log_probabilities",
      nats, before they are divided, "tokens" of each, and the number that the model "said". A
      conversation that is several examples, as its template has it, has a line for each.

    Raises:
      ValueError: a model or examples that cannot be read.
    """
    from experiments.finetune import data
    from experiments.finetune.models import loading

    model = loading.load(asked.model)
    texts = data.load_whole(asked.data).sample(asked.examples, asked.seed)
    tokens = data.encode_for(texts, model, asked.normalise)
    read = _of_choices if texts.kind == "choices" else _of_completions
    return list(read(model, texts, tokens, _batches(tokens, asked.batch_size, progress)))


def _batches(tokens: Any, size: int, progress: bool) -> Iterator[tuple[np.ndarray, int]]:
    """The places of batches, and how many are not there twice."""
    from tqdm import tqdm

    from experiments.finetune import data, objective

    bar = tqdm(total=len(tokens), desc="scoring", unit="example", disable=not progress)
    with bar:
        for places, count in data.in_order(tokens.lengths, objective.size_of(tokens, size)):
            yield places, count
            bar.update(count)


def _of_choices(
    model: Any, texts: Any, tokens: Any, batches: Iterator[tuple[np.ndarray, int]]
) -> Iterator[dict[str, Any]]:
    from experiments.finetune import objective
    from experiments.finetune.programs import programs

    read = programs(objective.log_probabilities(model.decoder))
    scores: dict[int, np.ndarray] = {}
    for places, count in batches:
        found = read(model.params, objective.batch_of(tokens, places))
        scores |= dict(zip(places[:count].tolist(), np.asarray(found, float), strict=False))
    for i, prompt in enumerate(texts.prompts):
        choices, answer = texts.of(i), texts.answers[i]
        of_each, divisors, sizes = scores[i][: len(choices)], 1.0, [1] * len(choices)
        if tokens.firsts is not None:
            rows = slice(tokens.firsts[i], tokens.firsts[i + 1])
            divisors = 1 / tokens.weights[rows].astype(float)
            sizes = [len(ids) for ids in tokens.sequences[rows]] - tokens.begins[rows]
        yield {
            "prompt": prompt,
            "choices": list(choices),
            "answer": answer,
            "said": int(of_each.argmax()),
            "right": int(of_each.argmax() == answer),
            "loss": float(np.logaddexp.reduce(of_each) - of_each[answer]),
            "log_probabilities": (of_each * divisors).tolist(),
            "tokens": list(map(int, sizes)),
        }


def _of_completions(
    model: Any, texts: Any, tokens: Any, batches: Iterator[tuple[np.ndarray, int]]
) -> Iterator[dict[str, Any]]:
    from experiments.finetune import objective
    from experiments.finetune.programs import programs

    read = programs(objective.answers(model.decoder))
    found: dict[int, tuple[float, float]] = {}
    for places, count in batches:
        losses, right, _ = read(model.params, objective.batch_of(tokens, places))
        pairs = zip(losses.tolist(), right.tolist(), strict=True)
        found |= dict(zip(places[:count].tolist(), pairs, strict=False))
    for i in range(len(tokens)):
        place = i if tokens.origins is None else int(tokens.origins[i])
        asked: dict[str, Any] = {"prompt": texts.prompts[place]}
        if texts.kind == "conversations":
            asked = {"messages": texts.chats[place].messages}
            count = int(tokens.learnt[i].sum())
        else:
            asked |= {"completion": texts.completions[place]}
            count = len(tokens.sequences[i]) - int(tokens.begins[i])
        yield {**asked, "tokens": count, "right": found[i][1], "loss": found[i][0]}


def main(asked: Asked) -> None:
    """Score, and say how well."""
    say(f"scoring {asked.data} by {asked.model}: loading JAX")
    from experiments.files import writable, write_text

    output = writable("output", Path(asked.output)) if asked.output else None
    found = lines(asked)
    right, loss = (float(np.mean([one[name] for one in found])) for name in ("right", "loss"))
    if output is not None:
        texts = (json.dumps(one, ensure_ascii=False) for one in found)
        write_text(output, "".join(f"{text}\n" for text in texts))
    count = f"{len(found):,} example{'s' * (len(found) > 1)} of {asked.data}"
    what = "answers" if "choices" in found[0] else "tokens"
    where = f"; wrote {output}" if output else ""
    print(f"{count}: {right:.1%} of the {what} right, mean loss {loss:.4f} nats{where}")


if __name__ == "__main__":
    command.run(main, Asked, about=__doc__ or "")
