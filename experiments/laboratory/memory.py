"""Bytes that a training step takes: Adam, quantization-aware training, and ZOQO.

Noga Bar and Raja Giryes, "ZOQO: Zero-Order Quantized Optimization", 2025, arXiv:2501.06736, table
V. Bytes are counted by formulas, read off the compiled program, and measured on a process that has
nothing but the program: it was compiled by another. `benchmarks/memory.py` asks what the compiler
and real decoders take; this claim is the paper's network.
"""

import dataclasses
import json
import pickle
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import serialize_executable

from experiments import drawing, footprint, markdown, settings
from experiments.laboratory.claim import Cell, Claim, Measurement
from experiments.laboratory.networks.steps import METHODS, counted, problem
from experiments.laboratory.pages import grouped
from zoqo_jax.directions import Distribution

__all__ = ["CLAIM", "Config"]

_MARGIN = 2**30  # bytes of a process beside its program's
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system (glibc)
_MB = 1e6


@dataclasses.dataclass(frozen=True)
class Config:
    """A network of three square layers without biases, relu between them, mean squared error.

    Attributes:
      widths: of the layers; even numbers.
      batch_size: examples a step.
      steps: that each process takes.
      noise: law of ZOQO's directions; the paper's is "uniform".

    Raises:
      ValueError: a setting outside what is said above, naming it and its value.
    """

    widths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    batch_size: int = 32
    steps: int = 3
    noise: Distribution = "uniform"

    def __post_init__(self) -> None:
        settings.check(self, least={"batch_size": 1, "steps": 1})
        if bad := [width for width in self.widths if width < 2 or width % 2]:
            raise ValueError(f"widths must be even and at least 2, got {bad[0]}.")


def _cells(config: Config) -> list[Cell]:
    """Every width by every method."""
    return [{"width": width, "method": name} for width in config.widths for name in METHODS]


def _measure(config: Config, cell: Cell) -> dict[str, Any]:
    """Bytes of one method at one width; those of its process are None where none was started."""
    method, width = METHODS[cell["method"]], cell["width"]
    step, arrays = problem(method, width, config.batch_size, config.noise)
    compiled = step.lower(*arrays).compile()
    program = footprint.of_program(compiled)
    if program is None:
        raise RuntimeError("this backend does not say what a program needs.")
    found = {"counted": counted(method, width, config.batch_size), "program": program}
    if total(found, "program") + _MARGIN > footprint.available():
        return {**found, "process": None, "empty": None}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "program")
        path.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
        shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), arrays)
        asked = {"program": str(path), "arrays": shapes, "steps": config.steps}
        return {**found, **footprint.child("experiments.laboratory.memory", asked, _MALLOC)}


def _child(program: str, arrays: list[Any], steps: int) -> dict[str, Any]:
    """Peak resident bytes of this process after some steps, and before it had an array."""
    stored = pickle.loads(Path(program).read_bytes())
    one = jax.devices()[:1]
    step = serialize_executable.deserialize_and_load(*stored, execution_devices=one)
    jnp.array(np.zeros(1)).block_until_ready()
    footprint.give_back()
    empty = _taken("now")
    changed, batch = ([_filled(*shape) for shape in some] for some in arrays)
    footprint.give_back()
    footprint.restart_peak()  # or it is that of filling them
    for _ in range(steps):
        changed = jax.block_until_ready(step(changed, batch))
    return {"process": _taken("peak"), "empty": empty}


def _taken(when: str) -> int | None:
    """Bytes of an accelerator, where there is one, or of the process."""
    resident = footprint.resident()
    on_device = resident["device_peak"]
    return resident[when] if on_device is None else on_device


def _filled(shape: list[int], dtype: str) -> jax.Array:
    """An array; what it holds makes no difference to memory, but codes must be legal."""
    if dtype.startswith("key"):
        return jax.random.wrap_key_data(jnp.array(np.zeros(2, np.uint32)))
    value = {"uint8": 0x88, "float32": 0.01}.get(dtype, 0)  # codes 136, or 8 and 8
    return jnp.array(np.full(shape, value, dtype)).block_until_ready()


def total(one: Measurement, how: str) -> float | None:
    """Bytes of a cell, "counted", of its "program", or of its "process" beyond an empty one's."""
    if how == "counted":
        return sum(one["counted"].values())
    if how == "program":
        program = one["program"]
        return program["argument"] + program["temp"] + program["output"] - program["alias"]
    return None if one["process"] is None else one["process"] - one["empty"]


def _table(found: list[Measurement]) -> str:
    """Megabytes of each cell."""
    counts = ("weights", "gradients", "state", "working", "activations")
    parts = ("argument", "output", "temp")
    adam = {one["width"]: total(one, "process") for one in found if one["method"] == "adam"}
    rows = []
    for one in found:
        process, beside = total(one, "process"), adam[one["width"]]
        figures = [
            *(one["counted"][part] for part in counts),
            total(one, "counted"),
            *(one["program"][part] for part in parts),
            total(one, "program"),
            process,
        ]
        rows.append(
            [
                METHODS[one["method"]].label,
                f"{one['width']:,}",
                *map(_megabytes, figures),
                f"{process / beside:.1%}" if process and beside else "–",
                _megabytes(one["empty"]),
            ]
        )
    head = ["method", "width", *counts, "counted", "arguments", "outputs", "temporary", "program"]
    head += ["process", "of Adam's", "empty process"]
    return f"{markdown.table(head, rows)}\n\nIn MB, 10^6 bytes."


def _draw(found: list[Measurement], fig: Any) -> None:
    """Bytes against width: counted, of the program, of the process."""
    names = {
        "counted": "counted",
        "program": "compiled program",
        "process": "process, beyond empty",
    }
    axes = fig.subplots(1, 3, sharey=True)
    for ax, (how, title) in zip(axes, names.items(), strict=True):
        for (name,), mine in grouped(found, "method").items():
            known = [one for one in mine if total(one, how)]
            values = [total(one, how) / _MB for one in known]
            line = {**drawing.style(list(METHODS).index(name)), "label": METHODS[name].label}
            ax.plot([one["width"] for one in known], values, **line)
        ax.set(xscale="log", yscale="log", xlabel="width of the layers", title=title)
        ax.set_xticks(sorted({one["width"] for one in found}), minor=False)
        ax.set_xticklabels(sorted({one["width"] for one in found}), rotation=45)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("MB")
    drawing.label_ends(axes[-1])


def _megabytes(count: float | None) -> str:
    if count is None:
        return "–"
    return f"{count / _MB:,.1f}" if count >= 0.05 * _MB else f"{count / _MB:.2g}"


CLAIM = Claim("memory", Config, _cells, _measure, _table, _draw)


if __name__ == "__main__":
    if (job := footprint.job()) is not None:
        print(json.dumps(_child(**job)))
