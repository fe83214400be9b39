"""What was measured, read from the results again: cells by their fields, and ratios of programs."""

from __future__ import annotations

import dataclasses
import statistics
from pathlib import Path
from typing import Any

from experiments.files import read_json

__all__ = [
    "ABSENT",
    "KERNEL",
    "MEBI",
    "OF_DEVICE",
    "STRUCTURES",
    "Entry",
    "Measured",
    "load",
    "median",
    "ratio",
    "resident",
    "temporary",
]

_NAMES = (
    "step",
    "baselines",
    "scaling",
    "memory",
    "dequantization",
    "formats",
    "compiling",
    "beside",
    "device",
    "exactness",
    "integers",
)
ABSENT = "not measured yet"
STRUCTURES = {"rank_one": "rank-one", "sparse": "sparse", "dense": "dense"}
KERNEL = "rank_one, kernel"  # steps beside "rank_one", on a device
OF_DEVICE = {
    "rank_one": "rank-one",
    KERNEL: "rank-one, kernel",
    "sparse": "sparse",
    "columns": "columns",
}
MEBI = 2**20

Entry = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Measured:
    """All that was measured on one backend.

    Attributes:
        backend: JAX's name of it.
        machine: the machine that the first file of results names.
        entries: the cells of each script.
    """

    backend: str
    machine: Entry
    entries: dict[str, list[Entry]]

    def find(self, script: str, **cell: Any) -> list[Entry]:
        """The entries of a script whose cells have these fields."""
        return [
            entry
            for entry in self.entries.get(script, ())
            if all(entry["cell"].get(key, ABSENT) == value for key, value in cell.items())
        ]


def load(where: Path) -> list[Measured]:
    """What is in a folder of results, the CPU first."""
    found: dict[str, Measured] = {}
    for path in sorted(where.glob("*_*.json")):
        script, backend = path.stem.rsplit("_", 1)
        if script in _NAMES:
            read = read_json(path)
            if not {"machine", "cells"} <= read.keys():
                raise ValueError(f"{path} holds no results.")
            one = found.setdefault(backend, Measured(backend, read["machine"], {}))
            one.entries[script] = list(read["cells"].values())
    return sorted(found.values(), key=lambda one: (one.backend != "cpu", one.backend))


def ratio(entry: Entry, above: str, below: str, scale: float = 1.0) -> tuple[float, float] | None:
    """The ratio of two programs' times, by medians and by minima, or None."""
    seconds = entry["seconds"]
    if above not in seconds or below not in seconds:
        return None
    medians, shortest = (
        scale * how(seconds[above]) / how(seconds[below]) for how in (statistics.median, min)
    )
    return medians, shortest


def temporary(entry: Entry, above: str, below: str = "forward") -> float | None:
    """The ratio of two programs' temporary bytes, or None."""
    memory = entry["memory"]
    if not memory.get(above) or not memory.get(below) or not memory[below]["temp"]:
        return None
    return memory[above]["temp"] / memory[below]["temp"]


def median(entry: Entry, name: str) -> float:
    """A program's median time."""
    return statistics.median(entry["seconds"][name])


def resident(entry: Entry, role: str, when: str, which: str) -> float | None:
    """The ratio of a process's memory to the inference process's."""
    said, base = (entry["processes"].get(name, {}).get(when) for name in (role, "inference"))
    return said[which] / base[which] if said and base and said[which] and base[which] else None
