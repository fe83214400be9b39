"""Train with workers that come and go.

    python -m experiments.elastic --module=package.module --log=run/log --steps=1000

starts workers on this machine by Ray, has them evaluate pieces of each step, and writes a line of
the log for each. Workers and this command itself may be killed at any time: the same command again
goes on, and comes to the same codes bit for bit, whoever evaluated what.
"""

from experiments import command
from experiments.command import say
from experiments.elastic.config import Config, Module


def main(config: Config, run: Module) -> None:
    """Make the run, and say what came of it."""
    say(f"training {run.module}, kept in {config.log}: loading JAX")
    from experiments.elastic.claims import claimed_log
    from experiments.elastic.crew import Crew
    from experiments.elastic.head import Head
    from experiments.elastic.ray_cluster import connected
    from experiments.elastic.replica import Replica
    from experiments.elastic.tasks import task_of

    with claimed_log(config.log):
        head = Head(config, Replica(task_of(run), config.hash_every))
        try:
            head.catch_up()
            if head.replica.step < run.steps:
                say("starting Ray and the workers")
                with connected(config):
                    head.run(Crew(config, run))
        except KeyboardInterrupt:
            where = f"{len(head.records)} of {run.steps} steps are in {config.log}"
            raise command.Stopped(where) from None
        print(f"{head.replica.step} steps, hash of the codes {head.replica.digest()}")


if __name__ == "__main__":
    command.run(main, Config, Module, about=__doc__ or "")
