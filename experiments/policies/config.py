"""What a run is: one frozen dataclass, checked when it is made."""

import dataclasses
from typing import Literal, get_args

from experiments import settings

__all__ = ["ENVIRONMENTS", "FLOATS", "Config", "Environment", "Method", "Shaping"]

Environment = Literal[
    "CartPole-v1", "Pendulum-v1", "Acrobot-v1", "MountainCarContinuous-v0", "Breakout-MinAtar"
]
ENVIRONMENTS = get_args(Environment)
Method = Literal["zoqo", "caq_zo", "qes", "open_es", "spsa"]
FLOATS = ("open_es", "spsa")  # methods that train floats
Shaping = Literal["usual", "ranks", "returns", "comparisons", "sized"]

# Rate and radius, chosen once for all bits: see docs/policies.md. Of zoqo and of the methods of
# floats in units of weights, of the other methods as shares of the number of codes.
_USUAL = {
    "zoqo": (0.04, 0.25),
    "caq_zo": (0.02, 0.05),
    "qes": (0.02, 0.05),
    "open_es": (0.04, 0.1),
    "spsa": (0.04, 0.1),
}
# What other environments want, chosen on seeds that no table has: on Pendulum radii that leave a
# plateau, in Breakout longer steps.
_OTHERS = {
    "Pendulum-v1": {"zoqo": (0.04, 0.5), "open_es": (0.04, 0.2), "spsa": (0.04, 0.2)},
    "Breakout-MinAtar": {"zoqo": (0.1, 0.25), "qes": (0.1, 0.05)},
}
_GENERATIONS = {
    "CartPole-v1": 30,
    "Pendulum-v1": 400,
    "Acrobot-v1": 60,
    "MountainCarContinuous-v0": 30,
    "Breakout-MinAtar": 200,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one run.

    Attributes:
      environment: of gymnax: "CartPole-v1", "Pendulum-v1", "Acrobot-v1",
        "MountainCarContinuous-v0" or "Breakout-MinAtar".
      method: "zoqo", "caq_zo" or "qes" on codes, or on floats "open_es" (evosax's) or "spsa".
      bits: of the codes, 2 to 8; 32 for floats.
      shaping: what a step makes of a generation's returns: their centred "ranks", the "returns"
        themselves, "comparisons" of the two sides of a query (zoqo alone), or "sized", the returns
        with steps that size themselves; "usual": ranks, of spsa the returns.
      population: policies tried in a generation, in pairs of opposite directions; even.
      episodes: that each of them plays, all of a generation the same ones.
      generations: steps of the method; 0: the environment's usual number.
      learning_rate: how far a step goes, or 0 for the method's own; see docs/policies.md.
      radius: how far queries look, or 0 likewise.
      hidden: units of each of the two hidden layers.
      test_episodes: that the policy itself plays, to report its return; no others do.
      seed: of all randomness.

    Raises:
      ValueError: a setting outside what is said above, naming it and its value.
    """

    environment: Environment = "CartPole-v1"
    method: Method = "zoqo"
    bits: int = 8
    shaping: Shaping = "usual"
    population: int = 100
    episodes: int = 4
    generations: int = 0
    learning_rate: float = 0.0
    radius: float = 0.0
    hidden: int = 64
    test_episodes: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what nothing later would refuse, or would only after minutes."""
        counts = ("episodes", "hidden", "test_episodes")
        settings.check(
            self,
            least={**dict.fromkeys(counts, 1), "generations": 0, "seed": 0},
            multiples={"population": 2},
            not_negative=("learning_rate", "radius"),
        )
        if self.method in FLOATS:
            if self.bits != 32:
                raise ValueError(f"bits must be 32 for {self.method}, got {self.bits}.")
        elif not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be in [2, 8] for {self.method}, got {self.bits}.")
        if self.shaping == "comparisons" and self.method != "zoqo":
            raise ValueError(f"shaping must not be 'comparisons' for {self.method}: zoqo's alone.")
        allowed = {"open_es": ("ranks",), "spsa": ("returns", "sized")}.get(self.method)
        if allowed and self.shaped not in allowed:
            raise ValueError(f"shaping must be of {allowed} for {self.method}: {self.shaping!r}.")

    @property
    def shaped(self) -> Shaping:
        """`shaping`, the method's own in place of "usual"."""
        usual = "returns" if self.method == "spsa" else "ranks"
        return usual if self.shaping == "usual" else self.shaping

    def used(self) -> "Config":
        """These settings with what is usual in place of 0."""
        rate, radius = _OTHERS.get(self.environment, {}).get(self.method, _USUAL[self.method])
        if self.shaped == "sized":
            rate = radius = 0.0  # nobody asks
        return dataclasses.replace(
            self,
            generations=self.generations or _GENERATIONS[self.environment],
            learning_rate=self.learning_rate or rate,
            radius=self.radius or radius,
        )

    @property
    def steps(self) -> int:
        """Generations, as many as make no more evaluations than `generations` of the population.

        Steps that size themselves evaluate the policy itself twice besides.
        """
        generations = self.used().generations
        if self.shaped == "sized":
            return max(generations * self.population // (self.population + 2), 1)
        return generations
