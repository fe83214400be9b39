"""Markdown tables, and the places in a document that a command writes them into.

Libraries that write tables (tabulate, pandas) pad columns and rules otherwise: every table of the
documents would change, for the ten lines of `table`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from scipy import stats

from experiments.files import write_text

__all__ = ["fill", "filled", "interval", "table"]

_MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the first column is text, the others are numbers.

    Example:
      >>> print(table(["name", "s"], [["a", "10"]]))
      | name |  s |
      | ---- | -: |
      | a    | 10 |
    """
    lines = [list(head), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)])

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(f"| {one} |" for one in map(line, [lines[0], rule, *lines[1:]]))


def filled(document: str, body: Callable[[str], str | None]) -> str:
    r"""The document with `body(NAME)` between each `<!-- table: NAME -->` and `<!-- end -->`.

    What stands there stays where `body` gives None.

    Example:
      >>> filled("<!-- table: a -->\nold<!-- end -->", str.upper)
      '<!-- table: a -->\n\nA\n\n<!-- end -->'
    """

    def one(found: re.Match[str]) -> str:
        text = body(found[2])
        return found[0] if text is None else f"{found[1]}\n{text}\n\n{found[3]}"

    return _MARKED.sub(one, document)


def fill(path: Path, body: Callable[[str], str | None]) -> None:
    """Write `filled` in place of a document, if there is one."""
    if path.is_file():
        write_text(path, filled(path.read_text(encoding="utf-8"), body))


def interval(values: Sequence[float], digits: int) -> str:
    """Mean over seeds and its 95 % interval by Student's t, e.g. "12.3 ± 0.4"; one seed has none.

    Example:
      >>> interval([1.0, 2.0, 3.0], 1), interval([4.0], 2)
      ('2.0 ± 2.5', '4.00')
    """
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{mean} ± {half:.{digits}f}"
