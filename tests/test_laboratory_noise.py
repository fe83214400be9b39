"""The claim on noise: its formulas beside brute force, and a tiny run."""

import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoqo_jax as zq
from experiments.laboratory import noise
from experiments.laboratory.claim import check
from experiments.laboratory.networks import estimates, tasks
from experiments.laboratory.networks.models import perceptron
from experiments.laboratory.networks.tasks import Examples


@pytest.mark.parametrize(
    ("law", "reach", "entries"), [("rademacher", 3, 13), ("uniform", 2, 7), ("gaussian", 2, 7)]
)
def test_the_gain_on_a_linear_loss_is_what_all_directions_give(law, reach, entries):
    rng = np.random.default_rng(0)
    g = rng.uniform(0.8, 1.2, entries) * rng.choice([-1, 1], entries)
    k = np.arange(-reach, reach + 1)
    chances = {
        "rademacher": (np.abs(k) == reach) / 2,
        "uniform": np.ones(k.size) / k.size,
        "gaussian": np.exp(-(k**2) / (2 * reach**2)),
    }[law]
    chances = chances / chances.sum()
    some = k[chances > 0]
    u = np.array(list(itertools.product(some, repeat=entries)))
    weight = chances[u + reach].prod(1)
    gain = weight @ (np.sign(u @ g) * (np.sign(u) @ g)) / np.linalg.norm(g)
    assert (
        abs(estimates.linear_gain(law, reach) / gain - 1) < 0.04
    )  # few entries: not quite Gaussian


def test_sparse_directions_gain_less_by_the_root_of_their_density():
    dense = estimates.linear_gain("uniform", 4)
    np.testing.assert_allclose(estimates.linear_gain("uniform", 4, 0.09), 0.3 * dense)
    np.testing.assert_allclose(estimates.linear_gain("rademacher", 1), np.sqrt(2 / np.pi))


def tiny():
    """A perceptron of 8 weights on a grid, and six examples."""
    rng = np.random.default_rng(1)
    params = [rng.normal(size=(2, 2)), rng.normal(size=(3, 2))]
    params = [zq.Quantizer(6)(jnp.asarray(x, jnp.float32)) for x in params]
    batch = Examples(rng.normal(size=(6, 1)).astype("f4"), np.array([0, 1, 0, 1, 1, 0], np.int32))
    return params, batch


def loss(matrices, batch):
    one = np.ones((6, 1))
    hidden = np.maximum(np.append(batch.inputs, one, 1) @ matrices[0], 0)
    logits = np.append(hidden, one, 1) @ matrices[1]
    return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(6), batch.labels])


def test_sampled_estimates_are_those_of_all_directions():
    params, batch = tiny()
    codes = [np.asarray(x.codes, int) for x in params]
    scales = [np.asarray(x.scale, float) for x in params]
    grid = params[0].grid
    levels = np.asarray(grid.levels, float)

    def at(u):
        parts = u[:4].reshape(2, 2), u[4:].reshape(3, 2)
        moved = [np.clip(n + v, grid.low, grid.high) for n, v in zip(codes, parts, strict=True)]
        values = [levels[n] * s for n, s in zip(moved, scales, strict=True)]
        return loss(values, batch)

    directions = 2 * np.array(list(itertools.product([-1, 1], repeat=10)))
    signs = np.array([np.sign(at(u) - at(-u)) for u in directions])
    each = signs[:, None] * np.sign(directions)

    shape = {"law": "rademacher", "structure": "dense", "density": 1.0}
    keys = jax.random.split(jax.random.key(0), (64, 64))
    found = estimates.means(perceptron, params, batch, keys, jnp.float32(2), **shape)
    found = jax.tree.map(np.asarray, found)
    error = 1 / np.sqrt(keys.size)
    np.testing.assert_allclose(found["mean"], each.mean(0), atol=5 * error)
    assert found["square"] == 1.0

    def value(x):
        return loss([x[:4].reshape(2, 2), x[4:].reshape(3, 2)], batch)

    x = np.concatenate([np.ravel(levels[n] * s) for n, s in zip(codes, scales, strict=True)])
    slopes = [(value(x + h) - value(x - h)) / 2e-5 for h in 1e-5 * np.eye(10)]
    np.testing.assert_allclose(found["g"], slopes, rtol=1e-3, atol=1e-5)
    right = (each == np.sign(found["g"])) @ np.abs(found["g"]) / np.abs(found["g"]).sum()
    np.testing.assert_allclose(found["agreement"], right.mean(), atol=5 * error)


def test_noise_adds_nothing_to_the_length_of_the_mean():
    rng = np.random.default_rng(2)
    g = rng.normal(size=100_000)
    one = {"g": g, "mean": rng.normal(size=g.size), "square": 2.0, "agreement": 0.5}
    opposite = {**one, "mean": -one["mean"], "agreement": 0.6}
    assert estimates.statistics(one, opposite)["cosine"] is None
    halves = [one, opposite]
    for half in halves:
        half["mean"] = 0.5 * g + 0.5 * np.sign(g) + 0.3 * rng.normal(size=g.size)
    found = estimates.statistics(*halves)
    mean = 0.5 * g + 0.5 * np.sign(g)
    length = np.linalg.norm(mean)
    assert abs(found["cosine"] - mean @ g / length / np.linalg.norm(g)) < 0.01
    assert abs(found["cosine_of_signs"] - mean @ np.sign(g) / length / np.sqrt(g.size)) < 0.01
    np.testing.assert_allclose(found["gain"], mean @ g / np.linalg.norm(g), rtol=0.01)
    np.testing.assert_allclose(found["variance"], 2.0 - (mean**2).mean(), rtol=0.01)
    np.testing.assert_allclose(found["agreement"], 0.55)


CONFIG = noise.Config(steps=2, radii=(3,), directions=128, batch_size=4, seeds=2)


def run(claim, config, folder: Path):
    page = folder / "page.md"
    page.write_text("<!-- table: noise -->\n<!-- end -->\n")
    found = check(claim, config, results=folder, document=page, progress=False)
    assert (folder / "page" / "noise.png").stat().st_size > 1_000
    return found, page.read_text()


@jax.numpy_dtype_promotion("standard")  # which optax.adam needs
def test_a_tiny_run(tmp_path):
    chosen = [x for x in noise.CLAIM.cells(CONFIG) if x["law"] == "rademacher"]
    claim = noise.CLAIM._replace(cells=lambda config: chosen[:1])
    found, page = run(claim, CONFIG, tmp_path)
    assert "| dense rademacher |      3 |" in page
    assert len(found[0]["gain"]) == 2 and found[0]["theory"] == pytest.approx(0.798, abs=1e-3)
    assert found[0]["agreement"] != found[0]["agreement"][::-1]  # two networks, two draws


@pytest.mark.slow
@jax.numpy_dtype_promotion("standard")
def test_all_laws_and_structures(tmp_path):
    found, page = run(noise.CLAIM, CONFIG, tmp_path)
    assert len(found) == 9 and "sparse gaussian" in page and "rank-one uniform" in page


def test_bad_settings_are_refused():
    for setting, value, message in [
        ("directions", 100, "directions must be a multiple of 128, got 100."),
        ("bits", 9, r"bits must be in \[2, 8\], got 9."),
        ("density", 1.0, r"density must be in \(0, 1\), got 1.0."),
        ("radii", (4, 0), r"radii must be in \[1, 255\], got 0."),
        ("seeds", 6, r"seeds must be in \[1, 5\], got 6."),
        ("batch_size", 0, "batch_size must be at least 1, got 0."),
    ]:
        with pytest.raises(ValueError, match=message):
            noise.Config(**{setting: value})
    with pytest.raises(FileNotFoundError, match="there is no folder 'nowhere'"):
        tasks.digits("nowhere")
