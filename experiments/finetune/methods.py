"""The optimizer of a run, by the name of its method."""

from collections.abc import Callable
from typing import Any

import jax
import optax

import zoqo_jax as zq
from experiments.finetune.config import Config

__all__ = ["transformation"]


def transformation(config: Config) -> optax.GradientTransformationExtraArgs:
    """The optimizer of a run."""
    key = jax.random.key(config.seed)

    def falling(start: float) -> Callable[[Any], jax.Array]:
        return optax.exponential_decay(start, max(config.steps, 1), config.decay)

    def rate(default: float) -> Any:
        start = config.learning_rate or default
        return start if sparse else falling(start)  # of sparse directions the density falls

    sparse = config.is_sparse
    queries = {"num_queries": config.num_queries, "query_batch": config.query_batch, "key": key}
    structure = {"auto": "sparse" if sparse else "dense"}.get(config.structure, config.structure)
    probed = _density(config)
    density = {"density": falling(probed)} if sparse else {}
    shape = {"structure": structure, **density, **queries}
    # Codes a step for each nat that two losses differ by; what models bear goes as 1 / density.
    borne = 0.05 if config.train == "codes" else 4.0
    codes = borne / probed if sparse else 10.0
    if config.method == "zoqo":
        # In place, and of sparse directions, a step is one code.
        one_code = 1e-9 if sparse or config.train == "codes" else None
        return zq.zoqo(
            rate(one_code or 1e-2),
            config.radius or one_code or 5e-3,
            noise=config.noise,
            step=config.step_rule,
            **shape,
        )
    if config.method == "caq_zo":
        radius = (config.radius or 0.1) if config.query == "off_grid" else None
        asked = {"query": config.query, "radius": radius, "rounding": config.rounding}
        return zq.caq_zo(rate(codes), boundary="clamp", **asked, **shape)
    if config.method in ("quzo", "qes"):
        rule = zq.quzo if config.method == "quzo" else zq.qes
        return rule(rate(codes), config.radius or 1.0, **shape)
    if config.method == "qzo":
        return zq.qzo(rate(1e-6), config.radius or 1e-4, **queries)
    if config.method == "adam":
        return optax.with_extra_args_support(optax.adam(rate(1e-3)))
    rule = optax.sign_sgd if config.method == "zo_signsgd" else optax.sgd
    return optax.chain(zq.spsa(config.radius or 2e-3, **queries), rule(rate(1e-2)))


def _density(config: Config) -> float:
    """Of sparse directions at the start."""
    if config.density or config.train == "codes":
        return config.density or 2.0**-10
    code = 2 * config.range / (2**config.bits - 1)  # in value units
    return min(1.0, (0.01 / code) ** 2)
