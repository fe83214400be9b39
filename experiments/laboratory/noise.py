"""What one comparison tells of a gradient, by law and structure of the direction.

ZOQO (Bar & Giryes, "ZOQO: Zero-Order Quantized Optimization", 2025, arXiv:2501.06736) estimates the
signs of a gradient by sign(l+ - l-) sign(u). Here stands the true gradient beside it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import zoqo_jax as zq
from experiments import markdown, settings
from experiments.laboratory.claim import Cell, Claim, Measurement
from experiments.laboratory.networks import estimates, tasks
from experiments.laboratory.networks.models import Params
from experiments.laboratory.networks.training import by_backpropagation
from experiments.laboratory.pages import errorbar, grouped, percent

__all__ = ["CLAIM", "Config"]

_LAWS = ("uniform", "gaussian", "rademacher")
_STRUCTURES = ("dense", "rank_one", "sparse")
_TOGETHER = 64  # directions evaluated at once
_COLORS = dict(zip(_LAWS, ("tab:blue", "tab:orange", "tab:green"), strict=True))
_LINES = dict(zip(_STRUCTURES, ("-", "--", ":"), strict=True))


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      digits: MNIST for `experiments.attack.data.load`: "mnist" (bundled), "tfds:mnist" or a folder.
      steps: of back-propagation that trained the networks.
      bits: of their weights.
      radii: reach of directions, whole codes.
      density: of sparse directions.
      directions: drawn for each network.
      batch_size: digits that losses and the gradient are taken of.
      seeds: networks.

    Raises:
      ValueError: a setting outside what is said above, naming it and its value.
    """

    digits: str = "mnist"
    steps: int = 200
    bits: int = 8
    radii: tuple[int, ...] = (1, 4, 16, 64)
    density: float = 0.0625
    directions: int = 16_384
    batch_size: int = 128
    seeds: int = 3

    def __post_init__(self) -> None:
        within = {"seeds": (1, 5), "bits": (2, 8), "radii": (1, 2**self.bits - 1)}
        settings.check(
            self,
            least={"steps": 1, "batch_size": 1},
            within=within,
            fractions=("density",),
            multiples={"directions": 2 * _TOGETHER},
        )


def _cells(config: Config) -> list[Cell]:
    return [
        {"law": law, "structure": structure, "radius": radius}
        for structure in _STRUCTURES
        for law in _LAWS
        for radius in config.radii
    ]


def _measure(config: Config, cell: Cell) -> dict[str, Any]:
    task = tasks.digits(config.digits)
    batch = task.validation.take(slice(config.batch_size))
    density = config.density if cell["structure"] == "sparse" else 1.0
    options = {"law": cell["law"], "structure": cell["structure"], "density": density}
    radius, rounds = jnp.float32(cell["radius"]), config.directions // 2 // _TOGETHER
    found = []
    for seed, params in enumerate(_networks(config)):
        halves = [
            estimates.means(
                task.logits,
                params,
                batch,
                jax.random.split(key, (rounds, _TOGETHER)),
                radius,
                **options,
            )
            for key in jax.random.split(jax.random.fold_in(jax.random.key(1), seed), 2)
        ]
        found.append(estimates.statistics(*jax.tree.map(np.asarray, halves)))
    theory = estimates.linear_gain(cell["law"], cell["radius"], density)
    return {"theory": theory, **{name: [one[name] for one in found] for name in found[0]}}


@functools.cache
def _networks(config: Config) -> list[Params]:
    """Trained and quantized, a lane for each seed."""
    floats = by_backpropagation(tasks.digits(config.digits), config.seeds, steps=config.steps)
    return [zq.quantize(params, zq.Quantizer(config.bits)) for params in floats]


def _table(found: list[Measurement]) -> str:
    head = ["direction", "radius", "gain along g", "on a linear loss", "signs right, %",
            "cosine with g", "with sign(g)", "variance"]  # fmt: skip
    rows = [
        [
            f"{one['structure'].replace('_', '-')} {one['law']}",
            str(one["radius"]),
            markdown.interval(one["gain"], 3),
            f"{one['theory']:.3f}",
            percent(one["agreement"], 2),
            _interval(one["cosine"]),
            _interval(one["cosine_of_signs"]),
            markdown.interval(one["variance"], 3),
        ]
        for one in found
    ]
    return markdown.table(head, rows)


def _interval(values: list[float | None]) -> str:
    known = [x for x in values if x is not None]
    return markdown.interval(known, 2) if len(known) == len(values) else "lost in noise"


def _draw(found: list[Measurement], fig: Any) -> None:
    titles = {
        "agreement": "signs right, weighed by |g|",
        "cosine": "cosine of the mean with g",
        "efficiency": "gain² / variance",
    }
    axes = fig.subplots(1, len(titles))
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for (law, structure), line in grouped(found, "law", "structure").items():
            style = {"color": _COLORS[law], "linestyle": _LINES[structure], "marker": "."}
            values = [_drawn(one, name) for one in line]
            errorbar(axis, [one["radius"] for one in line], values, **style)
        axis.set(title=title, xlabel="radius, codes")
        axis.set_xscale("log", base=2)
    axes[-1].axhline(2 / np.pi, color="grey", linewidth=0.8)  # Rademacher, linear
    for law, color in _COLORS.items():
        axes[0].plot([], [], color=color, label=law)
    for structure, style in _LINES.items():
        axes[0].plot([], [], color="black", linestyle=style, label=structure.replace("_", "-"))
    axes[0].plot([], [], color="grey", linewidth=0.8, label="2/π")
    names = axes[0].get_legend_handles_labels()
    fig.legend(*names, loc="outside lower center", ncols=len(names[0]), frameon=False)


def _drawn(one: Measurement, name: str) -> list[float]:
    if name != "efficiency":
        return [np.nan if x is None else x for x in one[name]]
    return [a**2 / b for a, b in zip(one["gain"], one["variance"], strict=True)]


CLAIM = Claim("noise", Config, _cells, _measure, _table, _draw)
