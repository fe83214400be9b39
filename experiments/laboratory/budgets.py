"""All methods at the same number of queries, each at its best of equally many learning rates.

ZOQO (arXiv:2501.06736), CAQ-ZO and its baseline of queries that are not aligned (arXiv:2605.10673),
QuZO (arXiv:2502.12346), QES (arXiv:2602.03120) and QZO (arXiv:2505.13430) on grids; MeZO
(arXiv:2305.17333) and ZO-SignSGD in floats. Models that have seen few examples, rounded to a grid,
learn from many.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

import zoqo_jax as zq
from experiments import markdown, settings
from experiments.laboratory.claim import Cell, Claim, Measurement
from experiments.laboratory.networks import methods, tasks, training
from experiments.laboratory.networks.models import Params
from experiments.laboratory.networks.tasks import Task
from experiments.laboratory.pages import errorbar, grouped, percent

__all__ = ["CLAIM", "Config", "quantizer"]

_TASKS = {
    "digits": "perceptron, MNIST",
    "pictures": "last layer, CIFAR-10",
    "sentences": "logistic regression, sentences",
}
_GRIDS = ("int8", "int4", "nf4")
_START, _ADAM = "nothing", "adam"


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      tasks: which to train on, of "digits", "pictures" and "sentences".
      digits: MNIST for `experiments.attack.data.load`: "mnist" (bundled), "tfds:mnist" or a folder.
      cifar10: for the same, "tfds:cifar10", or a folder or tar file of pictures.
      weights: of the ResNet whose features are read, a bundled name or a file of
        `experiments.attack.train`.
      sentences: for `experiments.finetune.data.load`: "tfds:sst2", a folder, or the bundled
        "reviews".
      block: weights that share a scale.
      few: examples that models have seen before they are rounded.
      pretraining: steps of back-propagation on these.
      queries: evaluations of a batch that each method may make.
      num_queries: pairs a step.
      radius: of probes, in values, for methods that have one; see `methods.in_turn`.
      batch_size: examples a query is made on.
      seeds: starts and runs; a further one serves to choose learning rates.

    Raises:
      ValueError: a setting outside what is said above, naming it and its value.
    """

    tasks: tuple[str, ...] = tuple(_TASKS)
    digits: str = "mnist"
    cifar10: str = "tfds:cifar10"
    weights: str = "cifar10"
    sentences: str = "tfds:sst2"
    block: int = 32
    few: int = 100
    pretraining: int = 200
    queries: int = 8_000
    num_queries: int = 4
    radius: float = 0.01
    batch_size: int = 64
    seeds: int = 3

    def __post_init__(self) -> None:
        counts = ("block", "few", "pretraining", "num_queries", "batch_size")
        least, within = dict.fromkeys(counts, 1), {"seeds": (1, 5)}
        settings.check(self, least=least, within=within, positive=("radius",))
        if not self.tasks or not set(self.tasks) <= set(_TASKS):
            raise ValueError(f"tasks must be of {tuple(_TASKS)}, got {self.tasks}.")
        settings.check(self, multiples={"queries": 2 * self.num_queries})

    @property
    def steps(self) -> int:
        """Of each method."""
        return self.queries // (2 * self.num_queries)


def quantizer(grid: str, block: int) -> zq.Quantizer:
    """A grid with a scale for every so many weights of an output channel.

    Args:
      grid: "int8" and "int4" are uniform, "nf4" is QLoRA's.
      block: its length.
    """
    if grid == "nf4":
        return zq.nf4(block, axis=0)
    return zq.Quantizer({"int8": 8, "int4": 4}[grid], axis=0, block=block)


def _cells(config: Config) -> list[Cell]:
    ways = [(_START, "floats"), (_ADAM, "floats"), *((x, "floats") for x in methods.FLOATS)]
    for grid in _GRIDS:
        ways.append((_START, grid))
        ways += [(name, grid) for name in methods.METHODS if name not in methods.FLOATS]
    return [
        {"task": task, "method": method, "grid": grid}
        for task in config.tasks
        for method, grid in ways
    ]


def _measure(config: Config, cell: Cell) -> dict[str, Any]:
    task, method = _task(config, cell["task"]), cell["method"]
    if method == _ADAM:
        lanes = training.by_backpropagation(
            task, config.seeds, steps=config.steps, batch_size=config.batch_size
        )
        return training.scores(task, lanes, task.test)
    lanes = _starts(config, cell["task"], cell["grid"])
    if method == _START:
        return training.scores(task, lanes[:-1], task.test)
    return training.at_best_rate(
        task,
        methods.in_turn((method,), config.num_queries, config.radius),
        lanes,
        jax.random.key(1),
        methods.RATES[method],
        steps=config.steps,
        batch_size=config.batch_size,
    )


def _task(config: Config, name: str) -> Task:
    if name == "digits":
        return tasks.digits(config.digits)
    if name == "pictures":
        return tasks.pictures(config.cifar10, config.weights)
    return tasks.sentences(config.sentences)


@functools.cache
def _starts(config: Config, name: str, grid: str) -> list[Params]:
    """Models that have seen few examples, a lane for each seed and a further one."""
    if grid != "floats":
        rule = quantizer(grid, config.block)
        return [zq.quantize(params, rule) for params in _starts(config, name, "floats")]
    task = _task(config, name)
    few = dataclasses.replace(task, train=task.train.take(slice(config.few)))
    return training.by_backpropagation(few, config.seeds + 1, steps=config.pretraining)


def _table(found: list[Measurement]) -> str:
    head = ["method and grid"]
    for (name,) in grouped(found, "task"):
        head += [f"{_TASKS[name]}: accuracy, %", "loss, nats", "rate"]
    rows = [
        [f"{method}, {grid}", *(text for one in on_tasks for text in _shown(one))]
        for (method, grid), on_tasks in grouped(found, "method", "grid").items()
    ]
    return markdown.table(head, rows)


def _shown(one: Measurement) -> list[str]:
    """Accuracy, loss and rate, with a star where a rate beyond those tried might do better."""
    loss = "diverged" if None in one["loss"] else markdown.interval(one["loss"], 3)
    rate = f"{one['rate']:.2g}{'*' if one['at_edge'] else ''}" if "rate" in one else ""
    return [percent(one["accuracy"], 1), loss, rate]


def _draw(found: list[Measurement], fig: Any) -> None:
    by_task = grouped(found, "task")
    on_grids = [x for x in methods.METHODS if x not in methods.FLOATS]
    axes = fig.subplots(1, len(by_task), squeeze=False)[0]
    for axis, ((name,), mine) in zip(axes, by_task.items(), strict=True):
        here = {(x["method"], x["grid"]): 100 * np.array(x["accuracy"]) for x in mine}
        for i, grid in enumerate(_GRIDS):
            places = np.arange(len(on_grids)) + 0.2 * (i - 1)
            style = {"linestyle": "", "marker": "o", "label": grid, "color": f"C{i}"}
            errorbar(axis, places, [here[method, grid] for method in on_grids], **style)
            start = np.mean(here[_START, grid])
            axis.axhline(start, color=f"C{i}", linewidth=0.8, linestyle=":")
        for method, style in ((methods.FLOATS[0], "-"), (methods.FLOATS[1], "--"), (_ADAM, "-.")):
            height = np.mean(here[method, "floats"])
            label = f"{method}, floats"
            axis.axhline(height, color="grey", linewidth=0.8, linestyle=style, label=label)
        axis.set_xticks(range(len(on_grids)), on_grids, rotation=45, ha="right", fontsize="small")
        axis.set_title(_TASKS[name], fontsize="medium")
    axes[0].set_ylabel("accuracy, % (dotted: at the start)")
    labels = axes[0].get_legend_handles_labels()
    fig.legend(*labels, loc="outside lower center", ncols=6, frameon=False, fontsize="small")


CLAIM = Claim("budgets", Config, _cells, _measure, _table, _draw)
