"""Fine-tune a quantized language model with forward passes only.

    python -m experiments.finetune --model=SmolLM2-135M-Instruct.Q4_1.gguf --output=run

reads a 4-bit GGUF file, trains its codes in place on the bundled film reviews, and writes the same
kind of file, a log that rebuilds it (`zq.replay`), and a report with curves. A run that was stopped
goes on when the same command is given again.
"""

import sys
import time

from absl import app, logging

from experiments import settings
from experiments.finetune import outputs, training
from experiments.finetune.config import Config
from experiments.finetune.models import loading


def main(config: Config) -> None:
    """Run, and say what came of it."""
    logging.set_verbosity(logging.WARNING)  # of the checkpoints, which tell much
    start = time.perf_counter()
    try:
        outcome = training.train(loading.load(config.model), config)
        written = outputs.write(config, outcome, time.perf_counter() - start)
    except KeyboardInterrupt:
        print(f"interrupted: the same command goes on from {config.output}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(
        f"{config.name}: test accuracy {outcome.before.accuracy:.1%} before, "
        f"{outcome.after.accuracy:.1%} after {outcome.best_step} steps; wrote "
        f"{', '.join(map(str, written))}"
    )


if __name__ == "__main__":
    app.run(main, flags_parser=settings.parser(Config))
