"""The README's first picture: what is kept of a run, and that documents say the same."""

import itertools
import json
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import tiny_model
from matplotlib.text import Text

from experiments import drawing
from experiments.finetune import outputs, picture, training
from experiments.finetune.config import Config
from experiments.finetune.models import loading

ROOT = Path(__file__).resolve().parent.parent
KEPT = json.loads((ROOT / "experiments/finetune/results/film_reviews.json").read_text())


def test_documents_say_what_the_picture_shows():
    before, after = (
        f"{100 * KEPT['scores'][when]['accuracy']:.1f}" for when in ("before", "after")
    )
    readme, page = ((ROOT / name).read_text() for name in ("README.md", "docs/finetune.md"))
    assert f"{before} to {after} %" in readme
    assert f"{before}%" in page and f"{after}%" in page
    counts = KEPT["answers"]["counts"]
    right = 1 - (counts["forgotten"] + counts["still wrong"]) / KEPT["test_examples"]
    assert f"{100 * right:.1f}" == after
    assert KEPT["file"]["bytes"][0] == KEPT["file"]["bytes"][1]
    assert KEPT["file"]["other_tensors_changed"] == 0


@pytest.mark.slow
def test_what_is_kept_of_a_run(tmp_path):
    model = tiny_model.write_model(tmp_path / "tiny.gguf")
    examples = tiny_model.write_examples(tmp_path / "examples.jsonl")
    config = Config(
        model=str(model), output=str(tmp_path / "run"), data=str(examples), steps=2, batch_size=4,
        eval_every=1, density=0.125, test_examples=0,
    )  # fmt: skip
    outcome = training.train(loading.load(model), config, progress=False)
    outputs.write(config, outcome, 1.0)
    found = picture.summary(tmp_path / "run")
    file = found["file"]
    assert 0 < file["moved"] < file["codes"]
    assert file["bytes"][0] == file["bytes"][1] and file["other_tensors_changed"] == 0
    assert [line["forward_passes"] for line in found["history"]] == [2, 4]
    wrong = found["answers"]["counts"]["forgotten"] + found["answers"]["counts"]["still wrong"]
    accuracy = 1 - wrong / found["test_examples"]
    assert np.isclose(accuracy, found["scores"]["after"]["accuracy"])


def test_picture_is_drawn(tmp_path):
    picture.draw(KEPT, (750.0, 804.0), tmp_path / "in_place.png")
    pixels = matplotlib.image.imread(tmp_path / "in_place.png")
    assert pixels.shape[0] > 600 and pixels[..., :3].min() < 0.1


def test_names_at_ends_of_lines_do_not_overlap():
    from matplotlib.figure import Figure

    fig = Figure(figsize=(5, 3), layout="constrained")
    axis = fig.subplots()
    for number in range(6):
        axis.plot(
            [0, 1], [number, 3 + number / 100], label=f"line {number}", **drawing.style(number)
        )
    axis.plot([], [], label="measured nowhere")
    axis.plot([0, 1], [np.nan, np.nan], label="nor this")
    drawing.label_ends(axis)
    assert len(axis.texts) == 6
    fig.draw_without_rendering()
    boxes = sorted((Text.get_window_extent(text) for text in axis.texts), key=lambda box: box.y0)
    assert all(a.y1 <= b.y0 + 1 for a, b in itertools.pairwise(boxes))
    assert all(box.x0 > axis.get_window_extent().x1 for box in boxes)
    # No two lines are told apart by their colour alone.
    kinds = [(drawing.style(n)["linestyle"], drawing.style(n)["marker"]) for n in range(7)]
    assert len(set(kinds)) == 7
