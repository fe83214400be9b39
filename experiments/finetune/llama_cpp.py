"""What llama.cpp says with a GGUF file, beside what we say with it.

    python -m experiments.finetune.llama_cpp --model=run/model.gguf --data=reviews

asks both the same dev examples, and prints both accuracies and how many answers are the same. It
needs the package xllamacpp, a build of llama.cpp.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments import command, settings
from experiments.finetune import data, objective
from experiments.finetune.models import loading

__all__ = ["Asked", "Both", "answers", "compare", "serve"]


@dataclasses.dataclass(frozen=True)
class Asked:
    """What to ask whom.

    Attributes:
      model: a GGUF file, such as `model.gguf` of a run, or "smollm2", the file that `make finetune`
        installs.
      data: as for `experiments.finetune`; examples with choices of one token each.
      dev: a file of dev examples; empty: they are among those of `data`.
      examples: how many dev examples; 0: all.
      seed: of which.
    """

    model: str
    data: str = "reviews"
    dev: str = ""
    examples: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what nothing later would refuse."""
        settings.check(self, least={"examples": 0, "seed": 0})


class Both(NamedTuple):
    """How two programs answered the same examples: fractions of them.

    Attributes:
      ours: accuracy.
      theirs: accuracy of llama.cpp.
      same: that got the same answer.
      count: examples.
    """

    ours: float
    theirs: float
    same: float
    count: int


def compare(asked: Asked, *, progress: bool = True) -> Both:
    """Ask both.

    Args:
      asked: what, and of which file.
      progress: whether to show a progress bar.

    Raises:
      ValueError: examples without choices, or a file that is none of GGUF.
      ImportError: xllamacpp is not installed.
    """
    checkpoint = loading.load(asked.model)
    if checkpoint.path.is_dir():
        raise ValueError(f"model must be a GGUF file, got the folder {checkpoint.path}.")
    source = asked.dev or asked.data
    texts = data.load_whole(source, "dev") if asked.dev else data.load(source, "dev")
    texts = texts.sample(asked.examples, asked.seed)
    if texts.kind != "choices":
        raise ValueError(f"data must have choices, {source} has {texts.kind}.")
    tokens = data.encode_for(texts, checkpoint)
    if not len(tokens.words):
        raise ValueError(f"data must have choices of one token each, {source} has longer ones.")
    ours = objective.evaluator(checkpoint.decoder)(checkpoint.params, tokens)
    prompts = [ids.tolist() for ids in tokens.sequences]
    theirs = answers(str(checkpoint.path), prompts, tokens.words.tolist(), progress=progress)
    right = [said == answer for said, answer in zip(theirs, texts.answers, strict=True)]
    same = [said == our for said, our in zip(theirs, ours.said, strict=True)]
    count = len(theirs)
    return Both(ours.accuracy, sum(right) / count, sum(same) / count, count)


def answers(
    path: str, prompts: Sequence[list[int]], words: Sequence[int], *, progress: bool = True
) -> list[int]:
    """The number of the word that llama.cpp finds likeliest after each prompt.

    Args:
      path: of a GGUF file.
      prompts: tokens of what comes before.
      words: tokens to choose from.
      progress: whether to show a progress bar.
    """
    server = serve(path)
    # All of the words gain as much, so that the likeliest of them is the likeliest of all.
    bias = [[word, 100.0] for word in words]
    question = {"n_predict": 1, "temperature": 0, "n_probs": 1, "logit_bias": bias}
    said = []
    for prompt in tqdm(prompts, desc="llama.cpp", unit="example", disable=not progress):
        answer = server.handle_completions({"prompt": prompt, **question})
        (first,) = answer["choices"][0]["logprobs"]["content"][:1]
        said.append(list(words).index(first["id"]))
    return said


def serve(path: str) -> Any:
    """A server of llama.cpp with a GGUF file, in this process."""
    try:
        import xllamacpp
    except ImportError as error:
        raise ImportError("llama.cpp is asked through xllamacpp: pip install xllamacpp.") from error
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = path, 2048, 1
    return xllamacpp.Server(params)


def main(asked: Asked) -> None:
    """Compare, and say how."""
    try:
        both = compare(asked)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{both.count} dev examples: ours {both.ours:.1%}, llama.cpp {both.theirs:.1%}; "
        f"{both.same:.1%} of the answers are the same"
    )


if __name__ == "__main__":
    command.run(main, Asked, about=__doc__ or "")
