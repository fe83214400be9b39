"""Check a claim: `python -m experiments.laboratory CLAIM`, with `--help` for its settings.

Each claim takes minutes on two cores, goes on where it was stopped, and writes its table and its
figure into docs/laboratory.md:

"""

import importlib
import sys
from pathlib import Path

from absl import app, flags, logging

from experiments import settings
from experiments.laboratory.claim import check

_ROOT = Path(__file__).resolve().parents[2]
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
}


def main() -> None:
    """Check the claim that the command line names."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name not in _CLAIMS:
        listing = "\n".join(f"  {claim:9} {text}" for claim, text in _CLAIMS.items())
        wrong = "" if name in ("--help", "-h") else f"error: there is no claim {name!r}.\n\n"
        print(f"{wrong}{__doc__}{listing}", file=sys.stderr if wrong else sys.stdout)
        sys.exit(1 if wrong else 0)
    claim = importlib.import_module(f"experiments.laboratory.{name}").CLAIM
    here = Path(__file__).resolve().parent
    results = flags.DEFINE_string("results", str(here / "results"), "folder of measurements")
    document = flags.DEFINE_string(
        "document", str(_ROOT / "docs" / "laboratory.md"), "what to write the table into"
    )
    progress = flags.DEFINE_bool("progress", True, "show a progress bar")

    def run(config: object) -> None:
        logging.set_verbosity(logging.WARNING)
        try:
            check(
                claim,
                config,
                results=Path(results.value),
                document=Path(document.value),
                progress=progress.value,
            )
        except KeyboardInterrupt:
            print(f"interrupted; what was measured is in {results.value}", file=sys.stderr)
            sys.exit(130)
        except (ValueError, OSError, ImportError, RuntimeError) as error:
            sys.exit(f"error: {error}")
        print(f"table and figure of {name}: {document.value}")

    app.run(run, argv=[sys.argv[0], *sys.argv[2:]], flags_parser=settings.parser(claim.config))


if __name__ == "__main__":
    main()
