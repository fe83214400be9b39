"""The laboratory: how claims are measured, kept and shown; each claim has tests of its own."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import markdown
from experiments.laboratory.claim import Claim, check


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings.

    Attributes:
      numbers: to square.
    """

    numbers: int = 3


def make(measured):
    def measure(config, cell):
        if measured is not None and len(measured) == 2:
            raise KeyboardInterrupt
        if measured is not None:
            measured.append(cell["n"])
        return {"square": np.float32(cell["n"] ** 2)}

    return Claim(
        name="squares",
        config=Config,
        cells=lambda config: [{"n": n} for n in range(config.numbers)],
        measure=measure,
        table=lambda found: markdown.table(["n", "square"], [map(str, x.values()) for x in found]),
        draw=lambda found, fig: fig.subplots().plot([one["square"] for one in found]),
    )


def test_what_was_measured_is_kept_and_not_measured_again(tmp_path):
    document = tmp_path / "page.md"
    document.write_text("<!-- table: squares -->\n<!-- end -->\n<!-- table: b -->\nx<!-- end -->")
    where = {"results": tmp_path / "results", "document": document, "progress": False}
    measured = []
    with pytest.raises(KeyboardInterrupt):
        check(make(measured), Config(), **where)
    assert measured == [0, 1]
    again = []
    assert check(make(again), Config(), **where)[2] == {"n": 2, "square": 4.0}
    assert again == [2]
    text = document.read_text()
    assert "| 2 |    4.0 |" in text and "numbers 3" in text and "jax " in text
    assert "<!-- table: b -->\nx<!-- end -->" in text
    assert (tmp_path / "page" / "squares.png").stat().st_size > 1000

    # Measurements with other settings are neither taken for these nor written over.
    with pytest.raises(ValueError, match="has measurements with another numbers, 3"):
        check(make([]), Config(numbers=1), **where)
    assert len(json.loads((tmp_path / "results" / "squares.json").read_text())["cells"]) == 3


def test_a_page_of_its_own_lies_beside_the_measurements(tmp_path):
    where = {"results": tmp_path, "document": tmp_path / "squares.md", "progress": False}
    check(make([]), Config(numbers=1), **where)
    assert {x.name for x in tmp_path.iterdir()} == {"squares.json", "squares.md", "squares.png"}
    assert "numbers 1" in (tmp_path / "squares.md").read_text()


def test_what_is_not_finite_is_refused(tmp_path):
    claim = make(None)._replace(measure=lambda config, cell: {"square": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        check(claim, Config(), results=tmp_path, document=tmp_path / "page.md", progress=False)
