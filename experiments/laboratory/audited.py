"""Audits that stop a run: the protocol of RC-ZOQO on MNIST.

A dense network is trained by back-propagation, rounded to 4 or 8 bits, and trained further by ZOQO
for 400 iterations of one query pair each. The methods that are compared:

- "dense": Algorithm 1 of ZOQO (Bar and Giryes, 2025, arXiv:2501.06736) as it stands: every code is
  probed and moved, ends that leave the grid are clamped to its edge;
- "zoqo": the same on a random support of a few hundred codes;
- "clip_safe": a code whose probe would leave the grid sits out, so that no chord is clipped;
- "audited": clip-safe up to an iteration, and from there on audits instead of steps. A fresh
  direction is tried at both ends; the better end is taken if it truly lowers the loss by the asked
  amount, on the same images each time, and else nothing moves. So many failures in a row end the
  run, with a bound on the chance that another direction would succeed.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import zoqo_jax as zq
from experiments import markdown, settings
from experiments.laboratory.claim import Cell, Claim, Measurement
from experiments.laboratory.networks import tasks
from experiments.laboratory.networks.audits import audit, clipped
from experiments.laboratory.networks.models import Params
from experiments.laboratory.networks.tasks import Task
from experiments.laboratory.networks.training import adam, cross_entropy, scores
from experiments.laboratory.pages import grouped

__all__ = ["CLAIM", "Config"]

VARIANTS = {
    "dense": "ZOQO, dense",
    "zoqo": "ZOQO, sparse",
    "clip_safe": "clip-safe",
    "audited": "audited",
}
_HIDDEN = (256, 128)
_PUBLISHED = {"zoqo": (95.96, 802), "clip_safe": (96.02, 790), "audited": (96.22, 523)}
_COLUMNS = {  # what was measured, decimals, factor
    "floats, %": ("floats", 2, 100),
    "before, %": ("start", 2, 100),
    "after, %": ("accuracy", 2, 100),
    "loss": ("loss", 4, 1),
    "queries": ("queries", 0, 1),
    "images, 1000": ("images", 0, 1e-3),
    "iterations": ("iterations", 0, 1),
    "taken": ("taken", 0, 1),
    "clipped, %": ("clipped", 2, 100),
    "still pass, %": ("passing", 0, 100),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A network of 784-256-128-10 units; grids have the range of least squared rounding error.

    Attributes:
      data: "tfds:mnist", a folder of IDX files, or "mnist": the bundled test images, of which 8,000
        are trained on and 2,000 tested on.
      bits: of the codes.
      seeds: how many, at most 5.
      pretrain_steps: of Adam, batches of 128.
      iterations: of ZOQO, or of the audits.
      entry: the iteration at which audits begin.
      batch_size: images of a query of ZOQO.
      support: codes that a sparse direction moves, in the mean.
      audit_images: that every query of the audits sees.
      decrease: that a direction must bring to succeed, as a fraction of the loss.
      failures: in a row, which end the run.
      trials: directions by which the last state is looked at, whatever the method; their queries
        are not counted.

    Raises:
      ValueError: a setting outside what is said above, naming it and its value.
    """

    data: str = "tfds:mnist"
    bits: tuple[int, ...] = (4, 8)
    seeds: int = 5
    pretrain_steps: int = 469
    iterations: int = 400
    entry: int = 251
    batch_size: int = 256
    support: int = 256
    audit_images: int = 1024
    decrease: float = 1e-3
    failures: int = 15
    trials: int = 100

    def __post_init__(self) -> None:
        counts = ("iterations", "entry", "batch_size", "support", "audit_images")
        least = dict.fromkeys((*counts, "failures", "trials"), 1)
        within = {"seeds": (1, 5), "bits": (2, 8)}
        settings.check(
            self,
            least=least,
            within=within,
            fractions=("decrease",),
            not_negative=("pretrain_steps",),
        )
        if self.entry > self.iterations:
            raise ValueError(
                f"entry must be at most {self.iterations}, the iterations, got {self.entry}."
            )

    @property
    def gamma(self) -> float:
        """The decrease asked for each code of a direction, as a fraction of the loss."""
        return self.decrease / self.support


def _cells(config: Config) -> list[Cell]:
    """Every seed by every method at every width; seeds share a compiled program."""
    return [
        {"bits": bits, "variant": variant, "seed": seed}
        for bits in config.bits
        for variant in VARIANTS
        for seed in range(config.seeds)
    ]


def _measure(config: Config, cell: Cell) -> dict[str, Any]:
    """Where a run starts and ends, and how many queries of how many images it took."""
    task, floats = tasks.mnist(config.data, _HIDDEN), _pretrained(config, cell["seed"])
    codes = _rounded(config, cell["seed"], cell["bits"])
    params, found = _run(config, cell["variant"], codes, task, jax.random.key(cell["seed"]))
    read = scores(task, [floats, codes, params], task.test)["accuracy"]
    return {**dict(zip(("floats", "start", "accuracy"), read, strict=True)), **found}


@functools.cache
def _pretrained(config: Config, seed: int) -> Params:
    """By back-propagation in floats; Adam at a constant rate."""
    key = jax.random.key(seed)
    batches = jax.random.split(jax.random.fold_in(key, 1), config.pretrain_steps)
    task, start = tasks.mnist(config.data, _HIDDEN), jax.random.fold_in(key, 0)
    return adam(task, start, batches, rate=1e-3, falls=False, batch_size=128)


@functools.cache
def _rounded(config: Config, seed: int, bits: int) -> Params:
    return zq.quantize(_pretrained(config, seed), zq.Quantizer(bits, range="mse"))


@functools.partial(jax.jit, static_argnames=("config", "variant"))
def _run(
    config: Config, variant: str, params: Params, task: Task, key: jax.Array
) -> tuple[Params, dict[str, Any]]:
    """Train, and look at what came out."""
    names = ("tx", "batch", "gate", "images", "end")
    keys = dict(zip(names, jax.random.split(key, 5), strict=True))
    is_audited = variant == "audited"
    steps = config.entry - 1 if is_audited else config.iterations
    fixed = task.train.draw(keys["images"], config.audit_images)
    loss = functools.partial(cross_entropy, task.logits, batch=fixed)
    tx = _transformation(config, variant, keys["tx"], params)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        batch = task.train.draw(key, config.batch_size)
        cut = clipped(tx.probes(state, params), params)
        value_fn = functools.partial(cross_entropy, task.logits, batch=batch)
        updates, state = tx.update(None, state, params, value_fn=value_fn)
        return (optax.apply_updates(params, updates), state), cut

    batches = jax.random.split(keys["batch"], steps)
    (params, state), cut = jax.lax.scan(step, (params, tx.init(params)), batches)
    queries = state.info.evaluations
    images = queries * config.batch_size
    calls = successes = jnp.int32(0)
    if is_audited:
        gate = zq.certificates.gate(
            key=keys["gate"], support=config.support, gamma=config.gamma, failures=config.failures
        )
        params, audits = audit(gate, params, loss, config.iterations - steps)
        calls, successes = audits.count, audits.successes
        queries = queries + audits.queries
        images = images + audits.queries * config.audit_images
    last = zq.certificates.audit(
        loss,
        params,
        keys["end"],
        support=config.support,
        gamma=config.gamma,
        trials=config.trials,
    )
    return params, {
        "queries": queries,
        "images": images,
        "iterations": steps + calls,
        "stopped": steps + calls < config.iterations,
        "taken": successes,
        "clipped": cut.mean(),
        "passing": last.successes / last.trials,
        "loss": loss(params),
    }


def _transformation(config: Config, variant: str, key: jax.Array, params: Any) -> Any:
    """ZOQO, whose radius and learning rate are the least that there are: one code."""
    shared = {"learning_rate": 1e-9, "radius": 1e-9, "key": key}
    if variant == "dense":
        return zq.zoqo(**shared)
    total = sum(layer["kernel"].size for layer in params)
    boundary = "clamp" if variant == "zoqo" else "mask"
    density = config.support / total
    return zq.zoqo(structure="sparse", density=density, boundary=boundary, **shared)


def _table(found: list[Measurement]) -> str:
    """A row for each method at each width, over seeds; under it what was published."""
    rows = []
    for (bits, variant), mine in grouped(found, "bits", "variant").items():
        figures = [
            markdown.interval([factor * one[name] for one in mine], places)
            for name, places, factor in _COLUMNS.values()
        ]
        stopped = f"{sum(one['stopped'] for one in mine)} of {len(mine)}"
        rows.append([VARIANTS[variant], str(bits), *figures, stopped])
    published = ", ".join(
        f"{accuracy:.2f} % at {queries} queries ({VARIANTS[variant]})"
        for variant, (accuracy, queries) in _PUBLISHED.items()
    )
    head = ["method", "bits", *_COLUMNS, "stopped"]
    return f"{markdown.table(head, rows)}\n\nPublished: {published}."


def _draw(found: list[Measurement], fig: Any) -> None:
    """Accuracy against queries, a point for each seed, and what was published."""
    by_bits = grouped(found, "bits")
    axes = fig.subplots(1, len(by_bits), squeeze=False)[0]
    for ax, ((bits,), here) in zip(axes, by_bits.items(), strict=True):
        start = 100 * np.mean([one["start"] for one in here])
        ax.axhline(start, color="0.6", label="before")
        for i, ((variant,), mine) in enumerate(grouped(here, "variant").items()):
            accuracies = [100 * one["accuracy"] for one in mine]
            label = f"{VARIANTS[variant]} ({np.mean(accuracies):.2f} %)"
            ax.plot([one["queries"] for one in mine], accuracies, "o", color=f"C{i}", label=label)
            if variant in _PUBLISHED:
                ax.plot(*_PUBLISHED[variant][::-1], "*", color=f"C{i}", markersize=11)
        near = [100 * one["accuracy"] for one in here]
        near = [one for one in near if one > start - 2] + [_PUBLISHED["audited"][0], start]
        ax.set_ylim(min(near) - 0.3, max(near) + 0.3)  # what collapses is in the legend alone
        ax.set(xlabel="queries", ylabel="test accuracy, %", title=f"{bits} bits (stars: published)")
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)


CLAIM = Claim("audited", Config, _cells, _measure, _table, _draw)
