"""Rebuild what a run trained from its seed log: no data and no forward passes are needed.

python -m experiments.finetune.replay --log=run/replay.npz --model=model.gguf --output=again
"""

import dataclasses
from pathlib import Path

from experiments import command
from experiments.command import say


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
    say(f"rebuilding {places.output} from {places.log} and {places.model}: loading JAX")
    from experiments.files import claimed
    from experiments.finetune import outputs, seed_log

    if not Path(places.log).is_file():
        raise ValueError(f"log: there is no file {places.log}.")
    output = Path(places.output)
    with claimed("output", output):
        say("replaying the steps")
        config, model, params = seed_log.rebuild(Path(places.log), places.model)
        written = outputs.write_trained(output, config, model, params)
    print(f"{config.name}, made again: wrote {written}")


if __name__ == "__main__":
    command.run(main, Places, about=__doc__ or "")
