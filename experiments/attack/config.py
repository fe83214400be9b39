"""What an attack run is: one frozen dataclass, checked when it is made."""

import dataclasses
import math
from typing import Literal, get_args

__all__ = ["Config", "Method"]

Method = Literal["zoqo", "zo_sign_sgd"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one attack run.

    Attributes:
      dataset: "mnist" (bundled), "tfds:NAME" or a folder of IDX files.
      weights: an .npz of `experiments.attack.train` to attack, or "" for the bundled MNIST network.
      num_images: how many correctly classified test images to attack, from the first on.
      method: "zoqo", on the integer grid, or "zo_sign_sgd", its float counterpart.
      epsilon: radius of the l_inf ball, in pixel values (images lie in [0, 1]).
      budget: most evaluations of the model that one image may cost.
      bits: of the perturbation's codes, 2 to 8 (zoqo).
      learning_rate: eta, in pixel values; 0 takes the method's default.
      decay_steps: zoqo's learning rate falls as 1 / sqrt(1 + t / decay_steps) after t steps; with 0
        it is constant.
      radius: mu, in pixel values; 0 takes the method's default.
      num_queries: directions a step; 0 takes the method's default.
      noise: law of zoqo's directions, "uniform", "gaussian" or "rademacher".
      step: zoqo's step rule, "floor" (the paper's: at least one whole code) or "dithered".
      seed: of all randomness.
      batch_size: images attacked at a time.

    Raises:
      ValueError: a setting outside what is said above, naming it and its value.
    """

    dataset: str = "mnist"
    weights: str = ""
    num_images: int = 300
    method: Method = "zoqo"
    epsilon: float = 0.3
    budget: int = 2_000
    bits: int = 8
    learning_rate: float = 0.0
    decay_steps: int = 5
    radius: float = 0.0
    num_queries: int = 0
    noise: str = "rademacher"
    step: str = "dithered"
    seed: int = 0
    batch_size: int = 128

    def __post_init__(self) -> None:
        """Check what no later room would check, or would only after minutes."""
        if self.method not in get_args(Method):
            raise ValueError(f"method must be one of {get_args(Method)}, got {self.method!r}.")
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be in [2, 8], got {self.bits}.")
        for name in ("num_images", "budget", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("learning_rate", "decay_steps", "radius", "num_queries"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {value}.")
        if not 0.0 < self.epsilon < math.inf:
            raise ValueError(f"epsilon must be positive and finite, got {self.epsilon}.")

    @property
    def name(self) -> str:
        """How tables call the run, e.g. "ZOQO, 8 bit"."""
        return f"ZOQO, {self.bits} bit" if self.method == "zoqo" else "ZO-SignSGD, float"
