"""Rebuild what a run trained from its seed log: no data and no forward passes are needed.

python -m experiments.finetune.replay --log=run/replay.npz --model=model.gguf --output=again
"""

import dataclasses
import sys
from pathlib import Path

from absl import app

from experiments import settings
from experiments.finetune import outputs, seed_log


@dataclasses.dataclass(frozen=True)
class Places:
    """Where things are.

    Attributes:
      log: replay.npz, which a run left in its folder.
      model: the file or folder that the run began from, or its name, as for `experiments.finetune`.
      output: folder for the trained file or adapter.
    """

    log: str
    model: str
    output: str


def main(places: Places) -> None:
    """Rebuild, and say where the trained file is."""
    try:
        config, model, params = seed_log.rebuild(Path(places.log), places.model)
        written = outputs.write_trained(Path(places.output), config, model, params)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")
    print(f"{config.name}, made again: wrote {written}")


if __name__ == "__main__":
    app.run(main, flags_parser=settings.parser(Places))
