"""Other people's models compute and train in codes as they are.

Tracing finds most that can fail, and is what the fast tests do, for some; a few of them run, the
slow ones all. Figures are in docs/models.md. `make zoo` asks the models whose packages are not here
as well.
"""

import importlib.metadata

import jax
import pytest

from zoo import expected, harness, registry

# Their warnings and their promotions are theirs.
pytestmark = pytest.mark.filterwarnings("default")

_MODELS = registry.everything()
# One model of each of three packages; the others, and all that train, are slow tests.
_TRACED = ("equinox.spectral_norm", "keras.cnn", "nnx.lstm")


@pytest.fixture(autouse=True)
def _their_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield
    jax.clear_caches()  # or compiled programs pile up


def _is_installed(package):
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _parameter(model, is_slow, *fails):
    marks = [pytest.mark.slow] * (model.heavy or is_slow)
    reasons = [expected.FAILS[key] for key in fails if key in expected.FAILS]
    if not _is_installed(model.package):
        marks.append(pytest.mark.skip(reason=f"{model.package} is not installed: make zoo"))
    elif reasons:
        marks.append(pytest.mark.xfail(strict=True, raises=AssertionError, reason=reasons[0]))
    return pytest.param(model, id=model.name, marks=marks)


def _check(model, depth):
    report = harness.examine(model, depth)
    assert not report.failures
    assert report.share in (None, 1.0), f"{report.share:.2f} implicit: {report.fallbacks}"


@pytest.mark.parametrize(
    "model", [_parameter(m, m.name not in _TRACED, m.name) for m in _MODELS.values()]
)
def test_a_model_is_traced_in_codes(model):
    _check(model, "traced")


@pytest.mark.parametrize(
    "model",
    [_parameter(m, True, m.name, f"run {m.name}") for m in _MODELS.values()],
)
def test_a_model_trains_in_codes(model):
    _check(model, "run")


def test_what_is_expected_to_fail_is_in_the_zoo():
    assert {key.removeprefix("run ") for key in expected.FAILS} <= set(_MODELS)
    assert len(_MODELS) >= 40
    assert len({model.package for model in _MODELS.values()}) >= 12
