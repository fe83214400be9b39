"""Attack a black-box image classifier on an integer grid: `python -m experiments.attack --help`.

By default it attacks 300 MNIST digits of the bundled network with ZOQO at 8 and at 4 bits, with
directions from coarse to fine and with dense ones, and beside them with SignHunter, Square Attack
and ZO-SignSGD, prints a table, and writes the table and a figure to `results/attack`.
"""

import csv
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from absl import app, flags, logging

from experiments import settings
from experiments.attack import config, report
from experiments.attack.config import Config
from experiments.attack.run import Metrics, run

_GIVEN = settings.define(Config, leave_out=["method", "bits", "structure", "epsilon"])
_BITS = flags.DEFINE_list("bits", ["8", "4"], "bit widths of the ZOQO runs, 2 to 8")
_STRUCTURES = flags.DEFINE_list(
    "structures",
    ["coarse_to_fine", "dense"],
    f"structures of the ZOQO runs' directions: {', '.join(get_args(config.Structure))}",
)
_BASELINES = flags.DEFINE_bool("baseline", True, "run SignHunter, Square Attack and ZO-SignSGD too")
_OUTPUT = flags.DEFINE_string("output", "results/attack", "folder for the table and the figure")
_PROGRESS = flags.DEFINE_bool("progress", True, "show a progress bar")
_EPSILON = flags.DEFINE_float(
    "epsilon", None, "radius of the l_inf ball, pixels in [0, 1]; default: 0.3, CIFAR-10 12/255"
)


def main(argv: Sequence[str]) -> None:
    """Run the attacks that the flags name; finished ones are reported even when interrupted."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    logging.set_verbosity(logging.WARNING)  # or JAX tells of each accelerator that it did not find
    try:
        configs = _configs()
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    runs: list[Metrics] = []
    try:
        for config in configs:
            runs.append(run(config, progress=_PROGRESS.value))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    if runs:
        _report(runs, Path(_OUTPUT.value))
    if len(runs) < len(configs):
        sys.exit(130)


def _configs() -> list[Config]:
    given = _GIVEN()
    usual = 12 / 255 if given["weights"] == "cifar10" else Config.epsilon
    base = Config(**given, epsilon=usual if _EPSILON.value is None else _EPSILON.value)
    configs = []
    for structure in _STRUCTURES.value:
        for bits in _BITS.value:
            if not bits.strip().isdigit():
                raise ValueError(f"bits must be whole numbers, got {bits!r}.")
            configs.append(dataclasses.replace(base, bits=int(bits), structure=structure))
    if _BASELINES.value:
        others = (name for name in get_args(config.MethodName) if name != "zoqo")
        configs.extend(dataclasses.replace(base, method=name) for name in others)
    if not configs:
        raise ValueError("bits must name a width when baseline is off, got none.")
    return configs


def _report(runs: Sequence[Metrics], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = report.table(runs)
    first = runs[0]
    print(
        f"\n{first.images} correctly classified images of {first.config.dataset}, "
        f"l_inf ball of {first.config.epsilon:g}, at most {first.config.budget} queries an image; "
        "queries over successes\n"
    )
    print(text)
    (folder / "table.md").write_text(text + "\n")
    with (folder / "images.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["attack", "place", "label", "read_as", "success", "queries"])
        for one in runs:
            for place in range(one.images):
                writer.writerow(
                    [
                        one.config.name,
                        place,
                        int(one.labels[place]),
                        int(one.predicted[place]),
                        int(one.success[place]),
                        int(one.queries[place]),
                    ]
                )
    report.figure(runs, folder / "figure.png")
    print(f"\ntable, figure and single images: {folder}/")


if __name__ == "__main__":
    app.run(main)
