"""The first picture of the README: a 4-bit file before and after training in place.

    python -m experiments.finetune.picture --run=results/finetune

reads what `make finetune` left in that folder, writes what the picture needs of it to
experiments/finetune/results/film_reviews.json, and draws docs/finetune/in_place.png. Without
`--run` it draws what that file has.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from experiments import command, drawing
from experiments.command import say
from experiments.files import read_json, writable, write_json
from experiments.finetune import data
from experiments.finetune.models import places as files

__all__ = ["draw", "summary"]

_ROOT = Path(__file__).resolve().parents[2]
_SUMMARY = Path(__file__).resolve().parent / "results" / "film_reviews.json"
_LONGEST = 70  # letters of a sentence that is shown
_SHOWN = {"learned": 3, "forgotten": 1}


@dataclasses.dataclass(frozen=True)
class Places:
    """Where things are.

    Attributes:
      run: the folder of a finished run of GGUF codes in place; empty: draw the last one again.
      output: the picture.
    """

    run: str = ""
    output: str = str(_ROOT / "docs" / "finetune" / "in_place.png")


def summary(run: Path) -> dict[str, Any]:
    """What a finished run left: scores, the file before and after, sentences it now answers.

    Args:
      run: the folder; its settings must be `--train=codes` of a GGUF file and examples with a
        choice of words.

    Raises:
      FileNotFoundError: the run is not finished, or is none of codes in place of a GGUF file.
    """
    names = ("config", "outcome", "before", "after")
    config, outcome, *scores = (json.loads((run / f"{name}.json").read_text()) for name in names)
    own = config.get("test", "")
    texts = data.load_whole(own, "test") if own else data.load(config["data"], "test")
    texts = texts.sample(config["test_examples"], config["seed"])
    base, trained = files.find(config["model"]), run / "model.gguf"
    passes = {0: 0, **{line["step"]: line["forward_passes"] for line in outcome["history"]}}
    return {
        "scores": {when: outcome[when] for when in ("before", "after")},
        "kept_after": passes[outcome["best_step"]],
        "dev_examples": config["dev_examples"],
        "test_examples": len(texts.prompts),
        "history": [
            {name: line[name] for name in ("forward_passes", "dev_loss", "dev_accuracy")}
            for line in outcome["history"]
        ],
        "answers": _answers(texts, *(one["said"] for one in scores)),
        "file": _compared(base, trained),
    }


def _answers(texts: data.Texts, before: list[int], after: list[int]) -> dict[str, Any]:
    """How many answers became right, became wrong, and stayed wrong, and the first short ones."""
    groups = texts.compared(before, after)
    shown = []
    for name, count in _SHOWN.items():
        short = [i for i in groups[name] if len(texts.prompts[i]) <= _LONGEST]
        for i in short[:count]:
            words = [texts.choices[number].strip() for number in (before[i], after[i])]
            shown.append([name, texts.prompts[i], *words])
    return {"counts": {name: len(group) for name, group in groups.items()}, "shown": shown}


def _compared(base: Path, trained: Path) -> dict[str, Any]:
    """Two GGUF files: their sizes, how many codes differ, and whether anything else does."""
    import jax  # which drawing alone does not need

    import zoqo_jax as zq
    from zoqo_jax.interop import gguf

    old, new = (gguf.load(path, tokenizer=False).tensors for path in (base, trained))
    codes = moved = by_one = others = 0
    for name, tensor in old.items():
        if not zq.is_quantized(tensor):
            others += not np.array_equal(tensor, new[name])
            continue
        steps = np.abs(np.asarray(new[name].codes, int) - np.asarray(tensor.codes, int))
        codes, moved = codes + steps.size, moved + int((steps > 0).sum())
        by_one += int((steps == 1).sum())
        rest = [jax.tree.leaves((array.scale, array.offset)) for array in (tensor, new[name])]
        others += not all(map(np.array_equal, *rest))
    return {
        "bytes": [path.stat().st_size for path in (base, trained)],
        "codes": codes,
        "moved": moved,
        "by_one": by_one,
        "other_tensors_changed": others,
    }


def draw(found: dict[str, Any], memory: tuple[float, float], path: Path) -> None:
    """Draw what a run left.

    Args:
      found: `summary`.
      memory: MiB at the peak of a process that answers, and of one that trains.
      path: of the picture.
    """
    from matplotlib.figure import Figure

    fig = Figure(figsize=(10.6, 4.9), layout="constrained")
    upper, lower = fig.subfigures(2, 1, height_ratios=(1.55, 1.0))
    left, right = upper.subplots(1, 2, width_ratios=(1.5, 1.0))
    _draw_scores(left, found)
    _draw_bytes(right, found, memory)
    _draw_answers(lower.subplots(), found)
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=150)


def _draw_scores(axis: Any, found: dict[str, Any]) -> None:
    history, scores = found["history"], found["scores"]
    passes = [line["forward_passes"] for line in history]
    looks = f"{found['dev_examples']} other sentences, on the way"
    line = {**drawing.style(2), "linestyle": "-"}
    axis.plot(passes, [100 * one["dev_accuracy"] for one in history], **line)
    axis.annotate(
        looks, (passes[-1], 100 * history[-1]["dev_accuracy"]), (0, -14),
        textcoords="offset points", ha="right", fontsize=9, color=line["color"],
    )  # fmt: skip
    ends = [(0, scores["before"]), (found["kept_after"], scores["after"])]
    for (at, score), where in zip(ends, ((12, -12), (-12, 4)), strict=True):
        axis.plot(at, 100 * score["accuracy"], "k*", ms=13)
        axis.annotate(
            f"{100 * score['accuracy']:.1f} %", (at, 100 * score["accuracy"]), where,
            textcoords="offset points", ha="left" if where[0] > 0 else "right",
            fontsize=12, weight="bold",
        )  # fmt: skip
    axis.axhline(50, color="0.5", lw=0.8, ls=":")
    axis.annotate("a coin", (passes[-1], 50), (0, 3), textcoords="offset points", ha="right",
                  fontsize=8, color="0.3")  # fmt: skip
    axis.set(xlabel="forward passes of a batch; no backward pass", ylabel="right answers, %")
    axis.set_xlim(left=-12)
    axis.set_ylim(48, 78)
    axis.set_title(
        "a 4-bit model learns in its own codes "
        f"($\\bigstar$: {found['test_examples']} test sentences)",
        fontsize=10,
    )
    axis.grid(alpha=0.3)


def _draw_bytes(axis: Any, found: dict[str, Any], memory: tuple[float, float]) -> None:
    sizes = [count / 2**20 for count in found["file"]["bytes"]]
    names = ("file before", "file after", "memory, asking", "memory, training")
    values = (*sizes, *memory)
    shades = ("0.75", "0.35", "0.75", "0.35")
    axis.barh(range(4), values, color=shades, edgecolor="black", height=0.7)
    ratios = ("", "", "", f" ({memory[1] / memory[0]:.2f} times)")
    for place, (value, ratio) in enumerate(zip(values, ratios, strict=True)):
        axis.text(value + 12, place, f"{value:.0f} MiB{ratio}", va="center", fontsize=9)
    axis.set_yticks(range(4), names)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.55 * max(values))
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    file = found["file"]
    rest = "nothing else" if not file["other_tensors_changed"] else "and other tensors"
    axis.set_title(
        f"{file['moved'] / 1e6:.1f} of {file['codes'] / 1e6:.0f} million codes moved, {rest}",
        fontsize=10,
    )


def _draw_answers(axis: Any, found: dict[str, Any]) -> None:
    axis.axis("off")
    shown, counts = found["answers"]["shown"], found["answers"]["counts"]
    heads = [('the model completes each sentence: "It was ..."', "before", "after", "")]
    rows = [
        (f"“{prompt.removesuffix(' It was')}”", was, now, name) for name, prompt, was, now in shown
    ]
    for line, row in enumerate(heads + rows):
        for x, text in zip((0.0, 0.53, 0.64, 0.77), row, strict=True):
            bold = "bold" if not line or x == 0.64 else "normal"
            axis.text(x, 1 - line / (len(shown) + 2), text, fontsize=9.5, weight=bold, va="top")
    total = found["test_examples"]
    axis.text(
        0.0, 1 - (len(shown) + 1) / (len(shown) + 2),
        f"of {total} test answers {counts['learned']} became right, {counts['forgotten']} wrong, "
        f"{counts['still wrong']} stayed wrong",
        fontsize=9.5, va="top", color="0.25",
    )  # fmt: skip


def main(places: Places) -> None:
    """Draw a run, or the last one again."""
    say(f"drawing {places.output}")
    writable("output", Path(places.output))
    from experiments.finetune import tables

    if places.run:
        say(f"reading the run in {places.run}")
        write_json(_SUMMARY, summary(Path(places.run)))
    found = read_json(_SUMMARY)
    if not found:
        raise ValueError(f"run must be given: there is no {_SUMMARY}.")
    rows = {row.name: row for row in tables.ROWS if row.table == "memory"}
    peaks = [
        max(one["resident_mib"] for one in tables.found(_SUMMARY.parent, rows[name]))
        for name in ("inference", "ZOQO, codes in place, sparse")
    ]
    draw(found, (peaks[0], peaks[1]), Path(places.output))
    print(f"picture: {places.output}")


if __name__ == "__main__":
    command.run(main, Places, about=__doc__ or "")
