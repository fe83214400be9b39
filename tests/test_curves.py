"""Curves of fine-tuning: runs that are made longer, what their page says, and what queries say."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_model
from test_finetune import _strict_promotion, config, files, run, slow  # noqa: F401

import zoqo_jax as zq
from experiments.finetune import curves, curves_page, seed_log, slopes, tables
from experiments.finetune.config import Config
from experiments.store import Row

SIZED = {
    "sized": True,
    "density": 0.0,
    "num_queries": 4,
    "query_batch": 4,
    "test": "dev",
    "looks": (20, 40),
}
CORES = {"train": "lora", "core": 2, "targets": ("q", "v")}
COLUMNS = {"structure": "columns", "guide_every": 2, "density": 0.125}


@pytest.mark.parametrize(
    "changes",
    [
        {**CORES, "method": "zoqo"},
        slow({**CORES, "method": "mezo"}),
        slow({**COLUMNS, "method": "zoqo"}),
        slow({**CORES, "method": "adam", "sized": False, "decay": 1.0}),
    ],
    ids=["cores", "float cores", "guided columns", "adam"],
)
def test_a_run_that_is_made_longer_is_the_longer_run(files, tmp_path, changes):  # noqa: F811
    """Bit for bit; and it is looked at after so many forward passes."""
    longer = {**SIZED, "steps": 14, **changes}
    whole = run(config(files, tmp_path / "whole", **longer))
    chosen = config(files, tmp_path / "parts", **{**longer, "steps": 7, "looks": (20,)})
    short = run(chosen)
    assert short.forward_passes >= 20 and len(short.history) == 1
    parts = run(dataclasses.replace(chosen, steps=14, looks=(20, 40)))
    pairs = zip(*map(jax.tree.leaves, (whole.params, parts.params)), strict=True)
    for one, other in pairs:
        np.testing.assert_array_equal(one, other)
    lines = [[line["dev_loss"] for line in one.history] for one in (whole, parts)]
    assert lines[0] == lines[1] and len(lines[0]) == 2
    assert whole.after == parts.after


def test_a_core_is_written_as_an_adapter_and_rebuilt_from_its_log(files, tmp_path):  # noqa: F811
    from safetensors.numpy import load_file

    chosen = config(files, tmp_path, **{**SIZED, **CORES, "steps": 5})
    outcome = run(chosen)
    _, _, again = seed_log.rebuild(tmp_path / "replay.npz", chosen.model)
    for one, other in zip(*map(jax.tree.leaves, (outcome.params, again)), strict=True):
        np.testing.assert_array_equal(one, other)
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_{}.weight"
    w = outcome.params["layers"]["v"]["weight"]
    change = w.materialise() - zq.dequantize(w.base)
    product = found[name.format("B")] @ found[name.format("A")]
    np.testing.assert_allclose(product, change[1], atol=1e-5)


def test_the_page_has_a_row_for_each_way(tmp_path):
    made = Config(model="tiny", output="-", sized=True, looks=(75, 150, 300))
    rows = [Row("layers_4", name, made, 2) for name in ("one", "other", "not run")]
    for row, passes in ((rows[0], (76, 152, 300)), (rows[1], (80, 150))):
        for seed in range(2):
            history = [
                {"step": n // 2, "forward_passes": n, "dev_loss": 0.5, "dev_accuracy": 0.7,
                 "seconds_a_step": 0.4} for n in passes
            ]  # fmt: skip
            before = {"accuracy": 0.5, "loss": 1.0}
            tables.store(tmp_path, row, seed).write(history=history, dev_before=before)
    document = tmp_path / "curves.md"
    document.write_text("<!-- table: layers_4 -->\n<!-- end -->\n<!-- table: else -->\nkept\n")
    curves_page.write(document, tmp_path, rows)
    lines = [" ".join(line.split()) for line in document.read_text().splitlines()]
    assert "| one | 2 | 70.0 ± 0.0 / 0.500 ± 0.000 | 200 |" in lines
    assert "| other | 2 | | 200 |" in lines  # not so long
    assert "kept" in lines
    assert (tmp_path / "curves" / "layers_4.png").stat().st_size > 10_000


@pytest.mark.slow
def test_slopes_are_measured_at_a_model_for_every_kind_of_direction(tmp_path, monkeypatch):
    model = tiny_model.write_model(tmp_path / "tiny.gguf")
    examples = tiny_model.write_examples(tmp_path / "examples.jsonl", 900)
    base = Config(
        model=str(model), output="-", layers=1, sized=True, batch_size=8,
        num_queries=4, query_batch=4,
    )  # fmt: skip
    kinds = {
        "codes": {}, "guided": COLUMNS, "float cores": {**CORES, "method": "mezo"}, "cores": CORES,
    }  # fmt: skip
    rows = [Row("layers_1", name, dataclasses.replace(base, **one)) for name, one in kinds.items()]
    monkeypatch.setattr(curves, "rows", lambda wanted: rows)
    document = tmp_path / "curves.md"
    document.write_text("<!-- table: slopes_1_at_first -->\n<!-- end -->\n")
    slopes.main(
        slopes.Wanted(
            models=(str(model),), names=("at first",), layers=1, queries=64, examples=128,
            results=str(tmp_path / "results"), cache=str(tmp_path / "states"),
            document=str(document), sst2=str(examples),
        )
    )  # fmt: skip
    found = {
        line.split("|")[1].strip(): [
            float(x.replace(",", "").replace("no bound", "inf")) for x in line.split("|")[2:-1]
        ]
        for line in document.read_text().splitlines()
        if line.startswith("| ") and "dims" not in line and "--" not in line
    }
    assert set(found) == set(kinds)
    # A core of 2 x 2 for each of two matrices: eight numbers, all of which every query displaces.
    assert 4 < found["float cores"][0] < 16
    assert found["codes"][0] > 500
    for row in found.values():
        assert row[3] == pytest.approx(row[2], rel=1.0)


def test_a_store_of_a_shorter_run_is_the_longer_ones(tmp_path):
    rows = [next(curves.rows(curves.Wanted(passes=n))) for n in (75, 600)]
    tables.store(tmp_path, rows[0], 0).write(history=[{"forward_passes": 76}])
    assert tables.store(tmp_path, rows[1], 0).content
    assert not curves._is_done(
        tables.store(tmp_path, rows[1], 0).content, curves.Wanted(passes=600)
    )
    names = [Path(row.stem(0)).name for row in curves.rows(curves.Wanted())]
    assert len(set(names)) == len(names)
