"""Attack methods, one a file: how one image's perturbation changes from question to answer.

A `Method` never sees the model. It asks for the losses at some perturbations, or whether they are
misread, and is told; `attack.py` evaluates, counts, and stops where an answer shows a misclassified
point.
"""

from experiments.attack.config import Config
from experiments.attack.methods import (
    coarse_to_fine,
    labels,
    rays,
    sign_flip,
    sign_hunter,
    square,
    zo_sign_sgd,
    zoqo,
)
from experiments.attack.methods.method import Method as Method

__all__ = ["Method", "make"]


def make(config: Config, shape: tuple[int, int, int]) -> Method:
    """The method that a config asks for, on images of a shape (height, width, channels).

    Example:
      >>> make(Config(method="square"), (28, 28, 1)).asks
      1
    """
    if config.method == "zoqo":
        coarse = config.structure == "coarse_to_fine"
        return (coarse_to_fine if coarse else zoqo).make(config, shape)
    others = {
        "zo_sign_sgd": zo_sign_sgd,
        "sign_hunter": sign_hunter,
        "square": square,
        "zoqo_labels": labels,
        "rays": rays,
        "sign_flip": sign_flip,
    }
    return others[config.method].make(config, shape)
