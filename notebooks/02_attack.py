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
# # An attack walks the grid
#
# A black box is a network that answers, and nothing else: no gradients, no weights. An attack changes an image
# within an l-infinity ball and counts its questions. Here the change itself lives on an integer grid: its pixels
# are codes of 2 to 8 bits whose legal values are the ball, so **the ball is never left, whatever the step**.
#
# Pick an image by its place in MNIST's test set, and run all again.

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

from experiments.attack import data, methods, models
from experiments.attack.attack import attack, margin_of
from experiments.attack.config import Config

PLACE = 503
FEW = int(os.environ.get("ATTACK_IMAGES", "64"))  # images in the comparisons
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

logits_fn = jax.jit(models.load_classifier("mnist"))
images, labels = data.load("mnist")
image, label = jnp.asarray(images[PLACE]), jnp.int32(labels[PLACE])
print(f"image {PLACE} is a {label}; the network reads {logits_fn(image[None]).argmax()}")


# %% [markdown]
# ## Questions and answers
#
# A method never sees the network. `ask` says which perturbations it wants judged, `tell` hands it the losses:
# by how much the true class leads, negative once the network is fooled. `attack` does this for thousands of
# images in one compiled program; here we do it by hand, for one image, and write everything down.


# %%
def walk(config, most=400):
    """Every question of an attack on the image, with its margin, until one fools the network."""
    method = methods.make(config, image.shape)
    state = method.init(jax.random.key(config.seed), image)
    ask, tell = jax.jit(method.ask), jax.jit(method.tell)
    asked, margins, states = [], [], []
    while len(margins) < most and not (margins and min(margins) < 0):
        questions = ask(state)
        shown = jnp.clip(image + questions, 0, 1)
        answers = jax.vmap(lambda z: margin_of(z, label))(logits_fn(shown))
        asked.extend(np.asarray(questions))
        margins.extend(answers.tolist())
        states.append(state)
        state = tell(state, answers)
    return np.asarray(asked), np.asarray(margins), states


asked, margins, _ = walk(Config(structure="coarse_to_fine"))
print(f"coarse to fine: {len(margins)} questions, margin {margins[0]:.2f} -> {margins[-1]:.2f}")

shown = np.unique(np.linspace(0, len(asked) - 1, 8).round().astype(int))
figure, axes = plt.subplots(
    2, len(shown), figsize=(1.5 * len(shown), 3.4), layout="constrained", squeeze=False
)
for column, place in zip(axes.T, shown, strict=True):
    column[0].imshow(asked[place, ..., 0], cmap="RdBu_r", vmin=-0.3, vmax=0.3)
    column[1].imshow(
        np.clip(image[..., 0] + asked[place, ..., 0], 0, 1), cmap="gray", vmin=0, vmax=1
    )
    column[0].set_title(f"question {place + 1}", fontsize=8)
    column[1].set_title(f"margin {margins[place]:.2f}", fontsize=8)
for axis in axes.flat:
    axis.set_axis_off()
plt.show()

# %% [markdown]
# ## Dense directions: every pixel of a direction has a sign of its own
#
# That is ZOQO as published: both ends of a random direction are asked for, and all codes move by the sign of the
# difference. It needs many more questions, each of which says one thing about 784 pixels. The codes' walk:

# %%
dense = walk(Config(structure="dense"))
codes = np.stack([np.asarray(state.perturbation.codes).reshape(28, 28) for state in dense[2]])
print(f"dense, 8 bit: {len(dense[1])} questions")
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained")
rng = np.random.default_rng(0)
for row, column in rng.integers(0, 28, (12, 2)):
    left.step(2 * np.arange(len(codes)), codes[:, row, column].astype(int), where="post", lw=0.9)
left.set_xlabel("questions")
left.set_ylabel("code (128 is 0, 1 and 255 the ball's edge)")
left.set_title("twelve pixels", fontsize=9)
right.hist(codes[-1].ravel(), bins=np.arange(0, 257, 4), color="C0")
right.set_xlabel("code")
right.set_ylabel("pixels, at the end")
plt.show()

# %% [markdown]
# ## How many bits does an attack need?
#
# With dense directions a coarse grid makes each step a leap, so its sign has to be surer: more directions a step.
# From coarse to fine only the two edges of the grid are used, and two bits have those.

# %%
several = {
    "8 bit, coarse to fine": Config(),
    "8 bit": Config(structure="dense"),
    "4 bit": Config(structure="dense", bits=4),
    "2 bit": Config(structure="dense", bits=2),
}
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for name, config in several.items():
    answers = walk(config)[1]
    axis.plot(
        1 + np.arange(len(answers)), np.minimum.accumulate(answers), ".-", label=name, lw=1.0, ms=3
    )
axis.axhline(0, color="0.6", lw=0.8)
axis.set_xscale("log")
axis.set_xlabel("questions")
axis.set_ylabel("least margin so far")
axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# ## Many images at once
#
# `attack` compiles one program and keeps it full: finished images leave, waiting ones take their places. Noise
# laws and structures of the directions, on the same images:

# %%
right_ones = np.flatnonzero(
    np.asarray(logits_fn(images[: 2 * FEW]).argmax(-1)) == labels[: 2 * FEW]
)
chosen = right_ones[:FEW]
choices = {
    "coarse to fine": {"structure": "coarse_to_fine"},
    "Rademacher, dense": {"structure": "dense"},
    "uniform, dense": {"structure": "dense", "noise": "uniform"},
    "Gaussian, dense": {"structure": "dense", "noise": "gaussian"},
    "Rademacher, rank one": {"structure": "rank_one"},
    "Rademacher, a tenth of the pixels": {"structure": "sparse", "density": 0.1},
    "SignHunter": {"method": "sign_hunter"},
    "Square Attack": {"method": "square"},
}
outcomes = {}
for name, settings in choices.items():
    config = Config(**settings, budget=2_000)
    outcomes[name] = outcome = attack(logits_fn, images[chosen], labels[chosen], config)
    queries = outcome.queries[outcome.success]
    print(
        f"{name:34s} failed {1 - outcome.success.mean():5.1%}   "
        f"mean {queries.mean():6.1f}   median {np.median(queries):5.0f} questions"
    )

# %%
figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
for name, outcome in outcomes.items():
    queries = np.sort(outcome.queries[outcome.success])
    left = 1 - np.arange(1, len(queries) + 1) / len(chosen)
    axis.step(queries, left, where="post", label=name, lw=1.3)
axis.set_xscale("log")
axis.set_xlabel("questions, for one image")
axis.set_ylabel("images not yet misread")
axis.legend(frameon=False, fontsize=8)
plt.show()

# %% [markdown]
# ## Labels alone
#
# Many services answer with a label and nothing else. Then a question is about signs and a radius, an integer,
# 2,032 at the edge of the ball, and the answer is whether the image is misread there. `zoqo_labels` first looks for signs
# that are misread at any radius, then flips squares: a flip is looked at a step nearer to the image, and stays, with
# its radius, if it is misread there. In a ball of 0.2 the first signs seldom suffice. Of 32 images, this is the walk
# of the one that takes the most labels.

# %%
by_labels = Config(method="zoqo_labels", epsilon=0.2, budget=2_000)
outcome = attack(logits_fn, images[chosen[:32]], labels[chosen[:32]], by_labels)
hardest = int(chosen[np.argmax(outcome.queries)])
image, label = jnp.asarray(images[hardest]), jnp.int32(labels[hardest])

method = methods.make(by_labels, image.shape)
state = method.init(jax.random.key(by_labels.seed), image)
ask, tell = jax.jit(method.ask), jax.jit(method.tell)
asked, looked_at, misread = [], [], []
while len(misread) < 400 and not (misread and misread[-1] and looked_at[-1] <= 1):
    (question,) = ask(state)
    read = logits_fn(jnp.clip(image + question, 0, 1)[None]).argmax(-1)
    asked.append(np.asarray(question))
    looked_at.append(float(jnp.abs(question).mean()) / by_labels.epsilon)
    misread.append(bool(read[0] != label))
    state = tell(state, read != label)
print(f"image {hardest}: {len(misread)} labels, {sum(misread)} of them wrong")

# %%
x, radii, misread = 1 + np.arange(len(misread)), np.array(looked_at), np.array(misread)
figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
axis.plot(x[~misread], radii[~misread], "x", color="0.6", ms=4, label="read correctly")
axis.plot(x[misread], radii[misread], "o-", color="C3", ms=3, lw=0.8, label="misread")
axis.axhline(1, color="0.6", lw=0.8)
axis.set_xlabel("labels")
axis.set_ylabel("radius looked at, of the ball's")
axis.legend(frameon=False, fontsize=8)
plt.show()

shown = np.flatnonzero(misread)
shown = shown[np.unique(np.linspace(0, len(shown) - 1, 8).round().astype(int))]
figure, axes = plt.subplots(
    1, len(shown), figsize=(1.4 * len(shown), 1.7), layout="constrained", squeeze=False
)
for axis, place in zip(axes[0], shown, strict=True):
    axis.imshow(np.clip(image[..., 0] + asked[place][..., 0], 0, 1), cmap="gray", vmin=0, vmax=1)
    axis.set_title(f"label {place + 1}", fontsize=8)
    axis.set_axis_off()
plt.show()

# %% [markdown]
# ## A model that is no JAX function
#
# Anything that answers numpy arrays will do, such as a client of a served model. The questions are the same, and
# so is the count.

# %%
calls = []


def served(batch):
    calls.append(len(batch))
    return np.asarray(logits_fn(batch))


outcome = attack(served, images[chosen[:8]], labels[chosen[:8]], Config(), compiled=False)
print(f"{sum(calls)} images answered, {outcome.queries.sum()} questions counted")

# %%
figure, axes = plt.subplots(1, 8, figsize=(10, 1.6), layout="constrained")
for axis, place, moved in zip(axes, chosen, outcome.perturbation, strict=False):
    fooled = np.clip(images[place] + moved, 0, 1)
    axis.imshow(fooled[..., 0], cmap="gray", vmin=0, vmax=1)
    axis.set_title(f"{labels[place]}, read as {logits_fn(fooled[None]).argmax()}", fontsize=7)
    axis.set_axis_off()
plt.show()
