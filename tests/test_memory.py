"""What a compiled step allocates: nothing as large as the model, and nothing that grows with it.

Read from XLA's own account of the compiled program; no clock is involved.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import NORMALLY
from flax import linen as nn

import zoqo_jax as zq
from zoqo_jax.transforms import stepping

slow = functools.partial(pytest.param, marks=pytest.mark.slow)

WIDTH, TOKENS = 256, 8
LAYER = 4 * WIDTH * WIDTH  # bytes of one decoded matrix
STRUCTURES = {
    "rank_one": {"structure": "rank_one"},
    "dense": {"structure": "dense"},
    "sparse": {"structure": "sparse", "density": 1 / 64},
}


class Unrolled(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.layers):
            x = x + nn.Dense(WIDTH)(nn.gelu(nn.LayerNorm()(x)))
        return x


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(WIDTH)(nn.gelu(nn.LayerNorm()(x))), None


class Stacked(nn.Module):
    layers: int

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers
        )
        return stack()(x, None)[0]


def problem(model, quantizer):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(TOKENS, WIDTH)), jnp.float32)
    params = zq.quantize(model.init(jax.random.key(0), x), quantizer)
    return params, lambda params: jnp.mean(model.apply(params, x) ** 2)


def step_of(value_fn, num_queries=1, **choices):
    tx = zq.zoqo(
        1e-4,
        1e-4,
        key=jax.random.key(0),
        noise="rademacher",
        num_queries=num_queries,
        **choices,
    )

    def step(params, state):
        updates, state = tx.update(None, state, params, value_fn=value_fn)
        return optax.apply_updates(params, updates), state

    return tx, jax.jit(step, donate_argnums=(0, 1))


@functools.cache
def compiled(model, layers, storage, structure, num_queries=1):
    quantizer = {"int8": zq.Quantizer(8), "nf4": zq.nf4(block=64)}[storage]
    params, value_fn = problem(model(layers), quantizer)
    tx, step = step_of(value_fn, num_queries, **STRUCTURES[structure])
    forward = jax.jit(zq.quaxify(value_fn))
    return (
        step.lower(params, tx.init(params)).compile(compiler_options=NORMALLY),
        forward.lower(params).compile(compiler_options=NORMALLY),
    )


@pytest.mark.parametrize(
    ("model", "storage", "structure", "num_queries"),
    [
        (Stacked, "int8", "rank_one", 1),
        slow(Stacked, "nf4", "dense", 1),
        slow(Unrolled, "int8", "rank_one", 1),
        slow(Unrolled, "int8", "dense", 1),
        slow(Stacked, "nf4", "sparse", 1),
        slow(Stacked, "int8", "rank_one", 8),
        slow(Stacked, "nf4", "dense", 8),
    ],
)
def test_what_a_step_allocates_does_not_grow_with_the_model(model, storage, structure, num_queries):
    small, _ = compiled(model, 4, storage, structure, num_queries)
    large, forward = compiled(model, 16, storage, structure, num_queries)
    temporary = [program.memory_analysis().temp_size_in_bytes for program in (small, large)]
    codes = 16 * WIDTH * WIDTH
    # Random words are a bit for each code, reaches of blocks a float for 64.
    assert temporary[1] - temporary[0] < 0.3 * codes
    assert temporary[1] < (3 if num_queries == 1 else 8) * LAYER  # the model in floats has 16
    assert forward.memory_analysis().temp_size_in_bytes < 2 * LAYER


@pytest.mark.parametrize("storage", ["int8", slow("nf4")])
@pytest.mark.parametrize("structure", ["dense", slow("sparse"), slow("rank_one")])
def test_large_leaves_are_changed_in_place(storage, structure, monkeypatch):
    """What an update of them takes is a piece of a leaf, however large the leaf."""
    monkeypatch.setattr(stepping, "_CHUNK", WIDTH * WIDTH)
    temporary = []
    for layers in (4, 16):
        program, _ = compiled.__wrapped__(Stacked, layers, storage, structure)
        temporary.append(program.memory_analysis().temp_size_in_bytes)
    rows = (16 - 4) * WIDTH  # each has its place and its stream
    assert temporary[1] - temporary[0] < 20 * rows


@pytest.mark.parametrize("storage", ["int8", slow("nf4")])
def test_a_donated_model_is_trained_in_place(storage):
    program, _ = compiled(Stacked, 16, storage, "rank_one")
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= memory.output_size_in_bytes - 1024
    per_byte = 1 if storage == "int8" else 2
    assert memory.alias_size_in_bytes > 16 * WIDTH * WIDTH // per_byte


def test_steps_are_compiled_once():
    params, value_fn = problem(Stacked(2), zq.nf4(block=64))
    tx, step = step_of(value_fn, structure="rank_one")
    state = tx.init(params)
    for _ in range(4):
        params, state = step(params, state)
    assert step._cache_size() == 1
    assert int(state.count) == 4
