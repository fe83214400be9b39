"""What an attack run is: one frozen dataclass, checked when it is made."""

import dataclasses
from typing import Literal

from experiments import settings

__all__ = ["LABEL_METHODS", "Config", "Loss", "MethodName", "Structure"]

MethodName = Literal[
    "zoqo",
    "zo_sign_sgd",
    "sign_hunter",
    "square",
    "zoqo_labels",
    "rays",
    "sign_flip",
    "hop_skip_jump",
]
LABEL_METHODS = ("zoqo_labels", "rays", "sign_flip", "hop_skip_jump")
Structure = Literal["dense", "rank_one", "sparse", "coarse_to_fine"]
Loss = Literal["margin", "cross_entropy"]

_NAMES = {
    "zo_sign_sgd": "ZO-SignSGD",
    "sign_hunter": "SignHunter",
    "square": "Square Attack",
    "rays": "RayS",
    "sign_flip": "SignFlip",
    "hop_skip_jump": "HopSkipJump (ART)",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of one attack run. Where 0 is said to be allowed, it takes the method's default.

    Attributes:
      dataset: what `data.load` takes: "mnist" (bundled), "tfds:NAME", a folder or a tar file.
      weights: a bundled network's name or an .npz of `experiments.attack.train`.
      weight_bits: 32 to attack the network in floats, 2 to 8 to quantize it first.
      num_images: how many correctly classified test images to attack, from the first on; 0: all.
      method: "zoqo", on the integer grid, "zo_sign_sgd", its float counterpart, "sign_hunter" or
        "square"; of those that see only labels "zoqo_labels", "rays", "sign_flip" or
        "hop_skip_jump", which is ART's, an optional package, and slow.
      epsilon: radius of the l_inf ball, in pixel values (images lie in [0, 1]).
      budget: most evaluations of the model that one image may cost, at least 2.
      loss: "margin" of the logits or "cross_entropy"; methods that see only labels read neither.
      targeted: look for one wrong class, drawn for each image, instead of any.
      bits: of the perturbation's codes, 2 to 8 (zoqo and zoqo_labels).
      structure: of zoqo's directions: "coarse_to_fine" (blocks that shrink), "dense", "rank_one" or
        "sparse".
      patterns: begin at the best of four patterns of the whole image ("coarse_to_fine" and
        zoqo_labels); if not, with all values raised.
      noise: law of zoqo's directions, "uniform", "gaussian" or "rademacher"; coarse_to_fine has
        whole blocks instead.
      step: zoqo's step rule, "floor" (the paper's: at least one whole code) or "dithered".
      learning_rate: eta, in pixel values, or 0.
      decay_steps: zoqo's learning rate falls as 1 / sqrt(1 + t / decay_steps) after t steps; with 0
        it is constant.
      radius: mu, in pixel values, or 0.
      num_queries: directions a step, or 0.
      density: share of the pixels in a sparse direction or in Square Attack's first square, or 0.
      seed: of all randomness.
      batch_size: images attacked at a time.
      model_batch: images that the model evaluates at a time.

    Raises:
      ValueError: a setting outside what is said above, naming it and its value.
    """

    dataset: str = "mnist"
    weights: str = "mnist"
    weight_bits: int = 32
    num_images: int = 300
    method: MethodName = "zoqo"
    epsilon: float = 0.3
    budget: int = 2_000
    loss: Loss = "margin"
    targeted: bool = False
    bits: int = 8
    structure: Structure = "coarse_to_fine"
    patterns: bool = True
    noise: str = "rademacher"
    step: str = "dithered"
    learning_rate: float = 0.0
    decay_steps: int = 5
    radius: float = 0.0
    num_queries: int = 0
    density: float = 0.0
    seed: int = 0
    batch_size: int = 128
    model_batch: int = 16

    def __post_init__(self) -> None:
        """Refuse what nothing later would refuse, or would only after minutes."""
        settings.check(
            self,
            least={"num_images": 0, "budget": 2, "batch_size": 1, "model_batch": 1},
            within={"bits": (2, 8), "density": (0, 1)},
            positive=("epsilon",),
            not_negative=("learning_rate", "decay_steps", "radius", "num_queries"),
        )
        if not (2 <= self.weight_bits <= 8 or self.weight_bits == 32):
            raise ValueError(f"weight_bits must be in [2, 8] or 32, got {self.weight_bits}.")

    def used(self, coloured: bool = False) -> "Config":
        """These settings with the method's defaults in place of 0, for grey or coloured images.

        Shares of first squares, and of blocks, stay 0: their methods have them.
        """
        grey, colours = (0.1, 0.1, 10), (2 / 255, 2.55 / 255, 20)  # SignHunter's
        rate, radius, count = colours if coloured else grey
        density = self.density
        if self.method == "zoqo":
            # On a coarse grid a step is a long one, so its sign has to be surer.
            rate = radius = self.epsilon / 3
            count = 1 if self.bits > 5 else 5
            if self.structure in ("dense", "rank_one"):
                density = 1.0
            elif self.structure == "sparse":
                density = density or 0.1
        return dataclasses.replace(
            self,
            learning_rate=self.learning_rate or rate,
            radius=self.radius or radius,
            num_queries=self.num_queries or count,
            density=density,
        )

    @property
    def name(self) -> str:
        """How tables call the run, e.g. "ZOQO, 8 bit, coarse to fine"."""
        if self.method == "zoqo_labels":
            return f"ZOQO, {self.bits} bit, labels"
        if self.method != "zoqo":
            return _NAMES[self.method]
        words = self.structure.replace("_", " " if self.structure == "coarse_to_fine" else "-")
        noise = "" if self.structure == "coarse_to_fine" else f" {self.noise}"
        return f"ZOQO, {self.bits} bit, {words}{noise}"
