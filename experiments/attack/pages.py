"""docs/attacks.md: tables, their CSV files, and figures, from what `tables.py` found."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.markdown import fill, interval, table
from experiments.store import Row

__all__ = ["Example", "Runs", "examples", "markdown", "write"]

_HEADER = ["attack", "images", "seeds", "failure rate", "mean queries", "median", "images/s"]
_PANELS = ("mnist", "cifar10", "robust")
_LABELS_PANELS = ("labels_mnist", "labels_cifar10", "labels_robust")
_BITS_PANELS = ("mnist", "cifar10")  # of the robust network two widths are attacked
_TITLES = {
    "mnist": "MNIST, $\\epsilon$ = 0.3",
    "cifar10": "CIFAR-10, $\\epsilon$ = 12/255",
    "robust": "robust MNIST, $\\epsilon$ = 0.3",
}
_COLOURS = {
    "sign_hunter": "C1",
    "square": "C2",
    "zo_sign_sgd": "0.5",
    "zoqo_labels": "C3",
    "rays": "C1",
    "sign_flip": "C2",
    "hop_skip_jump": "C4",
}


@dataclasses.dataclass(frozen=True)
class Runs:
    """What the runs of a row came to, so far.

    Attributes:
      row: the row.
      queries: of each run, evaluations spent on each image, 0 where it was not misclassified.
      seconds: of each run.
    """

    row: Row
    queries: list[np.ndarray]
    seconds: list[float]


class Example(NamedTuple):
    """What one attack made of a few images.

    Attributes:
      name: of the attack.
      pictures: as the network saw them last, (n, height, width, channels) in [0, 1].
      captions: a line for each of them.
    """

    name: str
    pictures: np.ndarray
    captions: list[str]


def write(document: Path, found: Sequence[Runs]) -> None:
    """Write every table into the document, and its CSV file and the figures beside it."""
    ours = {runs.row.table for runs in found}
    found = [runs for runs in found if runs.queries]
    folder = document.parent / document.stem
    folder.mkdir(parents=True, exist_ok=True)
    for name in {runs.row.table for runs in found}:
        with (folder / f"{name}.csv").open("w", newline="") as file:
            lines = [_cells(runs) for runs in found if runs.row.table == name]
            csv.writer(file).writerows([_HEADER, *lines])
    failures(found, folder / "failures.png")
    failures(found, folder / "labels.png", _LABELS_PANELS)
    bits(found, folder / "bits.png")

    def body(name: str) -> str | None:
        if name not in ours:
            return None  # another command writes it
        some = [runs for runs in found if runs.row.table == name]
        return markdown(some) if some else "*not attacked yet*"

    fill(document, body)


def markdown(found: Sequence[Runs]) -> str:
    """Runs as a Markdown table."""
    return table(_HEADER, map(_cells, found))


def _cells(runs: Runs) -> list[str]:
    found = [queries[queries > 0] for queries in runs.queries]
    none = any(not len(queries) for queries in found)
    images = len(runs.queries[0])
    return [
        runs.row.name,
        f"{images:,}",
        str(len(runs.queries)),
        interval([float((queries == 0).mean()) for queries in runs.queries], 4),
        "-" if none else interval([float(queries.mean()) for queries in found], 1),
        "-" if none else interval([float(np.median(queries)) for queries in found], 0),
        f"{sum(map(len, runs.queries)) / sum(runs.seconds):.1f}",
    ]


def _figure(columns: int, rows: int = 1, size: tuple[float, float] = (4.2, 3.9)) -> Any:
    """A figure and its axes (rows, columns), each of them `size` inches."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False)


def failures(found: Sequence[Runs], path: Path, tables: Sequence[str] = _PANELS) -> None:
    """Draw the share of images not yet misclassified against queries, a panel for each table."""
    panels = [name for name in tables if any(runs.row.table == name for runs in found)]
    if not panels:
        return
    fig, (axes,) = _figure(len(panels))
    for axis, panel in zip(axes, panels, strict=True):
        for runs in found:
            if runs.row.table != panel or not _is_drawn(runs):
                continue
            budget = runs.row.config.budget
            spent = np.sort(np.where(runs.queries[0] > 0, runs.queries[0], budget + 1))
            x = np.concatenate([[1], spent[spent <= budget], [budget]])
            left = 1 - np.searchsorted(spent, x, side="right") / len(spent)
            axis.step(x, left, where="post", label=runs.row.name, **_style(runs))
        axis.set_xscale("log")
        axis.set_title(_TITLES[panel.removeprefix("labels_")], fontsize=10)
        axis.set_xlabel("evaluations of the network, for one image")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("images not yet misclassified")
    axes[0].legend(frameon=False, fontsize=8)  # the most methods
    fig.savefig(path, dpi=150)


def bits(found: Sequence[Runs], path: Path) -> None:
    """Draw failures and mean queries against bits, of the images that all widths attacked."""
    panels = [name for name in _BITS_PANELS if any(_is_dense(runs, name) for runs in found)]
    if not panels:
        return
    fig, (axes,) = _figure(2)
    for panel in panels:
        some = sorted(
            (runs for runs in found if _is_dense(runs, panel)), key=lambda r: r.row.config.bits
        )
        count = min(len(queries) for runs in some for queries in runs.queries)
        shared = [[queries[:count] for queries in runs.queries] for runs in some]
        widths = [runs.row.config.bits for runs in some]
        means = [np.mean([q[q > 0].mean() for q in runs if q.any()]) for runs in shared]
        fails = [np.mean([(q == 0).mean() for q in runs]) for runs in shared]
        label = f"{_TITLES[panel]}, {count:,} images"
        axes[0].plot(widths, means, "o-", label=label)
        axes[1].plot(widths, fails, "o-", label=label)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("mean queries, over successes")
    axes[1].set_ylabel("failure rate")
    for axis in axes:
        axis.set_xlabel("bits of the perturbation, dense directions")
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    fig.savefig(path, dpi=150)


def examples(found: Sequence[Example], path: Path) -> None:
    """Draw what attacks made of the same few images, a row for each attack."""
    columns = len(found[0].pictures)
    fig, axes = _figure(columns, len(found), size=(1.05, 1.28))
    for line, (name, pictures, captions) in zip(axes, found, strict=True):
        for axis, picture, caption in zip(line, pictures, captions, strict=True):
            axis.imshow(picture.squeeze(), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(caption, fontsize=7, pad=2)
        line[0].set_ylabel(name, fontsize=7)
    fig.savefig(path, dpi=120)


def _is_dense(runs: Runs, name: str) -> bool:
    config = runs.row.config
    return (runs.row.table, config.method, config.structure) == (name, "zoqo", "dense")


def _is_drawn(runs: Runs) -> bool:
    config = runs.row.config
    return config.method != "zoqo" or config.bits in (8, 4)


def _style(runs: Runs) -> dict[str, Any]:
    config = runs.row.config
    colour = _COLOURS.get(config.method)
    if colour is None:
        colour = "C3" if config.structure == "coarse_to_fine" else "C0"
    return {"color": colour, "ls": "--" if config.bits == 4 else "-"}
