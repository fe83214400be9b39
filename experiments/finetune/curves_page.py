"""docs/curves.md: a table and a figure for each number of layers, from what `curves.py` found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import drawing
from experiments.files import read_json
from experiments.finetune import tables
from experiments.markdown import fill, interval, table
from experiments.store import Row

__all__ = ["FIRST", "write", "write_slopes"]

Found = tuple[Row, list[dict[str, Any]]]

FIRST = 75  # forward passes before the first look; each later one is after twice as many
_COLUMNS = (300, 1200, 4800, 19200)  # looks that have columns of their own, where a run was so long
_PANELS = {"dev_accuracy": "accuracy on held-out sentences, %", "dev_loss": "loss, nats"}


def write(document: Path, folder: Path, rows: Iterable[Row]) -> None:
    """Write the table of these rows into the document, and the figure beside it."""
    found = [(row, tables.found(folder, row)) for row in rows]
    found = [(row, outcomes) for row, outcomes in found if outcomes]
    if not found:
        return
    name = found[0][0].table
    figures = document.parent / document.stem
    figures.mkdir(parents=True, exist_ok=True)
    _draw(found, figures / f"{name}.png")
    fill(document, lambda other: _table(found) if other == name else None)


def write_slopes(document: Path, folder: Path, layers: int, names: Sequence[str]) -> None:
    """Write the tables of what queries say, one for each model that was looked at.

    Args:
      document: where to.
      folder: of results, with a file "slopes_LAYERS_MODEL.json" for each model.
      layers: how many of the last layers train.
      names: of rows, in their order.
    """

    def body(name: str) -> str | None:
        path = folder / f"{name}.json"
        if not name.startswith(f"slopes_{layers}_") or not path.is_file():
            return None
        found = read_json(path)
        head = ["what is guessed at", "dims", "noise", "predicted", "measured", "right, %", "gain"]
        return table(head, [_slopes(one, found[one]) for one in names if one in found])

    fill(document, body)


def _slopes(name: str, found: dict[str, float]) -> list[str]:
    return [
        name,
        f"{found['dims']:,.0f}",
        f"{found['noise']:.0f}",
        f"{found['predicted']:.4f}",
        f"{found['measured']:.4f}",
        f"{100 * found['right']:.0f}",
        f"{found['gain']:.3f}" if found["gain"] > 0 else "no bound",  # curved downwards
    ]


def _table(found: list[Found]) -> str:
    """Loss and accuracy after so many forward passes, means and intervals over seeds."""
    longest = max(len(one["history"]) for _, outcomes in found for one in outcomes)
    looks = [FIRST * 2**k for k in range(longest)]
    columns = [look for look in _COLUMNS if look in looks] or looks[-1:]
    before = found[0][1][0]["dev_before"]
    start = f"{100 * before['accuracy']:.1f} / {before['loss']:.3f}"
    lines = [["nothing", "", *[start] * len(columns), ""]]
    for row, outcomes in found:
        cells = [_cell(outcomes, looks.index(look)) for look in columns]
        lines.append([row.name, str(len(outcomes)), *cells, f"{_seconds(outcomes):.0f}"])
    head = [f"% / loss after {look:,}" for look in columns]
    return table(["what trains", "seeds", *head, "seconds for 1,000"], lines)


def _cell(outcomes: list[dict[str, Any]], look: int) -> str:
    """Accuracy and loss at a look, of the runs that were so long."""
    lines = [one["history"][look] for one in outcomes if len(one["history"]) > look]
    if not lines:
        return ""
    accuracies = interval([100 * line["dev_accuracy"] for line in lines], 1)
    return f"{accuracies} / {interval([line['dev_loss'] for line in lines], 3)}"


def _seconds(outcomes: list[dict[str, Any]]) -> float:
    """Seconds for 1,000 forward passes: the least of all looks, as machines were never idle."""
    lines = [line for one in outcomes for line in one["history"]]
    return 1000 * min(x["seconds_a_step"] * x["step"] / x["forward_passes"] for x in lines)


def _draw(found: list[Found], path: Path) -> None:
    """Accuracy and loss against forward passes, means over seeds."""
    from matplotlib.figure import Figure

    longest = max(len(one["history"]) for _, outcomes in found for one in outcomes)
    marks = [FIRST * 4**k for k in range((longest + 1) // 2)]
    fig = Figure(figsize=(6.4 * len(_PANELS), 4.8), layout="constrained")
    for axis, (name, label) in zip(fig.subplots(1, len(_PANELS)), _PANELS.items(), strict=True):
        times = 100 if name == "dev_accuracy" else 1
        for number, (row, outcomes) in enumerate(found):
            looks = min(len(one["history"]) for one in outcomes)
            passes = [line["forward_passes"] for line in outcomes[0]["history"][:looks]]
            values = [[line[name] for line in one["history"][:looks]] for one in outcomes]
            means = times * np.mean(values, axis=0)
            axis.plot(passes, means, label=row.name, **drawing.style(number))
        start = times * found[0][1][0]["dev_before"][name.removeprefix("dev_")]
        axis.axhline(start, color="0.6", lw=0.8)
        axis.set_xscale("log")
        axis.set_xticks(marks, [f"{mark:,}" for mark in marks])
        axis.minorticks_off()
        axis.set_xlabel("forward passes of a batch (the line: before training)")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        drawing.label_ends(axis)
    fig.savefig(path, dpi=130)
