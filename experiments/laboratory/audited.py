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
from experiments.laboratory import digits
from experiments.laboratory.claim import Cell, Claim, Measurement

__all__ = ["CLAIM", "Config"]

VARIANTS = {
    "dense": "ZOQO, dense",
    "zoqo": "ZOQO, sparse",
    "clip_safe": "clip-safe",
    "audited": "audited",
}
_SIZES = (784, 256, 128, 10)
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
        counts = ("seeds", "iterations", "entry", "batch_size", "support", "audit_images")
        least = dict.fromkeys((*counts, "failures", "trials"), 1)
        settings.check(self, least=least, not_negative=("pretrain_steps",))
        if not 0 < self.decrease < 1:
            raise ValueError(f"decrease must be in (0, 1), got {self.decrease}.")
        if self.seeds > 5:
            raise ValueError(f"seeds must be at most 5, got {self.seeds}.")
        if self.entry > self.iterations:
            raise ValueError(
                f"entry must be at most {self.iterations}, the iterations, got {self.entry}."
            )
        if bad := [bits for bits in self.bits if not 2 <= bits <= 8]:
            raise ValueError(f"bits must be in [2, 8], got {bad[0]}.")

    @property
    def gamma(self) -> float:
        """The decrease asked for each code of a direction, as a fraction of the loss."""
        return self.decrease / self.support


def cells(config: Config) -> list[Cell]:
    """Every seed by every method at every width; seeds share a compiled program."""
    return [
        {"bits": bits, "variant": variant, "seed": seed}
        for bits in config.bits
        for variant in VARIANTS
        for seed in range(config.seeds)
    ]


_accuracy = jax.jit(zq.quaxify(digits.accuracy))


def measure(config: Config, cell: Cell) -> dict[str, Any]:
    """Where a run starts and ends, and how many queries of how many images it took."""
    loaded, seed = digits.load(config.data), cell["seed"]
    start = digits.pretrained(config.data, _SIZES, config.pretrain_steps, 128, seed)
    codes = zq.quantize(start, zq.Quantizer(cell["bits"], range="mse"))
    train, test = ((jnp.asarray(x), jnp.asarray(y)) for x, y in (loaded[:2], loaded[2:]))
    found = _run(config, cell["variant"], codes, train, jax.random.key(seed))
    params = found.pop("params")
    return {
        "floats": _accuracy(start, *test),
        "start": _accuracy(codes, *test),
        "accuracy": _accuracy(params, *test),
        **found,
    }


@functools.partial(jax.jit, static_argnames=("config", "variant"))
def _run(
    config: Config,
    variant: str,
    params: digits.Params,
    train: tuple[jax.Array, jax.Array],
    key: jax.Array,
) -> dict[str, Any]:
    """Train, and look at what came out."""
    keys = dict(
        zip(("tx", "batch", "gate", "images", "end"), jax.random.split(key, 5), strict=True)
    )
    is_audited = variant == "audited"
    steps = config.entry - 1 if is_audited else config.iterations
    fixed = _some(keys["images"], config.audit_images, train)
    tx = _transformation(config, variant, keys["tx"], params)

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, state = carry
        batch = _some(key, config.batch_size, train)
        cut = clipped(tx.probes(state, params), params)
        updates, state = tx.update(
            None, state, params, value_fn=lambda params: digits.loss(params, *batch)
        )
        return (optax.apply_updates(params, updates), state), cut

    batches = jax.random.split(keys["batch"], steps)
    (params, state), cut = jax.lax.scan(step, (params, tx.init(params)), batches)
    queries, images = state.queries, state.queries * config.batch_size
    calls = successes = jnp.int32(0)
    if is_audited:
        gate = zq.certificates.gate(
            key=keys["gate"], support=config.support, gamma=config.gamma, failures=config.failures
        )
        params, audits = audit(gate, params, fixed, config.iterations - steps)
        calls, successes = audits.count, audits.successes
        queries = queries + audits.queries
        images = images + audits.queries * config.audit_images

    def loss(params: Any) -> jax.Array:
        return digits.loss(params, *fixed)

    last = zq.certificates.audit(
        loss,
        params,
        keys["end"],
        support=config.support,
        gamma=config.gamma,
        trials=config.trials,
    )
    return {
        "params": params,
        "queries": queries,
        "images": images,
        "iterations": steps + calls,
        "stopped": steps + calls < config.iterations,
        "taken": successes,
        "clipped": cut.mean(),
        "passing": last.successes / last.trials,
        "loss": zq.quaxify(loss)(params),
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


def _some(key: jax.Array, count: int, of: tuple[jax.Array, jax.Array]) -> tuple[Any, Any]:
    """Some images and their labels."""
    rows = jax.random.randint(key, (count,), 0, len(of[1]))
    return of[0][rows], of[1][rows]


def audit(gate: Any, params: Any, fixed: tuple[Any, Any], calls: int) -> tuple[Any, Any]:
    """Parameters and the gate's state after audits, as many as it wants, or `calls` at most."""

    def goes_on(carry: Any) -> jax.Array:
        stop, _, state = carry
        return ~stop & (state.count < calls)

    def call(carry: Any) -> Any:
        _, params, state = carry
        stop, state = gate.update(state, lambda params: digits.loss(params, *fixed), params)
        return stop, gate.accept(state, params), state

    start = (jnp.array(False), params, gate.init(params))
    return jax.lax.while_loop(goes_on, call, start)[1:]


def clipped(stencils: list[Any], params: digits.Params) -> jax.Array:
    """Of the codes that a direction probes, the share of those whose chord is cut short."""
    ends = [
        [layer["kernel"].codes.astype(jnp.int16) for layer in end]
        for end in (zq.queries.endpoints(params, stencils, side) for side in (1, -1))
    ]
    cut = probed = jnp.int32(0)
    for stencil, layer, plus, minus in zip(stencils, params, *ends, strict=True):
        u = zq.stencils.draw(stencil, layer["kernel"])
        cut += jnp.sum(plus - minus != 2 * u, dtype=jnp.int32)
        probed += jnp.sum(u != 0, dtype=jnp.int32)
    return cut / jnp.maximum(probed, 1)


def table(found: list[Measurement]) -> str:
    """A row for each method at each width, over seeds; under it what was published."""
    rows = []
    for (bits, variant), mine in _groups(found).items():
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


def draw(found: list[Measurement], fig: Any) -> None:
    """Accuracy against queries, a point for each seed, and what was published."""
    widths = sorted({one["bits"] for one in found})
    for ax, bits in zip(fig.subplots(1, len(widths), squeeze=False)[0], widths, strict=True):
        start = 100 * np.mean([one["start"] for one in found if one["bits"] == bits])
        ax.axhline(start, color="0.6", label="before")
        for i, (variant, label) in enumerate(VARIANTS.items()):
            mine = _groups(found).get((bits, variant), [])
            accuracy = [100 * one["accuracy"] for one in mine]
            queries = [one["queries"] for one in mine]
            ax.plot(
                queries, accuracy, "o", color=f"C{i}", label=f"{label} ({np.mean(accuracy):.2f} %)"
            )
            if variant in _PUBLISHED:
                ax.plot(*_PUBLISHED[variant][::-1], "*", color=f"C{i}", markersize=11)
        near = [100 * one["accuracy"] for one in found if one["bits"] == bits]
        near = [one for one in near if one > start - 2] + [_PUBLISHED["audited"][0], start]
        ax.set_ylim(min(near) - 0.3, max(near) + 0.3)  # what collapses is in the legend alone
        ax.set(xlabel="queries", ylabel="test accuracy, %", title=f"{bits} bits (stars: published)")
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)


def _groups(found: list[Measurement]) -> dict[tuple[int, str], list[Measurement]]:
    groups: dict[tuple[int, str], list[Measurement]] = {}
    for one in found:
        groups.setdefault((one["bits"], one["variant"]), []).append(one)
    return groups


CLAIM = Claim("audited", Config, cells, measure, table, draw)
