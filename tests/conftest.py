"""What every test runs under: four host devices, strict promotion, and reproducible hypothesis.

Programs are compiled in a hurry (`compiling.py`), unless XLA_NORMALLY=1 is in the environment, as
it is for the slow tests. Types are checked at each call (`typing_once.py`).
"""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import compiling

# Before jax is imported. JAX_PLATFORMS=cuda in the environment runs the same tests on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = compiling.flags(os.environ.get("XLA_FLAGS", ""))
# What one process has compiled, the others of this run and the commands that tests start read.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="zoqo_jax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import hypothesis
import jax
import jaxtyping
import pytest
import typing_once

compiling.share_context()
typing_once.install()

from experiments import footprint  # noqa: E402  (types of what it imports are checked)

# After each of its programs a run of fine-tuning forgets all that was traced in its process, and
# here the other tests would trace it again.
footprint.forget_traces = footprint.give_back = lambda: None

hypothesis.settings.register_profile("default", deadline=None)  # the first example compiles
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


# Scripts that made files for the tests, with libraries that the tests do without.
collect_ignore_glob = ["files/make_*.py"]


def pytest_collection_finish(session):
    gc.freeze()  # what is imported stays: the collector need not look at it again and again


def pytest_unconfigure(config):
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def _strict_promotion():
    """A promotion left to JAX is one nobody thought about; optax.adam itself needs "standard"."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture(autouse=True, scope="module")
def _maps_are_left():
    """A program takes 4 to 5 maps of memory, of which Linux lets a process have 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if maps.is_file() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def untyped():
    """Without the type checks of the tests, which refuse bad arguments before the library can."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
