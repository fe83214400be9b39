"""The tables and figures of docs/finetune.md: `python -m experiments.finetune.tables --help`.

Every row is one `Config`, run once for each of its seeds by `python -m experiments.finetune` in a
process of its own, so that its memory is its own. A run that was stopped goes on bit for bit when
the command is given again. What a finished run came to goes to experiments/finetune/results, a
JSON file for each; after each of them the tables are written anew into the document, between
`<!-- table: NAME -->` and `<!-- end -->`, with the figures beside it.
"""

import dataclasses
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments import command, settings
from experiments.command import say

if __name__ == "__main__":
    say("tables of fine-tuning: loading JAX")  # which the imports below take seconds for

from experiments import footprint
from experiments.files import read_json, writable, write_json
from experiments.finetune import pages
from experiments.finetune.config import LENGTH, Config
from experiments.store import Row, Store, storing

__all__ = ["ROWS", "Row", "found", "run"]

_ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Places:
    """Where things are, and which rows are wanted.

    Attributes:
      results: folder of what runs came to.
      work: folder for the runs themselves, checkpoints and all.
      document: what to write the tables into.
      sst2: "tfds:sst2", or a folder of train.tsv, dev.tsv and test.tsv.
      only: run only rows whose name holds this.
      render: only write the tables from what was found before.
    """

    results: str = str(Path(__file__).resolve().parent / "results")
    work: str = "results/finetune-tables"
    document: str = str(_ROOT / "docs" / "finetune.md")
    sst2: str = "tfds:sst2"
    only: str = ""
    render: bool = False


def _rows() -> Iterator[Row]:
    # The outputs of the lower two thirds are computed once for all runs: training these layers as
    # well makes a step three times as long and the model hardly better.
    base = Config(
        model="smollm2",
        output="-",
        data="sst2",
        layers=10,
        train="lora",
        steps=600,
        batch_size=16,
        max_tokens=32,
        eval_every=100,
        dev_examples=384,
        checkpoint_every=200,
        test_examples=0,
    )

    def row(table: str, name: str, seeds: int = 1, **changes: Any) -> Row:
        return Row(table, name, dataclasses.replace(base, **changes), seeds)

    # Rates are those that answered dev examples best, see docs/finetune.md.
    by_signs = {"learning_rate": 1e-2, "radius": 5e-3}
    yield row("sst2", "Adam, float LoRA, back-propagation", method="adam", steps=400)
    yield row("sst2", "MeZO, float LoRA", 3, method="mezo", learning_rate=1e-2)
    yield row("sst2", "ZO-SignSGD, float LoRA", 3, method="zo_signsgd", **by_signs)
    yield row("sst2", "ZOQO, 8-bit LoRA, the paper's step", 3, bits=8, **by_signs)
    yield row("sst2", "ZOQO, 4-bit LoRA, the paper's step", bits=4, structure="dense", **by_signs)
    dithered = {"step_rule": "dithered", **by_signs}
    yield row("sst2", "ZOQO, 8-bit LoRA, dithered step", 3, bits=8, **dithered)
    yield row("sst2", "ZOQO, 6-bit LoRA, dithered step", bits=6, **dithered)
    coarser = {**dithered, "range": 0.2, "learning_rate": 0.02, "radius": 0.02}
    yield row("sst2", "ZOQO, 4-bit LoRA, dithered step", bits=4, **coarser)
    # Of few bits a step is one code of few entries; how many is the step size, and falls.
    for bits, reach, density in ((4, 0.4, 0.035), (3, 0.4, 0.006), (2, 0.2, 0.0045)):
        sparse = {"structure": "sparse", "range": reach, "density": density, "decay": 1 / 64}
        yield row("sst2", f"ZOQO, {bits}-bit LoRA, sparse", 3, bits=bits, **sparse)
    on_nf4 = {"method": "caq_zo", "grid": "nf4", "bits": 4, "learning_rate": 10.0}
    for query in ("aligned", "off_grid"):
        name = f"CAQ-ZO, NF4 LoRA, {query.replace('_', '-')} probes"
        yield row("sst2", name, 3, query=query, rounding="error_feedback", **on_nf4)
    yield row("sst2", "QuZO, 4-bit LoRA", method="quzo", bits=4, range=0.2, learning_rate=5.0)

    ten = {"train": "codes", "density": 2.0**-8, "decay": 1 / 32}
    yield row("sst2", "ZOQO, 4-bit codes of ten layers", **ten)
    population = {"num_queries": 4, "steps": 150}
    yield row("sst2", "ZOQO, 4-bit codes of ten layers, 4 directions", **population, **ten)
    itself = {"train": "codes", "sized": True, "num_queries": 4, "query_batch": 4, "steps": 141}
    name = "ZOQO, 4-bit codes of ten layers, no number by hand, bfloat16"
    yield row("sst2", name, 3, dtype="bfloat16", **itself)
    # Directions are sparser, as steps are of several codes where the loss differs much.
    by_size = {"train": "codes", "method": "caq_zo", "density": 2.0**-10, "learning_rate": 400.0}
    for rounding in ("nearest", "stochastic"):
        name = f"CAQ-ZO, 4-bit codes of ten layers, {rounding}"
        yield row("sst2", name, rounding=rounding, **by_size)
    whole = {"train": "codes", "layers": 0, "density": 2.0**-9, "decay": 1 / 128}
    yield row("sst2", "ZOQO, all 4-bit codes in place", **whole)
    # Of all layers the rate times the density has to be an eighth: the first ones are sensitive.
    sparser = {**by_size, "layers": 0, "density": 2.0**-14, "learning_rate": 800.0}
    longer = {"steps": 1200, "eval_every": 200, "rounding": "nearest"}
    yield row("sst2", "CAQ-ZO, all 4-bit codes in place", 3, **sparser, **longer)
    scales = {"method": "qzo", "learning_rate": 4e-6}
    yield row("sst2", "QZO, scales of the 4-bit file", train="scales", **scales)

    # Each in a process of its own, the first one trains nothing.
    short = {"layers": 0, "steps": 4, "eval_every": 4, "dev_examples": 64, "test_examples": 64}
    own = {**short, "train": "codes"}
    yield row("memory", "inference", **{**own, "steps": 0})
    yield row("memory", "ZOQO, codes in place, sparse", **own)
    yield row("memory", "ZOQO, codes in place, rank-one", structure="rank_one", **own)
    yield row("memory", "CAQ-ZO, codes in place", method="caq_zo", **own)
    yield row("memory", "ZOQO, 8-bit LoRA", **short)
    yield row("memory", "MeZO, float LoRA", method="mezo", **short)
    yield row("memory", "Adam, float LoRA, back-propagation", method="adam", **short)

    # Gemma 3 270M as people have it, Q4_K_M: Q5_0, Q4_K, Q6_K and Q8_0. A third of its layers.
    six = {"train": "codes", "layers": 6, "max_tokens": 48, "eval_every": 50, "dev_examples": 256}
    gemma = {"model": "gemma3-270m", "checkpoint_every": 25}
    yield row("gemma", "ZOQO, codes of six layers", **gemma, **six)
    yield row("gemma_memory", "inference", **gemma, **{**own, "steps": 0})
    yield row("gemma_memory", "ZOQO, codes in place, sparse", **gemma, **own)


ROWS = tuple(_rows())


def found(folder: Path, row: Row) -> list[dict[str, Any]]:
    """What the finished runs of a row came to, as `outcome.json` has it.

    Example:
      >>> found(Path("/nowhere"), ROWS[0])
      []
    """
    outcomes = (store(folder, row, seed).content for seed in range(row.seeds))
    return [outcome for outcome in outcomes if outcome]


def main(places: Places) -> None:
    """Run what is left, and write the tables."""
    folder, document = Path(places.results), writable("document", Path(places.document))
    chosen = [row for row in ROWS if places.only in f"{row.table} {row.name}"]
    with storing(folder):
        for row in [] if places.render else chosen:
            for seed in range(row.seeds):
                if not store(folder, row, seed).content:
                    run(places, row, seed)
                    pages.write(document, [(row, found(folder, row)) for row in ROWS])
        pages.write(document, [(row, found(folder, row)) for row in ROWS])
    print(f"tables and figures: {document}")


def store(folder: Path, row: Row, seed: int) -> Store:
    """What a run came to; nothing where it is not finished, or was another with this name.

    A run that may be made longer is the same run when it is.
    """
    length = LENGTH if row.config.goes_on and row.config.looks else ()
    return row.store(folder, seed, ".json", ("data", "output", "cache", *length))


def run(places: Any, row: Row, seed: int) -> None:
    """Run a row in a process of its own, and store what it came to.

    Args:
      places: has `results`, `work` and `sst2`, as `Places`.
      row: what to run.
      seed: of the run.
    """
    kept, work = store(Path(places.results), row, seed), Path(places.work)
    output, cache = work / row.stem(seed), work / "states"
    config = dataclasses.replace(
        row.config, data=places.sst2, output=str(output), cache=str(cache), seed=seed
    )
    # Runs of a model that read all test examples begin with the same answers to them.
    asked = repr((config.model, config.data, config.layers)).encode()
    before = work / f"before_{hashlib.sha256(asked).hexdigest()[:16]}.json"
    own = output / "before.json"
    shares = not config.test_examples
    if shares and before.is_file() and not own.is_file():
        write_json(own, read_json(before))
    name = f"{row.name}, seed {seed}"
    print(f"{row.table}: {name}", file=sys.stderr)
    variables = {}
    if row.table.endswith("memory"):
        # XLA's compiler takes more memory than the model does, so another process compiles.
        variables = footprint.programs_in(work.resolve() / "programs")
        _process(dataclasses.replace(config, output=f"{output}_compiles"), name, variables)
    _process(config, name, variables)
    outcome = read_json(output / "outcome.json")
    if shares:
        write_json(before, read_json(own))
    kept.write(used=outcome.pop("settings"), **outcome)


def _process(config: Config, name: str, variables: dict[str, str]) -> None:
    """Run one configuration with these environment variables, to its end."""
    line = [sys.executable, "-m", "experiments.finetune", *settings.arguments(config)]
    # A group of its own: a Ctrl-C reaches it once, through this process, and so does a SIGTERM.
    child = subprocess.Popen(line, cwd=_ROOT, env={**os.environ, **variables}, process_group=0)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.terminate()  # it writes a checkpoint first
        child.wait()
        raise
    if code:
        sys.exit(f"error: {name}, ended with status {code}")


if __name__ == "__main__":
    command.run(main, Places, about=__doc__ or "")
