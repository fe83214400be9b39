"""Tables and figures from what was measured: `python -m benchmarks.report`.

Reads every `benchmarks/results/NAME_BACKEND.json` and writes, into docs/performance.md, what
belongs between `<!-- table: NAME -->` and `<!-- end -->`; the figures go beside it. With `--quick`
the tables go to the screen, and the figures into the folder of the results.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from benchmarks import figures, results
from benchmarks.results import ROOT, folder
from benchmarks.tables import ABSENT, TABLES, Measured, load
from experiments import markdown

__all__ = ["filled"]

_DOCUMENT = flags.DEFINE_string(
    "document", str(ROOT.parent / "docs" / "performance.md"), "what to write the tables into"
)
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


def main(argv: Sequence[str]) -> None:
    """Write the document and its figures, or show the tables."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    where, document = folder(), Path(_DOCUMENT.value)
    try:
        measured = load(where)
        if not measured:
            sys.exit(f"error: {where} holds no results: run make bench first.")
        if flags.FLAGS.quick:
            for one in measured:
                figures.draw(one, where)
                for name, of in TABLES.items():
                    print(f"\n{name}\n\n{of(one)}")
            return
        text_ = filled(document.read_text(encoding="utf-8"), measured)
        for one in measured:
            figures.draw(one, document.parent)
        document.write_text(text_, encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"tables and figures: {document}")


if __name__ == "__main__":
    flags.adopt_module_key_flags(results)
    app.run(main)
