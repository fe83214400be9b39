"""What an elastic run is: frozen dataclasses of settings, checked when they are made."""

import dataclasses

from experiments import settings

__all__ = ["Config", "Module"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Who makes a run, and where it is kept. None of it changes what is computed.

    Attributes:
      log: a file, or any address that fsspec knows (memory, sftp, an object store); checkpoints lie
        beside it. The same command with the same log goes on where it stopped.
      address: of a Ray cluster: HOST:PORT or "auto" on one of its machines, ray://HOST:PORT from
        elsewhere; empty: Ray runs on this machine, for this run alone.
      workers: how many are wanted. Where the cluster has no room for all of them, the others come
        when it has.
      cpus: that a worker takes, of those that the cluster counts; it may be a fraction.
      gpus: the same.
      share: of the pieces of a step that nobody has, what is divided among all workers at a time: 1
        gives each its whole work at once and fewest messages, less lets fast workers do more.
      lease_seconds: after which work that was not answered is given to another worker, too.
      lost_seconds: after which a worker that does not answer is replaced.
      hash_every: steps between comparisons of the replicas' codes.
      checkpoint_every: steps between checkpoints, from which newcomers begin.
      join_seconds: how long to go on waiting where no worker is there.

    Raises:
      ValueError: a setting outside what is said above, naming it and its value.
    """

    log: str
    address: str = ""
    workers: int = 2
    cpus: float = 1.0
    gpus: float = 0.0
    share: float = 0.25
    lease_seconds: float = 60.0
    lost_seconds: float = 600.0
    hash_every: int = 20
    checkpoint_every: int = 100
    join_seconds: int = 600

    def __post_init__(self) -> None:
        """Refuse what would end in a wait for nobody."""
        if not self.log:
            raise ValueError("log must not be empty.")
        least = {"workers": 1, "hash_every": 1, "checkpoint_every": 1, "join_seconds": 1}
        positive = ("lease_seconds", "lost_seconds", "share")
        settings.check(
            self,
            least=least,
            positive=positive,
            not_negative=("cpus", "gpus"),
            within={"share": (0, 1)},
        )


@dataclasses.dataclass(frozen=True)
class Module:
    """A run of a module's own loss.

    Attributes:
      module: its name, as for `import`. It has `params`, a tree with quantized leaves; `tx`, a
        transformation of zoqo_jax; `value_fn`, from params to the loss; and if examples are to be
        divided `batch`, from a step's number to a tree of arrays with an axis of examples first, of
        which `value_fn` is given a part as its second argument.
      steps: of the run.
      parts: of a batch, of as many examples each.

    Raises:
      ValueError: a setting outside what is said above, naming it and its value.
    """

    module: str
    steps: int = 200
    parts: int = 1

    def __post_init__(self) -> None:
        """Refuse what nothing later would refuse."""
        if not self.module:
            raise ValueError("module must not be empty.")
        settings.check(self, least={"steps": 0, "parts": 1})
