"""Audited runs: clipped chords and accepted moves against the codes themselves, queries counted."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoqo_jax as zq
from experiments.laboratory import audited
from experiments.laboratory.claim import check
from experiments.laboratory.networks import audits, models, training
from experiments.laboratory.networks.tasks import Examples

KEY = jax.random.key(3)
TINY = {
    "data": "mnist",
    "bits": (4,),
    "seeds": 2,
    "pretrain_steps": 1,
    "iterations": 6,
    "entry": 4,
    "batch_size": 4,
    "support": 64,
    "audit_images": 8,
    "trials": 1,
}


@pytest.fixture(autouse=True)
def _promotion_that_adam_needs():
    with jax.numpy_dtype_promotion("standard"):
        yield


# Chords


def network(bits):
    return zq.quantize(models.layers((6, 8, 4))(KEY), zq.Quantizer(bits))


@pytest.mark.parametrize(("boundary", "noise"), [("clamp", "rademacher"), ("mask", "uniform")])
def test_chords_are_clipped_where_a_code_and_its_direction_leave_the_grid(boundary, noise):
    params = network(2)[:1]  # of four codes, two at the edges
    tx = zq.zoqo(1e-9, 1e-9, key=KEY, boundary=boundary, noise=noise)
    probes = jax.jit(lambda params: tx.probes(tx.init(params), params))(params)
    cut = probed = 0
    for probe, layer in zip(probes, params, strict=True):
        n, grid = np.asarray(layer["kernel"].codes, int), layer["kernel"].grid
        u = np.asarray(probe.draw(layer["kernel"]), int)
        for code, step in zip(n.ravel(), u.ravel(), strict=True):
            inside = grid.low <= code - abs(step) and code + abs(step) <= grid.high
            cut += step != 0 and not inside
            probed += step != 0
    assert jax.jit(audits.clipped)(probes, params) == pytest.approx(cut / probed)
    assert (cut > 0) == (boundary == "clamp")


# Audits


def problem():
    rng = np.random.default_rng(1)
    images = jnp.asarray(rng.normal(size=(12, 6)), jnp.float32)
    batch = Examples(images, jnp.asarray(rng.integers(0, 4, 12)))
    return network(4), functools.partial(training.cross_entropy, models.dense, batch=batch)


def test_an_audit_takes_only_what_lowers_the_loss_enough():
    """Call by call: the loss of every state is that of the one before, or lower by the asked."""
    params, loss = problem()
    gate = zq.certificates.gate(key=KEY, support=3, gamma=1e-3, failures=10)
    run = jax.jit(lambda calls: audits.audit(gate, params, loss, calls))
    states = [run(calls) for calls in range(25)]
    losses = [float(jax.jit(loss)(params)) for params, _ in states]
    taken = [int(state.successes) for _, state in states]
    assert taken[-1] > 2
    for (before, after), (few, more) in zip(
        itertools.pairwise(losses), itertools.pairwise(taken), strict=True
    ):
        assert (after < before * (1 - 1e-3)) if more > few else after == before
    _, last = run(400)
    assert last.failures == 10 and last.queries == 3 * last.count < 3 * 400
    _, later = run(800)  # it has stopped
    assert later.count == last.count


def test_a_run_counts_its_queries_and_is_shown(tmp_path, monkeypatch):
    """Of one layer, which compiles soon."""
    monkeypatch.setattr(audited, "_HIDDEN", ())
    monkeypatch.setattr(audited, "VARIANTS", {"audited": "audited"})
    published = {"audited": audited._PUBLISHED["audited"]}
    monkeypatch.setattr(audited, "_PUBLISHED", published)
    document = tmp_path / "page.md"
    document.write_text("<!-- table: audited -->\n<!-- end -->\n")
    config = audited.Config(**TINY)
    found = check(audited.CLAIM, config, results=tmp_path, document=document, progress=False)
    for one in found:  # three steps, and three audits, too few to stop
        assert (one["queries"], one["images"]) == (6 + 9, 6 * 4 + 9 * 8)
        assert one["iterations"] == 6 and one["clipped"] == 0 and 0 <= one["taken"] <= 3
        assert not one["stopped"]
    assert found[0]["start"] != found[1]["start"]
    assert "96.22 % at 523 queries" in document.read_text()
    assert (tmp_path / "page" / "audited.png").stat().st_size > 1000


@pytest.mark.slow
def test_every_method_runs_and_failures_stop_a_run():
    config = audited.Config(**TINY | {"failures": 1, "decrease": 0.9, "trials": 2, "seeds": 1})
    found = {
        cell["variant"]: audited.CLAIM.measure(config, cell) for cell in audited.CLAIM.cells(config)
    }
    assert list(found) == list(audited.VARIANTS)
    for variant in ("dense", "zoqo", "clip_safe"):
        one = found[variant]
        assert (one["queries"], one["images"], one["iterations"]) == (12, 48, 6)
        assert not one["stopped"] and one["taken"] == 0
    assert found["audited"]["stopped"] and found["audited"]["iterations"] == 4
    assert found["audited"]["queries"] == 6 + 3
    assert found["clip_safe"]["clipped"] == 0 < found["dense"]["clipped"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": (4, 9)}, r"bits must be in \[2, 8\], got 9"),
        ({"seeds": 6}, r"seeds must be in \[1, 5\], got 6"),
        ({"entry": 401}, "entry must be at most 400, the iterations, got 401"),
        ({"decrease": 1.0}, r"decrease must be in \(0, 1\), got 1.0"),
        ({"support": 0}, "support must be at least 1, got 0"),
        ({"pretrain_steps": -1}, "pretrain_steps must be finite and not negative, got -1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        audited.Config(**settings)


def test_missing_data_are_told():
    config = audited.Config(**TINY | {"data": "/no/such/folder"})
    with pytest.raises(FileNotFoundError, match="there is no folder '/no/such/folder'"):
        audited.CLAIM.measure(config, audited.CLAIM.cells(config)[0])
