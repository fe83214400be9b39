"""The tables of attacks: rows go on where they were stopped, and are written into a document."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from experiments.attack import missed, pgd, tables
from experiments.attack.config import Config
from experiments.attack.tables import Places, Row

_CONFIG = Config(method="square", num_images=5, budget=30)
_ROW = Row("mnist", "Square Attack", _CONFIG, seeds=2)


@pytest.fixture
def places(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "ROWS", (_ROW,))
    monkeypatch.setattr(tables, "_CHUNK", 2)
    document = tmp_path / "attacks.md"
    document.write_text("# Attacks\n\n<!-- table: mnist -->\n<!-- end -->\n")
    results = str(tmp_path / "results")
    return Places(results=results, document=str(document), progress=False)


def found(places, row=_ROW):
    return tables.load(tables.Path(places.results), row).queries


@pytest.mark.slow
def test_a_row_goes_on_where_it_was_stopped(places, monkeypatch):
    one, calls = tables._one, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return one(*args)

    monkeypatch.setattr(tables, "_one", interrupted)
    with pytest.raises(KeyboardInterrupt, match="what was found is in"):
        tables.main(places)
    assert [len(queries) for queries in found(places)] == [2]
    tables.main(places)
    assert len(calls) == 2 + 2 + 3  # chunks: one kept and one stopped, two, and three of seed 1
    parts = found(places)

    monkeypatch.setattr(tables, "_CHUNK", 1_000)
    tables.main(dataclasses.replace(places, results=places.results + " whole"))
    whole = found(dataclasses.replace(places, results=places.results + " whole"))
    for some, all_at_once in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(some, all_at_once)

    text = tables.Path(places.document).read_text()
    assert "| Square Attack |      5 |     2 |" in text
    folder = tables.Path(places.document).with_suffix("")
    assert {path.name for path in folder.iterdir()} == {
        "mnist.csv", "failures.png", "examples_mnist.png",
    }  # fmt: skip


def test_a_row_of_other_settings_is_attacked_anew(places, monkeypatch):
    monkeypatch.setattr(tables, "_draw", lambda *args: None)
    tables.main(places)
    other = dataclasses.replace(_ROW, config=dataclasses.replace(_CONFIG, budget=31))
    assert len(found(places)) == 2
    assert found(places, other) == []


def test_rows_are_chosen_by_their_names(places):
    tables.main(dataclasses.replace(places, only="SignHunter"))
    assert found(places) == []
    tables.main(dataclasses.replace(places, render=True))
    assert "*not attacked yet*" in tables.Path(places.document).read_text()


def test_a_data_set_that_is_not_there_is_named(places, monkeypatch):
    config = dataclasses.replace(_CONFIG, dataset="cifar10", weights="cifar10")
    monkeypatch.setattr(tables, "ROWS", (Row("cifar10", "Square Attack", config),))
    tables.main(places)  # without --cifar10 its rows are left out
    with pytest.raises((OSError, ValueError), match="/nowhere"):
        tables.main(dataclasses.replace(places, cifar10="/nowhere"))


def test_so_many_images_are_attacked_and_a_later_run_goes_on(places, monkeypatch):
    sizes = []

    def counted(part, *rest):
        sizes.append(len(part.images))
        return np.full(len(part.images), 7, np.uint16), 1.0

    monkeypatch.setattr(tables, "_one", counted)
    monkeypatch.setattr(tables, "_draw", lambda *args: None)
    tables.main(dataclasses.replace(places, images=3))
    assert [len(queries) for queries in found(places)] == [3, 3]
    assert sizes == [2, 1, 2, 1]
    tables.main(places)
    assert [len(queries) for queries in found(places)] == [5, 5]
    assert sizes[4:] == [2, 2]


def test_bad_counts_of_images_are_refused():
    with pytest.raises(ValueError, match="images must be at least 0, got -1"):
        Places(images=-1)


# --- what attacks missed --------------------------------------------------------------------------


def test_gradients_find_what_there_is_and_nothing_else():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(6, 6, 1)).astype(np.float32)
    images = rng.uniform(0.4, 0.6, (70, 6, 6, 1)).astype(np.float32)  # more than a batch

    def logits_fn(x):
        score = (x * weights).sum((1, 2, 3))
        return jnp.stack([score, -score], axis=-1)

    scores = np.asarray(logits_fn(images))
    labels = scores.argmax(-1)
    least = np.abs(scores[:, 0]) / np.abs(weights).sum()  # an l_inf radius that suffices
    epsilon = float(np.median(least))
    found = pgd.find(logits_fn, images, labels, epsilon, restarts=1, steps=20)
    clear = np.abs(least - epsilon) > 1e-4
    assert_array_equal(found[clear], (least < epsilon)[clear])


def test_what_attacks_missed_is_counted_of_what_is_known(places, monkeypatch, capsys):
    tables.main(dataclasses.replace(places, images=3))
    document = tables.Path(places.document)
    document.write_text("<!-- table: missed -->\n<!-- end -->\n")
    asked = []

    def all_of_them(logits_fn, images, labels, epsilon, **settings):
        asked.append(len(images))
        return np.ones(len(images), bool)

    queries = [np.array([3, 0, 7], np.uint16), np.array([0, 0, 5], np.uint16)]
    for seed, one in enumerate(queries):
        tables._store(tables.Path(places.results), _ROW, seed).write(queries=one, seconds=1.0)
    monkeypatch.setattr(missed.pgd, "find", all_of_them)
    settings = missed.Gradients(
        results=places.results, document=places.document, progress=False, restarts=2
    )
    missed.main(settings)
    missed.main(settings)
    assert asked == [1]  # the image that no run found, once
    line = document.read_text().splitlines()[4]
    known, ours, hunter, square = line.split("|")[3:7]
    assert (int(known), ours.strip(), hunter.strip()) == (3, "-", "-")
    assert square.split() == ["1.5", "±", "6.4"]  # one of seed 0, two of seed 1


def test_attacks_are_given_other_digits_of_which_gradients_find_an_example(
    places, monkeypatch, capsys
):
    config = dataclasses.replace(_CONFIG, weights="mnist_robust")
    monkeypatch.setattr(tables, "ROWS", (Row("robust", "Square Attack", config, seeds=2),))
    monkeypatch.setattr(missed, "_OTHERS", (3, 8))
    monkeypatch.setattr(missed.pgd, "find", lambda *args, **settings: np.arange(5) % 2 == 0)
    document = tables.Path(places.document)
    document.write_text("<!-- table: known -->\n<!-- end -->\n")
    given = []
    attack = missed.attack.attack
    monkeypatch.setattr(
        missed.attack, "attack", lambda *args: given.append(args[1]) or attack(*args)
    )
    settings = missed.Gradients(results=places.results, document=places.document, progress=False)
    missed.main(settings)
    missed.main(settings)
    digits = tables.case(dataclasses.replace(config, num_images=8), places).images[[3, 5, 7]]
    assert_array_equal(given, [digits, digits])  # of two seeds, once
    cells = [cell.strip() for cell in document.read_text().splitlines()[4].split("|")]
    assert cells[1:4] == ["Square Attack", "3", "2"]
    assert 0 <= float(cells[4].split()[0]) <= 3
