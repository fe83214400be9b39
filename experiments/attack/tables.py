"""The tables and figures of docs/attacks.md: `python -m experiments.attack.tables --help`.

Every row of a table is one `Config`, attacked once for each of its seeds, a thousand images at a
time, or a hundred where only labels are seen. What is found goes to experiments/attack/results, an
`.npz` for each row and seed, written after every thousand or hundred: a run may be stopped at any
moment and goes on from there, and so does one of so many `--images`. After each row
the tables are written anew into the document, between `<!-- table: NAME -->` and `<!-- end -->`,
with a CSV file each beside it, and the figures; once all rows of a table are found, a page of
adversarial images, too.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import command, settings
from experiments.command import say

if __name__ == "__main__":
    say("tables of attacks: loading JAX")  # which the imports below take seconds for

import numpy as np
from tqdm import tqdm

from experiments import footprint
from experiments.attack import attack, models, pages
from experiments.attack.config import LABEL_METHODS, Config
from experiments.attack.pages import Runs
from experiments.attack.run import Case, load_case
from experiments.files import writable
from experiments.store import Row, Store, storing

__all__ = ["ROWS", "Places", "Row", "Runs", "case", "load"]

_ROOT = Path(__file__).resolve().parents[2]
_CHUNK = 1_000
_SMALL_CHUNK = 100  # of attacks that see only labels, which take hundreds of queries
_SEEN = ("ZOQO, 8 bit, coarse to fine", "ZOQO, 2 bit, dense", "SignHunter", "Square Attack")


@dataclasses.dataclass(frozen=True)
class Places:
    """Where things are, and which rows are wanted.

    Attributes:
      results: folder of what was found.
      document: what to write the tables into.
      cifar10: "tfds:cifar10", a folder or a tar file of pictures; empty: leave its rows out.
      only: attack only rows whose name, after that of the table, holds this.
      images: attack so many images of a row at most; 0: all of them.
      render: only write the tables from what was found before.
      progress: show a progress bar.
    """

    results: str = str(Path(__file__).resolve().parent / "results")
    document: str = str(_ROOT / "docs" / "attacks.md")
    cifar10: str = ""
    only: str = ""
    images: int = 0
    render: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse what nothing later would refuse."""
        settings.check(self, least={"images": 0})


def _rows() -> Iterator[Row]:
    mnist = Config(num_images=0, budget=10_000)
    robust = dataclasses.replace(mnist, weights="mnist_robust", num_images=300)
    cifar = dataclasses.replace(
        mnist, dataset="cifar10", weights="cifar10", epsilon=12 / 255, batch_size=64
    )
    # Attacks of hundreds of queries get fewer images, and fewer yet where many images withstand:
    # one that does costs 10,000 queries, minutes of the CIFAR-10 network on two cores.
    yield from _quick("mnist", mnist)
    yield from _dense("mnist", mnist, [8])
    yield from _dense("mnist", _some(mnist, 1_000), [4])
    yield from _dense("mnist", _some(mnist, 300), [6, 3, 2])
    yield _float("mnist", _some(mnist, 300))
    yield from _quick("robust", robust)
    yield from _dense("robust", robust, [8, 4], seeds=1)
    yield _float("robust", robust, seeds=1)
    yield from _quick("cifar10", _some(cifar, 1_000))
    yield from _dense("cifar10", _some(cifar, 100), [8])
    yield from _dense("cifar10", _some(cifar, 100), [6, 4, 3, 2], seeds=1)
    yield _float("cifar10", _some(cifar, 100), seeds=1)

    digits = _some(mnist, 200)
    for structure in ("dense", "rank_one", "sparse"):
        for noise in ("rademacher", "uniform", "gaussian"):
            for bits in (8, 4):
                config = dataclasses.replace(digits, structure=structure, noise=noise, bits=bits)
                yield Row("noise", f"{structure}, {noise}, {bits} bit", config, seeds=3)
    for base, seeds in ((_some(mnist, 1_000), 3), (_some(cifar, 100), 1)):
        for bits in (32, 8, 4):
            name = f"{base.weights}, {'float' if bits == 32 else f'{bits} bit'}"
            config = dataclasses.replace(base, weight_bits=bits)
            yield from _strongest("quantized", name, config, seeds=3)
        for loss in ("margin", "cross_entropy"):
            for targeted in (False, True):
                name = f"{base.weights}, {'targeted, ' if targeted else ''}{loss}"
                config = dataclasses.replace(base, loss=loss, targeted=targeted)
                yield from _strongest("losses", name, config, seeds)
    # The start patterns were chosen on "mnist"; the others never saw them.
    for weights in ("mnist", "mnist_narrow", "mnist_5x5", "mnist_mlp", "cifar10"):
        base = _some(cifar if weights == "cifar10" else mnist, 300)
        yield from _with_and_without(dataclasses.replace(base, weights=weights))
    yield from _labels("labels_mnist", _some(mnist, 1_000))
    yield from _labels("labels_robust", robust)
    yield from _labels("labels_cifar10", _some(cifar, 1_000))


def _some(config: Config, num_images: int) -> Config:
    return dataclasses.replace(config, num_images=num_images)


def _quick(table: str, base: Config) -> Iterator[Row]:
    for bits in (8, 4):
        config = dataclasses.replace(base, bits=bits)
        yield Row(table, f"ZOQO, {bits} bit, coarse to fine", config, seeds=3)
    config = dataclasses.replace(base, method="sign_hunter")
    yield Row(table, "SignHunter", config, seeds=1)  # it draws nothing
    yield Row(table, "Square Attack", dataclasses.replace(base, method="square"), seeds=3)


def _dense(table: str, base: Config, all_bits: Sequence[int], seeds: int = 3) -> Iterator[Row]:
    for bits in all_bits:
        config = dataclasses.replace(base, bits=bits, structure="dense")
        yield Row(table, f"ZOQO, {bits} bit, dense", config, seeds)


def _float(table: str, base: Config, seeds: int = 3) -> Row:
    return Row(table, "ZO-SignSGD, float", dataclasses.replace(base, method="zo_sign_sgd"), seeds)


def _strongest(table: str, name: str, config: Config, seeds: int) -> Iterator[Row]:
    square = dataclasses.replace(config, method="square")
    yield Row(table, f"{name}, ZOQO", config, seeds)
    yield Row(table, f"{name}, Square Attack", square, seeds)


def _with_and_without(base: Config) -> Iterator[Row]:
    plain, name = dataclasses.replace(base, patterns=False), base.weights
    yield Row("patterns", f"{name}, ZOQO", base, seeds=3)
    yield Row("patterns", f"{name}, ZOQO without patterns", plain, seeds=3)
    hunter = dataclasses.replace(base, method="sign_hunter")
    yield Row("patterns", f"{name}, SignHunter", hunter)
    labels = {"num_images": 100, "method": "zoqo_labels", "model_batch": 4}
    yield Row("patterns", f"{name}, labels, ZOQO", dataclasses.replace(base, **labels))
    alone = dataclasses.replace(plain, **labels)
    yield Row("patterns", f"{name}, labels, ZOQO without patterns", alone)
    rays = dataclasses.replace(base, **{**labels, "method": "rays"})
    yield Row("patterns", f"{name}, labels, RayS", rays)


def _labels(table: str, base: Config) -> Iterator[Row]:
    # A few images take most of the labels, by themselves in a batch for the model.
    base = dataclasses.replace(base, model_batch=4)
    for bits in (8, 4):
        config = dataclasses.replace(base, method="zoqo_labels", bits=bits)
        yield Row(table, f"ZOQO, {bits} bit, labels", config)
    yield Row(table, "RayS", dataclasses.replace(base, method="rays"))
    yield Row(table, "SignFlip", dataclasses.replace(base, method="sign_flip"))
    # which asks about hundreds of points at once
    hopping = dataclasses.replace(base, method="hop_skip_jump", model_batch=64)
    yield Row(table, "HopSkipJump", hopping)


ROWS = tuple(_rows())


def load(folder: Path, row: Row) -> Runs:
    """What was found of a row.

    Example:
      >>> load(Path("/nowhere"), ROWS[0]).queries
      []
    """
    stores = [_store(folder, row, seed).content for seed in range(row.seeds)]
    found = [content for content in stores if content]
    queries = [content["queries"] for content in found]
    return Runs(row, queries, [float(content["seconds"]) for content in found])


def main(places: Places) -> None:
    """Attack what is left, and write the tables."""
    folder, document = Path(places.results), writable("document", Path(places.document))
    chosen = [] if places.render else [row for row in ROWS if _is_chosen(row, places)]
    with storing(folder):
        for row in chosen:
            if any([_attack(places, row, seed) for seed in range(row.seeds)]):
                footprint.forget_traces()  # or compiled programs pile up
                pages.write(document, [load(folder, row) for row in ROWS])
        pages.write(document, [load(folder, row) for row in ROWS])
        for table in sorted({row.table for row in chosen}):
            if all(len(load(folder, r).queries) == r.seeds for r in ROWS if r.table == table):
                _draw(table, places, document.parent / document.stem / f"examples_{table}.png")
    print(f"tables and figures: {document}")


def _is_chosen(row: Row, places: Places) -> bool:
    if row.config.weights not in models.BUNDLED:
        return False  # not trained yet
    if row.config.dataset == "cifar10" and not places.cifar10:
        return False
    return places.only in f"{row.table} {row.name}"


def case(config: Config, places: Places) -> Case:
    """The images of a configuration, from the data set that was named on the command line.

    Example:
      >>> case(Config(num_images=2), Places()).labels.tolist()
      [7, 2]
    """
    if config.dataset == "cifar10":
        config = dataclasses.replace(config, dataset=places.cifar10)
    return load_case(config)


def _attack(places: Places, row: Row, seed: int) -> bool:
    """Attack the images of a run that were not attacked before, and say whether there were any."""
    store = _store(Path(places.results), row, seed)
    config = dataclasses.replace(row.config, seed=seed)
    chosen = case(config, places)
    total = min(len(chosen.images), places.images or len(chosen.images))
    chunk = _SMALL_CHUNK if config.method in LABEL_METHODS else _CHUNK
    chunk = 10 if config.method == "hop_skip_jump" else chunk  # minutes, one after another
    queries = store.content.get("queries", np.zeros(0, np.uint16))
    seconds = store.content.get("seconds", 0.0)
    before = len(queries)
    title = f"{row.table}: {row.name}, seed {seed}"
    with tqdm(
        total=total, initial=len(queries), desc=title, unit="image", disable=not places.progress
    ) as bar:
        while len(queries) < total:
            part = chosen.take(slice(len(queries), min(len(queries) + chunk, total)))
            found, spent = _one(part, config, bar, len(queries))
            queries, seconds = np.concatenate([queries, found]), seconds + spent
            store.write(queries=queries, seconds=seconds)
    return len(queries) > before


def _one(part: Case, config: Config, bar: Any, before: int) -> tuple[np.ndarray, float]:
    start = time.perf_counter()
    outcome = attack.attack(
        part.logits_fn,
        part.images,
        part.labels,
        config,
        targets=part.targets,
        on_progress=lambda finished, found: bar.update(before + finished - bar.n),
    )
    queries = np.where(outcome.success, outcome.queries, 0).astype(np.uint16)
    return queries, time.perf_counter() - start


def _draw(table: str, places: Places, path: Path) -> None:
    """Attack an image of each class by the methods worth seeing, and draw what became of them."""
    rows = [row for row in ROWS if row.table == table and row.name in _SEEN]
    if not rows:
        return
    chosen = case(rows[0].config, places)
    _, first = np.unique(chosen.labels, return_index=True)
    _, images, labels, _ = chosen.take(first)
    drawn = [pages.Example("the image", images, [str(label) for label in labels])]
    for row in rows:
        outcome = attack.attack(chosen.logits_fn, images, labels, row.config)
        seen = np.clip(images + outcome.perturbation, 0.0, 1.0)
        read = np.asarray(chosen.logits_fn(seen)).argmax(-1)
        words = [
            f"{label}, {spent:,} quer{'ies' if spent > 1 else 'y'}"
            if label != right
            else "not found"
            for label, right, spent in zip(read, labels, outcome.queries, strict=True)
        ]
        drawn.append(pages.Example(row.name.replace(", ", "\n", 1), seen, words))
    pages.examples(drawn, path)


def _store(folder: Path, row: Row, seed: int) -> Store:
    """What was found in a run: the queries of the images attacked so far, and the seconds."""
    return row.store(folder, seed, ".npz", ("dataset", "batch_size"))


if __name__ == "__main__":
    command.run(main, Places, about=__doc__ or "")
