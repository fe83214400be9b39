"""One model in a process of its own: `python -m zoo.one NAME FILE` writes its report into FILE."""

import dataclasses
import json
import sys
from pathlib import Path

from zoo import harness, registry


def main(name: str, file: str, timed: bool) -> None:
    report = harness.examine(registry.everything()[name], timed)
    Path(file).write_text(json.dumps(dataclasses.asdict(report)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], "--timed" in sys.argv[3:])
