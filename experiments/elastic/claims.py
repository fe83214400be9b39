"""One head at a time for a log, as far as its file system can say so."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from experiments.elastic.log import Log

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
        lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ValueError(f"log: cannot write {path}: {error.strerror}.") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise ValueError(f"log: another process writes {path}: wait for it, or stop it.") from None
    try:
        yield
    finally:
        os.close(lock)
