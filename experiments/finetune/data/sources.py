"""Where examples come from: bundled, tensorflow-datasets, folders and files; and their splits."""

import gzip
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import numpy as np

from experiments.finetune.data import files
from experiments.finetune.data.texts import Split, Texts

__all__ = ["load", "load_all", "load_whole", "remarks"]

_ASSETS = Path(__file__).resolve().parents[1] / "assets"


def load(source: str, split: Split) -> Texts:
    """Examples of a split.

    Args:
      source: "reviews" (bundled: rated sentences of film reviews; a tenth each for dev and test),
        "tfds:sst2" (tensorflow-datasets' glue/sst2; its dev is our test, a tenth of train our dev),
        a folder with a file each, train.tsv or train.csv or train.jsonl and so on, or a file, see
        `files.read`; of a single file a tenth each is dev and test.
      split: "train", "dev" or "test".

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: an empty file, a line that says something else, or a single file of fewer than ten
        examples; it is named.

    Example:
      >>> texts = load("reviews", "dev")
      >>> len(texts.prompts), texts.prompts[0], texts.choices[texts.answers[0]]
      (1056, "If you're looking for a smart, ... It was", ' great')
    """
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}, got {split!r}.")
    return _splits(source, {split}, ("dev", "test"))[split]


def load_whole(source: str, split: Split = "test") -> Texts:
    """All examples of a file; of anything else, those of a split.

    Args:
      source: as of `load`.
      split: which, where the source is no single file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: as `load`, but a file may have any number of examples.

    Example:
      >>> load_whole("reviews", "dev") == load("reviews", "dev")
      True
    """
    is_file = Path(source).suffix in files.ENDINGS and not Path(source).is_dir()
    return files.read(Path(source)) if is_file else load(source, split)


def load_all(source: str, dev: str = "", test: str = "") -> dict[Split, Texts]:
    """The examples of all splits.

    Args:
      source: as of `load`.
      dev: where the dev examples are, as of `load_whole`; empty: among those of the source.
      test: where the test examples are.

    Raises:
      ValueError: as `load`; or splits that ask for different things, or training examples that all
        have the same answer.
    """
    apart: dict[Split, str] = {"dev": dev, "test": test}
    cut = [split for split, place in apart.items() if not place]
    texts = _splits(source, {"train", *cut}, cut)
    texts |= {split: load_whole(place, split) for split, place in apart.items() if place}
    texts = {split: texts[split] for split in get_args(Split)}
    train = texts["train"]
    for split, one in texts.items():
        place = apart.get(split) or source
        if one.kind == train.kind and set(one.choices) < set(train.choices):
            texts[split] = _with_all_choices(one, train.choices)  # not every label is in every file
        elif one.kind != train.kind or (
            one.choices and train.choices and one.choices != train.choices
        ):
            raise ValueError(
                f"data: {place}: {split} has {one.choices or one.kind} to choose from, train "
                f"{train.choices or train.kind}."
            )
    if train.choices and len(set(train.answers)) == 1:
        raise ValueError(
            f"data: {source}: all {len(train.answers)} training examples have the answer "
            f"{train.choices[train.answers[0]]!r}."
        )
    return texts


def remarks(texts: Mapping[Split, Texts]) -> list[str]:
    """What a reader of a score should know of the examples, a sentence each.

    Examples are the same if their prompts (and completions) are, but for white space.

    Example:
      >>> train, test = (Texts(x, ("no", "yes"), [0, 1], []) for x in (["a", "b"], ["c", "a "]))
      >>> remarks({"train": train, "test": test})
      ['1 of 2 test examples is in train, too.']
    """
    seen = {split: [" ".join(one.split()) for one in _all_of(x)] for split, x in texts.items()}
    found = []
    for split, other in (("dev", "train"), ("test", "train"), ("test", "dev")):
        others = set(seen.get(other, ()))
        both = [one for one in seen.get(split, ()) if one in others]
        if both:
            verb = "is" if len(both) == 1 else "are"
            found.append(
                f"{len(both)} of {len(seen[split])} {split} examples {verb} in {other}, too."
            )
    for split, one in texts.items():
        if split != "train" and one.choices and len(set(one.answers)) == 1:
            answer = one.choices[one.answers[0]]
            found.append(f"All {len(one.answers)} {split} examples have the answer {answer!r}.")
    return found


def _all_of(texts: Texts) -> list[str]:
    """What tells examples from each other."""
    if texts.kind != "completions":
        return texts.prompts
    return list(map("".join, zip(texts.prompts, texts.completions, strict=True)))


def _with_all_choices(texts: Texts, choices: tuple[str, ...]) -> Texts:
    """Examples with some of the choices, with all of them."""
    answers = [choices.index(texts.choices[answer]) for answer in texts.answers]
    return texts._replace(choices=choices, answers=answers)


def _splits(source: str, wanted: set[Split], cut: list[Split]) -> dict[Split, Texts]:
    """The wanted splits; those of `cut` are a tenth each of a single file."""
    if source == "reviews":
        content = gzip.decompress((_ASSETS / "film_reviews.tsv.gz").read_bytes()).decode()
        rows = [line.split("\t") for line in content.splitlines()]
        rated = [(text, int(float(rating) > 0)) for text, rating in rows if float(rating)]
        return _tenths(files.sentiment(rated), wanted, cut)
    if source == "tfds:sst2":
        return {split: _from_tfds(split) for split in wanted}
    path = Path(source)
    if path.is_dir():
        return {split: files.read(_in_folder(path, split)) for split in wanted}
    if path.suffix not in files.ENDINGS:
        raise FileNotFoundError(
            "data must be reviews, tfds:sst2, a folder, or a .tsv, .csv or .jsonl file, got "
            f"{source!r}."
        )
    texts = files.read(path)
    if cut and len(texts.prompts) < 10:
        raise ValueError(
            f"{path}: {len(texts.prompts)} examples are too few, as a tenth each is for "
            f"{' and '.join(cut)}: give at least 10, or a folder with a file for each, or a file "
            "of their own by --dev and --test."
        )
    return _tenths(texts, wanted, cut)


def _in_folder(folder: Path, split: Split) -> Path:
    """The one file of a split."""
    names = [f"{split}{ending}" for ending in (".tsv", ".csv", ".jsonl")]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise FileNotFoundError(f"data: there is no {', '.join(names)} in {folder}.")
    if len(found) > 1:
        raise ValueError(f"data: {folder} has both {found[0].name} and {found[1].name}.")
    return found[0]


def _tenths(texts: Texts, wanted: set[Split], cut: list[Split]) -> dict[Split, Texts]:
    """A tenth of the examples at random for each split that is cut off; the rest is train's."""
    tenth = len(texts.prompts) // 10
    order = np.random.default_rng(0).permutation(len(texts.prompts))
    parts = {"dev": order[:tenth], "test": order[tenth : 2 * tenth], "train": order[2 * tenth :]}
    left = [parts[split] for split in parts if split not in cut]  # those that are not cut off
    parts["train"] = np.concatenate(left)
    return {split: texts.take(parts[split]) for split in wanted}


def _from_tfds(split: Split) -> Texts:
    import tensorflow_datasets as tfds

    source = tfds.data_source("glue/sst2", split="validation" if split == "test" else "train")
    rated = [(str(one["sentence"], "utf-8").strip(), int(one["label"])) for one in source]
    if split != "test":
        rated = [one for i, one in enumerate(rated) if (i % 10 == 0) == (split == "dev")]
    return files.sentiment(rated)
