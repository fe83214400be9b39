"""Small tasks on real data that claims train on: digits, pictures, sentences.

A task is a network of `models` and three splits of a data set.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.attack import data as images
from experiments.attack import models as image_models
from experiments.finetune import data as texts
from experiments.laboratory.networks import models
from experiments.laboratory.networks.models import Init
from experiments.laboratory.networks.vectors import bags, numbers, vectors

__all__ = [
    "Examples",
    "Task",
    "convolved",
    "digits",
    "mnist",
    "pictures",
    "sentences",
    "small_digits",
    "words",
]

_LONGEST = 16  # words of a sentence that the transformer reads
_PICTURES = {"train": 9_000, "test": 4_000}  # how many are looked at; they cost a forward pass each
_VALIDATION = 1_000


class Examples(NamedTuple):
    """Inputs and what they are labelled as.

    Attributes:
      inputs: what a model reads, examples first.
      labels: int32 (examples,).
    """

    inputs: Any
    labels: Any

    def take(self, places: Any) -> "Examples":
        """Some of the examples."""
        return Examples(self.inputs[places], self.labels[places])

    def draw(self, key: jax.Array, count: int) -> "Examples":
        """So many examples at random, with replacement."""
        return self.take(jax.random.randint(key, (count,), 0, self.labels.shape[0]))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Task:
    """A model and data; programs are compiled for each model.

    Attributes:
      logits: (params, inputs) -> logits, float32 (examples, classes).
      init: key -> params before any training.
      train: to learn from.
      validation: to choose by; None where nothing is chosen.
      test: to report on.
    """

    logits: Callable[[Any, jax.Array], jax.Array] = dataclasses.field(metadata={"static": True})
    init: Init = dataclasses.field(metadata={"static": True})
    train: Examples
    validation: Examples | None
    test: Examples


@functools.cache
def mnist(source: str, hidden: tuple[int, ...]) -> Task:
    """MNIST's digits for a dense network with biases, as published ones are; nothing to choose by.

    Args:
      source: what `experiments.attack.data.load` takes; of the bundled "mnist", which is MNIST's
        test set, 8,000 images are to learn from and 2,000 to report on.
      hidden: units of the layers between.
    """
    if source == "mnist":
        test, train = _cut(_digits(source, "test"), 8_000)  # shuffled: the first half is easier
    else:
        train, test = _digits(source, "train"), _digits(source, "test")
    train, test = (x._replace(inputs=x.inputs.reshape(len(x.labels), -1)) for x in (train, test))
    sizes = (train.inputs.shape[1], *hidden, images.NUM_CLASSES)
    return Task(models.dense, models.layers(sizes), train, None, test)


@functools.cache
def digits(source: str, hidden: int = 32) -> Task:
    """MNIST's digits at half their size, for a perceptron of one hidden layer.

    Args:
      source: what `experiments.attack.data.load` takes; of the bundled "mnist", which is MNIST's
        test set, 7,000 images are to learn from and 2,000 to report on.
      hidden: its units.
    """
    if source == "mnist":
        train, test = _cut(_halved(source, "test"), 2_000)
    else:
        train, test = _halved(source, "train"), _halved(source, "test")
    sizes = (train.inputs.shape[1], hidden, images.NUM_CLASSES)
    return _perceptron(sizes, *_cut(train, _VALIDATION), test)


@functools.cache
def convolved(source: str, channels: tuple[int, ...] = (1, 8, 16)) -> Task:
    """`digits`, for convolutions between so many channels."""
    flat = digits(source)
    splits = [flat.train, flat.validation, flat.test]
    pictures = [x._replace(inputs=x.inputs.reshape(-1, 14, 14, 1)) for x in splits]
    side = -(-14 // 2 ** (len(channels) - 1))
    init = models.kernels(channels, (side * side * channels[-1] + 1, images.NUM_CLASSES))
    return Task(models.convolutional, init, *pictures)


@functools.cache
def small_digits(*, transposed: bool = False, hidden: int = 64) -> Task:
    """scikit-learn's digits of 8 x 8 pixels, for a perceptron: 1,100 to learn from, 397 for tests.

    Args:
      transposed: whether rows are columns, for a network that is to have something to learn.
      hidden: units of its one hidden layer.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels / 16).astype(np.float32)
    if transposed:
        pixels = pixels.reshape(-1, 8, 8).swapaxes(1, 2).reshape(-1, 64)
    rest, test = _cut(Examples(pixels, labels.astype(np.int32)), 397)
    return _perceptron((64, hidden, images.NUM_CLASSES), *_cut(rest, 300), test)


@functools.cache
def pictures(source: str, weights: str) -> Task:
    """CIFAR-10's pictures as a trained ResNet sees them, for a new last layer.

    Args:
      source: what `experiments.attack.data.load` takes.
      weights: of the ResNet, what `experiments.attack.models.load_weights` takes.

    Raises:
      FileNotFoundError: there are no such weights.
      ValueError: they are of another network.
    """
    if weights not in image_models.BUNDLED and not Path(weights).is_file():
        raise FileNotFoundError(
            f"weights: there is no file {weights!r}, nor is it one of {image_models.BUNDLED}: "
            "train a ResNet by experiments.attack.train."
        )
    params = image_models.load_weights(weights)
    if not isinstance(image_models.network(params), image_models.ResNet):
        raise ValueError(f"weights must be a ResNet's, got {weights!r}.")
    width = params["Dense_0"]["kernel"].shape[0]
    last = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}  # what it would read is shown
    look = jax.jit(functools.partial(image_models.apply, {**params, "Dense_0": last}))

    def seen(split: str) -> Examples:
        pixels, labels = images.load(source, split=split)
        some = np.random.default_rng(0).permutation(len(labels))[: _PICTURES[split]]
        parts = [look(pixels[some[i : i + 250]]) for i in range(0, len(some), 250)]
        return Examples(np.concatenate(parts), labels[some])

    train, test = _standardised(seen("train"), seen("test"))
    return _perceptron((width, images.NUM_CLASSES), *_cut(train, _VALIDATION), test)


@functools.cache
def sentences(source: str, width: int = 64) -> Task:
    """Sentences, praise or blame, as sums of word vectors, for logistic regression.

    A word weighs by its rarity, log(sentences / sentences that hold it).

    Args:
      source: what `experiments.finetune.data.load` takes.
      width: numbers of a word's vector, see `vectors`.
    """
    splits = [_held(source, split) for split in ("train", "dev", "test")]
    number = numbers(splits[0][0])
    learned = bags(splits[0][0], number)
    weighed = vectors(learned, width) * np.log(len(learned) / learned.sum(0))[:, None]
    parts = [Examples(bags(tokens, number) @ weighed, labels) for tokens, labels in splits]
    return _perceptron((width, 2), *_standardised(*parts))


@functools.cache
def words(source: str, width: int = 32) -> Task:
    """Sentences, praise or blame, as sequences of word vectors, for a transformer of one layer.

    Args:
      source: what `experiments.finetune.data.load` takes.
      width: numbers of a word's vector, see `vectors`, and of the transformer's.
    """
    splits = [_held(source, split) for split in ("train", "dev", "test")]
    number = numbers(splits[0][0])
    table = vectors(bags(splits[0][0], number), width) * width**0.5

    def read(tokens: Sequence[list[str]], labels: np.ndarray) -> Examples:
        sequences = np.zeros((len(tokens), _LONGEST, width), np.float32)
        for sequence, sentence in zip(sequences, tokens, strict=True):
            known = [number[word] - 1 for word in sentence if word in number][:_LONGEST]
            sequence[: len(known)] = table[known]
        return Examples(sequences, labels)

    d = width
    shapes = [(d, 3 * d), (d, d), (d, 2 * d), (2 * d, d), (d + 1, 2)]
    return Task(models.transformer, models.matrices(shapes), *(read(*split) for split in splits))


def _perceptron(
    sizes: Sequence[int], train: Examples, validation: Examples, test: Examples
) -> Task:
    """A perceptron of so many units, each layer's matrix with a row for the one."""
    shapes = [(n + 1, m) for n, m in itertools.pairwise(sizes)]
    return Task(models.perceptron, models.matrices(shapes), train, validation, test)


def _cut(examples: Examples, count: int) -> tuple[Examples, Examples]:
    """All but so many, at random, and those."""
    order = np.random.default_rng(0).permutation(len(examples.labels))
    return examples.take(order[count:]), examples.take(order[:count])


def _digits(source: str, split: str) -> Examples:
    pixels, labels = images.load(source, split=split)
    if pixels.shape[1:] != (28, 28, 1):
        raise ValueError(f"data must be of 28 x 28 pixels, got {source!r} of {pixels.shape[1:]}.")
    return Examples(pixels, labels)


def _halved(source: str, split: str) -> Examples:
    """Digits of 14 x 14 pixels, each the mean of four."""
    whole = _digits(source, split)
    small = whole.inputs.reshape(-1, 14, 2, 14, 2).mean((2, 4), dtype=np.float32)
    return Examples(small.reshape(len(small), -1), whole.labels)


def _held(source: str, split: texts.Split) -> tuple[list[list[str]], np.ndarray]:
    """The words of a split's sentences, and 1 where they praise."""
    found = texts.load(source, split)
    if found.choices != texts.SENTIMENT:
        raise ValueError(f"sentences: {source!r} holds no praise and blame.")
    tokens = [prompt.removesuffix(" It was").lower().split() for prompt in found.prompts]
    return tokens, np.array(found.answers, np.int32)


def _standardised(*parts: Examples) -> list[Examples]:
    """Inputs of mean 0 and deviation 1 over the first part."""
    mean, deviation = parts[0].inputs.mean(0), parts[0].inputs.std(0) + 1e-6
    return [Examples((x.inputs - mean) / deviation, x.labels) for x in parts]
