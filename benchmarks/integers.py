"""Products of integers and of bfloat16 beside those of float32: `python -m benchmarks.integers`.

- *Product*: vectors times one matrix of codes, of the shapes that SmolLM2-135M has. "float32"
  decodes and multiplies, "integer" is `zq.with_products(..., "integer")`, of blocks of any length,
  and "bfloat16" has decoded values and vectors in that type and sums in float32. Errors are
  relative, root mean square, to the product with the same values in float64.
- *Step*: a forward pass and a step of the 12-layer network, by floats and by integers.
- *Training*: the perceptron of scikit-learn's digits for 1,000 steps of 8 queries that size
  themselves, in the same three ways, from the same start with the same directions and batches.
- *File*: a forward pass and a step on the file that `make finetune` trains, SmolLM2-135M in Q4_1,
  as `python -m experiments.finetune` computes them with `--dtype=float32` and `--dtype=bfloat16`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from experiments.command import say

if __name__ == "__main__":
    say("benchmark integers: loading JAX")  # which the imports below take seconds for

import jax
import jax.numpy as jnp
import numpy as np
import optax

import zoqo_jax as zq
from benchmarks import models, results
from benchmarks.timing import Effort, Program, report_of
from experiments.finetune.config import Config
from experiments.finetune.models import loading, places
from experiments.finetune.parts import adapt
from experiments.laboratory.networks import tasks, training
from zoqo_jax.implicit import products

__all__ = ["File", "Product", "Step", "Training", "measure"]

STORAGES = {
    "8 bits": zq.Quantizer(8),
    "4 bits by row": zq.Quantizer(4, axis=0),
    "8 bits, blocks of 192": zq.Quantizer(8, axis=-1, block=192),
    "8 bits, blocks of 96": zq.Quantizer(8, axis=-1, block=96),
    "4 bits, blocks of 32": zq.Quantizer(4, axis=-1, block=32),
}
_SHAPES = ((1536, 576), (576, 1536), (49_152, 576))
_STEPS, _QUERIES, _BATCH = 1000, 8, 256


@dataclasses.dataclass(frozen=True)
class Product:
    """Vectors times one matrix.

    Attributes:
        storage: of the matrix, of `STORAGES`.
        outputs: its rows.
        inputs: its columns.
        vectors: how many.
    """

    storage: str
    outputs: int
    inputs: int
    vectors: int


@dataclasses.dataclass(frozen=True)
class Step:
    """A forward pass and a step, each by floats and by integers.

    Attributes:
        tokens: of a batch.
        structure: of directions.
    """

    tokens: int
    structure: str


@dataclasses.dataclass(frozen=True)
class Training:
    """A run in each of the three ways.

    Attributes:
        bits: of a code.
        seed: of all.
    """

    bits: int
    seed: int


@dataclasses.dataclass(frozen=True)
class File:
    """A forward pass, for the logits after each sequence, and a step of one query.

    Attributes:
        sequences: that are read at once.
        length: tokens of each.
    """

    sequences: int
    length: int


Cell = Product | Step | Training | File


def cells(quick: bool) -> list[Cell]:
    """Everything to measure."""
    if quick:
        return [Product("8 bits", 64, 64, 32), Step(32, "dense"), Training(8, 0)]
    matrices = [
        Product(storage, *shape, vectors)
        for storage in STORAGES
        for shape in _SHAPES
        for vectors in (1, 32, 512)
        if shape[0] < 49_152 or vectors < 512
    ]
    steps = [Step(tokens, name) for tokens in (32, 1024) for name in ("rank_one", "dense")]
    runs = [Training(bits, seed) for bits in (8, 4) for seed in range(3)]
    return [*runs, *matrices, *steps, File(1, 32), File(16, 32)]


def measure(cell: Cell, effort: Effort) -> dict[str, Any]:
    """What one cell says."""
    if isinstance(cell, Training):
        return {name: _trained(cell, name, effort) for name in ("float32", "integer", "bfloat16")}
    if isinstance(cell, Step):
        return _stepped(cell, effort)
    if isinstance(cell, File):
        return _of_file(cell, effort)
    key = jax.random.key(0)
    w = STORAGES[cell.storage](jax.random.normal(key, (cell.outputs, cell.inputs)))
    x = jax.random.normal(jax.random.key(1), (cell.vectors, cell.inputs))
    out = jnp.zeros((cell.vectors, cell.outputs))

    def program(w: Any) -> Program:
        """Its result goes into memory that is there already: fresh pages would cost more."""

        def product(out: jax.Array, w: Any, x: jax.Array) -> tuple[jax.Array]:
            x = x.astype(w.dtype)
            return (zq.quaxify(lambda w: jnp.matmul(x, w.T, preferred_element_type=out.dtype))(w),)

        return Program(product, (out,), (w, x))

    ways = {name: _multiplied(w, name) for name in ("float32", "integer", "bfloat16")}
    with _blocks_of_any_length():
        programs = {name: program(way) for name, way in ways.items()}
    exact = np.asarray(x, np.float64) @ np.asarray(w.materialise(), np.float64).T
    errors = {}
    for name, call in programs.items():
        (got,) = call()
        errors[name] = float(np.linalg.norm(got - exact) / np.linalg.norm(exact))
    return {"errors": errors, **report_of(programs, effort)}


def _multiplied(tree: Any, how: str) -> Any:
    """Quantized leaves that are multiplied in one of the three ways."""
    if how == "integer":
        return zq.with_products(tree, "integer")
    return loading.values_in(how, tree)


@contextlib.contextmanager
def _blocks_of_any_length() -> Iterator[None]:
    """Integer sums also of blocks that `plan` thinks too short for them."""
    before = products.THRESHOLDS["cpu"]
    products.THRESHOLDS["cpu"] = before._replace(integer_block=1)
    try:
        yield
    finally:
        products.THRESHOLDS["cpu"] = before


def _stepped(cell: Step, effort: Effort) -> dict[str, Any]:
    """Times of forward passes and steps."""
    net = models.NET
    params = zq.quantize(net.params(jax.random.key(0)), zq.Quantizer(8))
    batch, tx = net.batch(cell.tokens), models.transformation(cell.structure)
    programs = {}
    for name in ("float", "integer"):
        own = zq.with_products(params, name)
        forward = zq.quaxify(net.loss)
        programs[f"forward {name}"] = Program(forward, (), (own, batch))

        def step(params: Any, state: Any, batch: Any) -> Any:
            return models.step(tx, net.loss)(params, state, batch)

        programs[f"step {name}"] = Program(step, (own, tx.init(own)), (batch,))
    return report_of(programs, effort)


def _of_file(cell: File, effort: Effort) -> dict[str, Any]:
    """Times of forward passes and steps, and how far logits are from float32's."""
    path = str(places.find("smollm2"))
    read = loading.load(path)
    shape = cell.sequences, cell.length
    tokens = jax.random.randint(jax.random.key(0), shape, 0, read.architecture.vocabulary)
    last = jnp.full(cell.sequences, cell.length - 1)
    tx = zq.zoqo(1e-9, 1e-9, key=jax.random.key(1), structure="sparse", density=models.DENSITY)

    def logits(params: Any, tokens: jax.Array) -> Any:
        return read.decoder.apply({"params": params}, tokens, at=last)

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        said = logits(params, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(said, tokens[:, 0]).mean()

    programs, said = {}, []
    for dtype in ("float32", "bfloat16"):
        params = adapt(loading.in_dtype(read, dtype), Config(path, data="-", output="-"))
        forward = Program(zq.quaxify(logits), (), (params, tokens))
        said.append(forward())
        programs[f"forward {dtype}"] = forward
        programs[f"step {dtype}"] = Program(
            models.step(tx, loss), (params, tx.init(params)), (tokens,)
        )
    error = jnp.linalg.norm(said[1] - said[0]) / jnp.linalg.norm(said[0])
    return {"error": float(error), **report_of(programs, effort)}


def _trained(cell: Training, how: str, effort: Effort) -> dict[str, Any]:
    """The scores of a run."""
    task = dataclasses.replace(tasks.small_digits(), logits=_perceptron)
    key = jax.random.key(cell.seed)
    start = _multiplied(zq.quantize(task.init(key), zq.Quantizer(cell.bits)), how)
    steps = _STEPS if effort.rounds > 5 else 20
    params, _ = training.by_queries(
        task, _sized, start, key, jnp.float32(1), steps=steps, batch_size=_BATCH
    )
    # All are read by floats: what differs is what was trained.
    params = zq.with_products(_multiplied(params, "float32"), "float")
    found = training.scores(task, [params], task.test)
    return {name: value for name, (value,) in found.items()}


def _perceptron(params: Any, inputs: jax.Array) -> jax.Array:
    """Logits, float32, of the laboratory's perceptron with products in the dtype of its values."""
    x = inputs
    for number, w in enumerate(params):
        x = jax.nn.relu(x) if number else x
        x = jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1))], axis=-1).astype(w.dtype)
        x = jnp.matmul(x, w, preferred_element_type=jnp.float32)
    return x


def _sized(params: Any, key: jax.Array, rate: Any) -> Any:
    del params, rate
    return (zq.zoqo(key=key, num_queries=_QUERIES),)


if __name__ == "__main__":
    results.run("integers", cells, measure)
