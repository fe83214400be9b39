"""JSON files of experiments, whole or not there."""

import json
from pathlib import Path
from typing import Any

from zoqo_jax.interop.files import replacing

__all__ = ["write_json"]


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file all at once or not at all, and its folder.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder) / "runs" / "one.json"
      ...     write_json(path, {"accuracy": 0.5})
      ...     json.loads(path.read_text())
      {'accuracy': 0.5}
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode())
