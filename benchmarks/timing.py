"""The clock: compiled programs called in turn (A B A B ...), and the memory that they take.

Two times are comparable when they were taken side by side. A shared machine drifts by tens of per
cent within a minute, so every ratio in the report comes from one process in which the programs took
turns; it is the ratio of the medians, and beside it stands the ratio of the shortest times.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from experiments import footprint

__all__ = ["TRACING", "Effort", "Program", "interleaved", "report_of", "temporary"]

TRACING = threading.RLock()
"""Held while a program is traced, which takes one core, and reads the environment."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        rounds: at most so many calls of each program.
        seconds: no further round after this long.
        least: but at least so many rounds.
    """

    rounds: int = 40
    seconds: float = 8.0
    least: int = 3


class Program:
    """A compiled function with arguments of its own.

    What it returns takes the place of its first arguments, whose memory is given away (donated), as
    in training. Nothing is carried where `carried` is empty. Where an argument is a shape, the
    function is only traced: call `compile`, from whatever thread, and give arrays to `begin`.

    Args:
        fn: the function.
        carried: its first arguments.
        fixed: its other arguments.
        copy: whether to carry copies, so that the caller and other programs keep theirs.

    Attributes:
        lowered: what JAX made of the function, until it is compiled.
        compile_seconds: what tracing and compiling took.
        memory: bytes that the compiled program says it needs; None where the backend does not say.
    """

    def __init__(
        self,
        fn: Callable[..., Any],
        carried: tuple[Any, ...],
        fixed: tuple[Any, ...] = (),
        copy: bool = True,
    ) -> None:
        self._call = jax.jit(fn, donate_argnums=tuple(range(len(carried))), keep_unused=True)
        self._copy = copy
        with TRACING:
            start = time.perf_counter()
            self.lowered: Any = self._call.lower(*carried, *fixed)
            self.compile_seconds = time.perf_counter() - start
        if not any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves((carried, fixed))):
            self.compile()
            self.begin(carried, fixed)

    def compile(self) -> None:
        """Compile what was traced."""
        start = time.perf_counter()
        self.memory = footprint.of_program(self.lowered.compile())
        self.compile_seconds += time.perf_counter() - start
        self.lowered = None  # some MiB

    def begin(self, carried: tuple[Any, ...], fixed: tuple[Any, ...]) -> None:
        """Take these arrays for arguments, in place of shapes."""
        self._carried = jax.tree.map(jnp.copy, carried) if self._copy else carried
        self._fixed = fixed

    def __call__(self) -> Any:
        out = self._call(*self._carried, *self._fixed)
        if self._carried:
            self._carried = out
        return jax.block_until_ready(out)


def interleaved(
    programs: Mapping[str, Callable[[], Any]], effort: Effort
) -> dict[str, list[float]]:
    """Seconds of each call of programs that take turns; the first call of each is not counted."""
    for program in programs.values():
        jax.block_until_ready(program())
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    start = time.perf_counter()
    for done in range(effort.rounds):
        if done >= effort.least and time.perf_counter() - start > effort.seconds:
            break
        for name, program in programs.items():
            before = time.perf_counter()
            jax.block_until_ready(program())
            seconds[name].append(round(time.perf_counter() - before, 7))
    return seconds


def report_of(programs: Mapping[str, Program], effort: Effort) -> dict[str, Any]:
    """Times, memory and compile times of programs that take turns."""
    return {
        "seconds": interleaved(programs, effort),
        "memory": {name: program.memory for name, program in programs.items()},
        "compile_seconds": {name: round(p.compile_seconds, 2) for name, p in programs.items()},
    }


def temporary(fn: Callable[..., Any], carried: tuple[Any, ...], fixed: tuple[Any, ...] = ()) -> Any:
    """Bytes that a program would need, arguments being shapes; nothing is run."""
    donated = tuple(range(len(carried)))
    return footprint.of_program(
        jax.jit(fn, donate_argnums=donated).lower(*carried, *fixed).compile()
    )
