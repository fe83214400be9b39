"""The log of an elastic run: a line for each step, written before the step counts.

It is the run: with the codes that it began from, its lines make the codes of every step again. A
line says which step it is, the key of the run, which queries and parts of the batch were evaluated,
and their losses, and now and then a hash of the codes before the step. It begins with a checksum:
a last line that was torn when a machine went down is no line.

Where a file system can add to a file, the log is one file; on others (object stores, which cannot)
it is a folder with an object for each line.
"""

import json
import os
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import fsspec
import numpy as np

__all__ = ["Log", "Record"]


class Record(NamedTuple):
    """What the log has of a step.

    Attributes:
      step: its number, from 0.
      key: the run's, two words; with the step's number it makes all of the step's directions.
      queries: the first query that was evaluated, and the one after the last.
      parts: the same for parts of the batch.
      losses: float32 (queries, 2), NaN where a query is skipped.
      look: the losses before and after the step, where it wanted them.
      hash: of the codes before the step, at some steps.

    Example:
      >>> one = Record(3, (0, 7), (0, 1), (0, 4), np.array([[0.5, np.nan]], np.float32))
      >>> Record.read(one.line()).losses.tolist()
      [[0.5, nan]]
    """

    step: int
    key: tuple[int, int]
    queries: tuple[int, int]
    parts: tuple[int, int]
    losses: np.ndarray
    look: np.ndarray | None = None
    hash: str = ""

    def line(self) -> str:
        """The line of the log."""
        content = {**self._asdict(), "losses": _numbers(self.losses)}
        content["look"] = None if self.look is None else _numbers(self.look)
        known = {name: x for name, x in content.items() if x not in (None, "")}
        return _checked(json.dumps(known, allow_nan=False))

    @classmethod
    def read(cls, line: str) -> "Record":
        """The record of a line.

        Raises:
          ValueError: it is none, or torn.
        """
        content = _read(line)
        try:
            losses, look = _array(content.pop("losses")), content.pop("look", None)
            pairs = {name: tuple(content.pop(name)) for name in ("key", "queries", "parts")}
            known = {"losses": losses, "look": None if look is None else _array(look)}
            return cls(**content, **pairs, **known)
        except (KeyError, TypeError) as error:
            raise ValueError(f"a line of it is no step: {error}") from None


class Log:
    """The log at an address, which one process at a time may write.

    Args:
      address: a file, or what else fsspec knows.

    Raises:
      ValueError: the address is none that fsspec knows.

    Example:
      >>> log = Log("memory://doctest/log")
      >>> log.begin({"bits": 4})
      >>> log.append(Record(0, (0, 7), (0, 1), (0, 1), np.array([[0.5, 0.25]], np.float32)))
      >>> head, records = Log("memory://doctest/log").read()
      >>> head, len(records)
      ({'bits': 4}, 1)
    """

    def __init__(self, address: str) -> None:
        try:
            self._files, self.path = fsspec.core.url_to_fs(address)
        except (ValueError, ImportError) as error:
            raise ValueError(f"log: {address} is no address that fsspec knows: {error}.") from None
        self.address = address
        self.is_local = "file" in np.atleast_1d(self._files.protocol)
        self._file: int | None = None
        self._count = 0

    def read(self) -> tuple[dict[str, Any], list[Record]]:
        """What the run began with, nothing where there is no run yet, and its steps.

        A last line that is torn is dropped, also from the file.

        Raises:
          ValueError: it is no log, or damaged before its last line.
        """
        good: list[str] = []
        for number, (line, is_last) in enumerate(self._lines()):
            try:
                _read(line)
            except ValueError as error:
                if is_last and number:
                    break
                if is_last and self._is_torn_beginning(line):
                    break
                raise ValueError(
                    f"log: line {number + 1} of {self.address} is damaged: {error}."
                ) from None
            good.append(line)
        self._count = len(good)
        if self.is_local and os.path.exists(self.path):
            size = sum(len(line.encode()) for line in good)
            if size < os.path.getsize(self.path):
                os.truncate(self.path, size)
        if not good:
            return {}, []
        head, records = _read(good[0]), [Record.read(line) for line in good[1:]]
        if "begins" not in head or [x.step for x in records] != list(range(len(records))):
            raise ValueError(f"log: {self.address} is no log of a run, or steps are missing.")
        return head["begins"], records

    def begin(self, content: dict[str, Any]) -> None:
        """Write the first line: what the run depends on."""
        self._write(_checked(json.dumps({"begins": content}, allow_nan=False)))

    def append(self, record: Record) -> None:
        """Write a step; when this returns, it will be found again.

        Raises:
          OSError: it could not be written, and nothing of it is there.
        """
        self._write(record.line())

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _write(self, line: str) -> None:
        if not self.is_local:
            self._files.makedirs(self.path, exist_ok=True)
            self._files.pipe_file(f"{self.path}/{self._count:09}", line.encode())
            self._count += 1
            return
        if self._file is None:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._file).st_size
        try:
            written, content = 0, line.encode()
            while written < len(content):
                written += os.write(self._file, content[written:])
            os.fsync(self._file)
        except BaseException:  # also Ctrl-C: half a line is none
            os.ftruncate(self._file, size)
            raise
        self._count += 1

    def _lines(self) -> Iterator[tuple[str, bool]]:
        """Each line, and whether it is the last one."""
        if self.is_local:
            if not os.path.exists(self.path):
                return
            with open(self.path, "rb") as file:
                lines = [x.decode(errors="replace") for x in file.read().splitlines(keepends=True)]
        else:
            self._files.invalidate_cache()
            found = self._files.ls(self.path, detail=False) if self._files.isdir(self.path) else []
            lines = [self._files.cat_file(name).decode(errors="replace") for name in sorted(found)]
        yield from ((line, number == len(lines)) for number, line in enumerate(lines, 1))

    @staticmethod
    def _is_torn_beginning(line: str) -> bool:
        """Whether a file's only line may be the begin of a first line."""
        return not line.endswith("\n") and line[9:].startswith('{"begins"'[: max(len(line) - 9, 0)])


def _checked(text: str) -> str:
    """A line, with its checksum first."""
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def _read(line: str) -> dict[str, Any]:
    """The content of a line.

    Raises:
      ValueError: it is not what was written.
    """
    head, _, text = line.partition(" ")
    if not text.endswith("\n") or head != f"{zlib.crc32(text[:-1].encode()):08x}":
        raise ValueError("its checksum is not that of its text")
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("it is no object")
    return content


def _numbers(array: np.ndarray) -> Any:
    """Float32 numbers as JSON has them, exactly, and null for what is not finite."""
    flat = [float(x) if np.isfinite(x) else None for x in array.ravel()]
    return flat if array.ndim == 1 else [flat[i : i + 2] for i in range(0, len(flat), 2)]


def _array(numbers: Any) -> np.ndarray:
    return np.array(numbers, dtype=object).astype(np.float32)  # None becomes NaN
