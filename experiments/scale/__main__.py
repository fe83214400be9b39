"""Runs of 10 to 10,000 workers, simulated: `python -m experiments.scale --help`.

Writes the tables and figures of docs/scale.md. The seconds are those that were measured on two
cores, see there; with others it says what your machines would do. A simulation that was stopped
goes on where it was.
"""

import dataclasses
from pathlib import Path

from tqdm import tqdm

from experiments import command
from experiments.files import writable
from experiments.scale import pages
from experiments.scale.plans import rows
from experiments.scale.simulation import Costs, Outcome, simulate
from experiments.store import Row, Store, storing

_ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Places:
    """Where things are, and which rows are wanted.

    Attributes:
      results: folder of what was simulated.
      document: what to write the tables into.
      only: simulate only rows whose name, after that of the table, holds this.
      render: only write the tables from what was simulated before.
      progress: show a progress bar.
    """

    results: str = str(Path(__file__).resolve().parent / "results")
    document: str = str(_ROOT / "docs" / "scale.md")
    only: str = ""
    render: bool = False
    progress: bool = True


def main(places: Places, costs: Costs) -> None:
    """Simulate what is left, and write the tables."""
    folder, document = Path(places.results), writable("document", Path(places.document))
    every = list(rows(costs))
    runs = [
        (row, seed)
        for row in every
        if not places.render and places.only in f"{row.table} {row.name}"
        for seed in range(row.seeds)
    ]
    with storing(folder):
        for row, seed in tqdm(runs, unit="run", disable=not places.progress):
            store = _store(folder, row, seed)
            if not store.content:
                simulated = row.config
                outcome = simulate(simulated.plan, simulated.costs, simulated.steps, seed)
                store.write(**outcome._asdict())
    pages.write(document, [(row, _found(folder, row)) for row in every])
    print(f"tables and figures: {document}")


def _found(folder: Path, row: Row) -> list[Outcome]:
    contents = (_store(folder, row, seed).content for seed in range(row.seeds))
    return [Outcome(**content) for content in contents if content]


def _store(folder: Path, row: Row, seed: int) -> Store:
    return row.store(folder, seed, ".json", ())


if __name__ == "__main__":
    command.run(main, Places, Costs, about=__doc__ or "")
