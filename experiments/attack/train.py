"""Trains the classifiers that the attack experiments attack.

- "cnn", for MNIST: Adam (Kingma and Ba, 2015, arXiv 1412.6980), its learning rate falling along a
  cosine, and images shifted at random by up to two pixels.
- "robust_cnn": the same network, trained on the adversarial examples that projected gradient
  descent finds in an l_inf ball (Madry et al., "Towards Deep Learning Models Resistant to
  Adversarial Attacks", 2018, arXiv 1706.06083); the ball grows to its size in the first third of
  the training.
- "narrow_cnn", "cnn_5x5" and "mlp", for MNIST: the same recipe, half the channels and units,
  filters of 5 x 5 pixels, and no convolutions at all.
- "resnet", for CIFAR-10: stochastic gradient descent with Nesterov momentum, a learning rate that
  rises and falls along a line, weight decay, smoothed labels, and images shifted by up to four
  pixels and mirrored at random.

    python -m experiments.attack.train --network=cnn --data=FOLDER_OR_tfds:mnist --output=mnist.npz

An interrupted training goes on from its last whole epoch.
"""

import dataclasses
import time
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments import command, settings

if __name__ == "__main__":
    command.say("training a classifier: loading JAX")  # which the imports below take seconds for

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from experiments.attack.data import load
from experiments.attack.models import CNN, MLP, LogitsFn, ResNet, fold, load_classifier, save_params
from experiments.attack.pgd import random_start, uphill
from experiments.files import writable
from experiments.store import Store

__all__ = ["TrainConfig", "accuracy", "train"]

Network = Literal["cnn", "robust_cnn", "narrow_cnn", "cnn_5x5", "mlp", "resnet"]

_ATTACK_STEPS = 7  # of projected gradient descent, on each batch


class _Recipe(NamedTuple):
    """How a network is trained unless the configuration says otherwise."""

    module: nn.Module
    epochs: int
    batch_size: int
    learning_rate: float
    max_shift: int  # pixels
    mirrored: bool = False
    smoothing: float = 0.0  # of labels
    epsilon: float = 0.0  # of the adversarial ball


_RECIPES: dict[str, _Recipe] = {
    "cnn": _Recipe(CNN(), 10, 128, 2e-3, max_shift=2),
    "robust_cnn": _Recipe(CNN(), 16, 128, 1e-3, max_shift=2, epsilon=0.3),
    "narrow_cnn": _Recipe(CNN((8, 16), 32), 10, 128, 2e-3, max_shift=2),
    "cnn_5x5": _Recipe(CNN(kernel=5), 10, 128, 2e-3, max_shift=2),
    "mlp": _Recipe(MLP(), 10, 128, 2e-3, max_shift=2),
    "resnet": _Recipe(ResNet(normalised=True), 36, 256, 0.2, 4, mirrored=True, smoothing=0.1),
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Settings of one training run.

    Attributes:
      data: what `data.load` takes, with a train and a test split.
      output: the `.npz` file to write; its folder is made if need be.
      network: "cnn", "robust_cnn", "narrow_cnn", "cnn_5x5", "mlp" or "resnet".
      epochs: passes over the training images; 0 takes the network's default.
      batch_size: images per step; 0 takes the network's default. The rest of an epoch's last batch
        is left out.
      learning_rate: the highest one; 0 takes the network's default.
      seed: of the initial weights, the order of the images and what is done to them; in
        [0, 2**32 - 1].
      progress: whether to show a progress bar.

    Raises:
      ValueError: a setting is out of range.

    Example:
      >>> TrainConfig(data="tfds:mnist", output="weights.npz", epochs=3).network
      'cnn'
    """

    data: str
    output: str
    network: Network = "cnn"
    epochs: int = 0
    batch_size: int = 0
    learning_rate: float = 0.0
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        if not self.output:
            raise ValueError(f"output must name a file, got {self.output!r}.")
        least = {"epochs": 0, "batch_size": 0}
        settings.check(self, least=least, not_negative=["learning_rate"])
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32 - 1], got {self.seed}.")


class _Training(NamedTuple):
    """What an epoch leaves to the next."""

    variables: Any  # "params" and, where the network is normalised, "batch_stats"
    state: optax.OptState


def train(config: TrainConfig) -> dict[str, float]:
    """Trains a network, writes its weights in float16 and measures what was written.

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
      >>> config = TrainConfig(data="tfds:mnist", output="mnist.npz")
      >>> train(config)["test_accuracy"] > 0.985  # doctest: +SKIP
      True
    """
    recipe = _RECIPES[config.network]
    recipe = recipe._replace(
        epochs=config.epochs or recipe.epochs,
        batch_size=config.batch_size or recipe.batch_size,
        learning_rate=config.learning_rate or recipe.learning_rate,
    )
    output = Path(config.output)
    writable("output", output)
    images, labels = load(config.data, split="train")
    test_images, test_labels = load(config.data, split="test")
    if len(images) < recipe.batch_size:
        raise ValueError(
            f"batch_size must be at most the {len(images)} training images, "
            f"got {recipe.batch_size}."
        )
    if images.shape[1:] != recipe.module.image_shape:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(f"data: {config.network} does not read images of {images.shape[1:]}.")
    output.parent.mkdir(parents=True, exist_ok=True)

    start = time.perf_counter()
    variables, losses = _fit(config, recipe, images, labels)
    seconds = time.perf_counter() - start
    save_params(output, fold(variables))
    _store(config).path.unlink(missing_ok=True)
    return {
        "test_accuracy": accuracy(load_classifier(output), test_images, test_labels),
        "train_loss": float(np.mean(losses)),
        "steps": recipe.epochs * (len(images) // recipe.batch_size),
        "seconds": seconds,
    }


def accuracy(
    logits_fn: LogitsFn, images: np.ndarray, labels: np.ndarray, *, batch: int = 1000
) -> float:
    """Fraction of images that a classifier reads as they are labelled.

    Args:
      logits_fn: images to logits.
      images: shape (n, height, width, channels) in [0, 1], n at least 1.
      labels: integers, shape (n,).
      batch: images per forward pass.

    Returns:
      A fraction in [0, 1].

    Example:
      >>> images, labels = load("mnist")
      >>> accuracy(load_classifier("mnist"), images[:1000], labels[:1000]) > 0.98
      True
    """
    predict = jax.jit(lambda images: logits_fn(images).argmax(-1))
    correct = [
        np.asarray(predict(images[i : i + batch])) == labels[i : i + batch]
        for i in range(0, len(images), batch)
    ]
    return float(np.concatenate(correct).mean())


def _fit(
    config: TrainConfig, recipe: _Recipe, images: np.ndarray, labels: np.ndarray
) -> tuple[Any, list[jax.Array]]:
    """The trained variables and the losses of the last epoch."""
    per_epoch = len(images) // recipe.batch_size
    steps = recipe.epochs * per_epoch
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    variables = jax.jit(recipe.module.init)(init_key, jnp.zeros((1, *images.shape[1:])))
    training = _Training(variables, _optimizer(recipe, steps).init(variables["params"]))
    store = _store(config)
    first, training = _resume(store, training)
    rng, losses = np.random.default_rng(config.seed), []
    with tqdm(
        total=steps, initial=first * per_epoch, unit="step", disable=not config.progress
    ) as bar:
        for epoch in range(recipe.epochs):
            order = rng.permutation(len(images))[: per_epoch * recipe.batch_size]
            if epoch < first:
                continue
            bar.set_description(f"epoch {epoch + 1}/{recipe.epochs}")
            losses = []
            for place, batch in enumerate(order.reshape(per_epoch, recipe.batch_size)):
                done = epoch * per_epoch + place
                training, loss = _step(
                    training,
                    images[batch],
                    labels[batch],
                    jax.random.fold_in(step_key, done),
                    jnp.float32(recipe.epsilon * min(1.0, 3 * done / steps)),
                    recipe=recipe,
                    steps=steps,
                )
                losses.append(loss)
                bar.update()
            bar.set_postfix_str(f"loss {np.mean(losses):.4f}")
            _keep(store, epoch + 1, training)
    return training.variables, losses


@cache  # A new but equal optimizer would compile the same step again.
def _optimizer(recipe: _Recipe, steps: int) -> optax.GradientTransformation:
    if isinstance(recipe.module, CNN | MLP):
        return optax.adam(optax.cosine_decay_schedule(recipe.learning_rate, steps))
    rises = max(steps // 5, 1)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0.0, recipe.learning_rate, rises),
            optax.linear_schedule(recipe.learning_rate, 0.0, max(steps - rises, 1)),
        ],
        [rises],
    )
    return optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(rate, momentum=0.9, nesterov=True)
    )


@partial(jax.jit, static_argnames=("recipe", "steps"), donate_argnames="training")
def _step(
    training: _Training,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    epsilon: jax.Array,
    *,
    recipe: _Recipe,
    steps: int,
) -> tuple[_Training, jax.Array]:
    images = _shift(images, key, recipe.max_shift)
    if recipe.mirrored:
        mirror = jax.random.bernoulli(jax.random.fold_in(key, 1), shape=(len(images), 1, 1, 1))
        images = jnp.where(mirror, images[:, :, ::-1], images)
    wanted = optax.smooth_labels(jax.nn.one_hot(labels, 10), recipe.smoothing)
    rest = {name: x for name, x in training.variables.items() if name != "params"}

    def objective(params: Any, images: jax.Array) -> tuple[jax.Array, Any]:
        logits, changed = recipe.module.apply(
            {"params": params, **rest}, images, train=True, mutable=list(rest)
        )
        return optax.softmax_cross_entropy(logits, wanted).mean(), changed

    params = training.variables["params"]
    if recipe.epsilon:
        loss_of = lambda x: objective(params, x)[0]  # noqa: E731
        images = _adversarial(loss_of, images, jax.random.fold_in(key, 2), epsilon)
    (loss, changed), gradients = jax.value_and_grad(objective, has_aux=True)(params, images)
    updates, state = _optimizer(recipe, steps).update(gradients, training.state, params)
    params = optax.apply_updates(params, updates)
    return _Training({"params": params, **changed}, state), loss


def _shift(images: jax.Array, key: jax.Array, most: int) -> jax.Array:
    """Each image moved by its own random number of pixels, at most `most`, black outside."""
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    corners = jax.random.randint(key, (len(images), 2), 0, 2 * most + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, corners)


def _adversarial(loss_of: Any, images: jax.Array, key: jax.Array, epsilon: jax.Array) -> jax.Array:
    """The images, moved uphill within the ball, from a random point of it."""
    x = random_start(images, key, epsilon)
    for _ in range(_ATTACK_STEPS):  # in a loop of XLA's, convolutions have slow gradients on a CPU
        x = uphill(loss_of, x, images, epsilon, 2.5 / _ATTACK_STEPS * epsilon)
    return x


def _store(config: TrainConfig) -> Store:
    """What an interrupted training leaves, a file beside its output."""
    path = Path(config.output)
    return Store(path.with_name(f"{path.name}.unfinished.npz"), dataclasses.asdict(config))


def _keep(store: Store, epochs: int, training: _Training) -> None:
    """Store what is needed to go on."""
    leaves = {str(i): x for i, x in enumerate(jax.tree.leaves(training))}
    store.write(epochs=epochs, **leaves)


def _resume(store: Store, training: _Training) -> tuple[int, _Training]:
    """How many epochs an interrupted training with these settings had done, and what they left."""
    if store.changed:
        raise ValueError(
            f"{store.path} is of a training with other settings: finish it or delete it."
        )
    if not store.content:
        return 0, training
    leaves, tree = jax.tree.flatten(training)
    stored = [jnp.asarray(store.content[str(i)]) for i in range(len(leaves))]
    return int(store.content["epochs"]), jax.tree.unflatten(tree, stored)


def _main(config: TrainConfig) -> None:
    try:
        metrics = train(config)
    except KeyboardInterrupt:
        path = _store(config).path
        stored = f"it goes on after the last whole epoch, kept in {path}" if path.is_file() else ""
        raise command.Stopped(stored) from None
    print(
        f"test accuracy {metrics['test_accuracy']:.2%} (float16 weights in {config.output}), "
        f"train loss {metrics['train_loss']:.4f}, {metrics['seconds']:.0f} s"
    )


if __name__ == "__main__":
    command.run(_main, TrainConfig, about=__doc__ or "")
