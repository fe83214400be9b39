"""Trains the MNIST classifier that the attack experiments attack.

Ordinary supervised training: Adam (Kingma and Ba, "Adam: A Method for Stochastic Optimization",
2015, arXiv 1412.6980) with cosine decay, and images shifted at random by up to two pixels. No
adversarial examples are used.

    python -m experiments.attack.train --data=FOLDER_OR_tfds:mnist --output=mnist_cnn.npz
"""

import math
import time
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from tqdm import tqdm

from experiments.attack.data import IMAGE_SHAPE, load
from experiments.attack.models import CNN, apply_cnn, load_params, save_params

__all__ = ["TrainConfig", "accuracy", "train"]

_MAX_SHIFT = 2  # pixels


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run.

    Attributes:
      data: a folder of IDX files or "tfds:NAME", with a train and a test split (see `data.load`).
      output: the `.npz` file to write; its folder is made if need be.
      epochs: passes over the training images, at least 1.
      batch_size: images per step, at least 1; the rest of an epoch's last batch is left out.
      learning_rate: Adam's first learning rate, positive; it decays to 0 along a cosine.
      seed: of the initial weights, the order of the images and their shifts; in [0, 2**32 - 1].
      progress: whether to show a progress bar.

    Raises:
      ValueError: a setting is out of range.

    Example:
      >>> TrainConfig(data="tfds:mnist", output="weights.npz", epochs=3).batch_size
      128
    """

    data: str
    output: str
    epochs: int = 10
    batch_size: int = 128
    learning_rate: float = 2e-3
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError(f"output must name a file, got {self.output!r}.")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}.")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32 - 1], got {self.seed}.")


def train(config: TrainConfig) -> dict[str, float]:
    """Trains a `CNN`, writes its weights in float16 and measures what was written.

    Args:
      config: the settings.

    Returns:
      `test_accuracy`, a fraction, of the file as written, on the whole test split; `train_loss`,
      the mean cross-entropy (nats) of the last epoch; `steps`; and `seconds` of training.

    Raises:
      ValueError: data of the wrong kind, fewer training images than `batch_size`, an `output` that
        is a folder, or weights that are no longer finite.
      FileNotFoundError: the data are missing.

    Example:
      >>> config = TrainConfig(data="tfds:mnist", output="mnist_cnn.npz")
      >>> train(config)["test_accuracy"] > 0.985  # doctest: +SKIP
      True
    """
    output = Path(config.output)
    if output.is_dir():
        raise ValueError(f"output must name a file, got the folder {config.output!r}.")
    images, labels = load(config.data, split="train")
    test_images, test_labels = load(config.data, split="test")
    if len(images) < config.batch_size:
        raise ValueError(
            f"batch_size must be at most the {len(images)} training images, "
            f"got {config.batch_size}."
        )
    output.parent.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    params, losses = _fit(config, images, labels)
    seconds = time.perf_counter() - start
    save_params(output, params)
    return {
        "test_accuracy": accuracy(load_params(output), test_images, test_labels),
        "train_loss": float(np.mean(losses[-(len(losses) // config.epochs) :])),
        "steps": len(losses),
        "seconds": seconds,
    }


def accuracy(params: Any, images: np.ndarray, labels: np.ndarray, *, batch: int = 1000) -> float:
    """Fraction of images that the `CNN` with these parameters classifies as labelled.

    Args:
      params: parameters of `CNN()`.
      images: shape (n, 28, 28, 1) in [0, 1], n at least 1.
      labels: integers, shape (n,).
      batch: images per forward pass.

    Returns:
      A fraction in [0, 1].

    Example:
      >>> from experiments.attack.data import load
      >>> from experiments.attack.models import load_mnist_cnn
      >>> images, labels = load("mnist")
      >>> accuracy(load_mnist_cnn()[1], images[:1000], labels[:1000]) > 0.98
      True
    """
    correct = [
        np.asarray(_predict(params, images[i : i + batch])) == labels[i : i + batch]
        for i in range(0, len(images), batch)
    ]
    return float(np.concatenate(correct).mean())


@jax.jit
def _predict(params: Any, images: jax.Array) -> jax.Array:
    return apply_cnn(params, images).argmax(-1)


def _fit(
    config: TrainConfig, images: np.ndarray, labels: np.ndarray
) -> tuple[Any, list[jax.Array]]:
    per_epoch = len(images) // config.batch_size
    optimizer = _optimizer(config.learning_rate, config.epochs * per_epoch)
    init_key, shift_key = jax.random.split(jax.random.key(config.seed))
    params = _init(init_key)
    state = optimizer.init(params)
    rng, losses = np.random.default_rng(config.seed), []
    with tqdm(total=config.epochs * per_epoch, unit="step", disable=not config.progress) as bar:
        for epoch in range(config.epochs):
            bar.set_description(f"epoch {epoch + 1}/{config.epochs}")
            order = rng.permutation(len(images))[: per_epoch * config.batch_size]
            for batch in order.reshape(per_epoch, config.batch_size):
                key = jax.random.fold_in(shift_key, len(losses))
                params, state, loss = _step(
                    params, state, images[batch], labels[batch], key, optimizer=optimizer
                )
                losses.append(loss)
                bar.update()
    return params, losses


@jax.jit
def _init(key: jax.Array) -> Any:
    return CNN().init(key, jnp.zeros((1, *IMAGE_SHAPE)))["params"]


@cache  # A new but equal optimizer would compile the same step again.
def _optimizer(learning_rate: float, steps: int) -> optax.GradientTransformation:
    return optax.adam(optax.cosine_decay_schedule(learning_rate, steps))


@partial(jax.jit, static_argnames="optimizer", donate_argnames=("params", "state"))
def _step(
    params: Any,
    state: optax.OptState,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    *,
    optimizer: optax.GradientTransformation,
) -> tuple[Any, optax.OptState, jax.Array]:
    images = _shift(images, key)

    def objective(params):
        logits = apply_cnn(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, gradients = jax.value_and_grad(objective)(params)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


def _shift(images: jax.Array, key: jax.Array) -> jax.Array:
    """Each image moved by its own random number of pixels, at most `_MAX_SHIFT`, black outside."""
    border = (_MAX_SHIFT, _MAX_SHIFT)
    padded = jnp.pad(images, ((0, 0), border, border, (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * _MAX_SHIFT + 1)

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), IMAGE_SHAPE)

    return jax.vmap(crop)(padded, corners)


def _parse(argv: list[str]) -> TrainConfig:
    # Defined here and not on import, so that several experiments can be imported together.
    default = TrainConfig(data="-", output="-")
    flags.DEFINE_string(
        "data", None, "Folder of IDX files, or tfds:NAME for tensorflow-datasets.", required=True
    )
    flags.DEFINE_string("output", None, "The .npz file of weights to write.", required=True)
    flags.DEFINE_integer("epochs", default.epochs, "Passes over the training images.")
    flags.DEFINE_integer("batch_size", default.batch_size, "Images per step.")
    flags.DEFINE_float("learning_rate", default.learning_rate, "Adam's first learning rate.")
    flags.DEFINE_integer("seed", default.seed, "Seed of weights, image order and shifts.")
    flags.DEFINE_bool("progress", default.progress, "Whether to show a progress bar.")
    rest = flags.FLAGS(argv)[1:]
    if rest:
        raise app.UsageError(f"unknown arguments: {' '.join(rest)}")
    names = TrainConfig.__dataclass_fields__
    return TrainConfig(**{name: getattr(flags.FLAGS, name) for name in names})


def _main(config: TrainConfig) -> None:
    metrics = train(config)
    print(
        f"test accuracy {metrics['test_accuracy']:.2%} (float16 weights in {config.output}), "
        f"train loss {metrics['train_loss']:.4f}, {metrics['seconds']:.0f} s"
    )


if __name__ == "__main__":
    app.run(_main, flags_parser=_parse)
