"""Check a claim: `python -m experiments.laboratory CLAIM`, with `--help` for its settings.

Each claim takes minutes on two cores, goes on where it was stopped, and writes its table and its
figure into results/laboratory. Those of docs/laboratory.md are written by
--results=experiments/laboratory/results --document=docs/laboratory.md.

"""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

from experiments import command
from experiments.command import say


@dataclasses.dataclass(frozen=True)
class Places:
    """Where a claim's measurements and its table go.

    Attributes:
      results: folder of measurements, a file for each claim, and of the table and the figure.
      document: Markdown to write the table into, in place of a file in `results`.
      progress: show a progress bar.
    """

    results: str = "results/laboratory"
    document: str = ""
    progress: bool = True


_CLAIMS = {
    "residual": "what off-grid queries hear of rounding, and aligned ones do not",
    "floors": "how good a state of a grid can be, and how close each method gets",
    "rates": "gradient norms against steps, beside the theory's exponents",
    "noise": "bias and variance of the estimate: law by structure of directions",
    "bits": "which grid wins at which bit width",
    "memory": "bytes of Adam, of quantization-aware training, and of ZOQO",
    "audited": "RC-ZOQO's protocol on MNIST: audits that stop a run",
    "judge": "training by comparisons alone, by a judge who errs",
    "budgets": "all methods at the same number of queries, on three tasks",
    "untuned": "steps that size themselves against the best setting of a long search",
}


def main() -> None:
    """Check the claim that the command line names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("--help", "-help", "-h"):
        listing = "\n".join(f"  {claim:9} {text}" for claim, text in _CLAIMS.items())
        print(f"{__doc__}{listing}")
        return
    if name not in _CLAIMS:
        say(f"error: there is no claim {name!r}: name one of {', '.join(_CLAIMS)}.")
        sys.exit(2)
    say(f"{name}: {_CLAIMS[name]} (loading JAX)")
    claim = importlib.import_module(f"experiments.laboratory.{name}").CLAIM

    def run(config: Any, places: Places) -> None:
        from experiments.files import writable
        from experiments.laboratory.claim import check
        from experiments.store import storing

        results, document = Path(places.results), places.document or f"{places.results}/{name}.md"
        names = {f"{one}{ending}" for one in _CLAIMS for ending in (".json", ".md", ".png")}
        if Path(document).exists() or places.document:
            writable("document", Path(document))
        with storing(results, names.__contains__):
            where = {"results": results, "document": Path(document)}
            check(claim, config, **where, progress=places.progress)
        print(f"table and figure of {name}: {document}")

    about = sys.modules[f"experiments.laboratory.{name}"].__doc__ or ""
    command.run(run, claim.config, Places, about=about, argv=sys.argv[2:])


if __name__ == "__main__":
    main()
