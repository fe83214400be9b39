"""Train policies in few-bit codes: `python -m experiments.policies --help`.

The returns of their episodes are all that they are trained by. By default CartPole and Pendulum of
gymnax, by ZOQO at 8, 4 and 2 bits and beside it by evosax's OpenES on floats, one seed each: some
minutes. All combinations of --environments, --methods and --bits are run, one after another; what a
run comes to is a file in --results, from which the table and the curves are made, and an episode of
each policy of seed 0 is drawn. A run that was stopped or killed goes on, bit for bit, when the
command is given again. Those of docs/policies.md are made by
--results=experiments/policies/results --document=docs/policies.md.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

from experiments import command, settings
from experiments.command import say
from experiments.policies.config import ENVIRONMENTS, FLOATS, Config, Method

_ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True)
class Runs:
    """Which runs to make, and where their results go.

    Attributes:
      environments: of gymnax: CartPole-v1, Pendulum-v1, Acrobot-v1, MountainCarContinuous-v0 and
        Breakout-MinAtar.
      methods: zoqo, caq_zo and qes train codes, open_es and spsa floats.
      bits: widths of the codes, 2 to 8.
      seeds: runs of each combination, seeds 0 to this minus one.
      results: folder of results, and of the table and the figure.
      document: Markdown to write the table into, in place of a file in `results`.
      draw: draw an episode of every policy of seed 0.
      progress: show a progress bar.
    """

    environments: tuple[str, ...] = ("CartPole-v1", "Pendulum-v1")
    methods: tuple[str, ...] = ("zoqo", "open_es")
    bits: tuple[int, ...] = (8, 4, 2)
    seeds: int = 1
    results: str = "results/policies"
    document: str = ""
    draw: bool = True
    progress: bool = True

    def __post_init__(self) -> None:
        """Refuse what nothing later would refuse."""
        settings.check(self, least={"seeds": 1}, within={"bits": (2, 8)})
        for what, allowed in (("environments", ENVIRONMENTS), ("methods", get_args(Method))):
            for one in getattr(self, what):
                if one not in allowed:
                    raise ValueError(f"{what} must be of {allowed}, got {one!r}.")


def configs(wanted: Runs, base: Config) -> Iterator[Config]:
    """The runs' settings, all of an environment's, seed by seed."""
    for environment in wanted.environments:
        for seed in range(wanted.seeds):
            for method in wanted.methods:
                for bits in (32,) if method in FLOATS else wanted.bits:
                    given = {"environment": environment, "method": method, "bits": bits}
                    yield dataclasses.replace(base, **given, seed=seed)


def main(wanted: Runs, base: Config) -> None:
    """Make the runs that are left, and write the table and the curves after each."""
    all_of_them = list(configs(wanted, base))
    say(f"{len(all_of_them)} runs on {', '.join(wanted.environments)}: loading JAX")
    from tqdm import tqdm

    from experiments.files import writable
    from experiments.policies import pages, training
    from experiments.policies.report import Report
    from experiments.store import storing

    folder = Path(wanted.results)
    document = writable("document", Path(wanted.document)) if wanted.document else None
    with storing(folder):
        report = Report(folder, document)
        stores = [training.store_of(config, folder) for config in all_of_them]
        for config, store in zip(all_of_them, stores, strict=True):
            if "final" in store.content:
                continue
            title = f"{config.environment}, {pages.name(config)}, seed {config.seed}"
            with tqdm(
                total=config.steps, desc=title, unit="generation", disable=not wanted.progress
            ) as bar:
                training.train(config, store, lambda done, bar=bar: bar.update(done - bar.n))
            if wanted.draw and config.seed == 0:
                report.episode(config)
            report.write()
        print(report.write())


if __name__ == "__main__":
    command.run(
        main, Runs, Config, about=__doc__ or "", leave_out=["environment", "method", "seed"]
    )
