"""Results that a run adds to a file as it finds them, and goes on from when it is run again."""

import dataclasses
import json
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from experiments.command import Stopped
from experiments.files import claimed, plain, read_json, write_json
from zoqo_jax.interop.files import replacing

__all__ = ["Row", "Store", "changed", "defaults", "storing"]


class Store:
    """A file of results and of the settings that they depend on, written whole or not at all.

    Args:
      path: of JSON, or of arrays if it ends with ".npz".
      settings: what the results depend on.
      name: what the file calls these.
      usual: of settings that older files do not have, what they were; see `defaults`.

    Attributes:
      content: the results in the file; none if these depend on other settings.
      changed: which setting is another, in words; empty where none is.

    Raises:
      ValueError: the file is damaged.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder, "results", "one.json")
      ...     Store(path, {"bits": 4}).write(accuracy=0.5)
      ...     same, other = Store(path, {"bits": 4}), Store(path, {"bits": 8})
      >>> same.content, other.content, other.changed
      ({'accuracy': 0.5}, {}, 'another bits, 4 instead of 8')
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        name: str = "settings",
        usual: dict[str, Any] | None = None,
    ) -> None:
        self.path, self._name, self._settings = path, name, plain(settings)
        self._holds_arrays = path.suffix == ".npz"
        self.content = _read_arrays(path, name) if self._holds_arrays else read_json(path)
        found = self.content.pop(name, {}) if self.content else self._settings
        self.changed = changed(found, self._settings, usual)
        self.content = {} if self.changed else self.content

    def write(self, **results: Any) -> None:
        """Add results, or replace those of the same name, and write the file."""
        self.content |= results
        if not self._holds_arrays:
            write_json(self.path, {self._name: self._settings, **self.content})
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(self._settings, sort_keys=True)
        with replacing(self.path) as file:
            np.savez_compressed(file, **{self._name: settings}, **self.content)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
      table: the table's name.
      name: the row's.
      config: the settings of its first run, a dataclass.
      seeds: how many runs, with as many seeds.
    """

    table: str
    name: str
    config: Any
    seeds: int = 1

    def stem(self, seed: int) -> str:
        """The name of a run's file.

        Example:
          >>> Row("mnist", "ZO-SignSGD, 8 bit", None).stem(0)
          'mnist_zo_signsgd_8_bit_0'
        """
        words = f"{self.table} {self.name} {seed}".lower()
        return "_".join("".join(c if c.isalnum() else " " for c in words).split())

    def store(self, folder: Path, seed: int, ending: str, leave_out: Collection[str]) -> Store:
        """The results of a run.

        Args:
          folder: of results.
          seed: of the run.
          ending: of the file's name.
          leave_out: settings that the results do not depend on.
        """
        config = dataclasses.asdict(dataclasses.replace(self.config, seed=seed))
        settings = {name: x for name, x in config.items() if name not in leave_out}
        path = folder / f"{self.stem(seed)}{ending}"
        return Store(path, settings, usual=defaults(self.config))


def changed(
    before: dict[str, Any], now: dict[str, Any], usual: dict[str, Any] | None = None
) -> str:
    """The first setting that is another now, in words; empty where none is.

    Args:
      before: settings by name.
      now: settings by name.
      usual: what those of `now` were where `before` does not name them, being older than they are.

    Example:
      >>> changed({"bits": 4}, {"bits": 4, "dev": ""}, {"dev": ""})
      ''
      >>> changed({"bits": 4}, {"bits": 4, "dev": "dev.csv"}, {"dev": ""})
      "another dev, '' instead of 'dev.csv'"
    """
    before = {**{name: x for name, x in (usual or {}).items() if name in now}, **before}
    for name in {**now, **before}:
        if before.get(name) != now.get(name):
            return f"another {name}, {before.get(name)!r} instead of {now.get(name)!r}"
    return ""


def defaults(config: Any) -> dict[str, Any]:
    """The defaults of a dataclass's settings; of one added later, what leaves all as it was.

    A field whose default has changed since then has that in its metadata, as "was".

    Example:
      >>> defaults(Row("mnist", "ZO-SignSGD", None))
      {'seeds': 1}
    """
    fields = dataclasses.fields(config)
    usual = {x.name: x.metadata.get("was", x.default) for x in fields}
    return plain({name: x for name, x in usual.items() if x is not dataclasses.MISSING})


@contextmanager
def storing(folder: Path, allows: Callable[[str], bool] = lambda name: True) -> Iterator[None]:
    """Claim a folder of results, see `claimed`; whoever stops the command is told of it."""
    with claimed("results", folder, allows):
        try:
            yield
        except KeyboardInterrupt:
            raise Stopped(f"what was found is in {folder}") from None


def _read_arrays(path: Path, name: str) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        with path.open("rb") as whole, np.load(whole, allow_pickle=False) as file:
            content = dict(file)
        return {**content, name: json.loads(str(content[name]))}
    except (KeyError, EOFError, ValueError, BadZipFile) as error:
        raise ValueError(f"{path} is damaged, delete it: {error}.") from error
