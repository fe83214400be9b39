"""docs/finetune.md: tables and figures, from what `tables.py` found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.files import write_text
from experiments.markdown import filled, interval, table

if TYPE_CHECKING:
    from experiments.finetune.tables import Row

__all__ = ["write"]

_HEAD = ["what trains", "seeds", "forward passes", "accuracy, %", "loss", "minutes", "peak, MiB"]

Found = tuple["Row", list[dict[str, Any]]]


def write(document: Path, all_found: Sequence[Found]) -> None:
    """Write every table into the document, and the figures beside it."""
    some = [(row, outcomes) for row, outcomes in all_found if outcomes]
    folder = document.parent / document.stem
    folder.mkdir(parents=True, exist_ok=True)
    for name in {row.table for row, _ in some if row.table != "memory"}:
        _draw([one for one in some if one[0].table == name], folder / f"{name}.png")

    def body(name: str) -> str:
        lines = [one for one in some if one[0].table == name]
        if not lines:
            return "*not run yet*"
        if name == "memory":
            return _memory(lines)
        return table(_HEAD, [_before(lines), *map(_cells, lines)])

    if document.is_file():
        write_text(document, filled(document.read_text(), body))


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
    """Loss and accuracy of the dev examples against forward passes, means over seeds.

    Adapters have the upper row, and what moves the file's own codes or scales the lower one.
    """
    from matplotlib.figure import Figure

    adapters = [one for one in found if one[0].config.train == "lora"]
    others = [one for one in found if one[0].config.train != "lora"]
    groups = [group for group in (adapters, others) if group]
    fig = Figure(figsize=(12.0, 4.4 * len(groups)), layout="constrained")
    for group, axes in zip(groups, fig.subplots(len(groups), 2, squeeze=False), strict=True):
        for number, (row, outcomes) in enumerate(group):
            style = {"color": f"C{number % 10}", "ls": "-" if number < 10 else "--", "lw": 1.2}
            looks = min(len(outcome["history"]) for outcome in outcomes)
            passes = [line["forward_passes"] for line in outcomes[0]["history"][:looks]]
            for axis, name, factor in zip(
                axes, ("dev_loss", "dev_accuracy"), (1, 100), strict=True
            ):
                lines = [[line[name] for line in one["history"][:looks]] for one in outcomes]
                axis.plot(passes, factor * np.mean(lines, axis=0), label=row.name, **style)
        axes[0].set_ylabel("loss of the dev examples, nats")
        axes[1].set_ylabel("accuracy on the dev examples, %")
        axes[1].legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize=8)
        for axis in axes:
            axis.set_xlabel("forward passes of a batch")
            axis.grid(alpha=0.3)
    fig.savefig(path, dpi=130)
