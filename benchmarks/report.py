"""Tables and figures from what was measured: `python -m benchmarks.report`.

Reads every `benchmarks/results/NAME_BACKEND.json` and writes, into docs/performance.md, what
belongs between `<!-- table: NAME -->` and `<!-- end -->`; the figures go beside it. With `--quick`
the tables go to the screen, and the figures into the folder of the results.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from benchmarks import figures
from benchmarks.measured import Measured, load
from benchmarks.results import ROOT, Places
from benchmarks.tables import TABLES
from experiments import command, markdown
from experiments.files import writable, write_text


@dataclasses.dataclass(frozen=True)
class Document:
    """What the tables go into.

    Attributes:
      document: what to write the tables into.
    """

    document: str = str(ROOT.parent / "docs" / "performance.md")


_FIGURES = {"step": "step", "size": "scaling", "growth": "memory"}


def main(places: Places, into: Document) -> None:
    """Write the document and its figures, or show the tables."""
    where, document = places.folder, Path(into.document)
    measured = load(where)
    if not measured:
        raise ValueError(f"results: {where} holds none: run make bench first.")
    if places.quick:
        for one in measured:
            figures.draw(one, where)
            for name, of in TABLES.items():
                print(f"\n{name}\n\n{of(one)}")
        return
    writable("document", document)
    text = markdown.filled(document.read_text(encoding="utf-8"), functools.partial(_body, measured))
    for one in measured:
        figures.draw(one, document.parent)
    write_text(document, text)
    print(f"tables and figures: {document}")


def _body(measured: Sequence[Measured], name: str) -> str:
    """What belongs into a place of the document: a table, and its figure if it has one."""
    if name not in TABLES:
        raise ValueError(f"no table is called {name!r}: choose among {', '.join(TABLES)}.")
    parts = []
    for one in measured:
        if len(measured) > 1:
            parts.append(f"On {one.machine['device']}:")
        if name in _FIGURES:
            parts.append(f"![{name}]({figures.file_of(_FIGURES[name], one)})")
        parts.append(TABLES[name](one))
    return "\n\n".join(parts)


if __name__ == "__main__":
    command.run(
        main, Places, Document, about=__doc__ or "", leave_out=["fresh", "progress", "only"]
    )
