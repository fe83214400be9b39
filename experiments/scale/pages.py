"""docs/scale.md: tables and figures, from what was simulated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from experiments import drawing
from experiments.markdown import fill, table
from experiments.scale.simulation import Outcome
from experiments.store import Row

__all__ = ["write"]

Found = tuple[Row, list[Outcome]]

_Column = Callable[[Row, list[Outcome]], str]


def _mean(name: str, form: str = ",.0f", scale: float = 1.0) -> _Column:
    def column(row: Row, outcomes: list[Outcome]) -> str:
        mean = float(np.mean([getattr(one, name) for one in outcomes])) * scale
        return format(mean, form)

    return column


def _newcomers(row: Row, outcomes: list[Outcome]) -> str:
    found = [one.catch_up for one in outcomes if one.catch_up is not None]
    return f"{np.median(found):,.1f}" if found else "-"


_RATES: dict[str, _Column] = {
    "steps an hour": _mean("steps_an_hour"),
    "queries a second": _mean("queries_an_hour", scale=1 / 3600),
    "waiting, %": _mean("waiting", ".0f", 100),
    "wasted, %": _mean("wasted", ".1f", 100),
}
_COLUMNS: dict[str, dict[str, _Column]] = {
    "patience": {**_RATES, "leases given again, a step": _mean("again", ".1f")},
    "lifetime": {
        **_RATES,
        "newcomers": _mean("newcomers"),
        "catch-up, s": _newcomers,
    },
}


def write(document: Path, found: Sequence[Found]) -> None:
    """Write every table into the document, and the figure beside it."""
    some = [(row, outcomes) for row, outcomes in found if outcomes]
    folder = document.parent / document.stem
    folder.mkdir(parents=True, exist_ok=True)
    workers = [one for one in some if one[0].table == "workers"]
    if workers:
        _draw(workers, folder / "workers.png")

    def body(name: str) -> str | None:
        lines = [one for one in some if one[0].table == name]
        if not lines:
            return "*not simulated yet*" if any(row.table == name for row, _ in found) else None
        columns = _COLUMNS.get(name, _RATES)
        cells = [[row.name, *(of(row, all_of) for of in columns.values())] for row, all_of in lines]
        return table([name, *columns], cells)

    fill(document, body)


def _draw(found: Sequence[Found], path: Path) -> None:
    """Steps an hour, and the share of the workers' time that is useful, against workers."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(10.5, 3.9), layout="constrained")
    left, right = fig.subplots(1, 2)
    sizes = sorted({row.config.plan.queries for row, _ in found})
    for number, queries in enumerate(sizes):
        lines = [one for one in found if one[0].config.plan.queries == queries]
        x = [row.config.plan.workers for row, _ in lines]
        steps = [np.mean([one.steps_an_hour for one in all_of]) for _, all_of in lines]
        busy = [
            100 * np.mean([(1 - one.waiting) * (1 - one.wasted) for one in all_of])
            for _, all_of in lines
        ]
        style = drawing.style(number)
        left.plot(x, steps, label=f"{queries:,} queries a step", **style)
        right.plot(x, busy, label=f"{queries:,} queries a step", **style)
    left.set_yscale("log")
    left.set_ylabel("steps an hour")
    right.set_ylabel("of the workers' time, answers that count, %")
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xlabel("workers")
        axis.grid(alpha=0.3)
    left.legend(frameon=False, fontsize=8)
    fig.savefig(path, dpi=130)
