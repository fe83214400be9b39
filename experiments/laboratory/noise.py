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
from matplotlib.lines import Line2D

import zoqo_jax as zq
from experiments import markdown, settings
from experiments.laboratory import tasks
from experiments.laboratory.claim import Cell, Claim, Measurement
from experiments.laboratory.training import by_backpropagation, cross_entropy, one_lane
from zoqo_jax.arrays import trained_leaves

__all__ = ["CLAIM", "Config", "linear_gain"]

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
    radii: tuple[str, ...] = ("1", "4", "16", "64")
    density: float = 0.0625
    directions: int = 16_384
    batch_size: int = 128
    seeds: int = 3

    def __post_init__(self) -> None:
        settings.check(self, least={"steps": 1, "batch_size": 1})
        if not 1 <= self.seeds <= 5:
            raise ValueError(f"seeds must be in [1, 5], got {self.seeds}.")
        if self.directions < 2 * _TOGETHER or self.directions % (2 * _TOGETHER):
            raise ValueError(
                f"directions must be a multiple of {2 * _TOGETHER}, got {self.directions}."
            )
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be in [2, 8], got {self.bits}.")
        if not 0.0 < self.density < 1.0:
            raise ValueError(f"density must be in (0, 1), got {self.density}.")
        bad = [x for x in self.radii if not x.isdecimal() or not 0 < int(x) < 2**self.bits]
        if bad or not self.radii:
            raise ValueError(
                f"radii must be whole numbers in [1, {2**self.bits - 1}], got {self.radii}."
            )


def linear_gain(law: str, reach: int, density: float = 1.0) -> float:
    """E[estimate . g] / |g| where the loss is linear and entries are many and independent.

    Then l+ - l- is Gaussian beside any one entry u, of which sign(l+ - l-) knows
    sqrt(2 / pi) g u / sqrt(E[u^2]) / |g|.

    Args:
      law: of an entry.
      reach: m, codes; the Gaussian law's deviation, too.
      density: the share of entries that are drawn; the others are zero.
    """
    k = np.arange(-reach, reach + 1)
    chances = {
        "uniform": np.ones(k.size),
        "gaussian": np.exp(-(k**2) / (2 * reach**2)),
        "rademacher": np.abs(k) == reach,
    }[law] * 1.0
    chances *= density / chances.sum()
    return float(np.sqrt(2 / np.pi) * chances @ np.abs(k) / np.sqrt(chances @ k**2))


def _cells(config: Config) -> list[Cell]:
    return [
        {"law": law, "structure": structure, "radius": int(radius)}
        for structure in _STRUCTURES
        for law in _LAWS
        for radius in config.radii
    ]


def _measure(config: Config, cell: Cell) -> dict[str, Any]:
    lanes, batch = _networks(config), _batch(config)
    density = config.density if cell["structure"] == "sparse" else 1.0
    shape = {"law": cell["law"], "structure": cell["structure"], "density": density}
    found = []
    for seed in range(config.seeds):
        halves = jax.random.split(jax.random.fold_in(jax.random.key(1), seed), 2)
        sums = [
            _sums(
                one_lane(lanes, seed),
                batch,
                jax.random.split(key, (config.directions // 2 // _TOGETHER, _TOGETHER)),
                jnp.float32(cell["radius"]),
                **shape,
            )
            for key in halves
        ]
        found.append(_statistics(*(jax.tree.map(np.asarray, x) for x in sums)))
    theory = linear_gain(cell["law"], cell["radius"], density)
    return {"theory": theory, **{name: [one[name] for one in found] for name in found[0]}}


@functools.cache
def _networks(config: Config) -> tasks.Params:
    """Trained networks, quantized; a lane for each seed."""
    keys = jax.vmap(jax.random.key)(jnp.arange(config.seeds))
    floats = by_backpropagation(tasks.digits(config.digits), keys, steps=config.steps)
    return jax.vmap(lambda params: zq.quantize(params, zq.Quantizer(config.bits)))(floats)


def _batch(config: Config) -> tasks.Examples:
    return tasks.digits(config.digits).validation.take(slice(config.batch_size))


@functools.partial(jax.jit, static_argnames=("law", "structure", "density"))
def _sums(
    params: Any,
    batch: tasks.Examples,
    keys: jax.Array,
    radius: jax.Array,
    *,
    law: Any,
    structure: Any,
    density: float,
) -> dict[str, jax.Array]:
    """The gradient, and means over directions of the estimate, its square, and its agreement."""
    loss = functools.partial(cross_entropy, tasks.perceptron, batch=batch)
    g = _flat(jax.grad(loss)(zq.dequantize(params)))
    arrays = list(trained_leaves(params).values())

    def estimate(key: jax.Array) -> jax.Array:
        probes = [
            zq.stencils.describe(
                jax.random.fold_in(key, i),
                array,
                radius,
                law=law,
                structure=structure,
                density=density,
            )
            for i, array in enumerate(arrays)
        ]
        plus, minus = zq.queries.losses(loss, params, probes, together=_TOGETHER)
        u = _flat([zq.stencils.draw(*pair) for pair in zip(probes, arrays, strict=True)])
        return jnp.sign(plus - minus) * jnp.sign(u).astype(jnp.float32)

    def agreement(estimated: jax.Array) -> jax.Array:
        """The share of the signs told that are right, each weighing |g|."""
        weight = jnp.where(estimated != 0, jnp.abs(g), 0.0).sum()
        return 0.5 + 0.5 * (estimated @ g) / jnp.maximum(weight, 1e-30)

    def add(total: Any, keys: jax.Array) -> tuple[Any, None]:
        estimated = jax.vmap(estimate)(keys)
        agreed = jax.vmap(agreement)(estimated)
        more = estimated.sum(0), (estimated**2).sum(), agreed.sum()
        return jax.tree.map(jnp.add, total, more), None

    zeros = jnp.zeros_like(g), jnp.zeros(()), jnp.zeros(())
    (total, squares, agreed), _ = jax.lax.scan(add, zeros, keys)
    return {"g": g, "mean": total / keys.size, "square": squares / keys.size / g.size,
            "agreement": agreed / keys.size}  # fmt: skip


def _statistics(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, Any]:
    """What two independent halves tell.

    The mean estimate's squared length is taken as the product of the halves' means, to which the
    noise of neither adds; where noise makes it negative, cosines are None.
    """
    g, d = one["g"].astype(np.float64), one["g"].size
    mean = (one["mean"] + other["mean"]) / 2.0
    squared = float(one["mean"].astype(np.float64) @ other["mean"])
    gain = float(mean @ g / np.linalg.norm(g))
    of_signs = float(mean @ np.sign(g) / np.sqrt((g != 0).sum()))
    length = np.sqrt(squared) if squared > 0 else None
    return {
        "agreement": float(one["agreement"] + other["agreement"]) / 2,
        "gain": gain,
        "cosine": length and gain / length,
        "cosine_of_signs": length and of_signs / length,
        "variance": float(one["square"] + other["square"]) / 2 - squared / d,
    }


def _flat(leaves: Any) -> jax.Array:
    return jnp.concatenate([leaf.ravel() for leaf in leaves])


def _table(found: list[Measurement]) -> str:
    head = ["direction", "radius", "gain along g", "on a linear loss", "signs right, %",
            "cosine with g", "with sign(g)", "variance"]  # fmt: skip
    rows = [
        [
            f"{one['structure'].replace('_', '-')} {one['law']}",
            str(one["radius"]),
            markdown.interval(one["gain"], 3),
            f"{one['theory']:.3f}",
            markdown.interval([100 * x for x in one["agreement"]], 2),
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
        for law in _LAWS:
            for structure in _STRUCTURES:
                line = [x for x in found if (x["law"], x["structure"]) == (law, structure)]
                values = [_drawn(one, name) for one in line]
                axis.errorbar(
                    [one["radius"] for one in line],
                    [np.mean(x) for x in values],
                    [np.std(x) for x in values],
                    color=_COLORS[law],
                    linestyle=_LINES[structure],
                    marker=".",
                )
        axis.set(title=title, xlabel="radius, codes")
        axis.set_xscale("log", base=2)
    axes[-1].axhline(2 / np.pi, color="grey", linewidth=0.8)  # Rademacher, linear
    names = [Line2D([], [], color=color, label=law) for law, color in _COLORS.items()]
    names += [
        Line2D([], [], color="black", linestyle=style, label=structure.replace("_", "-"))
        for structure, style in _LINES.items()
    ]
    names.append(Line2D([], [], color="grey", linewidth=0.8, label="2/π"))
    fig.legend(handles=names, loc="outside lower center", ncols=len(names), frameon=False)


def _drawn(one: Measurement, name: str) -> list[float]:
    if name != "efficiency":
        return [np.nan if x is None else x for x in one[name]]
    return [a**2 / b for a, b in zip(one["gain"], one["variance"], strict=True)]


CLAIM = Claim("noise", Config, _cells, _measure, _table, _draw)
