"""A copy of a folder or file that takes its place only when it is whole."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from zoqo_jax.interop.folder import shards

__all__ = ["Stage"]


class Stage:
    """Copies of files beside the path where they shall go, to be changed before they go there.

    A context: at its end all files take their places; after an error none does. What was there is
    moved aside first and moved back if a move fails, so that only the death of the process between
    two moves can leave files of before and after side by side.

    Attributes:
        is_in_place: whether the path is the source itself. Then only changed files are copied.

    Examples:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     source = Path(folder, "a.safetensors")
        ...     _ = source.write_bytes(b"codes")
        ...     with Stage(Path(folder, "b.safetensors"), source) as stage:
        ...         stage.write(source, 0, np.frombuffer(b"n", np.uint8))
        ...     Path(folder, "b.safetensors").read_bytes(), source.read_bytes()
        (b'nodes', b'codes')
    """

    def __init__(self, path: Path, source: Path) -> None:
        self._is_folder = source.is_dir()
        self._source = source.resolve() if self._is_folder else source
        self._target = path.resolve() if self._is_folder else path.parent.resolve() / path.name
        self._files = self._listed() if self._is_folder else [Path(source.name)]
        self.is_in_place = self._target.exists() and self._target.samefile(source)
        self._check_target(path)

    def __enter__(self) -> Stage:
        beside = self._target.parent
        # Moves are atomic only within a file system: the copies lie beside their place.
        self._folder = Path(tempfile.mkdtemp(dir=beside, prefix=f".{self._target.name}."))
        self._new, self._old = self._folder / "new", self._folder / "old"
        try:
            self._new.mkdir()
            self._old.mkdir()
            if not self.is_in_place:
                for file in self._files:
                    self._copy(file)
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        return self

    def write(self, file: Path, begin: int, values: np.ndarray) -> None:
        """Put an array's bytes into the copy of a source's file.

        Args:
            file: of the source.
            begin: offset of the first byte.
            values: what to write there.
        """
        name = Path(file.name)
        if not (self._new / name).exists():
            self._copy(name)
        with open(self._new / name, "r+b") as opened:
            opened.seek(begin)
            opened.write(np.ascontiguousarray(values).tobytes())

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _commit(self) -> None:
        """Move all copies to their places."""
        if self._is_folder and not (self._target.exists() and any(self._target.iterdir())):
            os.replace(self._new, self._target)
            return
        done: list[tuple[Path, Path]] = []
        try:
            for file in self._files:
                if not (self._new / file).exists():
                    continue
                place = self._target / file if self._is_folder else self._target
                done.append((file, place))
                self._swap(file, place)
        except BaseException:
            for file, place in reversed(done):
                _move(self._old / file, place)
            raise

    def _swap(self, file: Path, place: Path) -> None:
        """Move what is there aside, and the copy there."""
        _move(place, self._old / file)
        _move(self._new / file, place)

    def _copy(self, file: Path) -> None:
        """Copy a file of the source, or what a link of it stands for."""
        place = self._new / file
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self._source / file if self._is_folder else self._source, place)
        place.chmod(place.stat().st_mode | 0o600)

    def _listed(self) -> list[Path]:
        """All files of the source, in subfolders, too."""
        found = []
        for folder, inner, names in os.walk(self._source):
            for name in sorted(inner):
                if Path(folder, name).is_symlink():
                    raise ValueError(f"{Path(folder, name)}: a link to a folder is not copied.")
            for name in sorted(names):
                file = Path(folder, name)
                if not file.is_file():
                    raise ValueError(f"{file}: it is no file that can be copied.")
                if not shards.is_inside(file, self._source):
                    raise ValueError(
                        f"{file}: it is a link out of its folder, to {file.resolve()}."
                    )
                found.append(file.relative_to(self._source))
        return found

    def _check_target(self, path: Path) -> None:
        """That saving to a path destroys nothing but an earlier save."""
        if not self._target.parent.is_dir():
            raise FileNotFoundError(f"path: there is no folder {path.parent} to save in.")
        if not self._is_folder:
            if self._target.is_dir():
                raise ValueError(f"{path}: a file was loaded, and this is a folder.")
            return
        if path.suffix == ".safetensors":
            raise ValueError(f"{path}: a folder was loaded, a path to save it in must not end so.")
        if self.is_in_place or not self._target.exists():
            inside = self._target.is_relative_to(self._source) and not self.is_in_place
            if inside:
                raise ValueError(f"{path}: it lies in the folder that was loaded.")
            return
        if not self._target.is_dir():
            raise ValueError(f"{path}: a folder was loaded, and this is a file.")
        known = set(self._files)
        for folder, _, names in os.walk(self._target):
            for name in names:
                file = Path(folder, name).relative_to(self._target)
                if file not in known:
                    raise ValueError(
                        f"{path}: it holds {file}, which is none of the files that are saved; "
                        "save to a new folder."
                    )


def _move(file: Path, place: Path) -> None:
    """Move a file, or a link, if it is there."""
    if file.is_symlink() or file.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
