"""What the attacks of docs/attacks.md missed: `python -m experiments.attack.missed --help`.

An image that withstands may have no adversarial example in the ball at all. So the images that no
run of a table found are given to projected gradient descent, which sees gradients, and the table
"missed" says of how many images an example is known, and how many of those each attack missed.

A table of 300 robust digits of which 45 have an example says little about which attack misses
fewer. So gradients also look at digits that are in no table, the attacks are given those of which
they find an example, and the table "known" says how many each attack misses.

What was found lies beside the tables' results, and is not looked for again.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from experiments import command, settings
from experiments.command import say

if __name__ == "__main__":
    say("what attacks missed: loading JAX")  # which the imports below take seconds for

import numpy as np

from experiments.attack import attack, pgd, tables
from experiments.attack.run import Case
from experiments.attack.tables import Places, Row, Runs
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
_OTHERS = (300, 3_000)  # robust digits, of those that the network reads correctly
_LOOK = {"restarts": 4, "steps": 40, "seed": 0}  # enough for most of what 20 restarts find


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
      others: look at robust digits that are in no table, too; ten minutes, the first time.
      progress: show a progress bar.
    """

    results: str = Places.results
    document: str = Places.document
    cifar10: str = ""
    restarts: int = 20
    steps: int = 100
    seed: int = 0
    others: bool = True
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
        others = list(_others(config)) if config.others else []
    head = ["table", "images", "with a known example", *(f"{name} misses" for name in _ATTACKS)]
    of_others = ["attack", "images", "seeds", "misses", "mean queries"]
    written = {"missed": table(head, lines)}
    if others:
        written["known"] = table(of_others, others)
    fill(document, written.get)
    print("\n\n".join(written.values()))


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
    for wanted in _ATTACKS.values():
        queries = [q for one in runs if one.row.name == wanted for q in one.queries]
        counts = [float((known[: len(q)] & (q == 0)).sum()) for q in queries]
        missed.append(interval(counts, 1) if counts else "-")
    return [name, f"{len(known):,}", f"{known.sum():,}", *missed]


def _others(config: Gradients) -> Iterator[list[str]]:
    """How many of the other robust digits with a known example each attack misses."""
    rows = {row.name: row for row in tables.ROWS if row.table == "robust"}
    rows = {name: rows[wanted] for name, wanted in _ATTACKS.items() if wanted in rows}
    if not rows:
        return
    first, last = _OTHERS
    whole = dataclasses.replace(next(iter(rows.values())).config, num_images=last)
    store = Store(
        Path(config.results) / "known_robust.npz", {**_LOOK, "first": first, "last": last}
    )
    if "places" not in store.content:
        case = tables.case(whole, Places()).take(range(first, last))
        print(f"robust: gradients look at {last - first:,} images that are in no table")
        here = pgd.find(
            case.logits_fn,
            case.images,
            case.labels,
            whole.epsilon,
            **_LOOK,
            progress=config.progress,
        )
        store.write(places=first + np.flatnonzero(here))
    known = tables.case(whole, Places()).take(store.content["places"].tolist())
    for name, row in rows.items():
        queries = [_asked(config, row, seed, known) for seed in range(row.seeds)]
        found = np.concatenate(queries)
        mean = f"{found[found > 0].mean():.1f}" if found.any() else "-"
        misses = interval([float((one == 0).sum()) for one in queries], 1)
        count = f"{len(known.images):,}"
        yield [name, count, str(len(queries)), misses, mean]


def _asked(config: Gradients, row: Row, seed: int, known: Case) -> np.ndarray:
    """The queries of each image, 0 where it withstands, attacked unless that is stored."""
    named = dataclasses.replace(row, table="known")
    store = named.store(Path(config.results), seed, ".npz", ("dataset", "batch_size"))
    if len(store.content.get("queries", ())) != len(known.images):
        print(f"known: {row.name}, seed {seed}")
        settings = dataclasses.replace(row.config, seed=seed)
        outcome = attack.attack(known.logits_fn, known.images, known.labels, settings)
        store.write(queries=np.where(outcome.success, outcome.queries, 0))
    return store.content["queries"]


if __name__ == "__main__":
    command.run(main, Gradients, about=__doc__ or "")
