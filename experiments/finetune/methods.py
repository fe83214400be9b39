"""The optimizer of a run, by the name of its method."""

from collections.abc import Callable
from typing import Any

import jax
import optax

import zoqo_jax as zq
from experiments.finetune.config import Config

__all__ = ["transformation"]


_INPUTS = 2.0**-6  # share of a matrix's inputs that a direction in columns has


def transformation(config: Config) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run."""
    key = jax.random.key(config.seed)

    def falling(start: float) -> Callable[[Any], jax.Array]:
        return optax.exponential_decay(start, max(config.steps, 1), config.decay)

    used, sparse = config.used, config.is_sparse
    queries = {"num_queries": config.num_queries, "query_batch": config.query_batch, "key": key}
    if config.sized:
        if config.method == "mezo":
            return optax.chain(zq.spsa(**queries))
        asked = {"rounding": config.rounding} if config.method == "caq_zo" else {}
        if config.structure == "columns":
            # A share of the entries of few inputs, so that guides have a choice to make.
            outputs = min(1.0, config.probed / _INPUTS)
            few = {"inputs": "columns", "outputs": outputs}
            asked["structure"] = zq.directions.with_options("columns", **few)
            asked["density"] = max(_INPUTS, config.probed)
        elif config.structure != "auto":
            asked["structure"] = config.structure
        return getattr(zq, config.method)(**asked, **queries)
    # Of sparse directions the density falls.
    rate = used["learning_rate"] if sparse else falling(used["learning_rate"])
    radius = used.get("radius")
    density = {"density": falling(config.probed)} if sparse else {}
    shape = {"structure": used.get("structure"), **density, **queries}
    if config.method == "zoqo":
        return zq.zoqo(rate, radius, noise=config.noise, step=config.step_rule, **shape)
    if config.method == "caq_zo":
        asked = {"query": config.query, "radius": radius, "rounding": config.rounding}
        return zq.caq_zo(rate, boundary="clamp", **asked, **shape)
    if config.method in ("quzo", "qes"):
        rule = zq.quzo if config.method == "quzo" else zq.qes
        return rule(rate, radius, **shape)
    if config.method == "qzo":
        return zq.qzo(rate, radius, **queries)
    if config.method == "adam":
        return optax.with_extra_args_support(optax.adam(rate))
    rule = optax.sign_sgd if config.method == "zo_signsgd" else optax.sgd
    return optax.chain(zq.spsa(radius, **queries), rule(rate))
