"""The same seeds give the same codes as in earlier versions: hashes of a few steps of each method.

`python tests/test_codes_stay.py` writes the table anew, for a change that an issue asks for.
"""

import functools
import hashlib
import itertools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import zoqo_jax as zq

TABLE = pathlib.Path(__file__).with_name("codes.json")
STEPS = 3
STRUCTURES = {"dense": {}, "rank_one": {}, "sparse": {"density": 0.25}, "sparse 1/64": {}}
BOUNDARIES = ("clamp", "mask", "reflect")


def _fall(start):
    return optax.exponential_decay(start, 2, 0.7)


METHODS = {
    "zoqo": lambda **more: zq.zoqo(0.07, 0.13, **more),
    "zoqo, several": lambda **more: zq.zoqo(0.07, 0.13, num_queries=3, **more),
    "zoqo, majority": lambda **more: zq.zoqo(
        _fall(0.2), _fall(0.2), num_queries=3, vote="majority", noise="rademacher", **more
    ),
    "zoqo, dithered": lambda **more: zq.zoqo(
        0.02, 0.02, num_queries=2, step="dithered", noise="gaussian", **more
    ),
    "caq_zo": lambda **more: zq.caq_zo(3.0, **more),
    "caq_zo, several": lambda **more: zq.caq_zo(_fall(2.0), num_queries=3, **more),
    "caq_zo, nearest": lambda **more: zq.caq_zo(5.0, num_queries=2, rounding="nearest", **more),
    "caq_zo, error feedback": lambda **more: zq.caq_zo(
        1.0, num_queries=2, rounding="error_feedback", **more
    ),
    "caq_zo, threshold": lambda **more: zq.caq_zo(3.0, num_queries=2, rounding="threshold", **more),
    "caq_zo, significant": lambda **more: zq.caq_zo(
        3.0, num_queries=4, rounding="significant", threshold=1.0, **more
    ),
    "caq_zo, off grid": lambda **more: zq.caq_zo(
        3.0, num_queries=2, query="off_grid", radius=0.2, **more
    ),
    "quzo": lambda **more: zq.quzo(1.0, 1.5, **more),
    "quzo, several": lambda **more: zq.quzo(
        2.0, _fall(2.0), num_queries=3, noise="rademacher", **more
    ),
    "qes": lambda **more: zq.qes(1.0, 1.5, num_queries=2, window=2, decay=0.75, **more),
    "qes, kept": lambda **more: zq.qes(1.0, 1.5, window=None, **more),
}


def cases():
    for method, structure, boundary in itertools.product(METHODS, STRUCTURES, BOUNDARIES):
        if (method, structure.split()[0]) != ("caq_zo, significant", "sparse"):
            yield f"{method}; {structure}; {boundary}"


# Of rows of many words: cells, signs that share words, chances by bit slicing.
WIDE = (
    "zoqo; sparse 1/16; clamp; wide",
    "zoqo, dithered; dense; clamp; wide",
    "caq_zo, several; rank_one; reflect; wide",  # slow: rank-one signs are among FEW
    "zoqo; columns; clamp; wide",
    "caq_zo, several; columns; mask; wide",
)


def transformation(case):
    method, structure, boundary, *_ = case.split("; ")
    more = dict(STRUCTURES.get(structure, {}))
    if structure == "sparse 1/16":
        structure, more = "sparse", {"density": 1 / 16}
    if structure == "sparse 1/64":
        structure, more = "sparse", {"density": _fall(1 / 64)}
    if structure == "columns":
        more = {"density": 0.25}
    return METHODS[method](structure=structure, boundary=boundary, key=jax.random.key(7), **more)


def on_a_cpu(make):
    """Made once on a CPU, as other devices round normal numbers and scales in other ways."""

    @functools.cache
    def made():
        with jax.default_device(jax.devices("cpu")[0]):
            params = make()
        return jax.device_put(params, jax.devices()[0])

    return made


@on_a_cpu
def weights():
    """Leaves of every kind: a scale for all, a channel, a block; one, two or four codes a byte."""
    w = jax.random.normal(jax.random.key(1), (6, 20))
    return {
        "bytes": zq.Quantizer(bits=8)(w),
        "blocks": zq.Quantizer(bits=4, block=5)(w),
        "few": zq.Quantizer(bits=2, axis=0, range="mse")(w),
        "nf4": zq.nf4(block=4)(w.reshape(2, 3, 20)),
        "row": zq.Quantizer(bits=3)(w[0]),
    }


@on_a_cpu
def wide_weights():
    """Of one and two codes a byte, more than 32 words a row in cells of 12."""
    w = jax.random.normal(jax.random.key(2), (5, 640))
    return {"bytes": zq.Quantizer(bits=8)(w), "nibbles": zq.Quantizer(bits=4, block=32)(w)}


def outcome(case):
    """A hash of where steps look, of what they make of given differences, and of the codes."""
    tx, params = transformation(case), wide_weights() if case in WIDE else weights()
    state = tx.init(params)
    heard = jnp.asarray(
        np.resize(
            [0.75, -1.25, 0.5, -0.25], (getattr(state, "info", state)).loss_differences.shape
        ),
        jnp.float32,
    )

    @jax.jit
    def step(params, state, heard):
        probes = tx.probes(state, params, 0)
        looked = jax.lax.map(
            lambda side: codes(zq.queries.endpoints(params, probes, side)),
            jnp.array([1, -1], jnp.int8),
        )
        updates, state = tx.update(None, state, params, differences=heard)
        params = optax.apply_updates(params, updates)
        return params, state, looked, codes(params)

    digest = hashlib.sha256()
    for i in range(STEPS):
        params, state, looked, reached = step(params, state, heard * (-1) ** i)
        plus, minus = ([leaf[j] for leaf in looked] for j in range(2))
        for leaf in (*plus, *minus, *reached):
            digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def codes(params):
    return [leaf.codes.astype(jnp.int16) for leaf in params.values()]


# Each transformation, structure and boundary is among them.
FEW = (
    "zoqo, majority; rank_one; mask",
    "caq_zo, error feedback; dense; reflect",
    "quzo; sparse 1/64; clamp",
    "qes, kept; sparse; reflect",
)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case, marks=() if case in FEW + WIDE[:2] else pytest.mark.slow)
        for case in [*cases(), *WIDE]
    ],
)
def test_codes_are_those_of_earlier_versions(case):
    assert outcome(case) == json.loads(TABLE.read_text())[case]


def test_few_cases_have_one_of_each():
    transformations = {method.split(",")[0] for method in METHODS}
    for i, kinds in enumerate((transformations, STRUCTURES, BOUNDARIES)):
        assert {case.split("; ")[i].split(",")[0] for case in FEW} == set(kinds)
    assert set(FEW) <= set(cases())


if __name__ == "__main__":
    table = {}
    for case in [*cases(), *WIDE]:
        table[case] = outcome(case)
        print(case, table[case], file=sys.stderr, flush=True)
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
