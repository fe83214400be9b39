"""Tables and figures from what was measured: `python -m benchmarks.report`.

Reads every `benchmarks/results/NAME_BACKEND.json` and writes, into docs/performance.md, what
belongs between `<!-- table: NAME -->` and `<!-- end -->`; the figures go beside it. With `--quick`,
and with `--document=-`, the tables go to the screen and the figures beside the results.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from benchmarks import figures
from benchmarks.measured import Measured, load
from benchmarks.results import ROOT, Places
from benchmarks.tables import NOTHING, TABLES
from experiments import command, markdown
from experiments.files import writable, write_text


@dataclasses.dataclass(frozen=True)
class Document:
    """What the tables go into.

    Attributes:
      document: what to write the tables into; "-" is the screen.
    """

    document: str = str(ROOT.parent / "docs" / "performance.md")


_FIGURES = {"step": "step", "size": "scaling", "growth": "memory", "device": "device"}


def main(places: Places, into: Document) -> None:
    """Write the document and its figures, or show the tables."""
    where = places.folder
    measured = load(where)
    if not measured:
        raise ValueError(f"results: {where} holds none: run make bench first.")
    if places.quick or into.document == "-":
        for one in measured:
            figures.draw(one, where)
            tables = {name: of(one) for name, of in TABLES.items()}
            for name, text in tables.items():
                if text != NOTHING:
                    print(f"\n{name}\n\n{text}")
        return
    document = writable("document", Path(into.document))
    text = markdown.filled(document.read_text(encoding="utf-8"), functools.partial(_body, measured))
    for one in measured:
        figures.draw(one, document.parent)
    write_text(document, text)
    print(f"tables and figures: {document}")


def _body(measured: Sequence[Measured], name: str) -> str:
    """What belongs into a place of the document: a table, and its figure if it has one."""
    if name not in TABLES:
        raise ValueError(f"no table is called {name!r}: choose among {', '.join(TABLES)}.")
    tables = [(one, TABLES[name](one)) for one in measured]
    parts = []
    for one, text in tables:
        if text == NOTHING:
            continue
        if len(measured) > 1:
            parts.append(f"On {one.machine['device']}:")
        if name in _FIGURES:
            parts.append(f"![{name}]({figures.file_of(_FIGURES[name], one)})")
        parts.append(text)
    return "\n\n".join(parts or [NOTHING])


if __name__ == "__main__":
    command.run(
        main, Places, Document, about=__doc__ or "", leave_out=["fresh", "progress", "only"]
    )
