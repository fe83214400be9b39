"""docs/policies.md, and what a user's own runs come to: the table of returns and the curves."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import drawing
from experiments.files import read_json
from experiments.markdown import interval, table
from experiments.policies.config import ENVIRONMENTS, Config

__all__ = ["Found", "curves", "load", "name", "returns", "shapings"]

_NAMES = {
    "zoqo": "ZOQO",
    "caq_zo": "CAQ-ZO",
    "qes": "QES",
    "open_es": "OpenES, floats (evosax)",
    "spsa": "SPSA, floats",
}
_ANCHORS = {  # what gymnax's table says of evolution strategies or PPO
    "CartPole-v1": 500.0,
    "Pendulum-v1": -130.0,
    "Acrobot-v1": -80.0,
    "MountainCarContinuous-v0": 92.0,
}
_LEAST = {  # what the axis of a figure begins with
    "CartPole-v1": 0,
    "Pendulum-v1": -1500,
    "Acrobot-v1": -510,
}
_METHODS = tuple(_NAMES)
_POINTS = 60  # of a curve

Found = tuple[Config, list[dict[str, Any]]]
"""A run's settings, those of its first seed, and what runs of all seeds came to."""


def load(folder: Path) -> list[Found]:
    """All finished runs whose results are in a folder, floats last, many bits first."""
    runs: dict[Config, dict[int, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        if "final" in content:
            config = Config(**content["settings"])
            of_seeds = runs.setdefault(dataclasses.replace(config, seed=0), {})
            of_seeds[config.seed] = content
    found = [(config, [seeds[seed] for seed in sorted(seeds)]) for config, seeds in runs.items()]
    return sorted(found, key=lambda one: _order(one[0]))


def name(config: Config) -> str:
    """How tables call a run.

    Example:
      >>> name(Config()), name(Config(method="open_es", bits=32))
      ('ZOQO, 8 bits', 'OpenES, floats (evosax)')
    """
    bits = "" if config.bits == 32 else f", {config.bits} bits"
    shaping = "" if config.shaping == "usual" else f", {config.shaping}"
    return f"{_NAMES[config.method]}{bits}{shaping}"


def returns(found: Sequence[Found]) -> str:
    """Final returns as a Markdown table: a row for each method, a column for each environment."""
    return _rows([one for one in found if one[0].shaping == "usual"], anchors=True)


def shapings(found: Sequence[Found]) -> str:
    """The same of the environments where returns were shaped in other ways, too."""
    others = {config.environment for config, _ in found if config.shaping != "usual"}
    some = [(config, runs) for config, runs in found if config.environment in others]
    names = {(config.method, config.bits) for config, _ in some if config.shaping != "usual"}
    return _rows([one for one in some if (one[0].method, one[0].bits) in names], anchors=False)


def _rows(found: Sequence[Found], anchors: bool) -> str:
    shown = [one for one in ENVIRONMENTS if any(config.environment == one for config, _ in found)]
    numbers = (f"{_ANCHORS[x]:.0f}" if x in _ANCHORS else "" for x in shown)
    rows = [["gymnax's table", *numbers]] if anchors else []
    for row in dict.fromkeys(name(config) for config, _ in found):
        mine = {config.environment: runs for config, runs in found if name(config) == row}
        finals = {x: [run["final"] for run in runs] for x, runs in mine.items()}
        rows.append([row, *(_cell(finals.get(x, [])) for x in shown)])
    return table(["return", *shown], rows)


def _cell(finals: Sequence[float]) -> str:
    digits = 1 if finals and max(map(abs, finals)) < 100 else 0
    return f"{interval(finals, digits)} ({len(finals)})" if finals else ""


def _order(config: Config) -> tuple[Any, ...]:
    is_usual = config.shaping == "usual"
    return not is_usual, _METHODS.index(config.method), -config.bits, config.shaping


def curves(found: Sequence[Found], path: Path) -> None:
    """Draw mean returns of populations against generations, means over seeds.

    Of long runs means of several generations are drawn.
    """
    from matplotlib.figure import Figure

    shown = [one for one in ENVIRONMENTS if any(config.environment == one for config, _ in found)]
    if not shown:
        return
    columns = min(len(shown), 2)
    lines = -(-len(shown) // columns)
    fig = Figure(figsize=(6.0 * columns, 3.6 * lines), layout="constrained")
    axes = np.ravel(fig.subplots(lines, columns, squeeze=False))
    names = list(dict.fromkeys(name(config) for config, _ in found))
    for axis, environment in zip(axes, shown, strict=False):
        for config, runs in found:
            if config.environment != environment or config.shaping != "usual":
                continue
            mean = np.mean([run["population"] for run in runs], axis=0)
            width = max(len(mean) // _POINTS, 1)
            mean = mean[: len(mean) // width * width].reshape(-1, width).mean(1)
            style = drawing.style(names.index(name(config)))
            label = name(config).replace(" (evosax)", "")
            ends = width * np.arange(1, len(mean) + 1)
            axis.plot(ends, mean, label=label, markevery=0.1, **style)
        if environment in _ANCHORS:
            axis.axhline(_ANCHORS[environment], color="0.6", lw=0.8)
        axis.set(title=environment, xlabel="generations", ylabel="mean return of a population")
        if environment in _LEAST:
            axis.set_ylim(bottom=_LEAST[environment])
        axis.grid(alpha=0.3)
        drawing.label_ends(axis, size=7)
    for axis in axes[len(shown) :]:
        axis.remove()
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=110)
