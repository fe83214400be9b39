"""Tables and figures from what was measured: `python -m benchmarks.report`.

Reads every `benchmarks/results/NAME_BACKEND.json` and writes, into docs/performance.md, what
belongs between `<!-- table: NAME -->` and `<!-- end -->`; the figures go beside it. With `--quick`
the tables go to the screen, and the figures into the folder of the results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from benchmarks import figures
from benchmarks.results import ROOT, Places
from benchmarks.tables import ABSENT, TABLES, Measured, load
from experiments import command, markdown
from experiments.files import writable, write_text

__all__ = ["filled"]


@dataclasses.dataclass(frozen=True)
class Document:
    """What the tables go into.

    Attributes:
      document: what to write the tables into.
    """

    document: str = str(ROOT.parent / "docs" / "performance.md")


_FIGURES = {"step": "step", "size": "scaling", "growth": "memory"}


def filled(document: str, measured: Sequence[Measured]) -> str:
    """The document with every table, and the figures that belong to one, in its place.

    Raises:
        ValueError: the document asks for a table that there is not.
    """

    def body(name: str) -> str:
        if name not in TABLES:
            raise ValueError(f"no table is called {name!r}: choose among {', '.join(TABLES)}.")
        parts = []
        for one in measured:
            if len(measured) > 1:
                parts.append(f"On {one.machine['device']}:")
            if name in _FIGURES:
                parts.append(f"![{name}]({figures.file_of(_FIGURES[name], one)})")
            parts.append(TABLES[name](one))
        return "\n\n".join(parts) if parts else f"*{ABSENT}*"

    return markdown.filled(document, body)


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
    text_ = filled(document.read_text(encoding="utf-8"), measured)
    for one in measured:
        figures.draw(one, document.parent)
    write_text(document, text_)
    print(f"tables and figures: {document}")


if __name__ == "__main__":
    command.run(
        main, Places, Document, about=__doc__ or "", leave_out=["fresh", "progress", "only"]
    )
