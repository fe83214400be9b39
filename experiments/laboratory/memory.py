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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import serialize_executable

import zoqo_jax as zq
from experiments import footprint, markdown, settings
from experiments.laboratory.claim import Cell, Claim, Measurement
from zoqo_jax.stencils import Law

__all__ = ["CLAIM", "Config", "Method", "counted", "problem"]

_LAYERS = 3
_MARGIN = 2**30  # bytes of a process beside its program's
_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system (glibc)
_MB = 1e6


class Method(NamedTuple):
    """One way to take a step.

    Attributes:
      label: in tables.
      bits: of a weight, as it is stored between steps.
      structure: of ZOQO's directions; None for back-propagation.
      fake: whether it computes with weights rounded to 8 bits.
    """

    label: str
    bits: int
    structure: Any = None
    fake: bool = False


METHODS = {
    "adam": Method("Adam, float32", 32),
    "qat": Method("QAT, 8 bit, Adam", 32, fake=True),
    "zoqo_8": Method("ZOQO, 8 bit, rank-one", 8, "rank_one"),
    "zoqo_8_dense": Method("ZOQO, 8 bit, dense", 8, "dense"),
    "zoqo_4": Method("ZOQO, 4 bit, rank-one", 4, "rank_one"),
    "zoqo_4_dense": Method("ZOQO, 4 bit, dense", 4, "dense"),
}


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
    noise: Law = "uniform"

    def __post_init__(self) -> None:
        settings.check(self, least={"batch_size": 1, "steps": 1})
        if bad := [width for width in self.widths if width < 2 or width % 2]:
            raise ValueError(f"widths must be even and at least 2, got {bad[0]}.")


def cells(config: Config) -> list[Cell]:
    """Every width by every method."""
    return [{"width": width, "method": name} for width in config.widths for name in METHODS]


def measure(config: Config, cell: Cell) -> dict[str, Any]:
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


def counted(method: Method, width: int, batch_size: int) -> dict[str, int]:
    """Bytes by formula, of what a textbook says must be in memory at once.

    Args:
      method: how to take a step.
      width: w; the network has P = 3 w^2 weights.
      batch_size: B.

    Returns:
      Bytes of "weights", "gradients", "state" (the optimizer's), "working" (matrices that are made
      from the weights, and directions) and "activations".

      Back-propagation keeps what each layer put out, 3 B w floats, and a gradient of each weight;
      Adam two moments and a count. Rounded weights are as many floats as weights, kept for the
      backward pass. ZOQO keeps codes and a scale for each layer, no gradient, and 32 bytes of
      state; one matrix at a time is in floats (of 4-bit codes, half of one), and what goes into a
      layer and comes out of it, for the two sides of a query. A direction is remade where it is
      needed: a row and a column of bytes, or a byte for each weight of a layer.
    """
    layer, kept = width * width, 4 * batch_size * width
    weights = _LAYERS * layer
    if method.structure is None:
        return {
            "weights": 4 * weights,
            "gradients": 4 * weights,
            "state": 2 * 4 * weights + 4,
            "working": 4 * weights if method.fake else 0,
            "activations": _LAYERS * kept,
        }
    direction = 2 * width if method.structure == "rank_one" else layer
    return {
        "weights": weights * method.bits // 8 + 4 * _LAYERS,
        "gradients": 0,
        "state": 32,
        "working": 4 * layer * method.bits // 8 + direction,
        "activations": 2 * 2 * kept,
    }


def problem(
    method: Method, width: int, batch_size: int, noise: Law = "uniform"
) -> tuple[Any, tuple[list[Any], list[Any]]]:
    """A jitted step, which writes over its first argument, and the shapes of its two arguments.

    They are lists: of all arrays that a step changes, and of inputs and targets.
    """
    if method.structure is None:
        tx: Any = optax.with_extra_args_support(optax.adam(1e-3))
    else:  # steps are one code long, the least that there is
        tx = zq.zoqo(1e-9, 1e-9, key=jax.random.key(0), structure=method.structure, noise=noise)

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        weights = [_straight_through(w) for w in params] if method.fake else params
        for w in weights[:-1]:
            x = jax.nn.relu(x @ w)
        return jnp.mean((x @ weights[-1] - y) ** 2)

    def start() -> tuple[Any, Any]:
        params = [jnp.ones((width, width)) for _ in range(_LAYERS)]
        if method.structure is not None:
            params = zq.quantize(params, zq.Quantizer(method.bits))
        return params, tx.init(params)

    def step(changed: list[jax.Array], batch: list[jax.Array]) -> list[jax.Array]:
        params, state = jax.tree.unflatten(jax.tree.structure(carried), changed)
        gradient = jax.grad(loss)(params, *batch) if method.structure is None else None
        updates, state = tx.update(gradient, state, params, value_fn=lambda p: loss(p, *batch))
        return jax.tree.leaves((optax.apply_updates(params, updates), state))

    carried = jax.eval_shape(start)
    batch = [jax.ShapeDtypeStruct((batch_size, width), jnp.float32)] * 2
    return jax.jit(step, donate_argnums=0), (jax.tree.leaves(carried), batch)


def _straight_through(w: jax.Array) -> jax.Array:
    """Rounded to 8 bits, and differentiated as if it were not."""
    return w + jax.lax.stop_gradient(zq.dequantize(zq.Quantizer(8)(w)) - w)


def _child(program: str, arrays: list[Any], steps: int) -> dict[str, Any]:
    """Peak resident bytes of this process after some steps, and before it had an array."""
    stored = pickle.loads(Path(program).read_bytes())
    one = jax.devices()[:1]
    step = serialize_executable.deserialize_and_load(*stored, execution_devices=one)
    jnp.array(np.zeros(1)).block_until_ready()
    empty = _taken("now")
    changed, batch = ([_filled(*shape) for shape in some] for some in arrays)
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
    return jnp.array(np.full(shape, value, dtype))


def total(one: Measurement, how: str) -> float | None:
    """Bytes of a cell, "counted", of its "program", or of its "process" beyond an empty one's."""
    if how == "counted":
        return sum(one["counted"].values())
    if how == "program":
        program = one["program"]
        return program["argument"] + program["temp"] + program["output"] - program["alias"]
    return None if one["process"] is None else one["process"] - one["empty"]


def table(found: list[Measurement]) -> str:
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


def draw(found: list[Measurement], fig: Any) -> None:
    """Bytes against width: counted, of the program, of the process."""
    names = {
        "counted": "counted",
        "program": "compiled program",
        "process": "process, beyond empty",
    }
    axes = fig.subplots(1, 3, sharey=True)
    for ax, (how, title) in zip(axes, names.items(), strict=True):
        for name, method in METHODS.items():
            mine = [(one["width"], total(one, how)) for one in found if one["method"] == name]
            widths = [width for width, value in mine if value]
            ax.plot(widths, [value / _MB for _, value in mine if value], "o-", label=method.label)
        ax.set(xscale="log", yscale="log", xlabel="width of the layers", title=title)
        ax.set_xticks(sorted({one["width"] for one in found}), minor=False)
        ax.set_xticklabels(sorted({one["width"] for one in found}), rotation=45)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("MB")
    axes[0].legend(fontsize=7)


def _megabytes(count: float | None) -> str:
    if count is None:
        return "–"
    return f"{count / _MB:,.1f}" if count >= 0.05 * _MB else f"{count / _MB:.2g}"


CLAIM = Claim("memory", Config, cells, measure, table, draw)


if __name__ == "__main__":
    if (job := footprint.job()) is not None:
        print(json.dumps(_child(**job)))
