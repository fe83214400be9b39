"""Which grid wins at which bit width, before and after training by queries.

CAQ-ZO (Shu & Zhu, "Compander-Aligned Query Geometry for Quantized Zeroth-Order Optimization", 2026,
arXiv:2605.10673) works on any companded grid and leaves adaptive ones open: quantiles, Lloyd-Max,
scales that are learned. Here a perceptron and a transformer, trained in floats, are rounded to each
grid and then trained on it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoqo_jax as zq
from experiments import drawing, markdown, settings
from experiments.laboratory.claim import Cell, Claim, Measurement
from experiments.laboratory.networks import methods, tasks, training
from experiments.laboratory.networks.models import Params
from experiments.laboratory.networks.tasks import Task
from experiments.laboratory.pages import grouped, percent

__all__ = ["CLAIM", "Config", "codebook_samples", "quantizer"]

_GRIDS = ("uniform", "mu_law", "nf4", "quantile", "lloyd_max")
_MODELS = {"digits": "perceptron, digits", "words": "transformer, film reviews"}
_TRAINED = {
    "as rounded": (),
    "zoqo": ("zoqo dithered",),
    "caq_zo": ("caq_zo",),
    "caq_zo, scales by qzo in turn": ("caq_zo", "qzo"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      digits: MNIST for `experiments.attack.data.load`: "mnist" (bundled), "tfds:mnist" or a folder.
      words: sentences for `experiments.finetune.data.load`: "reviews" (bundled), "tfds:sst2" or a
        folder.
      bits: widths to compare, in [2, 8].
      range: what uniform and mu-law grids reach to, the largest weight of a channel ("absmax") or
        the range of least squared error ("mse"); codebooks reach to the largest weight.
      pretraining: steps of back-propagation in floats, before rounding.
      queries: evaluations of a batch that training on the grid may cost.
      num_queries: pairs a step.
      radius: of probes of scales, in values.
      batch_size: examples a query is made on.
      seeds: float models, and runs on each; a further model serves to choose learning rates.

    Raises:
      ValueError: a setting outside what is said above, naming it and its value.
    """

    digits: str = "mnist"
    words: str = "reviews"
    bits: tuple[int, ...] = (2, 3, 4, 6, 8)
    range: str = "mse"
    pretraining: int = 1_000
    queries: int = 800
    num_queries: int = 4
    radius: float = 0.01
    batch_size: int = 32
    seeds: int = 3

    def __post_init__(self) -> None:
        least = {"pretraining": 1, "num_queries": 1, "batch_size": 1}
        within = {"seeds": (1, 5), "bits": (2, 8)}
        settings.check(self, least=least, within=within, positive=("radius",))
        unit = 4 * self.num_queries  # for two that take turns
        settings.check(self, multiples={"queries": unit})
        if self.range not in ("absmax", "mse"):
            raise ValueError(f"range must be 'absmax' or 'mse', got {self.range!r}.")


def codebook_samples(lanes: Sequence[Params]) -> np.ndarray:
    """All weights, each as a fraction of the largest of its channel."""
    matrices = [x for same in zip(*lanes, strict=True) for x in same]
    return np.concatenate([np.ravel(x / jnp.abs(x).max(-2, keepdims=True)) for x in matrices])


def quantizer(grid: str, bits: int, value_range: str, samples: np.ndarray) -> zq.Quantizer:
    """A grid of so many bits, with a scale for each output channel.

    Args:
      grid: "uniform", "mu_law", "nf4" (of 4 bits), "quantile" or "lloyd_max".
      bits: 2 to 8.
      value_range: of the first two, see `Config`.
      samples: that the last two are fitted to: `codebook_samples`.
    """
    if grid in ("uniform", "mu_law"):
        compander = zq.companders.identity() if grid == "uniform" else zq.companders.mu_law()
        return zq.Quantizer(bits, compander, range=value_range, axis=-1)
    if grid == "nf4":
        return zq.Quantizer(bits, zq.companders.nf4(), axis=-1)
    fit = {"quantile": zq.companders.quantile, "lloyd_max": zq.companders.lloyd_max}[grid]
    return zq.Quantizer(bits, fit(samples, bits), axis=-1)


def _cells(config: Config) -> list[Cell]:
    return [
        {"model": model, "bits": bits, "grid": grid, "trained": trained}
        for model in _MODELS
        for bits in config.bits
        for grid in _GRIDS
        for trained in _TRAINED
        if grid != "nf4" or bits == 4
    ]


def _measure(config: Config, cell: Cell) -> dict[str, Any]:
    task, floats = _task(config, cell["model"]), _floats(config, cell["model"])
    lanes = _rounded(config, cell["model"], cell["grid"], cell["bits"])
    found = {"floats": training.scores(task, floats[:-1], task.test)["accuracy"]}
    names = _TRAINED[cell["trained"]]
    if not names:
        return {**found, **training.scores(task, lanes[:-1], task.test)}
    best = training.at_best_rate(
        task,
        methods.in_turn(names, config.num_queries, config.radius),
        lanes,
        jax.random.key(1),
        methods.RATES[names[0]],
        steps=config.queries // (2 * config.num_queries * len(names)),
        batch_size=config.batch_size,
    )
    return {**found, **best}


def _task(config: Config, model: str) -> Task:
    return tasks.digits(config.digits) if model == "digits" else tasks.words(config.words)


@functools.cache
def _floats(config: Config, model: str) -> list[Params]:
    """Models trained by back-propagation, a lane for each seed and a further one."""
    task = _task(config, model)
    return training.by_backpropagation(task, config.seeds + 1, steps=config.pretraining)


@functools.cache
def _rounded(config: Config, model: str, grid: str, bits: int) -> list[Params]:
    floats = _floats(config, model)
    rule = quantizer(grid, bits, config.range, codebook_samples(floats))
    return [zq.quantize(params, rule) for params in floats]


def _table(found: list[Measurement]) -> str:
    rows = []
    for (model, bits), mine in grouped(found, "model", "bits").items():
        best = {
            trained: max(np.mean(one["accuracy"]) for one in ways)
            for (trained,), ways in grouped(mine, "trained").items()
        }
        for (grid,), ways in grouped(mine, "grid").items():
            cells = []
            for one in ways:
                text, edge = percent(one["accuracy"], 1), "*" if one.get("at_edge") else ""
                is_best = np.mean(one["accuracy"]) == best[one["trained"]]
                cells.append(f"**{text}**{edge}" if is_best else f"{text}{edge}")
            rows.append(
                [f"{_MODELS[model]}, {bits} bits, {grid}", *cells, percent(ways[0]["floats"], 1)]
            )
    return markdown.table(["accuracy, %", *_TRAINED, "in floats"], rows)


def _draw(found: list[Measurement], fig: Any) -> None:
    """Accuracy against bits, many to few, where grids part; quantiles are in the table alone."""
    fig.set_size_inches(11.0, 6.0)
    axes = fig.subplots(len(_MODELS), len(_TRAINED), sharex=True, sharey="row", squeeze=False)
    for row, model in zip(axes, _MODELS, strict=True):
        for axis, trained in zip(row, _TRAINED, strict=True):
            here = [x for x in found if (x["model"], x["trained"]) == (model, trained)]
            lines = grouped([x for x in here if x["grid"] != "quantile"], "grid").items()
            for number, ((grid,), line) in enumerate(lines):
                accuracies = [100 * np.mean(one["accuracy"]) for one in line]
                style = drawing.style(number)
                axis.plot([x["bits"] for x in line], accuracies, label=grid, **style)
            axis.axhline(100 * np.mean(here[0]["floats"]), color="grey", linewidth=0.8)
        row[0].set_ylabel(f"{_MODELS[model]}\naccuracy, % (grey: floats)")
        row[0].invert_xaxis() if model == next(iter(_MODELS)) else None
        row[-1].set_xticks(sorted({x["bits"] for x in found}))
    for axis, trained in zip(axes[0], _TRAINED, strict=True):
        axis.set_title(trained, fontsize="medium")
    for axis in axes[-1]:
        axis.set_xlabel("bits")
    for row in axes:
        drawing.label_ends(row[-1])


CLAIM = Claim("bits", Config, _cells, _measure, _table, _draw)
