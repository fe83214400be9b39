"""What is asked of a model, and whether what it is given and answers is what it should be."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

__all__ = ["Model", "answers", "check_logits", "checked_classes", "checked_images", "chunked"]

Model = Callable[[Any], Any]
"""Images (m, height, width, channels) in [0, 1] -> logits (m, classes), or labels (m,)."""


def chunked(logits_fn: Model, size: int) -> Model:
    """A JAX function as one of numpy arrays of at most `size` images, compiled once."""
    jitted = jax.jit(logits_fn)

    def model(shown: np.ndarray) -> np.ndarray:
        padded = np.pad(shown, [(0, size - len(shown)), *[(0, 0)] * (shown.ndim - 1)])
        return np.asarray(jitted(padded))[: len(shown)]

    return model


def answers(
    model: Model, shown: np.ndarray, most: int, highest: int, sees_labels: bool
) -> np.ndarray:
    """A Python function's logits, asked for at most `most` images at a time.

    Args:
      model: answers numpy arrays.
      shown: float32 (n, height, width, channels).
      most: images at a time.
      highest: the greatest class that an image has or is to be taken for.
      sees_labels: whether labels, integers, will do: they come back one-hot.

    Raises:
      ValueError: the answers are not what `Model` says, or know fewer classes.
    """
    found = []
    for begin in range(0, len(shown), most):
        some = shown[begin : begin + most]
        logits = np.asarray(model(some))
        if (
            sees_labels
            and logits.shape == some.shape[:1]
            and np.issubdtype(logits.dtype, np.integer)
        ):
            logits = _one_hot(logits, highest)
        logits = logits.astype(np.float32)
        check_logits(logits, len(some), highest)
        found.append(logits)
    return np.concatenate(found)


def _one_hot(labels: np.ndarray, highest: int) -> np.ndarray:
    """Logits of which the label's is largest; all classes that no image has are one."""
    if labels.min() < 0:
        raise ValueError(f"logits_fn must return labels that are not negative, got {labels.min()}.")
    return np.eye(highest + 2)[np.minimum(labels, highest + 1)]


def checked_images(images: Any) -> np.ndarray:
    """Images as float32 (n, height, width, channels).

    Raises:
      ValueError: they are no such floats in [0, 1].
    """
    images = np.asarray(images)
    if images.ndim != 4 or not images.size or not np.issubdtype(images.dtype, np.floating):
        raise ValueError(
            "images must be floats of shape (n, height, width, channels), "
            f"got {images.dtype} of shape {images.shape}."
        )
    bad = ~((images >= 0) & (images <= 1)).all(axis=(1, 2, 3))  # NaN is neither
    if bad.any():
        place = int(np.flatnonzero(bad)[0])
        low, high = images[place].min(), images[place].max()
        raise ValueError(f"images must lie in [0, 1], got [{low}, {high}] at {place}.")
    return np.ascontiguousarray(images, np.float32)


def checked_classes(name: str, classes: Any, count: int) -> np.ndarray:
    """Classes as int32 (count,).

    Raises:
      ValueError: they are not so many integers, or one is negative; it names the argument.
    """
    classes = np.asarray(classes)
    if classes.shape != (count,) or not np.issubdtype(classes.dtype, np.integer):
        raise ValueError(
            f"{name} must be {count} integers, one for each image, "
            f"got {classes.dtype} of shape {classes.shape}."
        )
    if classes.min() < 0:
        raise ValueError(f"{name} must not be negative, got {classes.min()}.")
    return classes.astype(np.int32)


def check_logits(logits: Any, count: int, highest: int) -> None:
    """Refuse what are no logits (count, classes) with a class `highest`, by a ValueError."""
    shape = tuple(getattr(logits, "shape", ()))
    if len(shape) != 2 or shape[0] != count:
        raise ValueError(f"logits_fn must return shape ({count}, classes), got {shape}.")
    if highest >= shape[1]:
        raise ValueError(f"labels must be below {shape[1]}, the model's classes, got {highest}.")
