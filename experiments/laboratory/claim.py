"""A claim: what is measured to check it, and how that is shown.

Every module that checks one defines a `CLAIM`. `check` measures what was not measured
before with the same settings, a cell at a time, stores each as it comes, so that a run may be
stopped at any moment, and writes the claim's table and figure into the document.
"""

import dataclasses
import platform
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from experiments import footprint, markdown
from experiments.command import say
from experiments.files import plain, write_text
from experiments.store import Store

__all__ = ["Cell", "Claim", "Measurement", "check"]

# Linux lets a process map some hundreds of compiled programs, and LLVM fails at the next one.
_CELLS_SHARING_PROGRAMS = 25

Cell = dict[str, Any]
"""What is measured once: numbers, strings, bools and lists of them."""

Measurement = dict[str, Any]
"""A cell with what was measured there; what is not finite is None."""


class Claim(NamedTuple):
    """A claim and how it is checked.

    Attributes:
      name: of its subcommand, its table and its figure.
      config: a frozen dataclass of settings, which all have defaults: those of the document.
      cells: config -> what to measure, in order.
      measure: (config, cell) -> what was found there, numbers (of NumPy or JAX, too), strings and
        lists of them, all finite or None; it must depend on nothing else.
      table: measurements -> a Markdown table.
      draw: (measurements, an empty `matplotlib.figure.Figure`) -> None.
    """

    name: str
    config: type
    cells: Callable[[Any], list[Cell]]
    measure: Callable[[Any, Cell], dict[str, Any]]
    table: Callable[[list[Measurement]], str]
    draw: Callable[[list[Measurement], Any], None]


def check(
    claim: Claim, config: Any, *, results: Path, document: Path, progress: bool = True
) -> list[Measurement]:
    """Measure what is left of a claim, and write its table and figure.

    Args:
      claim: what to check.
      config: of the claim's type.
      results: folder of what was measured, a file NAME.json for each claim.
      document: Markdown; the table goes between `<!-- table: NAME -->` and `<!-- end -->`, the
        figure into the folder beside it that is called as it is. A file `results`/NAME.md is all
        of the claim's, and has its figure beside it.
      progress: whether to show a progress bar.

    Returns:
      The measurements, in the order of the cells.

    Raises:
      ValueError: the folder has measurements of this claim with other settings.
    """
    settings = dataclasses.asdict(config)
    store = Store(results / f"{claim.name}.json", settings)
    if store.changed:
        raise ValueError(
            f"results: {store.path} has measurements with {store.changed}: name another folder, or "
            "delete this file."
        )
    content = store.content = store.content or {"seconds": 0.0, "cells": []}
    cells = plain(claim.cells(config))
    done = [one["cell"] for one in content["cells"]]
    todo = [cell for cell in cells if cell not in done]
    if progress:
        there = f"{len(cells) - len(todo)} of {len(cells)} cells are in {results}"
        say(f"{there}; measuring the others: compiling" if todo else there)
    bar = tqdm(
        todo,
        desc=claim.name,
        unit="cell",
        initial=len(cells) - len(todo),
        total=len(cells),
        disable=not progress,
    )
    for number, cell in enumerate(bar, 1):
        start = time.perf_counter()
        found = plain(claim.measure(config, cell))
        content["cells"].append({"cell": cell, "found": found})
        content["seconds"] += time.perf_counter() - start
        store.write(versions=_versions())
        if number % _CELLS_SHARING_PROGRAMS == 0:
            footprint.forget_traces()
    measured = [next(x for x in content["cells"] if x["cell"] == cell) for cell in cells]
    found = [{**one["cell"], **one["found"]} for one in measured]
    words = (
        f"{len(cells)} cells in {content['seconds'] / 60:.1f} minutes; "
        f"{', '.join(content.get('versions', []))}; "
        f"{', '.join(f'{name} {value}' for name, value in plain(settings).items())}."
    )
    is_own = document == results / f"{claim.name}.md"
    _write_page(claim, found, words, document, is_own)
    return found


def _versions() -> list[str]:
    packages = [f"{name} {metadata.version(name)}" for name in ("jax", "numpy")]
    cores = footprint.cores()
    here = [f"Python {platform.python_version()}", f"{cores} core{'s' if cores > 1 else ''}"]
    return [*packages, *here]


def _write_page(
    claim: Claim, found: list[Measurement], words: str, document: Path, is_own: bool
) -> None:
    from matplotlib.figure import Figure

    folder = document.parent if is_own else document.parent / document.stem
    folder.mkdir(parents=True, exist_ok=True)
    fig = Figure(figsize=(9.0, 3.8), layout="constrained")
    claim.draw(found, fig)
    fig.savefig(folder / f"{claim.name}.png", dpi=130)
    text = f"{claim.table(found)}\n\n*{words}*"
    if is_own:
        write_text(document, f"# {claim.name}\n\n{text}\n\n![{claim.name}]({claim.name}.png)\n")
    else:
        markdown.fill(document, {claim.name: text}.get)
