"""Memory of a step: formulas against the arrays of real trees, and processes that are started."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import NORMALLY

from experiments import footprint
from experiments.laboratory import memory
from experiments.laboratory.claim import check
from experiments.laboratory.networks import steps

PLACE = "<!-- table: memory -->\n<!-- end -->\n"


@pytest.fixture(autouse=True)
def _promotion_that_adam_needs():
    with jax.numpy_dtype_promotion("standard"):
        yield


def nbytes(arrays):
    """Bytes of arrays, a key counting as the words it is made of."""
    arrays = [x if jnp.issubdtype(x.dtype, np.number) else as_words(x) for x in arrays]
    return sum(x.size * x.dtype.itemsize for x in arrays)


def as_words(key):
    return jax.eval_shape(jax.random.key_data, key)


@pytest.mark.parametrize("name", steps.METHODS)
def test_what_is_counted_between_steps_is_what_is_there(name):
    method = steps.METHODS[name]
    _, (changed, batch) = steps.problem(method, 64, 8)
    counted = steps.counted(method, 64, 8)
    assert counted["weights"] + counted["state"] == nbytes(changed)
    assert counted["gradients"] in (0, counted["weights"])
    assert nbytes(batch) == 2 * 4 * 8 * 64


def test_parts_are_those_of_the_textbook():
    """Three layers of 10 x 10, two examples, by hand."""
    assert steps.counted(steps.METHODS["qat"], 10, 2) == {
        "weights": 1200,
        "gradients": 1200,
        "state": 2404,
        "working": 1200,
        "activations": 240,
    }
    assert steps.counted(steps.METHODS["zoqo_4_dense"], 10, 2) == {
        "weights": 150 + 12,
        "gradients": 0,
        "state": 48,
        "working": 200 + 100,
        "activations": 320,
    }


@pytest.mark.parametrize(
    "name",
    ["adam", "zoqo_8_dense", *(pytest.param(x, marks=pytest.mark.slow) for x in ("qat", "zoqo_4"))],
)
def test_a_step_writes_over_its_arguments(name):
    method = steps.METHODS[name]
    step, arrays = steps.problem(method, 32, 4)
    program = footprint.of_program(step.lower(*arrays).compile(compiler_options=NORMALLY))
    counted = steps.counted(method, 32, 4)
    # A step does not read what the last one told: losses, their difference, two counts, its size
    # and its true share.
    unread = 28 if name.startswith("zoqo") else 0
    expected = counted["weights"] + counted["state"] - unread
    assert program["argument"] == pytest.approx(expected + 2 * 4 * 4 * 32, abs=16)
    assert program["alias"] >= program["output"] - 512  # tables of pointers, and counts


def test_rounded_weights_have_the_gradient_of_plain_ones():
    w = jnp.array([[0.1, -0.52], [1.0, 0.3]])
    s = 2 / 255  # 8 bits on [-1, 1]
    rounded = np.clip(np.round(np.array(w) / s), -127, 127) * s
    np.testing.assert_allclose(steps._straight_through(w), rounded, atol=1e-5)
    square = lambda w: jnp.sum(steps._straight_through(w) ** 2)  # noqa: E731
    np.testing.assert_allclose(jax.grad(square)(w), 2 * rounded, atol=1e-4)


@pytest.mark.slow
def test_processes_are_measured_and_shown(tmp_path, monkeypatch):
    some = {name: steps.METHODS[name] for name in ("adam", "zoqo_8")}
    monkeypatch.setattr(memory, "METHODS", some)
    for ours in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR"):  # a process as a user starts it
        monkeypatch.delenv(ours)
    document = tmp_path / "page.md"
    document.write_text(PLACE)
    config = memory.Config(widths=(1024,), batch_size=2, steps=1)
    found = check(memory.CLAIM, config, results=tmp_path, document=document, progress=False)
    adam, zoqo = (memory.total(one, "process") for one in found)
    assert memory.total(found[0], "program") < adam < 2 * memory.total(found[0], "program")
    assert 2**20 < zoqo < adam
    assert all(one["empty"] > 50e6 for one in found)
    text = document.read_text()
    assert "| ZOQO, 8 bit, rank-one | 1,024 |" in text and "100.0%" in text
    assert (tmp_path / "page" / "memory.png").stat().st_size > 1000


def test_no_process_is_started_that_the_machine_cannot_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "METHODS", {"adam": steps.METHODS["adam"]})
    monkeypatch.setattr(footprint, "available", lambda: memory._MARGIN)
    document = tmp_path / "page.md"
    document.write_text(PLACE)
    config = memory.Config(widths=(8,))
    (found,) = check(memory.CLAIM, config, results=tmp_path, document=document, progress=False)
    assert found["process"] is None and found["program"]["argument"] > 0
    assert "–" in document.read_text()


def test_a_process_that_fails_is_told(monkeypatch):
    with pytest.raises(RuntimeError, match=r"python -m no\.such ended with code 1"):
        footprint.child("no.such", {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"widths": (256, 511)}, "widths must be even and at least 2, got 511"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"noise": "pink"}, "noise must be one of .* got 'pink'"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        memory.Config(**settings)
