"""One attack run, from a config to its metrics."""

import dataclasses
import time

import jax
import numpy as np
from tqdm import tqdm

from experiments.attack import batching, data, models
from experiments.attack.config import Config

__all__ = ["Metrics", "run"]


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
      clean: the attacked images, float32 (images, 28, 28, 1).
      labels: their labels, int32 (images,).
      adversarial: what the attack made of them, clipped to [0, 1].
      predicted: the model's class for `adversarial`, int (images,).
      success: whether it is wrong, bool (images,).
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


def run(config: Config, *, progress: bool = False) -> Metrics:
    """Attack the first `config.num_images` correctly classified test images.

    Args:
      config: what to attack, and how.
      progress: show a progress bar on standard error.

    Returns:
      The metrics. Choosing the images costs no queries.

    Raises:
      ValueError: the data set has too few correctly classified images, or bad data or weights.
      FileNotFoundError: the data set's folder or the weights' file is missing.

    Example:
      >>> metrics = run(Config(num_images=2, budget=1_000))
      >>> metrics.failure_rate, bool((metrics.predicted != metrics.labels).all())
      (0.0, True)
    """
    logits_fn = models.load_classifier(config.weights)
    images, labels = data.load(config.dataset)
    chosen = _first_correct(logits_fn, images, labels, config.num_images)
    images, labels = images[chosen], labels[chosen]
    start = time.perf_counter()
    with tqdm(total=len(images), desc=config.name, unit="image", disable=not progress) as bar:

        def on_progress(finished: int, found: int) -> None:
            bar.set_postfix_str(f"{found} misclassified", refresh=False)
            bar.update(finished - bar.n)

        outcome = batching.attack(logits_fn, images, labels, config, on_progress)
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


def _first_correct(
    logits_fn: models.LogitsFn, images: np.ndarray, labels: np.ndarray, count: int
) -> np.ndarray:
    """Places of the first `count` images that the model gets right."""
    found: list[int] = []
    for begin in range(0, len(images), _CHUNK):
        block = slice(begin, begin + _CHUNK)
        right = _classes(logits_fn, images[block]) == labels[block]
        found.extend(begin + np.flatnonzero(right))
        if len(found) >= count:
            return np.asarray(found[:count])
    raise ValueError(f"num_images must be at most {len(found)}, the correct ones, got {count}.")


def _classes(logits_fn: models.LogitsFn, images: np.ndarray) -> np.ndarray:
    classify = jax.jit(lambda images: logits_fn(images).argmax(axis=-1))
    blocks = [images[begin : begin + _CHUNK] for begin in range(0, len(images), _CHUNK)]
    return np.concatenate([np.asarray(classify(block)) for block in blocks])


_CHUNK = 1_000
