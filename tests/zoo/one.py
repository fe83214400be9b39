"""One model in a process of its own: `python -m zoo.one NAME FILE DEPTH` fills FILE."""

import dataclasses
import json
import sys
from pathlib import Path

from zoo import harness, registry


def main(name: str, file: str, depth: harness.Depth) -> None:
    report = harness.examine(registry.everything()[name], depth)
    Path(file).write_text(json.dumps(dataclasses.asdict(report)), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
