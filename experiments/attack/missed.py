"""What the attacks of docs/attacks.md missed: `python -m experiments.attack.missed --help`.

An image that withstands may have no adversarial example in the ball at all. So the images that no
run of a table found are given to projected gradient descent, which sees gradients, and the table
"missed" says of how many images an example is known, and how many of those each attack missed.

What gradients found lies beside the tables' results, and is not looked for again.
"""

import dataclasses
from pathlib import Path

from experiments import command, settings
from experiments.command import say

if __name__ == "__main__":
    say("what attacks missed: loading JAX")  # which the imports below take seconds for

import numpy as np

from experiments.attack import pgd, tables
from experiments.attack.tables import Places, Runs
from experiments.files import writable
from experiments.markdown import fill, interval, table
from experiments.store import Store, storing

__all__ = ["TABLES", "Gradients", "main"]

TABLES = ("mnist", "robust", "cifar10")
_ATTACKS = {
    "ZOQO, 8 bit": "ZOQO, 8 bit, coarse to fine",
    "SignHunter": "SignHunter",
    "Square Attack": "Square Attack",
}


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Where things are, and how long gradients look.

    Attributes:
      results: folder of what the attacks found, and gradients.
      document: what to write the table into.
      cifar10: "tfds:cifar10", a folder or a tar file of pictures; empty: leave its images out.
      restarts: random points of the ball to begin at.
      steps: gradients from each of them.
      seed: of the random points.
      progress: show a progress bar.
    """

    results: str = Places.results
    document: str = Places.document
    cifar10: str = ""
    restarts: int = 20
    steps: int = 100
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse what nothing later would refuse."""
        settings.check(self, least={"restarts": 1, "steps": 1})


def main(config: Gradients) -> None:
    """Look where no attack found anything, and write the table."""
    folder, document = Path(config.results), writable("document", Path(config.document))
    lines = []
    with storing(folder):
        for name in TABLES:
            runs = [tables.load(folder, row) for row in tables.ROWS if row.table == name]
            runs = [one for one in runs if one.queries]
            if runs and (name != "cifar10" or config.cifar10):
                lines.append(_line(name, runs, _known(name, runs, config)))
    head = ["table", "images", "with a known example", *(f"{name} misses" for name in _ATTACKS)]
    fill(document, lambda name: table(head, lines) if name == "missed" else None)
    print(table(head, lines))


def _known(name: str, runs: list[Runs], config: Gradients) -> np.ndarray:
    """Of which images some run of a table or gradients found an adversarial example, bool (n,)."""
    known = np.zeros(max(len(queries) for one in runs for queries in one.queries), bool)
    for queries in (queries for one in runs for queries in one.queries):
        known[: len(queries)] |= queries > 0
    settings = {x: getattr(config, x) for x in ("restarts", "steps", "seed")}
    store = Store(Path(config.results) / f"missed_{name}.npz", settings)
    asked, found = (store.content.get(x, np.zeros(0, int)) for x in ("asked", "found"))
    left = np.setdiff1d(np.flatnonzero(~known), asked)
    if len(left):
        places = Places(cifar10=config.cifar10)
        row = max(runs, key=lambda one: max(map(len, one.queries))).row
        case = tables.case(row.config, places).take(left.tolist())
        print(f"{name}: gradients look at {len(left)} images that no attack found")
        here = pgd.find(
            case.logits_fn,
            case.images,
            case.labels,
            row.config.epsilon,
            **settings,
            progress=config.progress,
        )
        asked, found = np.append(asked, left), np.append(found, left[here])
        store.write(asked=asked, found=found)
    known[found] = True
    return known


def _line(name: str, runs: list[Runs], known: np.ndarray) -> list[str]:
    missed = []
    for attack in _ATTACKS.values():
        queries = [q for one in runs if one.row.name == attack for q in one.queries]
        counts = [float((known[: len(q)] & (q == 0)).sum()) for q in queries]
        missed.append(interval(counts, 1) if counts else "-")
    return [name, f"{len(known):,}", f"{known.sum():,}", *missed]


if __name__ == "__main__":
    command.run(main, Gradients, about=__doc__ or "")
