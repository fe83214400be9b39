"""What the tables and figures of claims share."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments import markdown
from experiments.laboratory.claim import Measurement

__all__ = ["errorbar", "grouped", "percent"]


def grouped(found: list[Measurement], *names: str) -> dict[tuple[Any, ...], list[Measurement]]:
    """Measurements by the values that some of their names have, in the order that these come in.

    Example:
      >>> found = [{"bits": 4, "loss": 0.2}, {"bits": 2, "loss": 0.9}, {"bits": 4, "loss": 0.1}]
      >>> {bits: len(group) for (bits,), group in grouped(found, "bits").items()}
      {4: 2, 2: 1}
    """
    groups: dict[tuple[Any, ...], list[Measurement]] = {}
    for one in found:
        groups.setdefault(tuple(one[name] for name in names), []).append(one)
    return groups


def percent(fractions: Sequence[float], digits: int) -> str:
    """Mean and interval over seeds, in percent.

    Example:
      >>> percent([0.5, 0.75], 1)
      '62.5 ± 158.8'
    """
    return markdown.interval([100 * x for x in fractions], digits)


def errorbar(axis: Any, places: Sequence[float], values: Sequence[Any], **style: Any) -> None:
    """Draw means over seeds, with bars of one standard deviation."""
    means, deviations = [np.mean(one) for one in values], [np.std(one) for one in values]
    axis.errorbar(places, means, deviations, **style)
