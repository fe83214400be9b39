# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart: train a quantized network on its own grid
#
# A Flax network is quantized to 8 bits and trained **from there on in whole codes, with forward passes only**:
# no float copy of a weight, no gradient, no optimizer moments. Two methods do it behind one optax interface,
# `zq.zoqo` and `zq.caq_zo`; a third, `zq.spsa`, is their float relative.

# %%
# What the notebooks share, `experiments`, is in the repository and not installed with the library.
import sys
from importlib.util import find_spec
from pathlib import Path

library = find_spec("zoqo_jax")
starts = [Path.cwd(), *map(Path, (library and library.submodule_search_locations) or [])]
folders = [folder for start in starts for folder in (start, *start.parents)]
if not (found := [one for one in folders if (one / "experiments/attack/data.py").is_file()]):
    raise ModuleNotFoundError(
        f"no folder above {Path.cwd()} holds experiments/: start the notebook in the repository, or run "
        "`pip install -e '.[experiments,interop,notebooks]'` there"
    )
sys.path.insert(0, str(found[0]))

# %%
import os

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import zoqo_jax as zq
from experiments.attack import data

STEPS = int(os.environ.get("QUICKSTART_STEPS", "3000"))
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## A grid, and what bends it
#
# A code is a whole number; its value is `scale * level[code]`. The identity compander makes levels equally
# spaced, others crowd them where weights are. Rounding happens in the coordinate z, where every grid is
# uniform: that is why one integer engine serves all of them.

# %%
weights = jnp.clip(jax.random.normal(jax.random.key(3), (4_000,)) / 3, -1.0, 1.0)
choices = {
    "uniform": zq.Quantizer(4, range=1.0),
    "mu-law (255)": zq.Quantizer(4, zq.companders.mu_law(255.0), range=1.0),
    "NF4": zq.Quantizer(4, zq.companders.nf4(), range=1.0),
    "Lloyd-Max": zq.Quantizer(4, zq.companders.lloyd_max(weights, 4), range=1.0),
}
figure, axes = plt.subplots(1, 4, figsize=(12, 3), sharey=True, layout="constrained")
values = jnp.linspace(-1, 1, 1_000)
for axis, (name, quantizer) in zip(axes, choices.items(), strict=True):
    rounded = zq.dequantize(quantizer(values))
    levels = np.unique(np.asarray(rounded))
    axis.hist(weights, bins=80, range=(-1, 1), density=True, color="0.88")
    axis.vlines(levels, -0.35, 0, color="C3", lw=1)
    axis.step(values, 0.8 * np.asarray(rounded) + 1.0, color="C0", lw=1.2)
    error = zq.dequantize(quantizer(weights)) - weights
    axis.set_title(f"{name}: rms error {jnp.sqrt((error**2).mean()):.3f}", fontsize=9)
    axis.set_yticks([])
    axis.set_xlabel("value")
figure.suptitle(
    "4-bit grids (red), the staircase they round with (blue), Gaussian weights (grey)", fontsize=10
)
plt.show()
# %% [markdown]
# ## A small Flax network and real digits
#
# The bundled 10,000 digits, halved to 14 x 14 pixels: 8,000 to train on and 2,000 to test with.

# %%
images, labels = data.load("mnist")
pixels = images.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(-1, 196)
pixels = (pixels - pixels[:8_000].mean(0)) / pixels[:8_000].std()
train_x, test_x = jnp.asarray(pixels[:8_000]), jnp.asarray(pixels[8_000:])
train_y, test_y = jnp.asarray(labels[:8_000]), jnp.asarray(labels[8_000:])


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(32)(x))
        return nn.Dense(10)(x)


network = Network()
floats = network.init(jax.random.key(0), train_x[:1])


def loss(params, x, y):
    logits = network.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@jax.jit
def accuracy(params):
    return (network.apply(zq.dequantize(params), test_x).argmax(-1) == test_y).mean()


# %% [markdown]
# ## Quantize and train
#
# `zq.quantize` turns the matrices into codes (biases stay float, and frozen). Training is the optax loop that
# you know, but for one argument: `value_fn`, the loss of ordinary float parameters. The network is unchanged.

# %%
quantizer = zq.Quantizer(bits=8, range=1.0)
start = zq.quantize(floats, quantizer)
start


# %%
def train(tx, params, steps=STEPS, batch=256):
    def step(carry, count):
        params, state = carry
        order = jax.random.fold_in(jax.random.key(7), count)
        chosen = jax.random.randint(order, (batch,), 0, 8_000)
        x, y = train_x[chosen], train_y[chosen]
        updates, state = tx.update(None, state, params, value_fn=lambda p: loss(p, x, y))
        both_sides = optax.tree.get(state, "losses")
        return (optax.apply_updates(params, updates), state), both_sides.mean()

    run = jax.jit(lambda params, state: jax.lax.scan(step, (params, state), jnp.arange(steps)))
    (params, _), losses = run(params, tx.init(params))
    return params, np.asarray(losses)


# %%
key = jax.random.key(1)
decay = optax.cosine_decay_schedule(1.0, STEPS)
runs = {
    "ZOQO": train(
        zq.zoqo(
            learning_rate=lambda t: 0.01 * decay(t),  # value units; a code is 0.0078
            radius=0.016,
            key=key,
            num_queries=8,
            query_batch=None,  # all eight at once
            step="dithered",
        ),
        start,
    ),
    "CAQ-ZO": train(
        zq.caq_zo(
            learning_rate=lambda t: 200 * decay(t),  # code units
            key=key,
            num_queries=8,
            query_batch=None,
        ),
        start,
    ),
}
print(f"{'before':8s} test accuracy {accuracy(start):.3f}")
for name, (params, _) in runs.items():
    print(f"{name:8s} test accuracy {accuracy(params):.3f}")

# %% [markdown]
# ## Chain with optax
#
# Each method is an `optax.GradientTransformationExtraArgs`, so it chains. `zq.spsa` hands float gradient
# estimates to whatever follows, here Adam.

# %%
tx = optax.chain(
    zq.spsa(radius=1e-3, key=key, num_queries=8, query_batch=None),
    optax.clip_by_global_norm(10.0),
    optax.adam(lambda t: 5e-3 * decay(t)),
)
runs["SPSA + Adam, float32"] = train(tx, floats)
print(f"SPSA + Adam in float32: test accuracy {accuracy(runs['SPSA + Adam, float32'][0]):.3f}")

# %%
figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
for name, (params, losses) in runs.items():
    window = max(1, len(losses) // 100)
    smooth = losses[: len(losses) // window * window].reshape(-1, window).mean(1)
    passes = 16 * window * np.arange(1, len(smooth) + 1)
    axis.plot(passes, smooth, label=f"{name}: {accuracy(params):.1%} on test digits")
axis.set_xlabel("forward passes on a batch of 256")
axis.set_ylabel("training loss")
axis.legend(frameon=False, fontsize=9)
plt.show()
# %% [markdown]
# ## Where the codes went
#
# The trained matrix is still the uint8 array that it was: a histogram of codes before and after, how far each
# code moved, and the travels of the codes that feed six hidden units, laid out as the pixels they look at.

# %%
before = np.asarray(start["params"]["Dense_0"]["kernel"].codes, int)
after = np.asarray(runs["ZOQO"][0]["params"]["Dense_0"]["kernel"].codes, int)
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), layout="constrained")
left.hist(before.ravel(), bins=np.arange(0, 257, 4), alpha=0.6, label="before")
left.hist(after.ravel(), bins=np.arange(0, 257, 4), alpha=0.6, label="after ZOQO")
left.set_xlabel("code")
left.set_ylabel("weights")
left.legend(frameon=False)
right.hist((after - before).ravel(), bins=61, color="C2")
right.set_xlabel("codes moved")
right.set_ylabel("weights")

travel = (after - before).reshape(14, 14, 32)
busiest = np.argsort(-np.abs(travel).mean((0, 1)))[:6]
figure, axes = plt.subplots(1, 6, figsize=(9, 1.7), layout="constrained")
bound = np.abs(travel).max()
for axis, unit in zip(axes, busiest, strict=True):
    picture = axis.imshow(travel[..., unit], cmap="RdBu_r", vmin=-bound, vmax=bound)
    axis.set_title(f"unit {unit}", fontsize=8)
    axis.set_axis_off()
figure.colorbar(picture, ax=axes, label="codes moved", shrink=0.8)
plt.show()
# %% [markdown]
# ## What a probe looks like
#
# A direction is made from a key when it is needed and never stored. `tx.probes` shows where the next step
# will look: dense entries of two codes at most, a rank-one matrix of signs, a sparse support.

# %%
state_of = {
    "uniform, dense": zq.zoqo(0.016, 0.016, key=key),
    "Rademacher, rank one": zq.zoqo(
        0.016, 0.008, key=key, noise="rademacher", structure="rank_one"
    ),
    "uniform, sparse (5 %)": zq.zoqo(0.016, 0.016, key=key, structure="sparse", density=0.05),
}
figure, axes = plt.subplots(1, 3, figsize=(9, 3.6), layout="constrained")
for axis, (name, tx) in zip(axes, state_of.items(), strict=True):
    probe = tx.probes(tx.init(start), start)[0]
    kernel = start["params"]["Dense_0"]["kernel"]
    u = probe.draw(kernel)
    picture = axis.imshow(u[:48], cmap="RdBu_r", vmin=-2, vmax=2, interpolation="nearest")
    axis.set_title(name, fontsize=9)
    axis.set_xlabel("column")
axes[0].set_ylabel("row")
figure.colorbar(picture, ax=axes, label="codes", shrink=0.7)
plt.show()
# %% [markdown]
# ## A run in a few bytes a step
#
# A step is determined by the key, the count and the differences of its losses. Keep those, and the run can be
# rebuilt from the base model without a forward pass, bit for bit.

# %%
tx = zq.zoqo(0.016, 0.016, key=key)


def logged(carry, count):
    params, state = carry
    x, y = train_x[:256], train_y[:256]
    updates, state = tx.update(None, state, params, value_fn=lambda p: loss(p, x, y))
    return (optax.apply_updates(params, updates), state), state.info.loss_differences


(trained, _), log = jax.lax.scan(logged, (start, tx.init(start)), jnp.arange(100))
again = zq.replay(start, log, tx)
same = jax.tree.map(lambda a, b: bool((a == b).all()), trained, again)
print(f"{log.nbytes} bytes of log rebuild every code:", all(jax.tree.leaves(same)))
