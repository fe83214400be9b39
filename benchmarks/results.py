"""Results: a JSON file for each script and backend, with the machine and the versions."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from benchmarks.timing import Effort
from experiments import command, footprint
from experiments.command import say
from experiments.store import Store, storing

__all__ = ["ROOT", "Places", "machine", "name_of", "run"]

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
Found = dict[str, Any]
Measure = Callable[[Any, Effort], Found | Callable[[], Found]]


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


def run(name: str, cells: Cells, measure: Measure, at_once: int = 1) -> None:
    """A script: measure the cells that are not in the results yet.

    A cell that fails does not stop the others: what was wrong goes into the file, under "failed",
    the exit status is not 0, and the next call measures it again.

    Args:
        name: of the file of results.
        cells: `cells(quick)` -> frozen dataclasses.
        measure: `measure(cell, effort)` -> what JSON can hold; or a function that returns it, for
            what has to be done while nothing else is.
        at_once: of how many cells `measure` is called at once, in threads.
    """

    def main(places: Places) -> None:
        say(f"measuring {name}, results in {places.folder}")
        with storing(places.folder):
            _measure(places)

    def _measure(places: Places) -> None:
        effort = Effort(rounds=5, seconds=2.0) if places.quick else Effort()
        path = places.folder / f"{name}_{jax.default_backend()}.json"
        store = Store(path, machine(), name="machine")
        if store.changed and not places.fresh:
            raise ValueError(
                f"{path} was measured elsewhere, with {store.changed}: give --fresh to measure it "
                "all again, or another folder, --results=."
            )
        measured = store.content.setdefault("cells", {})
        failed = store.content.setdefault("failed", {})
        chosen = [cell for cell in cells(places.quick) if places.only in name_of(cell)]
        todo = [c for c in chosen if places.fresh or name_of(c) not in measured]
        with tqdm(total=len(todo), desc=name, unit="cell", disable=not places.progress) as bar:
            for cell, finish in _begun(measure, todo, effort, at_once):
                bar.set_postfix_str(name_of(cell))
                for before in (measured, failed):
                    before.pop(name_of(cell), None)
                try:
                    measured[name_of(cell)] = {
                        "cell": dataclasses.asdict(cell),
                        "commit": _commit(),
                        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                        "load": round(os.getloadavg()[0], 2),
                        **finish(),
                    }
                except Exception as error:  # the other cells are still of use
                    failed[name_of(cell)] = "".join(traceback.format_exception(error))[-4000:]
                    say(f"{name_of(cell)} failed: {type(error).__name__}: {str(error)[:400]}")
                store.write()
                bar.update()
        there = len(chosen) - len(todo)
        wrong = [name_of(cell) for cell in todo if name_of(cell) in failed]
        print(f"{name}: {len(todo) - len(wrong)} cells measured, {there} were there: {path}")
        if wrong:
            raise ValueError(f"{len(wrong)} of {len(todo)} cells failed, see {path}: {wrong[0]}.")

    about = sys.modules["__main__"].__doc__ or name
    command.run(main, Places, about=about)


def _begun(
    measure: Measure, cells: Sequence[Any], effort: Effort, at_once: int
) -> Iterator[tuple[Any, Callable[[], Found]]]:
    """Each cell, and a function that returns what was found, or raises what was wrong."""

    for first in range(0, len(cells), at_once):
        some = cells[first : first + at_once]
        if at_once == 1:
            yield some[0], lambda cell=some[0]: _done(measure(cell, effort))
        else:
            with ThreadPoolExecutor(at_once) as pool:
                begun = [pool.submit(measure, cell, effort) for cell in some]
                for i, cell in enumerate(some):
                    yield cell, lambda begun=begun[i:]: _done(begun[0].result(), begun)
                    begun[i] = Future()  # without the memory that the other holds
        jax.clear_caches()  # or compiled programs pile up


def _done(found: Found | Callable[[], Found], others: Sequence[Future[Any]] = ()) -> Found:
    """What was found, by what is left to do once the others are at rest."""
    if callable(found):
        wait(others)
        return found()
    return found


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
