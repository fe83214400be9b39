"""Fine-tune a quantized language model with forward passes only.

    python -m experiments.finetune --model=SmolLM2-135M-Instruct.Q4_1.gguf --output=run

reads a 4-bit GGUF file, trains its codes in place on the bundled film reviews, and writes the same
kind of file, a log that rebuilds it (`zq.replay`), and a report with curves. A run that was stopped
goes on when the same command is given again.

    ... --num_queries=4 --coordinator=HOST:PORT --processes=2 --process=0    (and elsewhere 1)

has two processes share each step; they come to the same codes as one would.
"""

import math
import time

from experiments import command
from experiments.cluster import Cluster, joined
from experiments.command import say
from experiments.finetune.config import Config


def main(config: Config, cluster: Cluster = Cluster()) -> None:  # noqa: B008 - it is frozen
    """Run, and say what came of it."""
    say(f"fine-tuning {config.model} by {config.name} in {config.output}: loading JAX")
    from experiments.finetune import outputs, training
    from experiments.finetune.folder import Folder, Guest
    from experiments.finetune.models import loading

    start = time.perf_counter()
    with joined(cluster) as team, (Folder if team.is_first else Guest)(config) as folder:
        try:
            say(f"{folder.where()}\nreading {config.model}")
            given = {"folder": folder, "team": team, "progress": team.is_first}
            outcome = training.train(loading.load(config.model), config, **given)
            if outcome is None:
                say(f"process {team.index} has made its part; process 0 writes the results")
                return
            say("writing what was trained, and the report")
            written = outputs.write(config, outcome, time.perf_counter() - start)
        except KeyboardInterrupt:
            raise command.Stopped(folder.where()) from None
    print(
        f"{config.name}: test accuracy {outcome.before.accuracy:.1%} before, "
        f"{outcome.after.accuracy:.1%} after {outcome.best_step} steps; wrote "
        f"{', '.join(map(str, written))}"
    )
    losses = {"before training": outcome.before.loss, "after it": outcome.after.loss}
    for when, loss in losses.items():
        if not math.isfinite(loss):
            raise ValueError(f"the loss of the test examples {when} is {loss}.")


if __name__ == "__main__":
    command.run(main, Config, Cluster, about=__doc__ or "")
