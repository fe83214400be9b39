"""Small tasks on real data that claims train on: digits, pictures, sentences.

Each is a model without biases beside its matrices (where one is wanted, a one is appended to what
the matrix reads), so that every number of it may lie on a grid, and three splits of a data set.
"""

import functools
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.attack import data as images
from experiments.attack import models
from experiments.finetune import data as texts

__all__ = ["Examples", "Params", "Task", "digits", "perceptron", "pictures", "sentences", "words"]

Params = list[Any]
"""The matrices of a model, in floats or quantized."""

_LEAST_SEEN = 4  # a word that fewer training sentences hold has no number
_LONGEST = 16  # words of a sentence that the transformer reads
_PICTURES = {"train": 9_000, "test": 4_000}  # how many are looked at; they cost a forward pass each
_VALIDATION = 1_000
_HEADS = 4


class Examples(NamedTuple):
    """Inputs and what they are labelled as.

    Attributes:
      inputs: what a model reads, examples first.
      labels: int32 (examples,).
    """

    inputs: np.ndarray
    labels: np.ndarray

    def take(self, places: Any) -> "Examples":
        """Some of the examples."""
        return Examples(self.inputs[places], self.labels[places])


class Task(NamedTuple):
    """A model and data.

    Attributes:
      logits: (params, inputs) -> logits, float32 (examples, classes).
      init: key -> params before any training.
      train: to learn from.
      validation: to choose by.
      test: to report on.
    """

    logits: Callable[[Any, jax.Array], jax.Array]
    init: Callable[[jax.Array], Params]
    train: Examples
    validation: Examples
    test: Examples


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
    return _task(train, test, (train.inputs.shape[1], hidden, images.NUM_CLASSES))


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
    if weights not in models.BUNDLED and not Path(weights).is_file():
        raise FileNotFoundError(
            f"weights: there is no file {weights!r}, nor is it one of {models.BUNDLED}: train a "
            "ResNet by experiments.attack.train."
        )
    params = models.load_weights(weights)
    if not isinstance(models.network(params), models.ResNet):
        raise ValueError(f"weights must be a ResNet's, got {weights!r}.")
    width = params["Dense_0"]["kernel"].shape[0]
    last = {"kernel": jnp.eye(width), "bias": jnp.zeros(width)}  # what it would read is shown
    look = jax.jit(functools.partial(models.apply, {**params, "Dense_0": last}))

    def seen(split: str) -> Examples:
        pixels, labels = images.load(source, split=split)
        some = np.random.default_rng(0).permutation(len(labels))[: _PICTURES[split]]
        parts = [look(pixels[some[i : i + 250]]) for i in range(0, len(some), 250)]
        return Examples(np.concatenate(parts), labels[some])

    train, test = _standardised(seen("train"), seen("test"))
    return _task(train, test, (width, images.NUM_CLASSES))


@functools.cache
def sentences(source: str, width: int = 64) -> Task:
    """Sentences, praise or blame, as sums of word vectors, for logistic regression.

    A word weighs by its rarity, log(sentences / sentences that hold it).

    Args:
      source: what `experiments.finetune.data.load` takes.
      width: numbers of a word's vector, see `_vectors`.
    """
    splits = [_held(source, split) for split in ("train", "dev", "test")]
    number = _numbers(splits[0][0])
    learned = _bags(splits[0][0], number)
    vectors = _vectors(learned, width) * np.log(len(learned) / learned.sum(0))[:, None]
    parts = [Examples(_bags(tokens, number) @ vectors, labels) for tokens, labels in splits]
    train, validation, test = _standardised(*parts)
    return _perceptron_task(train, validation, test, (width, 2))


@functools.cache
def words(source: str, width: int = 32) -> Task:
    """Sentences, praise or blame, as sequences of word vectors, for a transformer of one layer.

    Args:
      source: what `experiments.finetune.data.load` takes.
      width: numbers of a word's vector, see `_vectors`, and of the transformer's.
    """
    splits = [_held(source, split) for split in ("train", "dev", "test")]
    number = _numbers(splits[0][0])
    vectors = _vectors(_bags(splits[0][0], number), width) * width**0.5

    def read(tokens: Sequence[list[str]], labels: np.ndarray) -> Examples:
        sequences = np.zeros((len(tokens), _LONGEST, width), np.float32)
        for sequence, sentence in zip(sequences, tokens, strict=True):
            known = [number[word] - 1 for word in sentence if word in number][:_LONGEST]
            sequence[: len(known)] = vectors[known]
        return Examples(sequences, labels)

    d = width
    shapes = [(d, 3 * d), (d, d), (d, 2 * d), (2 * d, d), (d + 1, 2)]
    return Task(transformer, _start(shapes), *(read(*split) for split in splits))


def perceptron(params: Params, inputs: jax.Array) -> jax.Array:
    """Logits of dense layers with rectifiers between them."""
    *hidden, last = params
    for matrix in hidden:
        inputs = jax.nn.relu(_with_one(inputs) @ matrix)
    return _with_one(inputs) @ last


def transformer(params: Params, inputs: jax.Array) -> jax.Array:
    """Logits of a layer of attention and one of rectifiers, averaged over words; 0 is no word."""
    qkv, out, up, down, last = params
    is_word = (inputs != 0.0).any(-1)
    count, length, width = inputs.shape
    q, k, v = (
        part.reshape(count, length, _HEADS, width // _HEADS)
        for part in jnp.split(_normalised(inputs) @ qkv, 3, axis=-1)
    )
    heard = jnp.einsum("nqhd,nkhd->nhqk", q, k) * (width // _HEADS) ** -0.5
    weights = jax.nn.softmax(jnp.where(is_word[:, None, None], heard, -1e9), axis=-1)
    x = inputs + jnp.einsum("nhqk,nkhd->nqhd", weights, v).reshape(inputs.shape) @ out
    x = x + jax.nn.relu(_normalised(x) @ up) @ down
    total = jnp.where(is_word[..., None], _normalised(x), 0.0).sum(1)
    mean = total / jnp.maximum(is_word.sum(1, keepdims=True), 1).astype(x.dtype)
    return _with_one(mean) @ last


def _task(train: Examples, test: Examples, sizes: tuple[int, ...]) -> Task:
    return _perceptron_task(*_cut(train, _VALIDATION), test, sizes)


def _perceptron_task(
    train: Examples, validation: Examples, test: Examples, sizes: tuple[int, ...]
) -> Task:
    shapes = [(n + 1, m) for n, m in itertools.pairwise(sizes)]
    return Task(perceptron, _start(shapes), train, validation, test)


def _start(shapes: Sequence[tuple[int, int]]) -> Callable[[jax.Array], Params]:
    """Gaussian matrices, of He's standard deviation sqrt(2 / rows)."""

    def init(key: jax.Array) -> Params:
        keys = jax.random.split(key, len(shapes))
        return [
            jax.random.normal(key, shape) * (2.0 / shape[0]) ** 0.5
            for key, shape in zip(keys, shapes, strict=True)
        ]

    return init


def _with_one(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, jnp.ones((*x.shape[:-1], 1), x.dtype)], axis=-1)


def _normalised(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)


def _cut(examples: Examples, count: int) -> tuple[Examples, Examples]:
    """All but so many, at random, and those."""
    order = np.random.default_rng(0).permutation(len(examples.labels))
    return examples.take(order[count:]), examples.take(order[:count])


def _halved(source: str, split: str) -> Examples:
    """Digits of 14 x 14 pixels, each the mean of four."""
    pixels, labels = images.load(source, split=split)
    if pixels.shape[1:] != (28, 28, 1):
        raise ValueError(f"digits: {source!r} has images of {pixels.shape[1:]}.")
    small = pixels.reshape(-1, 14, 2, 14, 2).mean((2, 4), dtype=np.float32)
    return Examples(small.reshape(len(small), -1), labels)


def _held(source: str, split: texts.Split) -> tuple[list[list[str]], np.ndarray]:
    """The words of a split's sentences, and 1 where they praise."""
    found = texts.load(source, split)
    if found.choices != texts.SENTIMENT:
        raise ValueError(f"sentences: {source!r} holds no praise and blame.")
    tokens = [prompt.removesuffix(" It was").lower().split() for prompt in found.prompts]
    return tokens, np.array(found.answers, np.int32)


def _numbers(tokens: Sequence[list[str]]) -> dict[str, int]:
    """The words that enough sentences hold, numbered from 1."""
    seen = Counter(word for sentence in tokens for word in set(sentence))
    kept = sorted(word for word, count in seen.items() if count >= _LEAST_SEEN)
    return {word: i + 1 for i, word in enumerate(kept)}


def _bags(tokens: Sequence[list[str]], number: dict[str, int]) -> np.ndarray:
    """A row for each sentence, 1 where it holds a word."""
    table = np.zeros((len(tokens), len(number) + 1), np.float32)
    for row, sentence in zip(table, tokens, strict=True):
        row[[number.get(word, 0) for word in sentence]] = 1.0
    return table[:, 1:]


def _vectors(bags: np.ndarray, width: int) -> np.ndarray:
    """Vectors of words, one long each, that know no labels and need no download.

    They are the leading components of the positive pointwise mutual information of two words to be
    in one sentence (Bullinaria and Levy, 2007; Levy and Goldberg, 2014), found by subspace
    iteration from a random start (Halko, Martinsson and Tropp, 2011). A word that tells nothing of
    others has zeros.
    """
    if bags.shape[1] < width:
        raise ValueError(
            f"sentences: {bags.shape[1]} words that occur {_LEAST_SEEN} times are too few for "
            f"vectors of {width} numbers."
        )
    often = bags.sum(0)
    together = (bags.T @ bags) * (len(bags) / np.outer(often, often))
    information = np.log(np.maximum(together, 1.0))
    basis = np.random.default_rng(0).normal(size=(len(often), width)).astype(np.float32)
    for _ in range(3):
        basis = np.linalg.qr(information @ basis)[0]
    rows = information @ basis
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)


def _standardised(*parts: Examples) -> list[Examples]:
    """Inputs of mean 0 and deviation 1 over the first part."""
    mean, deviation = parts[0].inputs.mean(0), parts[0].inputs.std(0) + 1e-6
    return [Examples((x.inputs - mean) / deviation, x.labels) for x in parts]
