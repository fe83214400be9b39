"""Steps that size themselves against the best setting of a long search, problem by problem.

Untuned are `zq.zoqo(key=key, num_queries=8)`, `zq.caq_zo` and, in floats, `zq.spsa` likewise. The
search tries settings of sparse ZOQO, of CAQ-ZO and, with 8 bits, of dense ZOQO (in floats: of
MeZO), each in a whole run of as many evaluations, and takes the one that scores best on what it
may choose by: a development split, or another seed's quadratic. Beside them stand MeZO and Adam.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import zoqo_jax as zq
from experiments import drawing, markdown, settings
from experiments.laboratory import untuned_problems as problems
from experiments.laboratory.claim import Cell, Claim, Measurement
from experiments.laboratory.networks import tasks
from experiments.laboratory.pages import grouped
from experiments.laboratory.untuned_problems import FLOATS, GRIDS, Problem
from experiments.laboratory.untuned_settings import MAKERS, UNTUNED, Setting, searched

__all__ = ["CLAIM", "Config"]

_QUADRATIC = ("8 bits in [-1, 1]", FLOATS)
_PROBLEMS = {
    "digits": ("4 bits", "2 bits", "8 bits", "NF4", "3 bits", FLOATS),
    "sentences": ("4 bits", "2 bits", "8 bits", FLOATS),
    "quadratic 1": _QUADRATIC,
    "quadratic 30": _QUADRATIC,
    "quadratic 1000": _QUADRATIC,
    "quadratic 30, noisy": _QUADRATIC,
    "convolutions": ("4 bits", "8 bits", FLOATS),
    "transformer": ("4 bits", "8 bits", FLOATS),
}
_NOISE = 10.0  # deviation of an entry of the gradient; at 0 its root mean square is about 5
_POINTS, _EXCESS = 0.02, 1.1
_SOLVED = 1e-9  # of a quadratic's loss at 0: what float32 leaves, and less of it is no better


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      problems: which, of "digits" (scikit-learn's), "sentences", "quadratic 1", "quadratic 30",
        "quadratic 1000", "quadratic 30, noisy", "convolutions" (MNIST) and "transformer".
      digits: MNIST for `experiments.attack.data.load`: "mnist" (bundled), "tfds:mnist" or a folder.
      sentences: for `experiments.finetune.data.load`: "tfds:sst2", a folder, or the bundled
        "reviews"; of the logistic regression.
      words: likewise, of the transformer.
      steps: of the untuned run; the others make as many evaluations.
      batch_size: examples a query is made on.
      costly_steps: likewise, of convolutions and the transformer.
      costly_batch_size: likewise.
      num_queries: pairs a step.
      every: of the settings that are searched, each so-many-th is tried.
      seeds: starts and runs; a further one serves to choose settings.

    Raises:
      ValueError: a setting outside what is said above, naming it and its value.
    """

    problems: tuple[str, ...] = tuple(_PROBLEMS)
    digits: str = "mnist"
    sentences: str = "tfds:sst2"
    words: str = "reviews"
    steps: int = 1_000
    batch_size: int = 256
    costly_steps: int = 400
    costly_batch_size: int = 64
    num_queries: int = 8
    every: int = 1
    seeds: int = 3

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "costly_steps", "costly_batch_size", "num_queries")
        least, within = dict.fromkeys((*counts, "every"), 1), {"seeds": (1, 5)}
        settings.check(self, least=least, within=within)
        if not self.problems or not set(self.problems) <= set(_PROBLEMS):
            raise ValueError(f"problems must be of {tuple(_PROBLEMS)}, got {self.problems}.")


def _cells(config: Config) -> list[Cell]:
    return [
        {"problem": name, "grid": grid, "way": way}
        for name in config.problems
        for grid in _PROBLEMS[name]
        for way in (
            ("spsa", "searched", "adam") if grid == FLOATS else ("zoqo", "caq_zo", "searched")
        )
    ]


def _measure(config: Config, cell: Cell) -> dict[str, Any]:
    name, grid, way = cell["problem"], cell["grid"], cell["way"]
    if way in UNTUNED:
        return _untuned(config, name, grid, way)
    evaluations = _untuned(config, name, grid, "spsa" if grid == FLOATS else "zoqo")["evaluations"]
    steps = config.steps if way == "adam" else round(evaluations / (2 * config.num_queries))
    tried = searched(_problem(config, name).rate, grid, way)[:: config.every]
    chosen, heard = tried[0], []
    if len(tried) > 1:
        heard = [_run(config, name, grid, one, config.seeds, steps) for one in tried]
        sign = -1.0 if _problem(config, name).is_accuracy else 1.0
        ranks = [(sign * _known(one["score"]), _known(one["loss"])) for one in heard]
        chosen = tried[ranks.index(min(ranks))]
    runs = [_run(config, name, grid, chosen, seed, steps) for seed in range(config.seeds)]
    scores = [[str(one), found["score"]] for one, found in zip(tried, heard, strict=False)]
    return {**_joined(runs), "steps": steps, "setting": str(chosen), "tried": scores}


@functools.cache
def _untuned(config: Config, name: str, grid: str, method: str) -> dict[str, Any]:
    runs = [
        _run(config, name, grid, Setting(method), seed, _steps(config, name))
        for seed in range(config.seeds)
    ]
    return {**_joined(runs), "evaluations": float(np.mean([one["evaluations"] for one in runs]))}


def _joined(runs: list[dict[str, Any]]) -> dict[str, Any]:
    names = [one for one in runs[0] if one != "evaluations"]
    return {name: [one[name] for one in runs] for name in names}


def _steps(config: Config, name: str) -> int:
    is_costly = name in ("convolutions", "transformer")
    return config.costly_steps if is_costly else config.steps


@functools.cache
def _problem(config: Config, name: str) -> Problem:
    kind, _, rest = name.partition(" ")
    if kind == "quadratic":
        condition, _, noisy = rest.partition(",")
        return problems.quadratic(float(condition), _NOISE if noisy else 0.0)
    if name == "digits":
        return problems.network(tasks.small_digits(), problems.of_transposed, config.batch_size)
    if name == "sentences":
        task = tasks.sentences(config.sentences)
        return problems.network(task, problems.of_few(task), config.batch_size)
    if name == "convolutions":
        task = tasks.convolved(config.digits)
        return problems.network(task, problems.untrained(task), config.costly_batch_size)
    task = tasks.words(config.words)
    return problems.network(task, problems.of_few(task), config.costly_batch_size)


def _run(
    config: Config, name: str, grid: str, setting: Setting, seed: int, steps: int
) -> dict[str, Any]:
    """Scores before and after a run of a seed, and what is known of it then."""
    problem, choosing = _problem(config, name), seed == config.seeds
    params, data = problem.start(seed), problem.data(seed)
    if grid != FLOATS:
        params = [GRIDS[grid](x) for x in params]
    train, score = _programs(problem, setting.method, config.num_queries)
    start, at_start = score(data, params, choosing)
    values = jnp.array([setting.value, setting.octaves, setting.radius], jnp.float32)
    params, told = train(data, params, jax.random.key(100 + seed), values, steps)
    end, loss = score(data, params, choosing)
    found = {"start": _plain(start), "score": _plain(end), "loss": _plain(loss)}
    found["loss_at_start"] = _plain(at_start)
    if setting.method in UNTUNED:
        found["evaluations"] = int(told.evaluations[-1])
        found |= {"size": float(told.size[-1]), "true_share": float(told.true_share[-1])}
        found["health"] = "; ".join(zq.health(told).findings)
    return found


@functools.lru_cache(maxsize=8)
def _programs(problem: Problem, method: str, num_queries: int) -> tuple[Any, Any]:
    make = functools.partial(MAKERS[method], num_queries=num_queries)

    @functools.partial(jax.jit, static_argnums=4)
    def train(data: Any, params: Any, key: jax.Array, values: jax.Array, steps: int) -> Any:
        value, octaves, radius = values
        own, batches = jax.random.split(key)

        def at(i: Any, params: Any) -> Any:
            now = value * 2.0 ** (-octaves * jnp.float32(i) / steps)
            return make(params, now, radius, key=own)

        def step(now: Any, i: jax.Array) -> Any:
            params, state = now
            batch = jax.random.fold_in(batches, i)
            loss = functools.partial(problem.loss, data, key=batch)
            gradient = jax.grad(loss)(params) if method == "adam" else None
            more = {} if method == "adam" else {"value_fn": loss}
            updates, state = at(i, params).update(gradient, state, params, **more)
            told = state.info if method in UNTUNED else None
            return (optax.apply_updates(params, updates), state), told

        start = params, at(0, params).init(params)
        (params, _), told = jax.lax.scan(step, start, jnp.arange(steps))
        return params, told

    return train, jax.jit(problem.score, static_argnums=2)


def _plain(value: jax.Array) -> float | None:
    return float(value) if math.isfinite(value) else None


def _known(value: float | None) -> float:
    return math.inf if value is None else value


class Row(NamedTuple):
    """An untuned method on a grid, beside the search there."""

    one: Measurement
    searched: Measurement

    @property
    def is_accuracy(self) -> bool:
        """Whether more is better."""
        return not self.one["problem"].startswith("quadratic")

    @property
    def scores(self) -> tuple[float, float]:
        """Of both, means over seeds."""
        mine, best = (float(np.mean([*map(_known, x["score"])])) for x in self)
        return mine, best

    @property
    def is_met(self) -> bool:
        """Whether the untuned method is about as good."""
        mine, best = self.scores
        return mine >= best - _POINTS if self.is_accuracy else mine <= max(_EXCESS * best, _SOLVED)

    @property
    def is_worse(self) -> bool:
        """Whether it ends worse than it began, with any seed."""
        pairs = zip(map(_known, self.one["score"]), self.one["start"], strict=True)
        return any(end < start if self.is_accuracy else end > start for end, start in pairs)


def _rows(found: list[Measurement]) -> list[Row]:
    rows = []
    for ways in grouped(found, "problem", "grid").values():
        best = [x for x in ways if x["way"] == "searched"]
        rows += [Row(x, best[0]) for x in ways if x["way"] in UNTUNED and best]
    return rows


def _table(found: list[Measurement]) -> str:
    head = ["accuracy, % (quadratics: loss, % of that at 0)", "at the start", "untuned", "searched"]
    head += ["setting", "difference", "as good", "worse than at the start", "MeZO", "Adam"]
    rows = _rows(found)
    floats = {(x["problem"], x["way"]): x for x in found if x["grid"] == FLOATS}
    lines = []
    for row in rows:
        one, (mine, best) = row.one, row.scores
        beside = [floats.get((one["problem"], way)) for way in ("searched", "adam")]
        lines.append(
            [
                f"{one['problem']}, {one['grid']}, {one['way']}",
                f"{100 * np.mean(one['start']):.1f}",
                *map(_shown, row),
                row.searched["setting"],
                f"{100 * (mine - best):+.2g}",
                *("yes" if is_so else "no" for is_so in (row.is_met, row.is_worse)),
                *(_shown(x) if x else "" for x in beside),
            ]
        )
    met = sum(row.is_met for row in rows)
    words = f"As good as the search: {met} of {len(rows)} rows."
    return "\n\n".join([markdown.table(head, lines), words, *_health(rows)])


def _health(rows: list[Row]) -> list[str]:
    """What `zq.health` found in untuned runs, a line for each that it found something in."""
    lines = [
        f"- {row.one['problem']}, {row.one['grid']}, {row.one['way']}, run {number}: {finding}"
        for row in rows
        for number, finding in enumerate(row.one.get("health", []))
        if finding
    ]
    return ["What `zq.health` says of them:", "\n".join(lines)] if lines else []


def _shown(one: Measurement) -> str:
    if None in one["score"]:
        return "diverged"
    digits = 2 if one["problem"].startswith("quadratic") else 1
    return markdown.interval([100 * x for x in one["score"]], digits)


def _draw(found: list[Measurement], fig: Any) -> None:
    fig.set_size_inches(9.0, 4.6)
    axes = fig.subplots(1, 2)
    for axis, is_accuracy in zip(axes, (True, False), strict=True):
        rows = [row for row in _rows(found) if row.is_accuracy == is_accuracy]
        for number, method in enumerate(UNTUNED):
            mine = np.array([row.scores for row in rows if row.one["way"] == method])
            if len(mine):
                style = drawing.style(number) | {"linestyle": "", "label": method}
                axis.plot(100 * mine[:, 1], 100 * mine[:, 0], **style)
        if not is_accuracy:
            axis.set_xscale("log")
            axis.set_yscale("log")
        if rows:
            ends = np.array([100 * x for row in rows for x in row.scores if math.isfinite(x)])
            axis.plot([ends.min(), ends.max()], [ends.min(), ends.max()], color="grey", lw=0.8)
            axis.legend(frameon=False, fontsize="small")
        what = "accuracy, %" if is_accuracy else "quadratics: loss, % of that at 0"
        axis.set_title(what, fontsize="medium")
        axis.set_xlabel("searched")
        axis.set_ylabel("untuned (grey: the same)")


CLAIM = Claim("untuned", Config, _cells, _measure, _table, _draw)
