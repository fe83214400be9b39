"""compressed-tensors: beside the library that wrote the files, bit for bit, and damaged files."""

from pathlib import Path

import format_checks as checks
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zoqo_jax.interop import compressed_tensors as form

FILES = Path(__file__).parent / "files" / "compressed_tensors"
FOLDERS = sorted(path.name for path in FILES.iterdir())
BITS = {"I8": 8, "I32": None, "U8": 4}


def width(array, parts):
    """Bits of a code in the file."""
    if any(part.dtype == np.int8 and part.ndim > 1 for part in parts.values()):
        return 8
    return 4 if len(array.grid.levels) == 15 else len(array.grid.levels).bit_length() - 1


@pytest.mark.parametrize("folder", FOLDERS)
def test_values_are_those_of_the_library(folder):
    tensors, config, expected = checks.read(FILES / folder)
    found = checks.decoded(form, tensors, config)
    assert set(found) == set(expected)
    for name, (array, parts, _) in found.items():
        scale = parts[f"{name}_scale"]
        if scale.dtype == np.float32 and f"{name}_zero_point" in parts:
            # scale * q and scale * z are rounded before they are subtracted: the larger's ulp.
            largest = np.abs(scale).max() * array.grid.high
            np.testing.assert_allclose(
                checks.values(array), expected[name], rtol=0, atol=np.spacing(largest)
            )
        else:
            np.testing.assert_array_equal(checks.values(array), expected[name])


@pytest.mark.parametrize("folder", FOLDERS)
def test_unchanged_codes_give_the_identical_bytes(folder):
    for name, found in checks.decoded(form, *checks.read(FILES / folder)[:2]).items():
        assert len(checks.check_encoding(form, name, *found)) == 1
