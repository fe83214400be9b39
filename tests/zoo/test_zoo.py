"""Other people's models compute and train in codes as they are.

The figures are in docs/models.md; `make zoo` asks the models whose packages are not here, too.
"""

import importlib.metadata

import jax
import pytest

from zoo import expected, harness, registry

# Their warnings and their promotions are theirs.
pytestmark = pytest.mark.filterwarnings("default")

_MODELS = registry.everything()


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


def _parameter(model):
    marks = [pytest.mark.slow] * (model.slow or model.heavy)
    if not _is_installed(model.package):
        marks.append(pytest.mark.skip(reason=f"{model.package} is not installed: make zoo"))
    elif model.name in expected.FAILS:
        marks.append(pytest.mark.xfail(strict=True, reason=expected.FAILS[model.name]))
    return pytest.param(model, id=model.name, marks=marks)


@pytest.mark.parametrize("model", map(_parameter, _MODELS.values()))
def test_a_model_trains_in_codes_as_it_is(model):
    report = harness.examine(model)
    assert not report.failures
    assert report.share in (None, 1.0), f"{report.share:.2f} implicit: {report.fallbacks}"


def test_what_is_expected_to_fail_is_in_the_zoo():
    assert set(expected.FAILS) <= set(_MODELS)
    assert len(_MODELS) >= 40
