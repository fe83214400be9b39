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
# # Policies in few-bit codes
#
# A policy is trained by what its episodes return, and nothing else: returns have no gradient, so evolution strategies perturb floats
# and compare. Here what is perturbed, compared and moved are the integer codes of a network, from the first step to the last.
#
# The environment is gymnax's CartPole: a pole on a cart, pushed left or right, a point for every moment that it stands, 500 at most. Needs
# `pip install -e '.[experiments,interop,notebooks,policies]'`, and some two minutes.

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

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import zoqo_jax as zq
from experiments.policies import environments, episode, methods, training
from experiments.policies.config import Config

GENERATIONS = int(os.environ.get("POLICIES_GENERATIONS", "30"))
BITS = 4
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## A network in codes
#
# Two hidden layers of 64 units, drawn at random and rounded: 4 bits a weight, biases (each layer's last row) as well. The
# greatest of its two outputs is the action.

# %%
game = environments.make(Config(bits=BITS))
start = methods.quantized(game.start(jax.random.key(0)), BITS)
print(
    [layer.shape for layer in start], sum(layer.nbytes for layer in jax.tree.leaves(start)), "bytes"
)

figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
axes[0].imshow(np.asarray(start[1].codes), cmap="viridis")
axes[0].set_title("codes of the second layer")
axes[1].hist(np.asarray(start[1].codes).ravel(), bins=np.arange(17) - 0.5)
axes[1].set(title="how many of each", xlabel="code")
plt.show()

# %% [markdown]
# Before training, the pole falls at once.


# %%
def show(layers, key):
    played = game.play(zq.dequantize(layers), key)
    figure, axes = plt.subplots(1, 6, figsize=(11, 2), layout="constrained")
    episode.strip(axes, game, played)
    figure.suptitle(f"return {float(played.rewards[: played.length].sum()):.0f}", fontsize=10)
    plt.show()


show(start, jax.random.key(1))

# %% [markdown]
# ## One step
#
# `game.mean_return(layers, keys)` plays an episode for each key. It is an ordinary function of ordinary weights; `query_batch=None`
# lets zoqo_jax evaluate all 100 policies of a generation, 50 directions and their opposites, on one batch. All play the same
# episodes, so what differs is the policy.

# %%
tx = zq.zoqo(
    0.04,
    0.25,
    key=jax.random.key(2),
    num_queries=50,
    query_batch=None,
    noise="gaussian",
    step="dithered",
)
state = tx.init(start)
episodes = jax.random.split(jax.random.key(3), 4)


@jax.jit
def ask(params, state, episodes):
    def loss(layers):
        return -game.mean_return(layers, episodes)

    _, heard = tx.update(None, state, params, value_fn=loss)
    return heard.info.losses


losses = ask(start, state, episodes)
figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
axes[0].hist(-np.asarray(losses).ravel(), bins=30)
axes[0].set(title="returns of a population", xlabel="mean of four episodes")
axes[1].plot(*methods.ranked(losses).T, ".")
axes[1].set(title="ranks of their losses", xlabel="one side of a query", ylabel="the other")
plt.show()

# %% [markdown]
# Few policies are far better than the others, and their returns would drown all else. Centred ranks, from -1/2 to 1/2, say as much
# of every generation, whatever the unit of the return. `update` takes their differences in place of those of losses, and the step is
# the same in all else.


# %%
@jax.jit
def step(params, state, losses):
    ranks = methods.ranked(losses)
    updates, state = tx.update(None, state, params, differences=ranks[:, 0] - ranks[:, 1])
    return zq.apply_updates(params, updates), state


moved, _ = step(start, state, losses)
change = np.asarray(moved[1].codes, int) - np.asarray(start[1].codes, int)
print(
    f"{np.mean(change != 0):.0%} of the second layer's codes moved, by {np.abs(change).max()} at most"
)

# %% [markdown]
# ## A run
#
# `experiments.policies` does this for as many generations as are wanted, compiled as one program, beside evosax's OpenES on floats: the
# same population, the same number of episodes.

# %%
curves = {}
for name, config in {
    f"ZOQO, {BITS} bits": Config(bits=BITS, generations=GENERATIONS),
    "OpenES, floats": Config(method="open_es", bits=32, generations=GENERATIONS),
}.items():
    program, of = training.program(config), training.keys(config.seed)
    kept, returns = program.start(of), []
    for generation in range(GENERATIONS):
        kept, told = program.chunk(kept, of.episodes, jnp.int32(generation), 1)
        returns.append(float(told.mean_return[0]))
    curves[name] = returns
    if config.bits == BITS:
        trained = program.layers(kept)

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for (name, returns), line in zip(curves.items(), ("-", "--"), strict=True):
    axis.plot(returns, line, label=name)
axis.set(xlabel="generation", ylabel="mean return of its population")
axis.legend(frameon=False)
plt.show()

# %% [markdown]
# The trained policy, and where its codes are now. They never left their 15 levels: the file is as large as at the start.

# %%
show(trained, jax.random.key(1))
begun = methods.quantized(game.start(training.keys(0).start), BITS)
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for layers, label in ((begun, "at the start"), (trained, "trained")):
    axis.hist(np.asarray(layers[1].codes).ravel(), bins=np.arange(17) - 0.5, alpha=0.5, label=label)
axis.set(title="codes of the second layer", xlabel="code")
axis.legend(frameon=False)
plt.show()


def size(layers):
    return sum(x.nbytes for x in jax.tree.leaves(layers))


print(size(begun), "->", size(trained), "bytes")

# %% [markdown]
# `make policies` runs CartPole and Pendulum at 8, 4 and 2 bits; [docs/policies.md](../docs/policies.md) has all environments, and says
# what did not work.
