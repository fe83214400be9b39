"""docs/finetune.md: tables and figures, from what `tables.py` found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import drawing
from experiments.markdown import fill, interval, table
from experiments.store import Row

__all__ = ["write"]

_HEAD = ["what trains", "seeds", "forward passes", "accuracy, %", "loss", "minutes", "peak, MiB"]

_DRAWN = {  # rows of the figure, and how they are called there
    "Adam, float LoRA, back-propagation": "Adam, float,\nback-propagation",
    "ZO-SignSGD, float LoRA": "ZO-SignSGD, float",
    "ZOQO, 8-bit LoRA, dithered step": "ZOQO, 8 bits",
    "ZOQO, 4-bit LoRA, sparse": "ZOQO, 4 bits, sparse",
    "ZOQO, 2-bit LoRA, sparse": "ZOQO, 2 bits, sparse",
    "ZOQO, 4-bit LoRA, the paper's step": "ZOQO, 4 bits,\nthe paper's step",
    "CAQ-ZO, 4-bit codes of ten layers, nearest": "CAQ-ZO, ten layers",
    "ZOQO, 4-bit codes of ten layers": "ZOQO, ten layers",
    "CAQ-ZO, all 4-bit codes in place": "CAQ-ZO, all codes",
    "ZOQO, all 4-bit codes in place": "ZOQO, all codes",
    "QZO, scales of the 4-bit file": "QZO, scales",
}


Found = tuple[Row, list[dict[str, Any]]]


def write(document: Path, all_found: Sequence[Found]) -> None:
    """Write every table into the document, and the figures beside it."""
    some = [(row, outcomes) for row, outcomes in all_found if outcomes]
    folder = document.parent / document.stem
    folder.mkdir(parents=True, exist_ok=True)
    for name in {row.table for row, _ in some if not row.table.endswith("memory")}:
        _draw([one for one in some if one[0].table == name], folder / f"{name}.png")

    def body(name: str) -> str:
        lines = [one for one in some if one[0].table == name]
        if not lines:
            return "*not run yet*"
        if name.endswith("memory"):
            return _memory(lines)
        return table(_HEAD, [_before(lines), *map(_cells, lines)])

    fill(document, body)


def _before(found: Sequence[Found]) -> list[str]:
    """The model as it was."""
    before = found[0][1][0]["before"]
    accuracy, loss = f"{100 * before['accuracy']:.1f}", f"{before['loss']:.3f}"
    return ["nothing", "", "0", accuracy, loss, "", ""]


def _cells(found: Found) -> list[str]:
    row, outcomes = found
    return [
        row.name,
        str(len(outcomes)),
        f"{outcomes[0]['forward_passes']:,}",
        interval([100 * outcome["after"]["accuracy"] for outcome in outcomes], 1),
        interval([outcome["after"]["loss"] for outcome in outcomes], 3),
        f"{np.mean([outcome['seconds'] for outcome in outcomes]) / 60:.1f}",
        f"{max(outcome['resident_mib'] for outcome in outcomes):,.0f}",
    ]


def _memory(found: Sequence[Found]) -> str:
    """Memory of processes, beside that of inference."""
    peaks = {row.name: max(one["resident_mib"] for one in outcomes) for row, outcomes in found}
    least = peaks.get("inference", np.nan)
    lines = [[name, f"{peak:,.0f}", f"{peak / least:.2f}"] for name, peak in peaks.items()]
    return table(["process", "peak, MiB", "of inference"], lines)


def _draw(found: Sequence[Found], path: Path) -> None:
    """Accuracy on the dev examples against forward passes, means over seeds.

    Adapters are on the left, and what moves the file's own codes or scales on the right; of each
    the most telling rows are drawn (`_DRAWN`), all where none of these is there.
    """
    from matplotlib.figure import Figure

    some = [one for one in found if one[0].name in _DRAWN] or list(found)
    adapters = [one for one in some if one[0].config.train == "lora"]
    others = [one for one in some if one[0].config.train != "lora"]
    groups = [group for group in (adapters, others) if group]
    titles = ("adapters", "the file's own codes or scales")
    fig = Figure(figsize=(6.2 * len(groups), 4.2), layout="constrained")
    for group, axis in zip(groups, fig.subplots(1, len(groups), squeeze=False)[0], strict=True):
        for number, (row, outcomes) in enumerate(group):
            looks = min(len(outcome["history"]) for outcome in outcomes)
            passes = [line["forward_passes"] for line in outcomes[0]["history"][:looks]]
            lines = [[line["dev_accuracy"] for line in one["history"][:looks]] for one in outcomes]
            label = _DRAWN.get(row.name, row.name)
            values = 100 * np.mean(lines, axis=0)
            axis.plot(passes, values, label=label, **drawing.style(number))
        axis.set_title(titles[group is not adapters], fontsize=10)
        axis.set_ylabel("accuracy on the dev examples, %")
        axis.set_xlabel("forward passes of a batch")
        axis.grid(alpha=0.3)
        drawing.label_ends(axis)
    fig.savefig(path, dpi=130)
