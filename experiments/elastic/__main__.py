"""Train with workers that come and go.

    python -m experiments.elastic --model=model.gguf --output=run --log=run/log --num_queries=4

fine-tunes as `experiments.finetune` does, but for looks at dev and test examples: it starts workers
by Ray, on this machine or on the cluster of --address, has them evaluate pieces of each step, and
writes a line of the log for each. Workers and this command itself may be killed at any time: the
same command again goes on, and comes to the same codes, bit for bit, whoever evaluated what.

    ... --module=package.module --log=run/log --steps=1000

trains what a module of your own has; `--module=... --help` lists the settings of such a run.
"""

import contextlib
import sys
from typing import Any

from experiments import command
from experiments.command import say
from experiments.elastic.config import Config, Module
from experiments.finetune.config import Config as Finetune


def main(config: Config, run: Any) -> None:
    """Make the run, and say what came of it."""
    what = run.module if isinstance(run, Module) else run.model
    if not isinstance(run, Module) and run.moves_floats:
        raise ValueError(
            f"method={run.method!r} moves floats: take one that moves codes or scales."
        )
    say(f"training {what}, kept in {config.log}: reading it")
    from experiments.elastic.claims import claimed_log
    from experiments.elastic.log import Log

    with claimed_log(config.log):
        try:
            replica, path = _made(config, run)
        except KeyboardInterrupt:
            kept = len(Log(config.log).read()[1])
            where = f"{kept} of {run.steps} steps are in {config.log}"
            raise command.Stopped(where) from None
    wrote = f"; wrote {path}" if path else ""
    print(f"{replica.step} steps, hash of the codes {replica.digest()}{wrote}")


def _made(config: Config, run: Any) -> tuple[Any, Any]:
    """The replica of a run that is over, and the file that was written of it."""
    from experiments.elastic.log import Log

    with contextlib.ExitStack() as exits:
        crew = None
        if len(Log(config.log).read()[1]) < run.steps:
            from experiments.elastic.ray_cluster import connected

            # Ray's processes are started before JAX has threads, which a fork does not take along.
            exits.enter_context(connected(config))
            from experiments.elastic.crew import Crew

            crew = Crew(config, run)
            crew.hire()  # they load JAX, the model and the data while this process does
        say("loading JAX, the model and the data")
        from experiments.elastic.head import Head
        from experiments.elastic.replica import Replica
        from experiments.elastic.tasks import task_of, written

        head = Head(config, Replica(task_of(run), config.hash_every))
        head.catch_up()
        head.run(crew)
    return head.replica, written(run, head.replica.params)


if __name__ == "__main__":
    own = any(one.replace("-", "_").startswith("__module") for one in sys.argv[1:])
    command.run(main, Config, Module if own else Finetune, about=__doc__ or "")
