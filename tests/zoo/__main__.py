"""The zoo's table: examine every model, each in a process of its own: `python -m zoo`.

Results are kept as they come, and the same command goes on where it was stopped; --fresh begins
anew, say with another version of the library. `make zoo` sets up an environment with all packages
and runs it; by hand it is PYTHONPATH=tests python -m zoo, in the repository.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

from experiments import command, settings
from experiments.command import say
from experiments.files import read_json, writable, write_json, write_text
from zoo import harness, registry, table

_HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Zoo:
    """What is examined, and where it goes.

    Attributes:
      results: JSON file of what was found.
      document: Markdown whose table is written; what stands around it stays.
      only: examine only models whose name holds this text.
      fresh: examine again what is in the results already.
      depth: "traced" finds most failures in seconds a model, "run" all, "timed" measures, too.
      seconds: a model that takes longer has failed.
    """

    results: str = str(_HERE / "results.json")
    document: str = str(_HERE.parent.parent / "docs" / "models.md")
    only: str = ""
    fresh: bool = False
    depth: harness.Depth = "timed"
    seconds: int = 900

    def __post_init__(self) -> None:
        settings.check(self, least={"seconds": 1})


def main(zoo: Zoo) -> None:
    """Examine the models that are not in the results yet, and write the table."""
    results = writable("results", Path(zoo.results))
    document = writable("document", Path(zoo.document))
    models = registry.everything()
    chosen = [name for name in models if zoo.only in name]
    if not chosen:
        raise ValueError(
            f"only: no model's name holds {zoo.only!r}; there are {', '.join(models)}."
        )
    found = read_json(results)
    todo = [name for name in chosen if zoo.fresh or not _is_known(found.get(name), zoo.depth)]
    try:
        for i, name in enumerate(todo):
            say(f"{name} ({i + 1} of {len(todo)})")
            found[name] = _examined(name, zoo)
            write_json(results, found)
    except KeyboardInterrupt:
        raise command.Stopped(f"what was found is in {results}") from None
    finally:
        text = document.read_text(encoding="utf-8") if document.exists() else table.EMPTY
        write_text(document, table.filled(text, models, found))
    bad = [name for name in chosen if found[name]["failures"]]
    print(f"{len(chosen) - len(bad)} of {len(chosen)} models pass: {document}")


def _is_known(report: dict[str, Any] | None, depth: harness.Depth) -> bool:
    """Whether a model was examined, at least to that depth."""
    depths = get_args(harness.Depth)
    return report is not None and depths.index(report["depth"]) >= depths.index(depth)


def _examined(name: str, zoo: Zoo) -> dict[str, Any]:
    """A model's report; a process that dies has one as well."""
    paths = [str(_HERE.parent), str(_HERE.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.json"
        line = [sys.executable, "-m", "zoo.one", name, str(file), zoo.depth]
        try:
            process = subprocess.run(
                line, env=environment, capture_output=True, text=True, timeout=zoo.seconds
            )
            last = (process.stderr.strip().splitlines() or ["no word"])[-1]
            failure = f"the process ended with {process.returncode}: {last}"
        except subprocess.TimeoutExpired:
            failure = f"took more than {zoo.seconds} s"
        report = read_json(file) or {"depth": zoo.depth, "failures": {"process": failure}}
    say(f"  {time.perf_counter() - start:.0f} s {report['failures'] or 'passes'}")
    return report


if __name__ == "__main__":
    command.run(main, Zoo, about=__doc__ or "")
