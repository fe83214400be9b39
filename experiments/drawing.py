"""Figures that are read without colour: marks, line styles, and names at the ends of lines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["label_ends", "style"]

# Colours that readers who do not see red from green tell apart, from dark to light and in turn with
# line styles and marks, so that neighbours differ in a grey print, too.
_STYLES = (
    ("#000000", "-", "o"),
    ("#D55E00", "--", "s"),
    ("#0072B2", "-.", "^"),
    ("#009E73", (0, (1, 1.2)), "D"),
    ("#CC79A7", (0, (5, 1, 1, 1, 1, 1)), "v"),
    ("#8C6D1F", (0, (8, 2)), "P"),
    ("#56B4E9", (0, (3, 2)), "X"),
)


def style(number: int) -> dict[str, Any]:
    """How the line of this number is drawn; from the eighth on marks are hollow.

    Example:
      >>> style(0)["marker"], style(1)["marker"], style(7)["marker"], style(7)["fillstyle"]
      ('o', 's', 'o', 'none')
    """
    again, place = divmod(number, len(_STYLES))
    color, _, marker = _STYLES[place]
    line = _STYLES[(place + again) % len(_STYLES)][1]
    return {
        "color": color,
        "linestyle": line,
        "marker": marker,
        "markersize": 4.5,
        "fillstyle": "none" if again else "full",
        "lw": 1.4,
    }


def label_ends(axis: Any, *, size: float = 8.0, lines: Sequence[Any] | None = None) -> None:
    """Write each labelled line's name at its right end, outside of the axes, and none over another.

    Args:
      axis: with all its lines, scales and limits; its figure has a constrained layout.
      size: of the letters, points.
      lines: which lines; None: all that have a label.
    """
    if lines is None:
        lines = [one for one in axis.get_lines() if not one.get_label().startswith("_")]
    # What was measured nowhere has no end.
    lines = [one for one in lines if np.isfinite(np.asarray(one.get_xydata(), float)).all(1).any()]
    if not lines:
        return
    figure = axis.get_figure(root=True)
    axis.set_xlim(axis.get_xlim())
    axis.set_ylim(axis.get_ylim())
    figure.draw_without_rendering()  # lays the axes out
    height = axis.get_window_extent().height * 72 / figure.dpi
    ends = []
    for line in lines:
        x, y = (np.asarray(values, float) for values in line.get_data(orig=False))
        known = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
        points = axis.transData.transform(np.stack([x[known], y[known]], axis=-1))
        place = points[points[:, 0].argmax()]  # an axis may run from right to left
        ends.append(axis.transAxes.inverted().transform(place))
    rows = [line.get_label().count("\n") + 1 for line in lines]
    heights = spread([float(y) for _, y in ends], [1.25 * size * n / height for n in rows])
    for line, end, at in zip(lines, ends, heights, strict=True):
        axis.annotate(
            line.get_label(),
            xy=tuple(end),
            xytext=(1.06, at),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=size,
            color=line.get_color(),
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": "0.55",  # no line's
                "linestyle": ":",
                "lw": 0.8,
                "shrinkA": 1,
                "shrinkB": 2,
            },
        )


def spread(places: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Centres of boxes of these sizes, one above the other, as near to these places as can be.

    Example:
      >>> spread([0.5, 0.5, 0.9], [0.2, 0.2, 0.2])
      [0.4, 0.6, 0.9]
    """
    order = np.argsort(places, kind="stable")
    blocks: list[list[Any]] = []  # [members, bottom]: neighbours that touch move as one
    for i in order:
        blocks.append([[i], places[i] - sizes[i] / 2])
        while len(blocks) > 1 and _top(blocks[-2], sizes) > blocks[-1][1] + 1e-9:
            members = blocks[-2][0] + blocks.pop()[0]
            # The least squares of what its members are moved by.
            offsets = np.cumsum([0.0, *(sizes[j] for j in members[:-1])])
            wanted = [places[j] - sizes[j] / 2 - at for j, at in zip(members, offsets, strict=True)]
            blocks[-1] = [members, float(np.mean(wanted))]
    found = [0.0] * len(places)
    for members, bottom in blocks:
        for j in members:
            found[j] = round(bottom + sizes[j] / 2, 9)
            bottom += sizes[j]
    return found


def _top(block: list[Any], sizes: Sequence[float]) -> float:
    return block[1] + sum(sizes[j] for j in block[0])
