"""Files of examples as people have them: TSV, CSV and JSON lines."""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.finetune.data.examples import collect
from experiments.finetune.data.texts import SENTIMENT, Texts

__all__ = ["ENDINGS", "read", "sentiment"]

_MOST_LABELS = 100
_TEXT = ("text", "sentence")


def read(path: Path) -> Texts:
    """The examples of a file, by the ending of its name.

    Args:
      path: of lines "sentence TAB 0 or 1" (.tsv), of a table with a header (.csv), or of a JSON
        object a line (.jsonl, .json), see `examples.collect`. A table has the columns prompt and
        completion; prompt, choices (a list, as JSON has it) and answer; or text (or sentence) and
        label. Labels 0 and 1 are asked as film reviews, all others by their own words.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is empty, or a line says something else; it is named.
    """
    return ENDINGS[path.suffix](path)


def sentiment(rated: Sequence[tuple[str, int]]) -> Texts:
    """Sentences that praise (1) or blame (0).

    Example:
      >>> sentiment([("A fine film.", 1)]).prompts
      ['A fine film. It was']
    """
    prompts = [f"{text} It was" for text, _ in rated]
    return Texts(prompts, SENTIMENT, [label for _, label in rated], [])


def _tsv(path: Path) -> Texts:
    rated = []
    for number, line in _lines(path):
        sentence, tab, label = line.rpartition("\t")
        if not tab or not sentence.strip() or label not in ("0", "1"):
            raise ValueError(f"{path}, line {number}: not 'sentence TAB 0 or 1': {line[:60]!r}.")
        rated.append((sentence, int(label)))
    return sentiment(rated)


def _json_lines(path: Path) -> Texts:
    def objects() -> Iterator[tuple[str, Any]]:
        for number, line in _lines(path):
            place = f"{path}, line {number}"
            try:
                one = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}: no JSON: {error}.") from error
            yield place, one

    return collect(objects())


def _csv(path: Path) -> Texts:
    rows = _rows(path)
    _, header = next(rows)
    names = [name.strip().lower() for name in header]
    text = next((name for name in _TEXT if name in names), None)
    if len(set(names)) < len(names):
        raise ValueError(f"{path}, line 1: a column is named twice: {', '.join(names)}.")
    filled = _named(path, names, rows)
    if "prompt" in names and ("completion" in names or {"choices", "answer"} <= set(names)):
        return collect((place, _with_choices(row, place)) for place, row in filled)
    if text and "label" in names:
        return _labelled([(place, row[text], row["label"].strip()) for place, row in filled])
    raise ValueError(
        f"{path}, line 1: wants a header with the columns prompt and completion, prompt, choices "
        f"and answer, or text and label, got {', '.join(map(repr, header))[:120]}."
    )


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a table that are not empty, two at least, with the lines they begin at."""
    text = _text(path)
    head = text.split("\n", 1)[0]
    comma = ";" if ";" in head and "," not in head else ","  # where a comma is a decimal point
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=comma, strict=True)
    found, begin = 0, 1
    try:
        for row in reader:
            if row:
                found += 1
                yield begin, row
            begin = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {begin}: no CSV: {error}.") from error
    if found < 2:
        raise ValueError(f"{path}: the file is empty, but for a header.")


def _named(
    path: Path, names: list[str], rows: Iterator[tuple[int, list[str]]]
) -> Iterator[tuple[str, dict[str, str]]]:
    for number, row in rows:
        place = f"{path}, line {number}"
        if len(row) != len(names):
            raise ValueError(
                f"{place}: {len(row)} fields, the header has {len(names)}: {row!r:.60}."
            )
        yield place, dict(zip(names, row, strict=True))


def _with_choices(row: dict[str, str], place: str) -> dict[str, Any]:
    """A row as JSON lines would have it: choices a list, an answer that is a number a number."""
    one: dict[str, Any] = {k: row[k] for k in ("prompt", "completion") if k in row}
    if "completion" in one or "choices" not in row:
        return one
    try:
        choices = json.loads(row["choices"])
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f'{place}: choices must be a list as ["one", "two"], got {row["choices"]!r:.60}.'
        ) from error
    answer = row["answer"]
    is_number = answer.strip().isdecimal() and not (isinstance(choices, list) and answer in choices)
    return {**one, "choices": choices, "answer": int(answer) if is_number else answer}


def _labelled(rows: list[tuple[str, str, str]]) -> Texts:
    """Texts with labels: reviews where these are 0 and 1, else the labels are what is asked for."""
    for place, text, label in rows:
        if not text.strip() or not label:
            raise ValueError(f"{place}: the {'label' if text.strip() else 'text'} is empty.")
    labels = sorted({label for _, _, label in rows})
    if set(labels) <= {"0", "1"}:
        return sentiment([(text, int(label)) for _, text, label in rows])
    if len(labels) > _MOST_LABELS:
        raise ValueError(
            f"{rows[0][0]}: {len(labels)} different labels, more than {_MOST_LABELS}: what is to "
            "be written freely goes in columns prompt and completion."
        )
    prompts = [f"{text}\nLabel:" for _, text, _ in rows]
    answers = [labels.index(label) for _, _, label in rows]
    return Texts(prompts, tuple(f" {label}" for label in labels), answers, [])


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a text file, of which there must be some."""
    text = _text(path).replace("\r\n", "\n").replace("\r", "\n")
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{path}: the file is empty.")
    return iter(lines)


def _text(path: Path) -> str:
    """What a file of UTF-8 text says."""
    if not path.is_file():
        raise FileNotFoundError(f"data: there is no file {path}.")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")  # Windows' editors mark UTF-8 in the first bytes
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: no UTF-8 text.") from error


ENDINGS: dict[str, Callable[[Path], Texts]] = {
    ".tsv": _tsv, ".csv": _csv, ".jsonl": _json_lines, ".json": _json_lines
}  # fmt: skip
"""What reads a file, by the ending of its name."""
