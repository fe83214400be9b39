"""Files that are written whole or not at all, and folders that one run at a time writes to."""

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from zoqo_jax.interop.files import replacing

__all__ = ["claimed", "locked", "plain", "read_json", "writable", "write_json", "write_text"]

_LOCK = ".lock"


def plain(content: Any) -> Any:
    """What JSON gives back of something: tuples and arrays are lists there.

    Raises:
      ValueError: a number in it is not finite.

    Example:
      >>> plain({"bits": (4, 8), "loss": np.float32(0.5)})
      {'bits': [4, 8], 'loss': 0.5}
    """
    as_list = lambda array: np.asarray(array).tolist()  # noqa: E731
    return json.loads(json.dumps(content, default=as_list, allow_nan=False))


def read_json(path: Path) -> dict[str, Any]:
    """A file's content, nothing where there is none.

    Raises:
      ValueError: it holds no JSON object.

    Example:
      >>> read_json(Path("/nowhere.json"))
      {}
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON file: {error}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file all at once or not at all, and its folder.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder) / "runs" / "one.json"
      ...     write_json(path, {"accuracy": 0.5})
      ...     read_json(path)
      {'accuracy': 0.5}
    """
    write_text(path, json.dumps(content, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write a file all at once or not at all, and its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(text.encode())


@contextlib.contextmanager
def claimed(
    setting: str, folder: Path, allows: Callable[[str], bool] = lambda name: False
) -> Iterator[None]:
    """A folder that no other process claims meanwhile; it is made if need be.

    The system drops the lock with the process that has it, also when that is killed.

    Args:
      setting: that names the folder.
      folder: what to claim; it goes again if it was made here and nothing is in it at the end.
      allows: whether a file of this name may be in it already; one that begins with a dot may.

    Raises:
      ValueError: it is no folder, cannot be written to, is claimed, or has other files in it.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as place, claimed("output", Path(place, "run")):
      ...     Path(place, "run").is_dir()
      True
    """
    made = _make(setting, folder)
    try:
        others = sorted(x.name for x in folder.iterdir() if not x.name.startswith("."))
        if strange := [name for name in others if not allows(name)]:
            raise ValueError(
                f"{setting}: {folder} holds other things, such as {strange[0]!r}: name a new or an "
                "empty folder."
            )
        words = f"is at work in {folder}: wait for it, stop it, or name another folder."
        lock = locked(folder / _LOCK, setting, words)
        try:
            yield
        finally:
            (folder / _LOCK).unlink(missing_ok=True)
            os.close(lock)
    finally:
        for one in reversed(made):
            with contextlib.suppress(OSError):  # something is in it
                one.rmdir()


def writable(setting: str, path: Path) -> Path:
    """The path of a file that can be written; nothing is left of the attempt.

    Raises:
      ValueError: it is a folder, or cannot be written.
    """
    if path.is_dir():
        raise ValueError(f"{setting} must name a file, got the folder {path}.")
    made = _make(setting, path.parent)
    for one in reversed(made):
        one.rmdir()
    return path


def _make(setting: str, folder: Path) -> list[Path]:
    """Make a folder, try to write in it, and tell which folders are new, the outermost first."""
    missing = []
    for one in (folder, *folder.parents):
        if one.exists():
            if not one.is_dir():
                raise ValueError(f"{setting} must be a folder, but {one} is a file.")
            break
        missing.insert(0, one)
    made = []
    try:
        for one in missing:
            one.mkdir()
            made.append(one)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        for one in reversed(made):
            one.rmdir()
        raise ValueError(f"{setting}: cannot write in {folder}: {error.strerror}.") from None
    return made


def locked(path: Path, setting: str, words: str) -> int:
    """The descriptor of a file that this process alone has locked; it is made if need be.

    Raises:
      ValueError: another process has it, and does what the words say.
    """
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.read(lock, 20).decode() or "unknown"
            os.close(lock)
            raise ValueError(f"{setting}: process {owner} {words}") from None
        # The one before may have removed the file between the two calls.
        if path.exists() and os.path.samestat(os.fstat(lock), path.stat()):
            os.ftruncate(lock, 0)
            os.write(lock, str(os.getpid()).encode())
            return lock
        os.close(lock)
