"""Training steps of three square layers: their programs, and bytes that they take, by formula."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import zoqo_jax as zq
from zoqo_jax.directions import Distribution, Structure

__all__ = ["METHODS", "Method", "counted", "problem"]

_LAYERS = 3


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
    structure: Structure | None = None
    fake: bool = False


METHODS = {
    "adam": Method("Adam, float32", 32),
    "qat": Method("QAT, 8 bit, Adam", 32, fake=True),
    "zoqo_8": Method("ZOQO, 8 bit, rank-one", 8, "rank_one"),
    "zoqo_8_dense": Method("ZOQO, 8 bit, dense", 8, "dense"),
    "zoqo_4": Method("ZOQO, 4 bit, rank-one", 4, "rank_one"),
    "zoqo_4_dense": Method("ZOQO, 4 bit, dense", 4, "dense"),
}


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
      backward pass. ZOQO keeps codes and a scale for each layer, no gradient, and 48 bytes of
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
        "state": 48,
        "working": 4 * layer * method.bits // 8 + direction,
        "activations": 2 * 2 * kept,
    }


def problem(
    method: Method, width: int, batch_size: int, noise: Distribution = "uniform"
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
