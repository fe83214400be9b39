"""One attack run, from a config to its metrics."""

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from experiments.attack import attack, data, models
from experiments.attack.config import Config

__all__ = ["Case", "Metrics", "load_case", "run"]


class Case(NamedTuple):
    """What a run attacks.

    Attributes:
      logits_fn: the model.
      images: those that it reads correctly, float32 (n, height, width, channels).
      labels: int32 (n,).
      targets: int32 (n,) classes to be taken for, or None.
    """

    logits_fn: models.LogitsFn
    images: np.ndarray
    labels: np.ndarray
    targets: np.ndarray | None

    def take(self, places: slice | Sequence[int]) -> "Case":
        """Some of the images."""
        some = (x if x is None else x[places] for x in self[1:])
        return Case(self.logits_fn, *some)


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What a run came to.

    Attributes:
      config: the run's settings.
      images: how many initially correct images were attacked.
      failure_rate: fraction of them for which the budget did not suffice.
      mean_queries: evaluations of the model, mean over successes; NaN without one.
      median_queries: the same, median.
      seconds: wall time of the attack, compilation included.
      images_per_second: images / seconds.
      clean: the attacked images, float32 (images, height, width, channels).
      labels: their labels, int32 (images,).
      adversarial: what the attack made of them, clipped to [0, 1].
      predicted: the model's class for `adversarial`, int (images,).
      success: whether it is wrong (or the target), bool (images,).
      queries: evaluations spent on each image, int32 (images,).
    """

    config: Config
    images: int
    failure_rate: float
    mean_queries: float
    median_queries: float
    seconds: float
    images_per_second: float
    clean: np.ndarray
    labels: np.ndarray
    adversarial: np.ndarray
    predicted: np.ndarray
    success: np.ndarray
    queries: np.ndarray


def load_case(config: Config) -> Case:
    """The model and the first `config.num_images` test images that it reads correctly.

    Args:
      config: what to attack; `num_images` 0 takes all correct ones. Choosing them costs no queries.

    Raises:
      ValueError: the data set has too few correctly classified images, or bad data or weights.
      FileNotFoundError: the data set or the weights' file is missing.
    """
    case = _correct(config.dataset, config.weights, config.weight_bits, config.num_images)
    return case._replace(targets=_others(case.labels, config.seed) if config.targeted else None)


def run(config: Config, *, progress: bool = False) -> Metrics:
    """Attack the first `config.num_images` correctly classified test images, or all of them.

    Args:
      config: what to attack, and how.
      progress: show a progress bar on standard error.

    Returns:
      The metrics.

    Raises:
      ValueError: the data set has too few correctly classified images, or bad data or weights.
      FileNotFoundError: the data set or the weights' file is missing.

    Example:
      >>> metrics = run(Config(num_images=2, budget=1_000))
      >>> metrics.failure_rate, bool((metrics.predicted != metrics.labels).all())
      (0.0, True)
    """
    case = load_case(config)
    start = time.perf_counter()
    with tqdm(total=len(case.images), desc=config.name, unit="image", disable=not progress) as bar:

        def on_progress(finished: int, found: int) -> None:
            bar.set_postfix_str(f"{found} misclassified", refresh=False)
            bar.update(finished - bar.n)

        logits_fn, images, labels, targets = case
        outcome = attack.attack(
            logits_fn, images, labels, config, targets=targets, on_progress=on_progress
        )
    seconds = time.perf_counter() - start
    adversarial = np.clip(images + outcome.perturbation, 0.0, 1.0)
    queries = outcome.queries[outcome.success]
    return Metrics(
        config=config,
        images=len(images),
        failure_rate=float(1 - outcome.success.mean()),
        mean_queries=float(queries.mean()) if queries.size else float("nan"),
        median_queries=float(np.median(queries)) if queries.size else float("nan"),
        seconds=seconds,
        images_per_second=len(images) / seconds,
        clean=images,
        labels=labels,
        adversarial=adversarial,
        predicted=_classes(logits_fn, adversarial),
        success=outcome.success,
        queries=outcome.queries,
    )


@functools.lru_cache(maxsize=1)
def _correct(dataset: str, weights: str, weight_bits: int, count: int) -> Case:
    params = models.load_weights(weights)
    logits_fn = models.classifier(params, weight_bits)
    images, labels = data.load(dataset)
    expected = models.network(params).image_shape
    if images.shape[1:] != expected:
        shape = images.shape[1:]
        raise ValueError(f"dataset has images of {shape}, but weights {weights} read {expected}.")
    found: list[int] = []
    for begin in range(0, len(images), _CHUNK):
        block = slice(begin, begin + _CHUNK)
        right = _classes(logits_fn, images[block]) == labels[block]
        found.extend(begin + np.flatnonzero(right))
        if 0 < count <= len(found):
            break
    if len(found) < count:
        raise ValueError(f"num_images must be at most {len(found)}, the correct ones, got {count}.")
    chosen = np.asarray(found[: count or None])
    return Case(logits_fn, images[chosen], labels[chosen], None)


def _others(labels: np.ndarray, seed: int) -> np.ndarray:
    """For each image a class that is not its own."""
    shift = np.random.default_rng(seed).integers(1, data.NUM_CLASSES, len(labels))
    return ((labels + shift) % data.NUM_CLASSES).astype(np.int32)


def _classes(logits_fn: models.LogitsFn, images: np.ndarray) -> np.ndarray:
    classify = jax.jit(lambda images: logits_fn(images).argmax(axis=-1))
    blocks = [images[begin : begin + _CHUNK] for begin in range(0, len(images), _CHUNK)]
    return np.concatenate([np.asarray(classify(block)) for block in blocks])


_CHUNK = 1_000
