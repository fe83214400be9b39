"""Checkpoints of an elastic run, beside its log: newcomers begin there rather than at step 0."""

import io
import zlib
from zipfile import BadZipFile

import fsspec
import numpy as np

from experiments.elastic.worker import Start

__all__ = ["Checkpoints"]

_KEPT = 2


class Checkpoints:
    """The newest checkpoints of a log.

    Args:
      log: the log's address; checkpoints are its name with ".checkpoint-" and a step added.

    Example:
      >>> some = Checkpoints("memory://doctest/of/log")
      >>> some.write(Start(5, [np.arange(3)]))
      >>> found = some.newest(7)
      >>> found.step, found.arrays[0].tolist(), some.newest(4)
      (5, [0, 1, 2], None)
    """

    def __init__(self, log: str) -> None:
        self._files, self._path = fsspec.core.url_to_fs(log)

    def write(self, start: Start) -> None:
        """Write a checkpoint, whole or not at all, and delete those before the last two."""
        content = io.BytesIO()
        np.savez(content, **{str(i): x for i, x in enumerate(start.arrays)})
        path, part = f"{self._path}.checkpoint-{start.step:09}", f"{self._path}.part"
        self._files.pipe_file(part, content.getvalue())
        self._files.mv(part, path)
        for old in self._names()[:-_KEPT]:
            self._files.rm_file(old)

    def newest(self, step: int) -> Start | None:
        """The newest checkpoint of at most this step that can be read, or None."""
        for name in reversed(self._names()):
            number = int(name.rpartition("-")[2])
            if number > step:
                continue
            try:
                with np.load(io.BytesIO(self._files.cat_file(name)), allow_pickle=False) as file:
                    return Start(number, [file[str(i)] for i in range(len(file.files))])
            except (BadZipFile, ValueError, KeyError, EOFError, OSError, zlib.error):
                continue  # it is damaged; one before it will do
        return None

    def _names(self) -> list[str]:
        self._files.invalidate_cache()
        found = self._files.glob(f"{self._path}.checkpoint-*")
        return sorted(x for x in found if x.rpartition("-")[2].isdigit())
