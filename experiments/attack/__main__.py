"""Attack a black-box image classifier on an integer grid: `python -m experiments.attack --help`.

By default it attacks 300 MNIST digits of the bundled network with ZOQO at 8 and at 4 bits, with
directions from coarse to fine and with dense ones, and beside them with SignHunter, Square Attack
and ZO-SignSGD, prints a table, and writes the table and a figure to `results/attack`.
"""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from experiments import command, settings
from experiments.attack import config
from experiments.attack.config import Config
from experiments.command import say

if TYPE_CHECKING:
    from experiments.attack.run import Metrics

_FILES = ("table.md", "images.csv", "figure.png")


@dataclasses.dataclass(frozen=True)
class Runs:
    """Which attacks to run, and where their table goes.

    Attributes:
      bits: bit widths of the ZOQO runs, 2 to 8.
      structures: structures of the ZOQO runs' directions: coarse_to_fine, dense, rank_one, sparse.
      baseline: run the other methods too: SignHunter, Square Attack and ZO-SignSGD, or RayS and
        SignFlip.
      labels: see only labels: run ZOQO, RayS and SignFlip that do, whatever the structures.
      hop_skip_jump: with `labels` run ART's HopSkipJump, too; slow, and needs that package.
      output: folder for the table and the figure; those of an earlier run are replaced.
      progress: show a progress bar.
      epsilon: radius of the l_inf ball, pixels in [0, 1]; by default 0.3, of CIFAR-10 12/255.
    """

    bits: tuple[int, ...] = (8, 4)
    structures: tuple[str, ...] = ("coarse_to_fine", "dense")
    baseline: bool = True
    labels: bool = False
    hop_skip_jump: bool = False
    output: str = "results/attack"
    progress: bool = True
    epsilon: float | None = None

    def __post_init__(self) -> None:
        """Refuse what nothing later would refuse."""
        settings.check(self, within={"bits": (2, 8)})
        if self.hop_skip_jump and not self.labels:
            raise ValueError("hop_skip_jump sees only labels: labels must be True, got False.")
        for one in self.structures:
            if one not in get_args(config.Structure):
                allowed = get_args(config.Structure)
                raise ValueError(f"structures must be of {allowed}, got {one!r}.")


def main(wanted: Runs, base: Config) -> None:
    """Run the attacks; finished ones are reported even when the command is stopped."""
    configs = _configs(wanted, base)
    say(f"{len(configs)} attacks on {base.dataset}, network {base.weights}: loading JAX")
    from experiments.attack.run import run
    from experiments.files import claimed

    folder = Path(wanted.output)
    runs: list[Metrics] = []
    with claimed("output", folder, _FILES.__contains__):
        say("choosing images that the network reads correctly")
        try:
            for one in configs:
                runs.append(run(one, progress=wanted.progress))
        except KeyboardInterrupt:
            if not runs:
                raise
            _report(runs, folder)
            done = f"{len(runs)} of {len(configs)} attacks are done and in {folder}"
            raise command.Stopped(f"{done}; all begin anew") from None
        _report(runs, folder)


def _configs(wanted: Runs, base: Config) -> list[Config]:
    usual = 12 / 255 if base.weights == "cifar10" else Config.epsilon
    epsilon = usual if wanted.epsilon is None else wanted.epsilon
    base = dataclasses.replace(base, epsilon=epsilon)
    if wanted.labels:
        first = dataclasses.replace(base, method="zoqo_labels")
        configs = [dataclasses.replace(first, bits=bits) for bits in wanted.bits]
        others = ["rays", "sign_flip"] + ["hop_skip_jump"] * wanted.hop_skip_jump
        return configs + _others(base, others if wanted.baseline else [])
    configs = [
        dataclasses.replace(base, bits=bits, structure=structure)
        for structure in wanted.structures
        for bits in wanted.bits
    ]
    if wanted.baseline:
        names = [name for name in get_args(config.MethodName) if name != "zoqo"]
        configs += _others(base, [name for name in names if name not in config.LABEL_METHODS])
    return configs


def _others(base: Config, names: Sequence[config.MethodName]) -> list[Config]:
    return [dataclasses.replace(base, method=name) for name in names]


def _report(runs: "Sequence[Metrics]", folder: Path) -> None:
    from experiments.attack import report
    from experiments.files import write_text

    text = report.table(runs)
    first = runs[0]
    print(
        f"\n{first.images} correctly classified images of {first.config.dataset}, "
        f"l_inf ball of {first.config.epsilon:g}, at most {first.config.budget} queries an image; "
        "queries over successes\n"
    )
    used = "\n".join(f"- {one.config.name}: {report.settings(one)}" for one in runs)
    text = f"{text}\n\nSettings as used:\n\n{used}\n"
    print(text)
    write_text(folder / "table.md", text)
    with io.StringIO(newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["attack", "place", "label", "read_as", "success", "queries"])
        for one in runs:
            columns = one.labels, one.predicted, one.success, one.queries
            for place, numbers in enumerate(zip(*columns, strict=True)):
                writer.writerow([one.config.name, place, *map(int, numbers)])
        write_text(folder / "images.csv", file.getvalue())
    report.figure(runs, folder / "figure.png")
    print(f"\ntable, figure and single images: {folder}/")


if __name__ == "__main__":
    command.run(main, Runs, Config, about=__doc__ or "", leave_out=["method", "structure"])
