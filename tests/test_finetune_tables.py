"""The tables of fine-tuning: rows run in processes of their own, and are found again."""

import dataclasses
from pathlib import Path

import pytest
import tiny_model

from experiments.finetune import tables
from experiments.finetune.config import Config
from experiments.finetune.tables import Places, Row


@pytest.fixture
def places(tmp_path):
    document = tmp_path / "finetune.md"
    marks = "".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in ("sst2", "memory"))
    document.write_text(f"# Fine-tuning\n\n{marks}")
    return Places(
        results=str(tmp_path / "results"), work=str(tmp_path / "work"), document=str(document)
    )


def keep(places, row, seed, **figures):
    """Write what a run of a row would have come to."""
    looks = [
        {"forward_passes": n, "dev_loss": 1 / n, "dev_accuracy": n / 100} for n in (10, 20, 30)
    ]
    outcome = {
        "before": {"accuracy": 0.5, "loss": 1.0}, "after": {"accuracy": 0.75, "loss": 0.5},
        "forward_passes": 30, "seconds": 120.0, "resident_mib": 500.0, "history": looks,
    }  # fmt: skip
    tables.store(Path(places.results), row, seed).write(**{**outcome, **figures})


def test_tables_say_what_runs_came_to(places, monkeypatch):
    config = Config(model="tiny", output="-", train="lora")
    rows = (
        Row("sst2", "one", config, seeds=2),
        Row("sst2", "other", dataclasses.replace(config, bits=4)),
        Row("memory", "inference", dataclasses.replace(config, steps=0)),
        Row("memory", "training", dataclasses.replace(config, steps=1)),
    )
    monkeypatch.setattr(tables, "ROWS", rows)
    for seed, accuracy in ((0, 0.7), (1, 0.8)):
        keep(places, rows[0], seed, after={"accuracy": accuracy, "loss": 0.5})
    keep(places, rows[2], 0, history=[])
    keep(places, rows[3], 0, resident_mib=550.0)
    tables.main(dataclasses.replace(places, render=True))
    text = Path(places.document).read_text()
    lines = [" ".join(line.replace("|", " ").split()) for line in text.splitlines()]
    assert "nothing 0 50.0 1.000" in lines
    assert "one 2 30 75.0 ± 63.5 0.500 ± 0.000 2.0 500" in lines  # t of one degree: 12.7
    assert not any(line.startswith("other") for line in lines)  # not run yet
    assert "training 550 1.10" in lines
    assert (Path(places.document).with_suffix("") / "sst2.png").stat().st_size > 10_000

    # A run of other settings is none of the row's.
    changed = dataclasses.replace(rows[0], config=dataclasses.replace(config, rank=4))
    assert tables.found(Path(places.results), changed) == []


@pytest.mark.slow
def test_a_row_runs_in_a_process_of_its_own_once(places, tmp_path, monkeypatch):
    model = tiny_model.write_model(tmp_path / "tiny.gguf")
    examples = tiny_model.write_examples(tmp_path / "examples.jsonl")
    config = Config(
        model=str(model), output="-", steps=2, batch_size=4, eval_every=1, density=0.125,
        test_examples=0,
    )  # fmt: skip
    row = Row("sst2", "codes", config, seeds=2)
    monkeypatch.setattr(tables, "ROWS", (row,))
    places = dataclasses.replace(places, sst2=str(examples))
    tables.main(places)
    outcomes = tables.found(Path(places.results), row)
    assert [outcome["forward_passes"] for outcome in outcomes] == [4, 4]
    assert min(outcome["resident_mib"] for outcome in outcomes) > 100
    assert outcomes[0]["before"] == outcomes[1]["before"]  # read once
    assert "| codes" in Path(places.document).read_text()
    monkeypatch.setattr(tables, "run", lambda *_: pytest.fail("ran again"))
    tables.main(places)

    broken = Row("sst2", "broken", dataclasses.replace(config, model=str(tmp_path / "none.gguf")))
    monkeypatch.undo()
    monkeypatch.setattr(tables, "ROWS", (broken,))
    with pytest.raises(SystemExit, match="broken, seed 0, ended with status 1"):
        tables.main(places)
