"""What is asked of every model: the same losses, implicit weights, and steps that move only codes.

`examine` goes on after a failure, so that a model's report says all that is wrong with it.
"""

import contextlib
import dataclasses
import importlib.metadata
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import zoqo_jax as zq
from zoo import layout
from zoo.registry import Model

__all__ = ["Report", "examine"]

STEPS = {
    # One code, however short the radius is.
    "dense": lambda key: zq.zoqo(1e-3, 1e-3, key=key, structure="dense"),
    "rank_one": lambda key: zq.caq_zo(10.0, key=key, structure="rank_one", boundary="clamp"),
}
apply_updates = getattr(zq, "apply_updates", optax.apply_updates)


@dataclasses.dataclass
class Report:
    """What became of a model.

    Attributes:
        version: of its package.
        depth: how far it was examined, see `examine`.
        weights: elements of the quantized leaves.
        share: of the elements that products, convolutions and look-ups take, the part in leaves
            that are never an array of floats; None where they take none, or explain fails.
        fallbacks: operations that got an array of floats, and of how many leaves.
        compile_seconds: tracing and compiling, of "forward", of "values" (by `quaxify`) and of
            each step.
        forward_seconds: time of one forward pass of the decoded model.
        ratio: time of each step over that of two such passes.
        failures: by what was asked, the message of what went wrong.
    """

    version: str = ""
    depth: str = "run"
    weights: int = 0
    share: float | None = None
    fallbacks: dict[str, int] = dataclasses.field(default_factory=dict)
    compile_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    forward_seconds: float | None = None
    ratio: dict[str, float] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)


Depth = Literal["traced", "run", "timed"]


def examine(model: Model, depth: Depth = "run") -> Report:
    """Ask everything of one model.

    Args:
        model: which.
        depth: "traced" goes no further than tracing, which is where most that can fail fails, and
            takes a tenth of the time; "timed" measures the steps as well.
    """
    report = Report(version=importlib.metadata.version(model.package), depth=depth)
    with _asked(report, "build"):
        params, loss = model.build()
        quantizer = zq.Quantizer(bits=model.bits, range="mse")
        quantized = eqx.filter_jit(lambda tree: zq.quantize(tree, quantizer))(params)
        report.weights = sum(leaf.size for leaf in _quantized(quantized).values())
        codes, plain = _Tree(quantized), _Tree(zq.dequantize(quantized))
    if report.failures:
        return report

    programs = {}
    # The model by itself: where this fails, the zoo is wrong, not the library.
    with _asked(report, "forward"):
        forward = _program(report, "forward", lambda x: loss(plain.whole(x)), plain.arrays)
        expected = forward(plain.arrays)
        assert np.isfinite(expected), f"the loss is {expected}"
        programs["forward"] = lambda: forward(plain.arrays)
    if report.failures:
        return report

    def near(actual: Any, expected: Any) -> None:
        actual, expected = float(actual), float(expected)
        error = abs(actual - expected) / max(abs(expected), 0.1)
        assert error <= model.tolerance, f"the loss is {actual:.6g} and not {expected:.6g}"

    with _asked(report, "values"):
        implicit = _program(
            report, "values", lambda x: zq.quaxify(loss)(codes.whole(x)), codes.arrays
        )
        near(implicit(codes.arrays), expected)
    with _asked(report, "explain"):
        _explain(report, loss, quantized)
    for name, make in STEPS.items():
        with _asked(report, name):
            tx = make(jax.random.key(3))
            state = tx.init(quantized)
            step, settings = _step(report, name, tx, loss, codes, state)
            arrays, after = step(codes.arrays, state)
            moved = _moved(quantized, eqx.combine(arrays, settings), bits=depth != "traced")
            if depth == "traced":
                continue
            for heard, end in zip(after.info.losses[0], _ends(tx, state, quantized), strict=True):
                near(heard, forward(_Tree(end).arrays))
            assert after.info.losses[0, 0] != after.info.losses[0, 1], (
                "both sides have the same loss"
            )
            assert moved or name == "rank_one", "no code moved"  # it rounds its steps at random
            programs[name] = lambda step=step, state=state: step(codes.arrays, state)
    if depth == "timed":
        _measure(report, programs)
    return report


class _Tree:
    """A tree whose arrays are arguments of a program; functions and settings stay outside."""

    def __init__(self, tree: Any) -> None:
        self.arrays, self._rest = eqx.partition(tree, eqx.is_array)

    def whole(self, arrays: Any) -> Any:
        return eqx.combine(arrays, self._rest)


def _quantized(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=zq.is_quantized)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves if zq.is_quantized(leaf)}


def _explain(report: Report, loss: Callable[[Any], Any], quantized: Any) -> None:
    explanation = zq.explain(loss, quantized, structure="rank_one", query_batch=1)
    values = {
        (use.operation, use.label)
        for use in explanation.uses
        if use.plan.algorithms == ("materialize",)
    }
    for operation, _ in sorted(values):
        report.fallbacks[operation] = report.fallbacks.get(operation, 0) + 1

    by_label = _quantized(quantized)

    def of_leaves(floats: list[Any]) -> Any:
        remaining = iter(floats)
        fill = lambda leaf: next(remaining) if zq.is_quantized(leaf) else leaf  # noqa: E731
        return loss(jax.tree.map(fill, quantized, is_leaf=zq.is_quantized))

    floats = [zq.dequantize(leaf) for leaf in by_label.values()]
    multiplied = [list(by_label)[i] for i in layout.multiplied(of_leaves, floats)]
    implicit = {use.label for use in explanation.uses} - {label for _, label in values}
    if multiplied:
        size = lambda labels: sum(by_label[label].size for label in labels)  # noqa: E731
        report.share = size(implicit.intersection(multiplied)) / size(multiplied)
    unread = sorted(set(multiplied) & set(explanation.unused))
    assert not unread, f"explain says that the loss never reads {', '.join(unread[:3])}"


def _step(
    report: Report, name: str, tx: Any, loss: Callable[[Any], Any], codes: _Tree, state: Any
) -> tuple[Callable[..., Any], Any]:
    """A step from arrays to arrays, and what else comes out of `apply_updates`."""
    settings = []

    def step(arrays: Any, state: Any) -> Any:
        params = codes.whole(arrays)
        updates, state = tx.update(None, state, params, value_fn=loss)
        arrays, rest = eqx.partition(apply_updates(params, updates), eqx.is_array)
        settings.append(rest)
        return arrays, state

    return _program(report, name, step, codes.arrays, state), settings[-1]


@jax.jit
def _end(leaf: Any, probe: Any, side: Any) -> Any:
    return zq.dequantize(zq.queries.endpoints(leaf, [probe], side))


def _ends(tx: Any, state: Any, quantized: Any) -> Iterator[Any]:
    """The decoded model where a step looked; a leaf at a time, for equal leaves compile once."""
    probes = tx.probes(state, quantized)
    for side in (1, -1):
        remaining = iter(probes)
        at_end = lambda leaf, side=side, remaining=remaining: (  # noqa: E731
            _end(leaf, next(remaining), side) if zq.is_quantized(leaf) else leaf
        )
        yield jax.tree.map(at_end, quantized, is_leaf=zq.is_quantized)


def _moved(before: Any, after: Any, bits: bool) -> bool:
    """Whether codes moved; a tree in which anything else did is refused."""
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(before, is_leaf=zq.is_quantized),
        jax.tree_util.tree_leaves_with_path(after, is_leaf=zq.is_quantized),
        strict=True,
    )
    moved = False
    for (path, old), (_, new) in pairs:
        label = jax.tree_util.keystr(path)
        if zq.is_quantized(old):
            assert zq.is_quantized(new), f"{label} became {type(new).__name__}"
            moved |= not _same(old.packed, new.packed, bits)
            old = dataclasses.replace(old, packed=new.packed)
            assert jax.tree.structure(old) == jax.tree.structure(new), f"{label}: another layout"
            ours, theirs = jax.tree.leaves(old), jax.tree.leaves(new)
            same = [_same(*pair, bits) for pair in zip(ours, theirs, strict=True)]
            assert all(same), f"{label}: more than its codes changed"
        else:
            assert _same(old, new, bits), f"{label} changed: {old!r:.60} became {new!r:.60}"
    return moved


def _same(old: Any, new: Any, bits: bool) -> bool:
    """Whether two leaves are the same, bit for bit; an array of one number is no number."""
    if not isinstance(old, jax.Array | np.ndarray):
        return old is new or (type(old) is type(new) and bool(old == new))
    if not isinstance(new, jax.Array | np.ndarray):
        return False
    if old.dtype != new.dtype or old.shape != new.shape:
        return False
    if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
        old, new = jax.random.key_data(old), jax.random.key_data(new)
    return not bits or np.asarray(old).tobytes() == np.asarray(new).tobytes()


def _program(report: Report, name: str, fn: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """A compiled program, and in the report the seconds that tracing and compiling it took.

    One that is only traced gives zeros. Where nobody measures, the compiler may save itself the
    trouble of making it fast.
    """
    start = time.perf_counter()
    if report.depth == "traced":
        shapes = jax.eval_shape(fn, *args)
        return lambda *args: jax.tree.map(_zeros, shapes)
    options = None if report.depth == "timed" else {"xla_backend_optimization_level": 0}
    program = jax.jit(fn).lower(*args).compile(compiler_options=options)
    report.compile_seconds[name] = round(time.perf_counter() - start, 2)
    return program


def _zeros(shape: Any) -> Any:
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), shape.shape)
    return jnp.zeros(shape.shape, shape.dtype)


def _measure(report: Report, programs: dict[str, Callable[[], Any]], seconds: float = 2.0) -> None:
    """The best time of each program; they take turns, so that a busy machine slows all alike."""
    best = dict.fromkeys(programs, float("inf"))
    start, rounds = time.perf_counter(), 0
    while rounds < 5 or (rounds < 200 and time.perf_counter() - start < seconds):
        for name, program in programs.items():
            before = time.perf_counter()
            jax.block_until_ready(program())
            best[name] = min(best[name], time.perf_counter() - before)
        rounds += 1
    report.forward_seconds = best.pop("forward")
    report.ratio = {name: round(t / report.forward_seconds / 2, 2) for name, t in best.items()}


@contextlib.contextmanager
def _asked(report: Report, what: str) -> Iterator[None]:
    """Keep the message of what fails, in one line, and go on."""
    try:
        yield
    except Exception as error:
        text = " ".join(str(error).split())
        text = re.sub(r"/\S*/(?=[\w.]+\.py)|\s+at 0x[0-9a-f]+", "", text)  # of this machine
        report.failures[what] = f"{type(error).__name__}: {text}"[:300]
