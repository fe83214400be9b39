"""Attack a black-box image classifier on an integer grid: `python -m experiments.attack --help`.

By default it attacks 300 MNIST digits of the bundled network with ZOQO at 8 and at 4 bits and,
beside them, with ZO-SignSGD in floats, prints a table, and writes the table and a figure to
`results/attack`.
"""

import csv
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging

from experiments.attack import report
from experiments.attack.config import Config
from experiments.attack.run import Metrics, run

_DEFAULT = Config()

_BITS = flags.DEFINE_list(
    "bits", ["8", "4"], "bit widths of the ZOQO runs, 2 to 8, comma-separated"
)
_BASELINE = flags.DEFINE_bool("baseline", True, "run float ZO-SignSGD too")
_OUTPUT = flags.DEFINE_string("output", "results/attack", "folder for the table and the figure")
_PROGRESS = flags.DEFINE_bool("progress", True, "show a progress bar")

_SETTINGS = {
    "dataset": flags.DEFINE_string(
        "dataset", _DEFAULT.dataset, "mnist (bundled), tfds:NAME or a folder of IDX files"
    ),
    "weights": flags.DEFINE_string(
        "weights",
        _DEFAULT.weights,
        "weights of experiments.attack.train; empty: the bundled network",
    ),
    "num_images": flags.DEFINE_integer(
        "num_images", _DEFAULT.num_images, "correctly classified images to attack"
    ),
    "epsilon": flags.DEFINE_float(
        "epsilon", _DEFAULT.epsilon, "radius of the l_inf ball; pixels lie in [0, 1]"
    ),
    "budget": flags.DEFINE_integer(
        "budget", _DEFAULT.budget, "most model evaluations for an image"
    ),
    "learning_rate": flags.DEFINE_float(
        "learning_rate", _DEFAULT.learning_rate, "first step in pixel values; 0: epsilon/3"
    ),
    "decay_steps": flags.DEFINE_integer(
        "decay_steps",
        _DEFAULT.decay_steps,
        "ZOQO's learning rate falls as 1/sqrt(1 + t/decay_steps); 0: constant",
    ),
    "radius": flags.DEFINE_float(
        "radius", _DEFAULT.radius, "size of the probes in pixel values; 0: epsilon/3"
    ),
    "num_queries": flags.DEFINE_integer(
        "num_queries",
        _DEFAULT.num_queries,
        "directions a step; 0: ZOQO 1, up to 5 bits 5; float 10",
    ),
    "noise": flags.DEFINE_enum(
        "noise", _DEFAULT.noise, ["uniform", "gaussian", "rademacher"], "law of ZOQO's directions"
    ),
    "step": flags.DEFINE_enum(
        "step", _DEFAULT.step, ["floor", "dithered"], "ZOQO's step rule; floor is the paper's"
    ),
    "seed": flags.DEFINE_integer("seed", _DEFAULT.seed, "seed of all randomness"),
    "batch_size": flags.DEFINE_integer(
        "batch_size", _DEFAULT.batch_size, "images attacked at a time"
    ),
}


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
    settings = {name: flag.value for name, flag in _SETTINGS.items()}
    base = Config(**settings)
    configs = []
    for bits in _BITS.value:
        if not bits.strip().isdigit():
            raise ValueError(f"bits must be whole numbers, got {bits!r}.")
        configs.append(dataclasses.replace(base, bits=int(bits)))
    if _BASELINE.value:
        configs.append(dataclasses.replace(base, method="zo_sign_sgd"))
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
