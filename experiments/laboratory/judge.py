"""Training by comparisons alone, by a judge who errs.

ZOQO (Bar and Giryes, 2025, arXiv:2501.06736) hears of a query no more than the sign of l+ - l-, so
a judge who says which end is better can take the losses' place. A network of two layers is trained
on MNIST from random codes by three kinds of judges:

- "losses": none; the sign comes from two losses;
- "errs": one who is wrong in a fixed percentage of all answers;
- "bradley_terry": one who prefers the end with the lower loss with probability
  sigmoid(k |l+ - l-|), after Bradley and Terry, "Rank analysis of incomplete block designs" (1952).

Each may be asked several times about the same two ends; the majority counts. A step moves by the
verdict. So if an answer leans to the right side by chance(right) - chance(wrong) = 1 - 2 e, the
loss should fall 1 - 2 e times as fast for an e that is the same everywhere, and sum(|d| (1 - 2 e))
/ sum(|d|) times where e depends on the difference d. With v votes a step costs v times as much and
1 - 2 e is that of the majority. `predicted` is that ratio of costs.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import zoqo_jax as zq
from experiments import markdown, settings
from experiments.laboratory.claim import Cell, Claim, Measurement
from experiments.laboratory.networks import tasks
from experiments.laboratory.networks.judges import Kind, chance_of_error, compare, lean
from experiments.laboratory.networks.tasks import Task
from experiments.laboratory.networks.training import accuracy, cross_entropy
from experiments.laboratory.pages import grouped

__all__ = ["CLAIM", "Config"]

_KINDS: dict[Kind, tuple[str, str, str]] = {  # name, what its level is called, marker
    "losses": ("two losses", "", "*"),
    "errs": ("errs", " in {} %", "o"),
    "bradley_terry": ("Bradley-Terry", ", k = {}", "s"),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A network of 784-HIDDEN-10 units in 8 bits, dense directions, steps and probes of one code.

    Attributes:
      data: "tfds:mnist", a folder of IDX files, or "mnist": the bundled test images, of which 8,000
        are trained on and 2,000 tested on.
      errors: percentages of wrong answers, below 50.
      sharpness: of Bradley-Terry judges, k, one over nats.
      votes: how often a judge who errs is asked about a query; odd numbers.
      seeds: how many, at most 5.
      hidden: units of the layer between.
      batch_size: images that two ends are compared on.
      target: test accuracy, a fraction, at which a run ends.
      steps: at most.
      every: steps between looks at the test images.
      test_images: to look at.

    Raises:
      ValueError: a setting outside what is said above, naming it and its value.
    """

    data: str = "tfds:mnist"
    errors: tuple[int, ...] = (0, 15, 30, 45)
    sharpness: tuple[int, ...] = (1000, 300, 100)
    votes: tuple[int, ...] = (1, 3, 9)
    seeds: int = 3
    hidden: int = 32
    batch_size: int = 128
    target: float = 0.6
    steps: int = 20_000
    every: int = 50
    test_images: int = 2_000

    def __post_init__(self) -> None:
        counts = ("hidden", "batch_size", "steps", "every", "test_images", "sharpness")
        least, within = dict.fromkeys(counts, 1), {"seeds": (1, 5)}
        settings.check(self, least=least, within=within, fractions=("target",))
        if bad := [error for error in self.errors if not 0 <= error < 50]:
            raise ValueError(f"errors must be in [0, 50), got {bad[0]}.")
        if bad := [votes for votes in self.votes if votes % 2 == 0]:
            raise ValueError(f"votes must be odd, got {bad[0]}.")


def _cells(config: Config) -> list[Cell]:
    """Every seed by every judge, who is asked so often; seeds share a compiled program."""
    judges = [("losses", 0, 1)]
    for kind, levels in (("errs", config.errors), ("bradley_terry", config.sharpness)):
        for votes in config.votes:
            judges += [(kind, level, votes) for level in levels if level or votes == 1]
    return [
        {"kind": kind, "level": level, "votes": votes, "seed": seed}
        for kind, level, votes in judges
        for seed in range(config.seeds)
    ]


def _measure(config: Config, cell: Cell) -> dict[str, Any]:
    """Queries until the target was reached, or None, and what the judge was like."""
    task, key = tasks.mnist(config.data, (config.hidden,)), jax.random.key(cell["seed"])
    task = dataclasses.replace(task, test=task.test.take(slice(config.test_images)))
    found = _run(config, cell["kind"], cell["votes"], cell["level"], key, task)
    reached = bool(found["accuracy"] >= config.target)
    return {
        "reached": found["queries"] if reached else None,
        "queries": found["queries"],
        "accuracy": found["accuracy"],
        "error": float(found["error"]) / int(found["looks"]),
        "predicted": cell["votes"] * found["differences"] / found["lean"],
    }


@functools.partial(jax.jit, static_argnames=("config", "kind", "votes"))
def _run(
    config: Config, kind: Kind, votes: int, level: jax.Array, key: jax.Array, task: Task
) -> dict[str, jax.Array]:
    """Train until the target is reached, looking every so often."""
    of_start, of_tx, of_batches = jax.random.split(key, 3)
    params = zq.quantize(task.init(of_start), zq.Quantizer(8))
    asked = None if kind == "losses" else votes
    tx: Any = zq.zoqo(1e-9, 1e-9, key=of_tx, num_comparisons=asked)  # one code

    def loss_of(step: jax.Array) -> Any:
        batch = task.train.draw(jax.random.fold_in(of_batches, step), config.batch_size)
        return functools.partial(cross_entropy, task.logits, batch=batch)

    def step(_: Any, carry: Any) -> Any:
        params, state = carry
        loss = loss_of(state.count)
        if kind == "losses":
            heard = {"value_fn": loss}
        else:
            heard = {"compare_fn": functools.partial(compare, kind, level, loss)}
        updates, state = tx.update(None, state, params, **heard)
        return optax.apply_updates(params, updates), state

    def look(carry: Any) -> Any:
        """Some steps, and what the judge says of the next one."""
        params, state, found = carry
        params, state = jax.lax.fori_loop(0, config.every, step, (params, state))
        pair = zq.queries.losses(loss_of(state.count), params, tx.probes(state, params))
        difference = jnp.abs(pair[0] - pair[1])
        error = chance_of_error(kind, level, difference)
        found = {
            "accuracy": accuracy(task.logits, params, task.test),
            "queries": state.info.evaluations,
            "looks": found["looks"] + 1,
            "error": found["error"] + error,
            "differences": found["differences"] + difference,
            "lean": found["lean"] + difference * lean(error, votes),
        }
        return params, state, found

    def goes_on(carry: Any) -> jax.Array:
        _, state, found = carry
        return (found["accuracy"] < config.target) & (state.count < config.steps)

    sums = dict.fromkeys(("accuracy", "error", "differences", "lean"), jnp.float32(0))
    counts = dict.fromkeys(("queries", "looks"), jnp.int32(0))
    return jax.lax.while_loop(goes_on, look, (params, tx.init(params), {**sums, **counts}))[2]


def _table(found: list[Measurement]) -> str:
    """A row for each judge and number of votes, over seeds; queries of the seeds that arrived."""
    head = "judge|votes|wrong answers, %|arrived|queries|cost|predicted|accuracy, %"
    rows = [
        [
            one.label,
            str(one.votes),
            _over(one.errors, 1),
            f"{len(one.queries)} of {len(one.errors)}",
            _over(one.queries, 0),
            _over(one.costs, 2),
            _over(one.predicted, 2),
            _over(one.accuracy, 1),
        ]
        for one in _rows(found)
    ]
    return markdown.table(head.split("|"), rows)


def _draw(found: list[Measurement], fig: Any) -> None:
    """Queries against how often a judge errs, and what that costs beside what was predicted."""
    left, right = fig.subplots(1, 2)
    rows = [one for one in _rows(found) if one.costs]
    colors = {votes: f"C{i}" for i, votes in enumerate(sorted({one.votes for one in rows}))}
    for one in rows:
        style = {"marker": _KINDS[one.kind][2], "color": colors[one.votes]}
        left.plot(np.mean(one.errors), np.mean(one.queries), **style)
        right.plot(np.mean(one.predicted), np.mean(one.costs), **style)
    errors = jnp.linspace(0, 0.46, 50)
    for (votes, color), dashes in zip(colors.items(), ("-", "--", ":") * len(colors), strict=False):
        cost = np.mean(rows[0].queries) / np.mean(rows[0].costs)
        theory = cost * votes / np.asarray(lean(errors, votes))
        left.plot(
            100 * errors,
            theory,
            color=color,
            linestyle=dashes,
            label=f"{votes} vote{'s' if votes > 1 else ''}, predicted",
        )
    for name, _, marker in _KINDS.values():
        left.plot([], [], marker, color="0.4", label=name)
    right.axline((1, 1), (10, 10), color="0.6")
    left.set(yscale="log", xlabel="wrong answers, %", ylabel="queries to the target")
    right.set(xscale="log", yscale="log", xlabel="predicted cost", ylabel="cost")
    names = left.get_legend_handles_labels()
    fig.legend(*names, loc="outside lower center", ncols=6, frameon=False, fontsize=7)
    for ax in (left, right):
        ax.grid(alpha=0.3)


class _Row(NamedTuple):
    """What the seeds of one judge found; queries and their costs are of those that arrived."""

    kind: Kind
    label: str
    votes: int
    errors: list[float]
    queries: list[float]
    costs: list[float]
    predicted: list[float]
    accuracy: list[float]


def _rows(found: list[Measurement]) -> list[_Row]:
    exact = {one["seed"]: one["reached"] for one in found if one["kind"] == "losses"}
    rows = []
    for (kind, level, votes), mine in grouped(found, "kind", "level", "votes").items():
        name, words, _ = _KINDS[kind]
        arrived = [one for one in mine if one["reached"]]
        row = _Row(
            kind=kind,
            label=name + words.format(level),
            votes=votes,
            errors=[100 * one["error"] for one in mine],
            queries=[one["reached"] for one in arrived],
            costs=[one["reached"] / exact[one["seed"]] for one in arrived if exact[one["seed"]]],
            predicted=[one["predicted"] for one in mine],
            accuracy=[100 * one["accuracy"] for one in mine],
        )
        rows.append(row)
    return rows


def _over(values: list[float], digits: int) -> str:
    return markdown.interval(values, digits) if values else "–"


CLAIM = Claim("judge", Config, _cells, _measure, _table, _draw)
