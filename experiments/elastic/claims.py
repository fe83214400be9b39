"""One head at a time for a log, as far as its file system can say so."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from experiments.elastic.log import Log
from experiments.files import locked

__all__ = ["claimed_log"]


@contextlib.contextmanager
def claimed_log(address: str) -> Iterator[None]:
    """A log that no other process of this machine writes meanwhile.

    Of other file systems than the local one it is for the user to see to it.

    Raises:
      ValueError: another has it, or it cannot be written there.
    """
    log = Log(address)
    if not log.is_local:
        yield
        return
    path = Path(log.path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = locked(Path(f"{path}.lock"), "log", f"writes {path}: wait for it, or stop it.")
    except OSError as error:
        raise ValueError(f"log: cannot write {path}: {error.strerror}.") from None
    try:
        yield
    finally:
        os.close(lock)
