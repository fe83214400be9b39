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
    say(f"training {run.module}, kept in {config.log}: starting Ray")
    from experiments.elastic.claims import claimed_log
    from experiments.elastic.ray_cluster import connected

    # Ray's processes are started before JAX has threads, which a fork does not take along.
    with claimed_log(config.log), connected(config):
        from experiments.elastic.crew import Crew

        crew = Crew(config, run)
        crew.hire()  # they load JAX, the model and the data while this process does
        say("loading JAX")
        from experiments.elastic.head import Head
        from experiments.elastic.replica import Replica
        from experiments.elastic.tasks import task_of

        head = Head(config, Replica(task_of(run), config.hash_every))
        try:
            head.catch_up()
            head.run(crew)
        except KeyboardInterrupt:
            where = f"{len(head.records)} of {run.steps} steps are in {config.log}"
            raise command.Stopped(where) from None
        print(f"{head.replica.step} steps, hash of the codes {head.replica.digest()}")


if __name__ == "__main__":
    command.run(main, Config, Module, about=__doc__ or "")
