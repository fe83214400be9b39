"""The attacked classifiers: small Flax networks, and their weights on disk.

Weights travel as a compressed `.npz` of plain arrays, one per leaf, named by the '/'-joined path
of the leaf, so that a file can be read anywhere and never runs code. A file does not name its
network: the shapes of its arrays tell.
"""

import zipfile
import zlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

import zoqo_jax as zq
from experiments.attack.data import ASSETS, NUM_CLASSES
from zoqo_jax.interop.files import replacing

__all__ = [
    "BUNDLED",
    "CNN",
    "MLP",
    "LogitsFn",
    "Params",
    "ResNet",
    "apply",
    "classifier",
    "fold",
    "load_classifier",
    "load_params",
    "load_weights",
    "network",
    "save_params",
]

Params = dict[str, Any]
LogitsFn = Callable[[jax.Array], jax.Array]

BUNDLED = ("cifar10", "mnist", "mnist_5x5", "mnist_mlp", "mnist_narrow", "mnist_robust")
"""Names of the weights that lie beside this file."""


class CNN(nn.Module):
    """Two convolutions, each halved by max-pooling, and two dense layers, for MNIST.

    Maps images, float32 of shape (n, 28, 28, 1) in [0, 1], to logits, float32 of shape
    (n, num_classes). The default sizes have 105,866 parameters.

    Attributes:
      features: channels of the two convolutions.
      hidden: units of the first dense layer.
      kernel: pixels on a side of a convolution's filters.
      num_classes: number of logits.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> images = jnp.zeros((2, 28, 28, 1))
      >>> logits, variables = CNN().init_with_output(jax.random.key(0), images)
      >>> logits.shape, sum(leaf.size for leaf in jax.tree.leaves(variables))
      ((2, 10), 105866)
    """

    features: tuple[int, int] = (16, 32)
    hidden: int = 64
    kernel: int = 3
    num_classes: int = NUM_CLASSES
    image_shape = (28, 28, 1)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits of the images."""
        x = images
        for channels in self.features:
            x = _halved(nn.relu(nn.Conv(channels, (self.kernel, self.kernel))(x)))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(self.num_classes)(x)


class MLP(nn.Module):
    """Three dense layers, for MNIST: a network without convolutions.

    Maps images, float32 of shape (n, 28, 28, 1) in [0, 1], to logits, float32 of shape
    (n, num_classes).

    Attributes:
      hidden: units of the first two layers.
      num_classes: number of logits.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> images = jnp.zeros((2, 28, 28, 1))
      >>> logits, variables = MLP().init_with_output(jax.random.key(0), images)
      >>> logits.shape, sum(leaf.size for leaf in jax.tree.leaves(variables))
      ((2, 10), 118282)
    """

    hidden: tuple[int, int] = (128, 128)
    num_classes: int = NUM_CLASSES
    image_shape = (28, 28, 1)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits of the images."""
        x = images.reshape(images.shape[0], -1)
        for units in self.hidden:
            x = nn.relu(nn.Dense(units)(x))
        return nn.Dense(self.num_classes)(x)


class ResNet(nn.Module):
    """Eight 3 x 3 convolutions, four of them in two residual blocks, for CIFAR-10.

    Maps images, float32 of shape (n, 32, 32, 3) in [0, 1], to logits, float32 of shape
    (n, num_classes), the means of an image's and its mirror image's. The default width has 412,394
    parameters. It is trained with batch normalisation (Ioffe and Szegedy, 2015, arXiv 1502.03167),
    of which `fold` makes biases.

    Attributes:
      width: channels of the first convolution; the last has eight times as many.
      normalised: batch normalisation after each convolution, instead of a bias.
      num_classes: number of logits.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> images = jnp.zeros((2, 32, 32, 3))
      >>> logits, variables = ResNet().init_with_output(jax.random.key(0), images)
      >>> logits.shape, sum(leaf.size for leaf in jax.tree.leaves(variables))
      ((2, 10), 412394)
    """

    width: int = 16
    normalised: bool = False
    num_classes: int = NUM_CLASSES
    image_shape = (32, 32, 3)

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Logits of the images; `train` normalises by the batch at hand, and reads no mirror."""

        def conv(x: jax.Array, channels: int) -> jax.Array:
            x = nn.Conv(channels, (3, 3), use_bias=not self.normalised)(x)
            if self.normalised:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            return nn.relu(x)

        width = self.width
        x = images if train else jnp.concatenate([images, images[:, :, ::-1]])
        x = conv(4.0 * x - 2.0, width)
        x = _halved(conv(x, 2 * width))
        x = x + conv(conv(x, 2 * width), 2 * width)
        x = _halved(conv(x, 4 * width))
        x = _halved(conv(x, 8 * width))
        x = x + conv(conv(x, 8 * width), 8 * width)
        x = nn.Dense(self.num_classes)(x.max(axis=(1, 2))) / 8.0
        return x if train else (x[: len(images)] + x[len(images) :]) / 2.0


def _halved(x: jax.Array) -> jax.Array:
    """The largest of every 2 x 2 pixels, a last odd row or column left out.

    XLA computes the gradient of `nn.max_pool` on a CPU one pixel at a time; this one's trains the
    CNN three times as fast.
    """
    count, height, width, channels = x.shape
    x = x[:, : height // 2 * 2, : width // 2 * 2]
    return x.reshape(count, height // 2, 2, width // 2, 2, channels).max((2, 4))


def fold(variables: Mapping[str, Any]) -> Params:
    """The parameters of a `ResNet` without normalisation that computes what this one does.

    Args:
      variables: "params" and, where the network is normalised, "batch_stats".

    Returns:
      Parameters of the network with `normalised=False`; for a network without normalisation, its
      own.

    Example:
      >>> images = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))
      >>> trained = ResNet(width=4, normalised=True)
      >>> variables = trained.init(jax.random.key(1), images)
      >>> folded, normalised = apply(fold(variables), images), trained.apply(variables, images)
      >>> bool(jnp.allclose(folded, normalised, atol=1e-5))
      True
    """
    params = dict(variables["params"])
    for name, seen in variables.get("batch_stats", {}).items():
        norm, conv = params.pop(name), name.replace("BatchNorm", "Conv")
        factor = norm["scale"] / jnp.sqrt(seen["var"] + 1e-5)
        bias = norm["bias"] - seen["mean"] * factor
        params[conv] = {"kernel": params[conv]["kernel"] * factor, "bias": bias}
    return params


def network(params: Mapping[str, Any]) -> CNN | MLP | ResNet:
    """The network that parameters belong to, by their names and shapes.

    Args:
      params: nested dictionaries as `init` makes them; leaves may be quantized.

    Raises:
      ValueError: no network of this file has such parameters.

    Example:
      >>> network(load_params(ASSETS / "mnist.npz")) == CNN(features=(16, 32), hidden=64)
      True
    """
    try:
        module = _module(params)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(
            f"params must be those of a CNN, an MLP or a ResNet, got {_shapes(params)}."
        ) from error
    images = jax.ShapeDtypeStruct((1, *module.image_shape), jnp.float32)
    wanted = _shapes(jax.eval_shape(module.init, jax.random.key(0), images)["params"])
    if _shapes(params) != wanted:
        raise ValueError(f"params must have the shapes {wanted}, got {_shapes(params)}.")
    return module


def _module(params: Mapping[str, Any]) -> CNN | MLP | ResNet:
    def outputs(name: str) -> int:
        return params[name]["kernel"].shape[-1]

    if "Conv_0" not in params:
        return MLP((outputs("Dense_0"), outputs("Dense_1")), outputs("Dense_2"))
    if "Conv_2" in params:
        return ResNet(outputs("Conv_0"), num_classes=outputs("Dense_0"))
    features, side = (outputs("Conv_0"), outputs("Conv_1")), params["Conv_0"]["kernel"].shape[0]
    return CNN(features, outputs("Dense_0"), side, outputs("Dense_1"))


def apply(params: Params, images: jax.Array) -> jax.Array:
    """Logits of the network that the parameters belong to.

    Args:
      params: nested dictionaries as `load_params` makes them; leaves may be quantized.
      images: shape (n, height, width, channels) in [0, 1].

    Returns:
      Logits of shape (n, classes).

    Raises:
      ValueError: no network of this file has such parameters.

    Example:
      >>> apply(load_params(ASSETS / "mnist.npz"), jnp.zeros((2, 28, 28, 1))).shape
      (2, 10)
    """
    module = network(params)
    # Flax types the result as perhaps a pair, which it is only with mutable collections.
    return cast(jax.Array, zq.quaxify(module.apply)({"params": params}, images))


def load_classifier(weights: str | Path = "mnist", bits: int = 32) -> LogitsFn:
    """A classifier to attack: a bundled one, or one that `experiments.attack.train` wrote.

    Args:
      weights: a name of `BUNDLED` or an `.npz` file.
      bits: 32 for floats; 2 to 8 for weights on a uniform grid of that many bits, each matrix and
        convolution with one scale a channel, computed with as they are stored.

    Returns:
      A function from images of shape (n, height, width, channels) in [0, 1] to logits of shape
      (n, classes); it can be jitted and vmapped and, in floats, differentiated.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged or holds another network's weights, or bits that cannot be.

    Example:
      >>> from experiments.attack.data import load
      >>> images, labels = load("mnist")
      >>> load_classifier("mnist", bits=4)(images[:5]).argmax(1).tolist(), labels[:5].tolist()
      ([7, 2, 1, 0, 4], [7, 2, 1, 0, 4])
    """
    return classifier(load_weights(weights), bits)


def classifier(params: Params, bits: int = 32) -> LogitsFn:
    """The function of `load_classifier`, of parameters at hand; see there."""
    if bits != 32:
        quantizer = zq.Quantizer(bits, axis=-1)
        params = zq.quantize(params, quantizer, where=lambda path, leaf: leaf.ndim >= 2)
    return partial(apply, params)


def load_weights(weights: str | Path = "mnist") -> Params:
    """The float32 parameters of `load_classifier`, of a bundled name or a file; see there."""
    path = ASSETS / f"{weights}.npz" if weights in BUNDLED else weights
    params = load_params(path)
    try:
        network(params)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return params


def save_params(path: str | Path, params: Mapping[str, Any], *, dtype: Any = np.float16) -> None:
    """Writes nested parameters as a compressed `.npz`, all at once or not at all.

    Args:
      path: the file, replaced if it exists; its folder must exist.
      params: nested dictionaries of finite arrays; names must not contain '/'.
      dtype: the floating type to store; float16 keeps 11 significant bits in half the space.

    Raises:
      ValueError: nothing to save, a name with '/', or a value that is not finite in `dtype`.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "weights.npz"
      ...     save_params(path, {"Dense_0": {"bias": np.array([0.5, -2.0])}})
      ...     load_params(path)["Dense_0"]["bias"].tolist()
      [0.5, -2.0]
    """
    flat = {}
    for names, leaf in traverse_util.flatten_dict(dict(params)).items():
        if any("/" in name for name in names):
            raise ValueError(f"params: names must not contain '/', got {names}.")
        with np.errstate(over="ignore"):  # Told below, by name.
            array = np.asarray(leaf).astype(dtype)
        if not np.isfinite(array).all():
            raise ValueError(f"params: {'/'.join(names)} is not finite in {np.dtype(dtype)}.")
        flat["/".join(names)] = array
    if not flat:
        raise ValueError(f"params must hold at least one array, got {params!r}.")
    with replacing(path) as file:
        # The stub reads ** as a clash with allow_pickle; no leaf has that name.
        np.savez_compressed(file, **flat)  # pyright: ignore[reportArgumentType]


def load_params(path: str | Path) -> Params:
    """Reads parameters written by `save_params`.

    Args:
      path: the file.

    Returns:
      Nested dictionaries of float32 arrays.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not such a file, damaged, or holding anything but finite floating-point arrays.

    Example:
      >>> sorted(load_params(ASSETS / "mnist.npz"))
      ['Conv_0', 'Conv_1', 'Dense_0', 'Dense_1']
    """
    flat = {}
    try:
        with zipfile.ZipFile(path):  # np.load would take other formats, too, and not say which.
            pass
        with np.load(path, allow_pickle=False) as file:
            flat = {tuple(name.split("/")): file[name] for name in file.files}
    except (
        ValueError,
        EOFError,
        MemoryError,
        RuntimeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ValueError(f"{path} is not a readable .npz of plain arrays: {error}") from error
    for names, array in flat.items():
        if not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
            raise ValueError(f"{path}: {'/'.join(names)} must hold finite floating-point numbers.")
        if any(names[:depth] in flat for depth in range(1, len(names))):
            raise ValueError(f"{path}: a prefix of {'/'.join(names)} is both a leaf and a branch.")
    return traverse_util.unflatten_dict(
        {names: jnp.asarray(array, jnp.float32) for names, array in flat.items()}
    )


def _shapes(params: Any) -> Any:
    return jax.tree.map(lambda leaf: tuple(leaf.shape), dict(params), is_leaf=zq.is_quantized)
