"""Where numbers are kept: a JSON for each script and backend, with the machine and the versions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from benchmarks.timing import Effort
from experiments import command, footprint
from experiments.command import say
from experiments.files import claimed

__all__ = ["ROOT", "Places", "Results", "machine", "name_of", "run"]

ROOT = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Places:
    """What a benchmark measures, and where the results lie.

    Attributes:
      quick: a network of a million parameters and few rounds.
      fresh: measure again what is in the results already.
      results: folder of the results; empty: benchmarks/results.
      progress: show a progress bar.
      only: measure only the cells whose name holds this text.
    """

    quick: bool = False
    fresh: bool = False
    results: str = ""
    progress: bool = True
    only: str = ""

    @property
    def folder(self) -> Path:
        """Where the results lie."""
        base = Path(self.results) if self.results else ROOT / "results"
        return base / "quick" if self.quick else base


Cells = Callable[[bool], Sequence[Any]]
Measure = Callable[[Any, Effort], dict[str, Any]]


@dataclasses.dataclass
class Results:
    """One file of results, written after every cell.

    Attributes:
        path: the file.
        machine: what they were measured on, see `machine`.
        cells: by name, what was measured.
    """

    path: Path
    machine: dict[str, Any]
    cells: dict[str, dict[str, Any]]

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read a file.

        Raises:
            ValueError: it holds no results.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            return cls(path, data["machine"], data["cells"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} holds no results: {error!r}") from error

    def put(self, cell: Any, measured: dict[str, Any]) -> None:
        """Add a cell and write the file, whole or not at all."""
        self.cells[name_of(cell)] = {
            "cell": dataclasses.asdict(cell),
            "commit": _commit(),
            "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "load": round(os.getloadavg()[0], 2),
            **measured,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_suffix(".json.new")
        text = json.dumps({"machine": self.machine, "cells": self.cells}, indent=1)
        new.write_text(text + "\n", encoding="utf-8")
        new.replace(self.path)


def machine() -> dict[str, Any]:
    """The machine and the versions that numbers belong to."""
    names = ("jax", "jaxlib", "flax", "optax", "numpy", "quax", "equinox")
    return {
        "backend": jax.default_backend(),
        "device": jax.local_devices()[0].device_kind,
        "devices": jax.local_device_count(),
        "processor": _processor(),
        "cores": footprint.cores(),
        "caches": _caches(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in names},
    }


def name_of(cell: Any) -> str:
    """A cell's name, e.g. "Cell storage=int8 tokens=32"."""
    fields = dataclasses.asdict(cell).items()
    return " ".join([type(cell).__name__, *(f"{key}={value}" for key, value in fields)])


def run(name: str, cells: Cells, measure: Measure) -> None:
    """A script: measure the cells that are not in the results yet.

    Args:
        name: of the file of results.
        cells: `cells(quick)` -> frozen dataclasses.
        measure: `measure(cell, effort)` -> what JSON can hold.
    """

    def main(places: Places) -> None:
        say(f"measuring {name}, results in {places.folder}")
        with claimed("results", places.folder, lambda name: True):
            _measure(places)

    def _measure(places: Places) -> None:
        effort = Effort(rounds=5, seconds=2.0) if places.quick else Effort()
        path = places.folder / f"{name}_{jax.default_backend()}.json"
        results = _open(path, places.fresh)
        chosen = [cell for cell in cells(places.quick) if places.only in name_of(cell)]
        todo = [c for c in chosen if places.fresh or name_of(c) not in results.cells]
        try:
            with tqdm(todo, desc=name, unit="cell", disable=not places.progress) as bar:
                for cell in bar:
                    bar.set_postfix_str(name_of(cell))
                    results.put(cell, measure(cell, effort))
                    jax.clear_caches()  # or compiled programs pile up
        except KeyboardInterrupt:
            raise command.Stopped(f"what was measured is in {results.path}") from None
        there = len(chosen) - len(todo)
        print(f"{name}: {len(todo)} cells measured, {there} were there: {results.path}")

    about = sys.modules["__main__"].__doc__ or name
    command.run(main, Places, about=about)


def _open(path: Path, fresh: bool) -> Results:
    here = machine()
    if not path.exists():
        return Results(path, here, {})
    results = Results.load(path)
    if results.machine == here:
        return results
    if fresh:
        return Results(path, here, {})
    differs = sorted(key for key in here if results.machine.get(key) != here[key])
    raise ValueError(
        f"{path} was measured elsewhere ({', '.join(differs)} differ): give --fresh to measure it "
        "all again, or another folder, --results=."
    )


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return out.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _caches() -> dict[str, int]:
    """Bytes of the first core's data caches; empty where the system does not say."""
    sizes = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = (
                (index / name).read_text().strip() for name in ("type", "level", "size")
            )
        except OSError:
            continue
        if kind != "Instruction" and size.endswith("K"):
            sizes[f"L{level}"] = 1024 * int(size[:-1])
    return sizes
