"""This library: a forward pass of a GGUF file, or a ZOQO step on its codes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import zoqo_jax as zq
from benchmarks.models import DENSITY, step
from benchmarks.peers.turns import serve
from experiments.finetune.config import Config
from experiments.finetune.models import loading
from experiments.finetune.parts import adapt


def ready(job: dict[str, Any]) -> Callable[[], Any]:
    """What is called.

    Args:
      job: "model", a GGUF file; "sequences" of "tokens" each; "what": "forward", the logits after
        each sequence, or "step", a query pair along sparse directions and its update.
    """
    checkpoint = loading.load(job["model"])
    model = checkpoint.decoder
    shape = job["sequences"], job["tokens"]
    tokens = jax.random.randint(jax.random.key(0), shape, 0, checkpoint.architecture.vocabulary)
    last = jnp.full(shape[0], shape[1] - 1)

    def logits(params: Any, tokens: jax.Array) -> jax.Array:
        return model.apply({"params": params}, tokens, at=last)

    if job["what"] == "forward":
        forward = jax.jit(zq.quaxify(logits))
        return lambda: jax.block_until_ready(forward(checkpoint.params, tokens))

    def loss(params: Any, tokens: jax.Array) -> jax.Array:
        said, answers = logits(params, tokens), tokens[:, 0]
        return optax.softmax_cross_entropy_with_integer_labels(said, answers).mean()

    params = adapt(checkpoint, Config(job["model"], data="-", output="-"))
    tx = zq.zoqo(1e-9, 1e-9, key=jax.random.key(1), structure="sparse", density=DENSITY)
    once = jax.jit(step(tx, loss), donate_argnums=(0, 1))
    carried = [params, tx.init(params)]

    def call() -> None:
        carried[:] = jax.block_until_ready(once(*carried, tokens))

    return call


if __name__ == "__main__":
    serve(f"jax {jax.__version__}", ready)
