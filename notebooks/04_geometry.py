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
# # The geometry of a grid
#
# An optimizer of codes hears two losses a step, and where these are taken decides what they tell. This notebook
# draws what the library relies on: grids that are uniform in one coordinate only, probes that hit codes exactly,
# steps that can and cannot reach every code, how good a state of a grid can be, and how to know when to stop.
#
# Every number is computed here, by the library and by `experiments.laboratory`, in about a minute.

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
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

import zoqo_jax as zq
from experiments.attack import models
from experiments.laboratory.convex import descents, problems, residuals
from zoqo_jax import directions
from zoqo_jax.analysis import certificates
from zoqo_jax.analysis.diagnosis import Spans
from zoqo_jax.grids import companders
from zoqo_jax.transforms import queries

jax.config.update("jax_disable_most_optimizations", True)  # compiled sooner, run but once
KEY = jax.random.key(0)
plt.rcParams.update({"figure.dpi": 90, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## Companders: a uniform grid, seen through a curve
#
# A code is a whole number, and codes are evenly spaced in a coordinate z. A compander is the curve between z and
# values: where z climbs steeply, levels crowd. Below each curve stands how densely its levels lie (red), over
# weights of the bundled MNIST network (grey), each in units of the largest of its 64 neighbours.

# %%
network = models.load_weights("mnist")
rows = network["Dense_0"]["kernel"]
weights = rows / jnp.abs(rows).max(axis=1, keepdims=True)

GRIDS = {
    "uniform": companders.identity(),
    "mu-law (255)": companders.mu_law(255.0),
    "power (1/2)": companders.power(0.5),
    "Gaussian": companders.gaussian(),
    "NF4": companders.nf4(),
}
GRIDS = {name: zq.Quantizer(4, compander, range=1.0) for name, compander in GRIDS.items()}


@functools.partial(jax.jit, static_argnums=0)
def every_code(quantizer):
    """An array that has each legal code once."""
    codes = jnp.arange(quantizer.grid.low, quantizer.grid.high + 1)
    return quantizer(jnp.zeros(len(codes))).with_codes(codes)


rounded = {name: jax.jit(quantizer)(weights) for name, quantizer in GRIDS.items()}
figure, axes = plt.subplots(
    2, 5, figsize=(12, 4.8), sharex=True, sharey="row", layout="constrained"
)
for (top, bottom), (name, quantizer) in zip(axes.T, GRIDS.items(), strict=True):
    array = every_code(quantizer)
    levels = zq.dequantize(array)
    z = jnp.linspace(quantizer.grid.low, quantizer.grid.high, 500)
    top.plot(residuals.between(quantizer, z) * array.scale, z, color="C0", lw=1.5)
    top.hlines(array.codes, -1.05, levels, color="0.85", lw=0.7)
    top.vlines(levels, -1, array.codes, color="C3", lw=0.5)
    bottom.hist(weights.ravel(), bins=81, range=(-1, 1), density=True, color="0.85")
    bottom.stairs(1 / (np.diff(levels) * (len(levels) - 1)), levels, color="C3", lw=1.2)
    bottom.vlines(levels, -0.35, 0, color="C3", lw=1)
    error = zq.dequantize(rounded[name]) - weights
    top.set_title(name, fontsize=10)
    bottom.set_title(f"rms rounding error {jnp.sqrt((error**2).mean()):.4f}", fontsize=9)
    bottom.set_xlabel("value / largest of 64")
axes[0, 0].set_ylabel("code")
axes[1, 0].set_ylabel("density")
axes[1, 0].set_ylim(-0.35, 2.2)
plt.show()

# %% [markdown]
# ## One radius in weight space does not fit a bent grid
#
# A method that knows nothing of codes probes w + r and w - r, and the engine rounds both ends to the nearest level.
# In a wide cell both ends come back: the query compares a loss with itself. In a narrow one an end jumps over
# codes. `zq.diagnose` counts what becomes of each: *collapsed* where both ends come back, *one-sided* where one
# does, *clean* where both move by one code, *wide* where an end moves further. Above for each code of a grid, below
# for the weights, at radii in units of the largest level. A uniform grid has a radius that is clean for all codes
# but those at its edges; a bent grid has none.

# %%
FATES = [fate.replace("_", "-") for fate in Spans._fields]
COLORS = ("0.88", "#f2c14e", "#2f7fb8", "#b5392f")
RADII = np.geomspace(0.003, 0.6, 24)


def fates(params, radius):
    """Of every leaf, the share of its weights that meets each fate."""
    leaves = zq.diagnose(params, radius, unit="half_range").leaves
    return [leaf.weights.shares for leaf in leaves]


figure, axes = plt.subplots(2, 5, figsize=(12, 5), sharex=True, sharey="row", layout="constrained")
for (top, bottom), (name, quantizer) in zip(axes.T, GRIDS.items(), strict=True):
    codes = every_code(quantizer).codes
    one_each = [quantizer(jnp.zeros(1)).with_codes(code[None]) for code in codes]
    strip = np.array([np.argmax(fates(one_each, radius), axis=1) for radius in RADII])
    top.pcolormesh(RADII, codes, strip.T, cmap=ListedColormap(COLORS), vmin=0, vmax=3)
    top.set_title(name, fontsize=10)
    shares = [100 * np.array(fates(rounded[name], radius)[0]) for radius in RADII]
    bottom.stackplot(RADII, np.transpose(shares), colors=COLORS, labels=FATES)
    bottom.set_xscale("log")
    bottom.set_xlabel("radius / largest level")
    best = np.argmax([share[2] for share in shares])
    bottom.set_title(f"at most {shares[best][2]:.0f} % clean, at {RADII[best]:.3f}", fontsize=9)
axes[0, 0].set_ylabel("code")
axes[1, 0].set_ylabel("weights, %")
handles, labels = axes[1, 0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
plt.show()

# %%
print("NF4's 16 codes\nradius  collapsed  one-sided  clean  wide")
for radius in (0.03, 0.05, 0.10, 0.15):
    spans = zq.diagnose(every_code(GRIDS["NF4"]), radius).leaves[0].codes
    print(
        f"{radius:6.2f}  {spans.collapsed:9d}  {spans.one_sided:9d}  {spans.clean:5d}  {spans.wide:4d}"
    )
print("\nTwo layers in NF4, radius .1 of each block's largest level")
dense = {name: network[name] for name in ("Dense_0", "Dense_1")}
params = jax.jit(lambda tree: zq.quantize(tree, zq.nf4(block=64)))(dense)
print(zq.diagnose(params, 0.1, unit="half_range"))

# %% [markdown]
# ## CAQ's stencil: one step in z
#
# CAQ-ZO probes one code up and one down instead. In z that is the same step everywhere (left); in values it is as
# long as the cells there are wide. The other two pictures have a row for each code: the ends that were asked for
# (of the grey line) and those that the engine answers for (red dots). A fixed radius misses levels; the stencil's
# ends are levels. A code at an edge has one neighbour, and sits out.

# %%
nf4 = GRIDS["NF4"]
array = every_code(nf4)
levels = np.asarray(zq.dequantize(array))
RADIUS = 0.1

figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), sharey=True, layout="constrained")
curve, fixed, aligned = axes
z = jnp.linspace(0, 15, 500)
curve.plot(residuals.between(nf4, z), z, color="0.6", lw=1)
curve.plot(levels, array.codes, ".", color="0.4", ms=4)
for n, color in ((1, "C0"), (7, "C1"), (13, "C2")):
    curve.hlines((n - 1, n + 1), -1.05, levels[[n - 1, n + 1]], color=color, lw=0.8, ls=":")
    curve.vlines(levels[[n - 1, n + 1]], -1, (n - 1, n + 1), color=color, lw=0.8, ls=":")
    curve.vlines(-1.05, n - 1, n + 1, color=color, lw=5)
    curve.hlines(-1, levels[n - 1], levels[n + 1], color=color, lw=5)
curve.set_title("equal in z, unequal in w", fontsize=9)
curve.set_ylabel("code")
for axis, off_grid in ((fixed, RADIUS), (aligned, None)):
    boundary = "clamp" if off_grid else "mask"
    probe = directions.describe(
        KEY, array, 1.0, distribution="rademacher", boundary=boundary, off_grid=off_grid
    )
    answers = [queries.endpoints(array, [probe], side) for side in (1, -1)]
    answers = np.array([zq.dequantize(end) for end in answers])
    asked = levels + RADIUS * np.array([[1], [-1]]) if off_grid else answers
    axis.vlines(levels, -1, 16, color="0.93", lw=0.8, zorder=0)
    axis.hlines(array.codes, asked.min(0), asked.max(0), color="0.55", lw=2)
    axis.plot(answers.T, array.codes, ".", color="C3", ms=7)
fixed.set_title(f"radius {RADIUS} in w, rounded", fontsize=9)
aligned.set_title("one step in z (edge codes sit out)", fontsize=9)
for axis in axes:
    axis.set_xlabel("value")
    axis.set_ylim(-1, 16)
plt.show()

# %% [markdown]
# What does that do to an estimate? Where one code is 1.0 and the loss is a sum of squares of whole numbers, every
# loss is a whole number, and (l₊ - l₋) / 2 must be the slope along the direction to the last bit. With CAQ's
# stencil it is. Rounded ends lie elsewhere than the radius says, and the slope is wrong by as much.

# %%
whole = zq.Quantizer(8, range=127.5)  # one code is 1.0
numbers = np.random.default_rng(0)
target = jnp.asarray(numbers.integers(-60, 60, 32), jnp.float32)
start = whole(jnp.asarray(numbers.integers(-60, 60, 32), jnp.float32))


def loss_to_target(w):
    return jnp.sum((w - target) ** 2)


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None))
def slopes(key, off_grid):
    """l+ - l- along a direction, and the slope there by differentiation."""
    probe = directions.describe(key, start, 1.0, distribution="rademacher", off_grid=off_grid)
    plus, minus = queries.losses(loss_to_target, start, [probe])
    gradient = jax.grad(loss_to_target)(zq.dequantize(start))
    return plus - minus, probe.draw(start) @ gradient


keys = jax.random.split(jax.random.key(1), 1_000)
heard, true = slopes(keys, None)
print(f"1,000 slopes; largest error with one step in z: {jnp.abs(heard / 2 - true).max()}")
for radius in (0.7, 1.3, 1.7):
    heard, true = slopes(keys, radius)
    error = jnp.linalg.norm(heard / (2 * radius) - true) / jnp.linalg.norm(true)
    print(f"radius of {radius} codes, rounded: off by {error:.0%}, root mean square")

# %% [markdown]
# On NF4 losses are no whole numbers, but codes are. The codes nearest to the stencil's ends, less those asked for,
# are 0, and so is the difference between the losses. Left, 400 queries of a quadratic in 16 dimensions. Right, the
# mean square of what is heard beyond what was asked for. A radius below half a cell hears nothing. From there the
# residual falls, on a fine grid as Δ²/μ², with teeth where radii are near whole cells. On NF4 longer probes end in
# wider cells, or beyond the edge, and it rises again. The stencil's residual is 0.0, which a logarithmic axis
# cannot show. `docs/laboratory.md` measures this for more grids and losses.

# %%
problem = problems.quadratic(jax.random.key(2), 16, condition=10.0)
differences = jax.jit(lambda ends: -jnp.diff(jax.vmap(jax.vmap(problem.loss))(ends))[:, 0])


def ends(key, quantizer, off_grid=None):
    """Values at the two ends of a query, asked for and answered, and codes between them."""
    codes_key, probe_key = jax.random.split(key)
    low, high = quantizer.grid.low, quantizer.grid.high
    codes = jax.random.randint(codes_key, (16,), (2 * low + high) // 3, (low + 2 * high) // 3 + 1)
    array = quantizer(jnp.zeros(16)).with_codes(codes)
    probe = directions.describe(probe_key, array, 1.0, distribution="rademacher", off_grid=off_grid)
    u = jnp.stack([side * probe.draw(array) for side in (1, -1)])
    answers = [queries.endpoints(array, [probe], side) for side in (1, -1)]
    answered = jnp.stack([zq.dequantize(end) for end in answers])
    asked = array.decode(codes + u) if off_grid is None else zq.dequantize(array) + off_grid * u
    left_over = [
        array.grid.nearest(zq.dequantize(end)) - n
        for end, n in zip(answers, codes + u, strict=True)
    ]
    return asked, answered, jnp.stack(left_over)


keys = jax.random.split(jax.random.key(3), 400)
asked, answered, left_over = jax.jit(jax.vmap(lambda key: ends(key, nf4)))(keys)
asked, heard = differences(asked), differences(answered)
print("one step in z: codes left over", np.unique(left_over), left_over.dtype)
print("one step in z: largest residual", jnp.abs(heard - asked).max())


@functools.partial(jax.jit, static_argnums=0)
def off_grid(quantizer, radii):
    """Of each radius, differences of losses asked for and heard."""

    def at(radius):
        asked, heard, _ = jax.vmap(lambda key: ends(key, quantizer, radius))(keys)
        return differences(asked), differences(heard)

    return jax.lax.map(at, radii)


figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
left.axline((0, 0), slope=1, color="0.8", lw=0.8)
left.plot(asked, heard, ".", ms=3, color="C2", label="one step in z")
steps = np.geomspace(0.1, 8, 49)
gaussian = zq.Quantizer(8, companders.gaussian(), range=1.0)
for name, quantizer, color in (("NF4", nf4, "C0"), ("Gaussian, 8 bit", gaussian, "C1")):
    radii = jnp.asarray(steps * quantizer.grid.spacing, jnp.float32)
    asked, heard = map(np.asarray, off_grid(quantizer, radii))
    squares = ((heard - asked) ** 2).mean(1) / (asked**2).mean(1)
    right.loglog(steps, squares, ".-", ms=4, lw=1, color=color, label=name)
    if name == "NF4":
        for at, shade in ((12, "C3"), (25, "C4")):
            left.plot(asked[at], heard[at], ".", ms=3, color=shade, label=f"radius {radii[at]:.2f}")
right.loglog(steps[24:], 0.05 / steps[24:] ** 2, color="0.5", ls="--", lw=1, label="slope -2")
left.set_xlabel("l₊ - l₋ asked for")
left.set_ylabel("heard")
left.legend(frameon=False, fontsize=9)
right.set_xlabel("radius, mean steps of the grid")
right.set_ylabel("squared residual / squared difference")
right.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# ### At the edges
#
# `boundary` decides what becomes of a probe that would leave the grid. `clamp` (ZOQO's) moves the end to the edge,
# and the chord between the two ends is short. `mask` (CAQ-ZO's) leaves the coordinate out: a chord is whole, or
# there is none. `reflect` turns the end back inside, and both ends may then lie on one side of the code (black).
# Here are the chords of probes that reach three codes, from each code of NF4.

# %%
figure, axes = plt.subplots(1, 3, figsize=(11, 3), sharey=True, layout="constrained")
for axis, boundary in zip(axes, ("clamp", "mask", "reflect"), strict=True):
    probe = directions.describe(KEY, array, 3.0, distribution="rademacher", boundary=boundary)
    plus, minus = (queries.endpoints(array, [probe], side).codes.astype(int) for side in (1, -1))
    whole_chord = jnp.abs(plus - minus) == 6
    axis.vlines(
        array.codes,
        jnp.minimum(plus, minus),
        jnp.maximum(plus, minus),
        lw=3,
        color=np.where(whole_chord, "C0", "C3"),
    )
    axis.plot(array.codes, array.codes, "k.", ms=4)
    axis.set_title(f"{boundary}: {whole_chord.sum()} of 16 chords are whole", fontsize=9)
    axis.set_xticks(range(0, 16, 3))
    axis.set_yticks(range(0, 16, 3))
    axis.set_xlabel("code")
axes[0].set_ylabel("codes between the ends")
plt.show()

# %% [markdown]
# ## The parity trap
#
# Two codes, and 121 targets around a start in the middle. If every step moves both codes by one, up or down, their
# sum stays even, and half of the lattice is a chessboard's other colour. Bright targets are visited, at any time in
# 60 steps, by all runs towards them, dark ones by none. The line is one run towards the star.
#
# Signs everywhere with steps of one code are trapped, and a rank-one matrix has signs everywhere as well. What
# escapes leaves some coordinate where it is: a zero in the noise (ZOQO's default), a sparse support, a dithered or
# a stochastic step. So does an edge of the grid, by accident.

# %%
signs = {"noise": "rademacher"}
TRANSFORMS = {
    "Rademacher, dense": functools.partial(zq.zoqo, 1.0, 1.0, **signs),
    "Rademacher, rank one": functools.partial(zq.zoqo, 1.0, 1.0, structure="rank_one", **signs),
    "Rademacher, sparse": functools.partial(
        zq.zoqo, 1.0, 1.0, structure="sparse", density=0.5, **signs
    ),
    "uniform on {-1, 0, 1}": functools.partial(zq.zoqo, 1.0, 1.0),
    "Rademacher, dithered": functools.partial(zq.zoqo, 0.7, 1.0, step="dithered", **signs),
    "CAQ-ZO, stochastic": functools.partial(zq.caq_zo, 0.3),
}
origin = whole(jnp.zeros((1, 2)))
around = jnp.stack(jnp.meshgrid(jnp.arange(-5.0, 6), jnp.arange(-5.0, 6)), axis=-1).reshape(
    -1, 1, 2
)


def walks(transform, seeds=8, steps=60):
    """Where runs towards each target go, in codes from the start."""

    def walk(target, key):
        loss = lambda w: jnp.abs(w - target).sum()  # noqa: E731
        return descents.descend(transform(key=key), loss, origin, steps, zq.dequantize)[:, 0]

    keys = jax.random.split(jax.random.key(5), seeds)
    return jax.jit(jax.vmap(jax.vmap(walk, (None, 0)), (0, None)))(around, keys)


figure, axes = plt.subplots(2, 3, figsize=(8, 5.2), sharex=True, sharey=True, layout="constrained")
side, goal = np.arange(-5, 6), around[:, 0].tolist().index([3.0, 4.0])
for axis, (name, transform) in zip(axes.flat, TRANSFORMS.items(), strict=True):
    places = walks(transform)
    visited = (places == around[:, None]).all(-1).any(-1).mean(-1)
    shades = {"cmap": "cividis", "vmin": 0, "vmax": 1, "edgecolors": "w", "lw": 0.3}
    picture = axis.pcolormesh(side, side, visited.reshape(11, 11), **shades)
    there = np.asarray((places[goal, 0] == around[goal]).all(-1))
    steps = there.argmax() + 1 if there.any() else 12
    path = np.concatenate([np.zeros((1, 2)), places[goal, 0, :steps]])
    axis.plot(*path.T, "o-", color="C3", ms=2.5, lw=1.2)
    axis.plot(3, 4, "*", color="w", mec="k", ms=9)
    axis.set_aspect("equal")
    axis.set_xticks(side[::5])
    axis.set_yticks(side[::5])
    axis.set_title(f"{name}: {visited.mean():.0%}", fontsize=9)
figure.colorbar(picture, ax=axes, label="share of runs that visit", shrink=0.8)
plt.show()

# %% [markdown]
# ## Directions: dense, rank one, sparse
#
# A rank-one matrix of signs is made of one sign for each row and one for each column, so a product with it costs
# little more than one with a vector. Its entries have the covariance of independent signs all the same (below, for
# 4 x 6 of them, over 4,000 draws), so that an estimate tells of every coordinate, on average. They are not
# independent: the four corners of any rectangle multiply to one. Sparse directions have that covariance times their
# density.

# %%
STRUCTURES = {
    "dense": {},
    "rank one": {"structure": "rank_one"},
    "sparse, a quarter": {"structure": "sparse", "density": 0.25},
}


def some_directions(shape, count, **structure):
    """Some directions for a matrix of codes."""
    matrix = whole(jnp.zeros(shape))

    def one(key):
        probe = directions.describe(key, matrix, 1.0, distribution="rademacher", **structure)
        return probe.draw(matrix)

    return np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(6), count)), int)


figure, axes = plt.subplots(2, 3, figsize=(9, 5), layout="constrained")
for (top, bottom), (name, structure) in zip(axes.T, STRUCTURES.items(), strict=True):
    drawn = some_directions((24, 36), 4_000, **structure)
    top.imshow(drawn[0], cmap="RdBu_r", vmin=-1.3, vmax=1.3, interpolation="nearest")
    top.set_title(f"{name}: rank {np.linalg.matrix_rank(drawn[0])}", fontsize=9)
    entries = drawn[:, :4, :6].reshape(-1, 24)
    covariance = entries.T @ entries / len(entries)
    picture = bottom.imshow(covariance, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    corners = entries[:, [0, 1, 6, 7]].prod(1).mean().round(2) + 0.0  # of the first rectangle
    variance = np.diag(covariance).mean()
    bottom.set_title(f"variance {variance:.2f}, corners {corners:.2f}", fontsize=9)
figure.colorbar(picture, ax=axes, label="entry, covariance", shrink=0.6)
for axis in axes.flat:
    axis.set_xticks([])
    axis.set_yticks([])
plt.show()

# %% [markdown]
# ## Floors
#
# The optimum lies between codes. Rounding it costs a quadratic Δ² tr(H) / 24 on average, whatever the method:
# `zq.certificates.loss_floor`, dashed. And a method that hears l₊ - l₋ alone never learns that a code is best. One
# that moves a single coordinate by signs (ZOQO) swings between the two nearest codes, at four times the floor on
# average. One that moves it at random, in proportion to the slope (CAQ-ZO), averages twice the floor. Here are 32
# quadratics in 16 dimensions and sparse directions of one coordinate on average; where there are more, they disturb
# each other. The legend has the mean of the last quarter.

# %%
BITS, STEPS, DIMENSION = (3, 5, 8), 4_000, 16


@jax.jit
@jax.vmap
def quadratics(key):
    return problems.quadratic(key, DIMENSION, condition=10.0)[1:]


keys = jax.random.split(jax.random.key(7), 32)
optima, hessians = quadratics(keys)


def descent(method, bits, key, optimum, hessian):
    """Excess losses of a descent and of the optimum rounded, and what the law says of that."""
    quantizer, spacing = zq.Quantizer(bits, range=1.0), 2 / (2**bits - 1)
    loss = lambda x: 0.5 * (x - optimum) @ hessian @ (x - optimum)  # noqa: E731
    excess = lambda params: loss(zq.dequantize(params))  # noqa: E731
    rate, trace = descents.falling(1.0, STEPS), jnp.trace(hessian)
    sparse = {"key": key, "density": 1 / DIMENSION}
    tx = descents.make(method, rate, spacing=spacing, trace=trace, **sparse)
    start = quantizer(jnp.zeros(DIMENSION))
    losses = descents.descend(tx, loss, start, STEPS, excess)
    return losses, excess(quantizer(optimum)), certificates.loss_floor(spacing, hessian)


figure, axis = plt.subplots(figsize=(9, 4), layout="constrained")
counted = 2 * np.arange(1, STEPS + 1).reshape(-1, 20).mean(1)
shades = dict(zip(BITS, plt.cm.viridis((0.0, 0.4, 0.8)), strict=True))
for method, bits in (*(("CAQ-ZO, stochastic", bits) for bits in BITS), ("ZOQO", 5)):
    run = jax.jit(jax.vmap(functools.partial(descent, method, bits)))
    losses, rounded, floor = (np.asarray(x).mean(0) for x in run(keys, optima, hessians))
    settled = losses[-STEPS // 4 :].mean() / floor
    look = {"color": shades[bits], "lw": 1.3} if method != "ZOQO" else {"color": "C1", "lw": 1.0}
    label = f"{bits} bit, {method}: {settled:.1f} times the law (optimum rounded: {rounded / floor:.2f})"
    axis.loglog(counted, losses.reshape(-1, 20).mean(1), label=label, **look)
    axis.axhline(floor, color=shades[bits], ls="--", lw=1)
axis.set_xlabel("evaluations of the loss")
axis.set_ylabel("excess loss")
axis.set_ylim(8e-5, 500)
axis.legend(frameon=False, fontsize=9, loc="upper right")
plt.show()

# %% [markdown]
# ## Audits: when to stop looking
#
# A gate tries fresh directions: a random few of the codes, each up or down by one. A direction passes if one of its
# ends lowers the loss by a set amount, and is then taken (left). 15 failures in a row stop the run. Were the chance
# to pass p, K directions would all fail with probability (1 - p)^K. Where p is 1 - 0.05^(1/K) that happens once in
# twenty times, and this p is `certificates.success_bound`: 18.1 % for 15 failures.
#
# In the middle that formula is measured, at states with some of 128 codes off by one. Their p comes from audits of
# 48,000 directions and makes the dashed curves; the full ones count 4,000 gates with other directions. A ring marks
# the first K whose bound is below p: there the curves should cross the line at 5 %.
#
# Right, runs that started with all codes off and were stopped, and the share of fresh directions that would still
# have passed. Runs that only ever use the same 15 directions stop because *these* fail, which says nothing of
# others. Fresh directions do better; but after each success another row of failures begins, and each row has its
# own chance to be an accident. An audit of the last state by 15 new directions is one row only, and finds nearly
# all of the false stops.

# %%
CODES, CALLS, ASKED = 128, 400, {"support": 2, "gamma": 1e-5}
grid = zq.Quantizer(4, range=1.5)  # one code is 0.2
best = jax.random.randint(jax.random.key(8), (CODES,), 3, 13)
exact = grid(jnp.zeros(CODES)).with_codes(best)


def planted_loss(w):
    return 1 + jnp.sum((w - zq.dequantize(exact)) ** 2)


def planted(off_by_one):
    """The optimum with some codes one too high."""
    return exact.with_codes(best + (jnp.arange(CODES) < off_by_one))


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None))
def walk(key, reuse):
    """A run by a gate until it stops, which has so many directions to `reuse` in turn."""
    gate = certificates.gate(key=key, **ASKED)

    def call(carry, _):
        stopped, params, state = carry
        state = state._replace(count=state.count % reuse)
        stop, after = gate.update(state, planted_loss, params)
        moved = stop, gate.accept(after, params), after
        carry = jax.tree.map(lambda old, new: jnp.where(stopped, old, new), carry, moved)
        return carry, (carry[0], after.side, planted_loss(zq.dequantize(carry[1])))

    start = jnp.array(False), planted(CODES), gate.init(exact)
    (_, params, _), history = jax.lax.scan(call, start, length=CALLS)
    return params, history


@jax.jit
@jax.vmap
def audits(key, params):
    """Of 16 audits of a state, the directions that passed and those that were tried."""
    look = functools.partial(certificates.audit, planted_loss, params, trials=15, **ASKED)
    found = jax.lax.map(look, jax.random.split(key, 16))
    return found.successes, found.trials


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, None))
def silence(key, params):
    """How many directions fail before one passes."""
    gate = certificates.gate(key=key, **ASKED)

    def call(state, _):
        _, state = gate.update(state, planted_loss, params)
        return state, jnp.where(state.successes == 0, state.failures, 0)

    return jax.lax.scan(call, gate.init(params), length=100)[1].max()


figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.7), layout="constrained")
RUNS = 200
walk_keys, look_keys, gate_keys = jax.random.split(jax.random.key(9), (3, 4_000))
bound = certificates.success_bound(15).item()
for reuse, color, name in ((CALLS, "C0", "fresh directions"), (15, "C3", "the same 15")):
    params, history = walk(walk_keys[:RUNS], reuse)
    stopped, side, loss = map(np.asarray, history)
    passed, tried = map(np.asarray, audits(look_keys[:RUNS], params))
    shares = passed[:, 1:].sum(1) / tried[:, 1:].sum(1)  # the first audit is the certificate
    false, silent = shares > bound, passed[:, 0] == 0
    print(f"{name}: {stopped[:, -1].sum()} of {RUNS} runs stopped, {false.sum()} of them falsely;")
    print(f"  an audit of the last state is silent in {(false & silent).sum()} of those")
    label = f"{name}: {false.mean():.0%} beyond"
    right.hist(shares, bins=np.linspace(0, 0.8, 41), color=color, alpha=0.6, label=label)
    if reuse == CALLS:
        last = stopped[0].argmax()
        steps = np.flatnonzero(side[0, :last])
        left.step(np.arange(last), loss[0, :last] - 1, where="post", color=color, lw=1)
        left.plot(steps, loss[0, steps] - 1, ".", color="C2", ms=5, label=f"{len(steps)} passed")
        left.axvline(last, color="k", lw=1, ls="--", label=f"stop, {last + 1} tried")
left.set_xlabel("directions tried, three evaluations each")
left.set_ylabel("excess loss")
left.legend(frameon=False, fontsize=9)
right.axvline(bound, color="k", lw=1, ls="--", label=f"bound, {bound:.1%}")
right.set_xlabel("share of fresh directions that still pass")
right.set_ylabel("runs")
right.set_ylim(0, 75)
right.legend(frameon=False, fontsize=8)

K = np.arange(1, 61)
bounds = np.asarray(jax.vmap(certificates.success_bound)(K))
for off_by_one, color in ((32, "C0"), (48, "C1"), (80, "C4")):
    copies = jax.vmap(planted)(jnp.full(RUNS, off_by_one))
    passed, tried = map(np.asarray, audits(look_keys[-RUNS:], copies))
    p = passed.sum() / tried.sum()
    silent = (np.asarray(silence(gate_keys, planted(off_by_one))) >= K[:, None]).mean(1)
    label = f"{off_by_one} codes off: p = {p:.3f}"
    middle.semilogy(K[silent > 0], silent[silent > 0], color=color, label=label)
    middle.semilogy(K, (1 - p) ** K, "k--", lw=0.8)
    middle.plot(K[(bounds <= p).argmax()], 0.05, "o", mfc="none", mec=color, ms=9)
middle.axhline(0.05, color="0.5", lw=0.8)
middle.set_ylim(0.01, 1.1)
middle.set_xlabel("directions, K")
middle.set_ylabel("share of gates with none passed")
middle.legend(frameon=False, fontsize=9)
plt.show()

# %% [markdown]
# ## Where to go next
#
# - [01_quickstart](01_quickstart.ipynb) trains a network on such grids, [02_attack](02_attack.ipynb) attacks one.
# - [docs/laboratory.md](../docs/laboratory.md) measures what is sketched here over grids, bits, methods and seeds: the
#   residual, floors, rates, noise, audited runs. `python -m experiments.laboratory --help` lists the claims.
# - `zq.diagnose` tells what a radius does to the codes of your own model, `zq.explain` what a query of it costs.
