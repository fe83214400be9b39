"""Who is in the zoo: every model registers the function that builds it.

A file of `models/` has one family of packages. What it registers imports its package when it is
built, not before: the list of the zoo is there without any of the packages.
"""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Model", "everything", "model"]

Built = tuple[Any, Callable[[Any], Any]]


@dataclasses.dataclass(frozen=True)
class Model:
    """One model as its package's users have it.

    Attributes:
        name: its family's file and its function, e.g. "linen.mlp".
        about: what it is, for the table.
        package: the distribution that it is installed from.
        build: makes its float parameters, in the tree that its users have, and `loss(params)`.
        bits: of the codes that it gets.
        tolerance: relative error of a loss that counts as rounding.
        heavy: whether its package is not in the environment of the tests.
        slow: whether it takes too long for the fast tests; all that is heavy does.
    """

    name: str
    about: str
    package: str
    build: Callable[[], Built]
    bits: int = 4
    tolerance: float = 2e-4
    heavy: bool = False
    slow: bool = False


_MODELS: dict[str, Model] = {}


def model(about: str, package: str, **more: Any) -> Callable[[Callable[[], Built]], Any]:
    """Register the function below it."""

    def register(build: Callable[[], Built]) -> Callable[[], Built]:
        name = f"{build.__module__.rpartition('.')[2]}.{build.__name__}"
        _MODELS[name] = Model(name, about, package, build, **more)
        return build

    return register


def everything() -> dict[str, Model]:
    """All models by name, those of a file together."""
    for file in sorted((Path(__file__).parent / "models").glob("*.py")):
        importlib.import_module(f"zoo.models.{file.stem}")
    return dict(_MODELS)
