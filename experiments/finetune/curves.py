"""Accuracy against forward passes, of many ways to train: `python -m experiments.finetune.curves`.

Every row is one way, run for each seed as `tables.py` runs its rows: in a process of its own, which
goes on bit for bit when the command is given again. Steps size themselves where they can, so that
no rate is searched and nothing in a run depends on its length: the same command with more
--passes makes the runs longer that are in --work. Held-out sentences are read after 75 forward
passes of a batch and each time that these have doubled. What was found goes to
experiments/finetune/results/curves, and into docs/curves.md.

    ... --layers=4 --passes=2400 --seeds=2 --only=cores
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments import command, settings
from experiments.command import say

if __name__ == "__main__":
    say("curves of fine-tuning: loading JAX")  # which the imports below take seconds for

from experiments.files import writable
from experiments.finetune import curves_page, tables
from experiments.finetune.config import MATRICES, Config
from experiments.store import Row, storing

__all__ = ["Wanted", "rows"]

_ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What to run, and where things are.

    Attributes:
      model: what trains, as `--model` of the experiment names it.
      layers: how many of the last layers train.
      passes: forward passes of a batch after which a run is read for the last time: 75, 150, 300
        and so on; what lies between counts as the next.
      seeds: how many runs of each row.
      only: run only rows whose name holds this.
      render: only write the tables from what was found before.
      results: folder of what runs came to.
      work: folder for the runs themselves, checkpoints and all.
      document: what to write the tables into.
      sst2: "tfds:sst2", a folder of train.tsv, dev.tsv and test.tsv, or other examples.

    Raises:
      ValueError: a setting outside what is said above.

    Example:
      >>> Wanted(passes=300).looks, Wanted(passes=1000).looks
      ((75, 150, 300), (75, 150, 300, 600, 1200))
    """

    model: str = "smollm2"
    layers: int = 4
    passes: int = 1200
    seeds: int = 1
    only: str = ""
    render: bool = False
    results: str = str(Path(__file__).resolve().parent / "results" / "curves")
    work: str = "results/finetune-curves"
    document: str = str(_ROOT / "docs" / "curves.md")
    sst2: str = "tfds:sst2"

    def __post_init__(self) -> None:
        """Refuse what nothing later would refuse, or would only after minutes."""
        settings.check(self, least={"layers": 0, "passes": 1, "seeds": 1})

    @property
    def looks(self) -> tuple[int, ...]:
        """After how many forward passes the held-out sentences are read."""
        found = [curves_page.FIRST]
        while found[-1] < self.passes:
            found.append(2 * found[-1])
        return tuple(found)


def rows(wanted: Wanted) -> Iterator[Row]:
    """All rows, of which some may be of no interest now.

    Example:
      >>> row = next(rows(Wanted(passes=300)))
      >>> row.name, row.config.steps, row.config.goes_on
      ('Adam, float adapters, by back-propagation', 100, True)
    """
    base = Config(
        model=wanted.model,
        output="-",
        data="sst2",
        test="dev",  # a curve is of the dev sentences; the test sentences wait for what wins
        layers=wanted.layers,
        looks=wanted.looks,
        sized=True,
        num_queries=4,
        query_batch=4,
        batch_size=16,
        max_tokens=32,
        dev_examples=0,
        test_examples=0,
        checkpoint_every=100,
    )

    def row(name: str, **changes: Any) -> Row:
        config = dataclasses.replace(base, **changes)
        a_step = 3 if config.method == "adam" else 2 * config.num_queries
        config = dataclasses.replace(config, steps=-(-wanted.looks[-1] // a_step))
        return Row(f"layers_{wanted.layers}", name, config, wanted.seeds)

    adapters, codes = {"train": "lora"}, {"train": "codes"}
    by_hand = {"sized": False, "num_queries": 1, "query_batch": 1}
    constant = {**by_hand, "method": "adam", "decay": 1.0}
    yield row("Adam, float adapters, by back-propagation", **constant, **adapters)
    yield row("MeZO, float adapters", method="mezo", **adapters)
    by_signs = {"method": "zo_signsgd", "learning_rate": 1e-2, "radius": 5e-3}
    yield row("ZO-SignSGD, float adapters, rate by hand", **by_hand, **by_signs, **adapters)
    # Cores of all matrices, as they are so few numbers; adapters of q and v.
    small = {**adapters, "core": 4, "targets": MATRICES}
    yield row("Adam, float cores of 4 x 4, by back-propagation", **constant, **small)
    yield row("MeZO, float cores of 4 x 4", method="mezo", **small)
    yield row("MeZO, float cores of 16 x 16", method="mezo", **{**small, "core": 16})
    yield row("ZOQO, 8-bit cores of 4 x 4", bits=8, **small)
    by_size = {"method": "caq_zo", "rounding": "error_feedback"}
    yield row("CAQ-ZO, 8-bit cores of 4 x 4, error feedback", bits=8, **by_size, **small)
    yield row("ZOQO, 4-bit codes, sparse", **codes)
    yield row("CAQ-ZO, 4-bit codes, sparse", method="caq_zo", **codes)
    columns = {"structure": "columns", **codes}
    yield row("ZOQO, 4-bit codes, columns", **columns)
    yield row("ZOQO, 4-bit codes, guided columns", guide_every=50, **columns)
    yield row("ZOQO, 8-bit adapters", bits=8, **adapters)
    yield row("ZOQO, 4-bit adapters", bits=4, range=0.4, **adapters)


def main(wanted: Wanted) -> None:
    """Run what is left, and write the tables."""
    folder, document = Path(wanted.results), writable("document", Path(wanted.document))
    with storing(folder):
        for row in [] if wanted.render else rows(wanted):
            for seed in range(row.seeds) if wanted.only in row.name else ():
                if not _is_done(tables.store(folder, row, seed).content, wanted):
                    tables.run(wanted, row, seed)
                    curves_page.write(document, folder, rows(wanted))
        curves_page.write(document, folder, rows(wanted))
    print(f"tables and figures: {document}")


def _is_done(outcome: dict[str, Any], wanted: Wanted) -> bool:
    """Whether a run is as long as it is wanted."""
    return bool(outcome) and outcome["history"][-1]["forward_passes"] >= wanted.looks[-1]


if __name__ == "__main__":
    command.run(main, Wanted, about=__doc__ or "")
