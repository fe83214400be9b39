"""JSON files of experiments, whole or not there."""

import json
from pathlib import Path
from typing import Any

from zoqo_jax.interop.files import replacing

__all__ = ["plain", "read_json", "write_json"]


def plain(content: Any) -> Any:
    """What JSON gives back of something: tuples are lists there.

    Example:
      >>> plain({"bits": (4, 8)})
      {'bits': [4, 8]}
    """
    return json.loads(json.dumps(content))


def read_json(path: Path) -> dict[str, Any]:
    """A file's content, nothing where there is none.

    Example:
      >>> read_json(Path("/nowhere.json"))
      {}
    """
    return json.loads(path.read_text()) if path.is_file() else {}


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
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode())
