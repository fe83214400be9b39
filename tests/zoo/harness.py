"""What is asked of every model: the same losses, implicit weights, and steps that move only codes.

`examine` goes on after a failure, so that a model's report says all that is wrong with it.
"""

import contextlib
import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Iterator
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import zoqo_jax as zq
from tests.zoo import layout
from tests.zoo.registry import Model

__all__ = ["Report", "examine"]

# A radius in values, as ZOQO has it; no shorter than one code in any model here.
STEPS = {
    "zoqo": lambda key: zq.zoqo(1e-3, 1e-3, key=key, structure="dense"),
    "caq_zo": lambda key: zq.caq_zo(10.0, key=key, structure="rank_one", boundary="clamp"),
}
apply_updates = getattr(zq, "apply_updates", optax.apply_updates)


@dataclasses.dataclass
class Report:
    """What became of a model.

    Attributes:
        version: of its package.
        weights: elements of the quantized leaves.
        share: of the elements that products, convolutions and look-ups take, the part in leaves
            that are never an array of floats; None where they take none, or explain fails.
        fallbacks: operations that got an array of floats, and how many leaves they got.
        compile_seconds: tracing and compiling, of "forward" and of each step.
        ratio: time of each step over that of two forward passes of the decoded model.
        forward_seconds: of one such pass.
        failures: by what was asked, the message of what went wrong.
    """

    version: str = ""
    weights: int = 0
    share: float | None = None
    fallbacks: dict[str, int] = dataclasses.field(default_factory=dict)
    compile_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    ratio: dict[str, float] = dataclasses.field(default_factory=dict)
    forward_seconds: float | None = None
    failures: dict[str, str] = dataclasses.field(default_factory=dict)


class _Tree:
    """A tree whose arrays are arguments of a program; functions and settings stay outside."""

    def __init__(self, tree: Any) -> None:
        self.arrays, self.rest = eqx.partition(tree, eqx.is_array)

    def whole(self, arrays: Any) -> Any:
        return eqx.combine(arrays, self.rest)


def examine(model: Model, timed: bool = False) -> Report:
    """Ask everything of one model; `timed` measures its steps as well."""
    report = Report(version=importlib.metadata.version(model.package))
    with _asked(report, "build"):
        params, loss = model.build()
        quantized = zq.quantize(params, zq.Quantizer(bits=model.bits, range="mse"))
        decoded = zq.dequantize(quantized)
        leaves = [x for x in jax.tree.leaves(quantized, is_leaf=zq.is_quantized) if _is_codes(x)]
        report.weights = sum(leaf.size for leaf in leaves)
    if report.failures:
        return report

    # The model by itself: if this fails, the zoo is wrong, not the library.
    plain = _Tree(decoded)
    with _asked(report, "forward"):
        forward = _compiled(
            report, "forward", lambda arrays: loss(plain.whole(arrays)), plain.arrays
        )
        expected = forward(plain.arrays)
        assert np.isfinite(expected), f"the loss is {expected}"
    if report.failures:
        return report

    def near(actual: Any, expected: Any) -> None:
        np.testing.assert_allclose(
            np.asarray(actual, np.float32),
            np.asarray(expected, np.float32),
            rtol=model.tolerance,
            atol=model.tolerance / 10,
        )

    codes = _Tree(quantized)
    with _asked(report, "values"):
        near(jax.jit(lambda arrays: zq.quaxify(loss)(codes.whole(arrays)))(codes.arrays), expected)
    with _asked(report, "explain"):
        _explain(report, loss, quantized)
    programs = {"forward": lambda: forward(plain.arrays)}
    for name, make in STEPS.items():
        with _asked(report, name):
            tx = make(jax.random.key(3))
            state = tx.init(quantized)
            step, settings = _step(report, name, tx, loss, codes, state)
            arrays, after = step(codes.arrays, state)
            for i, end in enumerate(_ends(tx, state, codes)):
                near(after.losses[0, i], forward(_Tree(end).arrays))
            assert after.losses[0, 0] != after.losses[0, 1], "both sides have the same loss"
            moved = _moved(quantized, eqx.combine(arrays, settings))
            assert moved or name == "caq_zo", "no code moved"  # its steps are rounded at random
            programs[name] = lambda step=step, state=state: step(codes.arrays, state)
    if timed:
        _measure(report, programs)
    return report


def _explain(report: Report, loss: Callable[[Any], Any], quantized: Any) -> None:
    explanation = zq.explain(loss, quantized, structure="rank_one", query_batch=1)
    by_label = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(quantized, is_leaf=zq.is_quantized)
        if _is_codes(leaf)
    }
    values = [use for use in explanation.uses if use.way == "values"]
    for operation, _ in {(use.operation, use.label) for use in values}:
        report.fallbacks[operation] = report.fallbacks.get(operation, 0) + 1

    def of_leaves(floats: list[Any]) -> Any:
        remaining = iter(floats)
        fill = lambda leaf: next(remaining) if _is_codes(leaf) else leaf  # noqa: E731
        return loss(jax.tree.map(fill, quantized, is_leaf=zq.is_quantized))

    floats = [zq.dequantize(leaf) for leaf in by_label.values()]
    labels = [list(by_label)[i] for i in layout.multiplied(of_leaves, floats)]
    read = {use.label for use in explanation.uses}
    floating = {use.label for use in values}
    sizes = {label: by_label[label].size for label in labels}
    unread = sorted(set(labels) - read)
    if sizes:
        implicit = sum(n for label, n in sizes.items() if label in read - floating)
        report.share = implicit / sum(sizes.values())
    assert not unread, f"explain says that the loss never reads {', '.join(unread[:3])}"


def _step(
    report: Report, name: str, tx: Any, loss: Callable[[Any], Any], codes: _Tree, state: Any
) -> tuple[Callable[..., Any], Any]:
    """A compiled step from arrays to arrays, and what else came out of `apply_updates`."""
    settings = []

    def step(arrays: Any, state: Any) -> Any:
        params = codes.whole(arrays)
        updates, state = tx.update(None, state, params, value_fn=loss)
        arrays, rest = eqx.partition(apply_updates(params, updates), eqx.is_array)
        settings.append(rest)
        return arrays, state

    return _compiled(report, name, step, codes.arrays, state), settings[-1]


def _ends(tx: Any, state: Any, codes: _Tree) -> list[Any]:
    """The decoded model where a step looked."""

    @jax.jit
    def ends(arrays: Any) -> Any:
        params = codes.whole(arrays)
        probes = tx.probes(state, params)
        trees = [zq.queries.endpoints(params, probes, side) for side in (1, -1)]
        return [eqx.filter(zq.dequantize(tree), eqx.is_array) for tree in trees]

    return [codes_rest(arrays, codes) for arrays in ends(codes.arrays)]


def codes_rest(arrays: Any, codes: _Tree) -> Any:
    rest = zq.dequantize(eqx.combine(codes.arrays, codes.rest))
    return eqx.combine(arrays, eqx.filter(rest, eqx.is_array, inverse=True))


def _moved(before: Any, after: Any) -> bool:
    """Whether codes moved; refuses a tree in which anything else did."""
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(before, is_leaf=zq.is_quantized),
        jax.tree_util.tree_leaves_with_path(after, is_leaf=zq.is_quantized),
        strict=True,
    )
    moved = False
    for (path, old), (_, new) in pairs:
        label = jax.tree_util.keystr(path)
        if _is_codes(old):
            assert zq.is_quantized(new), f"{label} became {type(new).__name__}"
            moved |= not _same(old.packed, new.packed)
            old = dataclasses.replace(old, packed=new.packed)
            ours, theirs = (jax.tree.leaves(x) for x in (old, new))
            assert jax.tree.structure(old) == jax.tree.structure(new), f"{label}: other settings"
            assert all(map(_same, ours, theirs)), f"{label}: more than its codes changed"
        else:
            assert _same(old, new), f"{label} changed: {old!r:.60} became {new!r:.60}"
    return moved


def _same(old: Any, new: Any) -> bool:
    """Whether two leaves are the same, bit for bit; an array of one number is no number."""
    if not eqx.is_array_like(old) or isinstance(old, bool | int | float | complex):
        return old is new or (type(old) is type(new) and bool(old == new))
    if not eqx.is_array_like(new) or old.dtype != new.dtype or old.shape != new.shape:
        return False
    if jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
        old, new = jax.random.key_data(old), jax.random.key_data(new)
    return np.asarray(old).tobytes() == np.asarray(new).tobytes()


def _is_codes(leaf: Any) -> bool:
    return zq.is_quantized(leaf)


def _compiled(report: Report, name: str, fn: Callable[..., Any], *args: Any) -> Any:
    start = time.perf_counter()
    program = jax.jit(fn).lower(*args).compile()
    report.compile_seconds[name] = round(time.perf_counter() - start, 2)
    return program


def _measure(report: Report, programs: dict[str, Callable[[], Any]], seconds: float = 2.0) -> None:
    """The best time of each program, which take turns, so that a busy machine slows all alike."""
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
        report.failures[what] = f"{type(error).__name__}: {text}"[:300]
