"""What every test runs under: four host devices, strict promotion, and reproducible hypothesis."""

import os

# Before jax is imported. JAX_PLATFORMS=cuda in the environment runs the same tests on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    four = "--xla_force_host_platform_device_count=4"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {four}".strip()

import hypothesis
import jax
import jaxtyping
import pytest

hypothesis.settings.register_profile("default", deadline=None)  # the first example compiles
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True, scope="module")
def _strict_promotion():
    """A promotion left to JAX is one nobody thought about; optax.adam itself needs "standard"."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def untyped():
    """Without the type checks of the tests, which refuse bad arguments before the library can."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
