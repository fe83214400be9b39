"""The attacked classifier: a small Flax network for 28 x 28 digits, its weights on disk.

Weights travel as a compressed `.npz` of plain arrays, one per leaf, named by the '/'-joined path
of the leaf, so that a file can be read anywhere and never runs code.
"""

import os
import tempfile
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

from experiments.attack.data import ASSETS, IMAGE_SHAPE, NUM_CLASSES

__all__ = [
    "CNN",
    "LogitsFn",
    "Params",
    "apply_cnn",
    "load_classifier",
    "load_mnist_cnn",
    "load_params",
    "save_params",
]

Params = dict[str, Any]
LogitsFn = Callable[[jax.Array], jax.Array]


class CNN(nn.Module):
    """Two 3 x 3 convolutions, each halved by max-pooling, and two dense layers.

    Maps images, float32 of shape (n, 28, 28, 1) in [0, 1], to logits, float32 of shape
    (n, num_classes). The default sizes have 105,866 parameters.

    Attributes:
      features: channels of the two convolutions.
      hidden: units of the first dense layer.
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
    num_classes: int = NUM_CLASSES

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Logits of the images."""
        x = images
        for channels in self.features:
            x = nn.relu(nn.Conv(channels, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(self.hidden)(x))
        return nn.Dense(self.num_classes)(x)


def apply_cnn(params: Params, images: jax.Array) -> jax.Array:
    """Logits of the default `CNN` with the given parameters.

    Args:
      params: nested dictionaries as `CNN().init(...)["params"]` makes them.
      images: shape (n, 28, 28, 1) in [0, 1].

    Returns:
      Logits of shape (n, 10).

    Example:
      >>> _, params = load_mnist_cnn()
      >>> apply_cnn(params, jnp.zeros((2, 28, 28, 1))).shape
      (2, 10)
    """
    # Flax types the result as perhaps a pair, which it is only with mutable collections.
    return cast(jax.Array, CNN().apply({"params": params}, images))


def load_mnist_cnn() -> tuple[LogitsFn, Params]:
    """The bundled MNIST classifier (see `assets/README.md` for its accuracy and training).

    Returns:
      `logits_fn`, which maps images of shape (n, 28, 28, 1) in [0, 1] to logits of shape (n, 10)
      and can be jitted, differentiated and vmapped, and the float32 parameters that it uses:
      `logits_fn(x)` is `apply_cnn(params, x)`.

    Raises:
      ValueError: the bundled file is damaged.

    Example:
      >>> from experiments.attack.data import load
      >>> logits_fn, params = load_mnist_cnn()
      >>> images, labels = load("mnist")
      >>> logits_fn(images[:5]).argmax(1).tolist(), labels[:5].tolist()
      ([7, 2, 1, 0, 4], [7, 2, 1, 0, 4])
    """
    params = _load_cnn_params(ASSETS / "mnist_cnn.npz")
    return partial(apply_cnn, params), params


def load_classifier(weights: str | Path = "") -> LogitsFn:
    """A classifier to attack: the bundled one, or one that `experiments.attack.train` wrote.

    Args:
      weights: the `.npz` file, or "" for the bundled MNIST network.

    Returns:
      A function from images of shape (n, 28, 28, 1) in [0, 1] to logits of shape (n, 10).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is damaged or holds another network's weights.

    Example:
      >>> load_classifier()(jnp.zeros((2, 28, 28, 1))).shape
      (2, 10)
    """
    return partial(apply_cnn, _load_cnn_params(weights)) if weights else load_mnist_cnn()[0]


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
    _write_atomically(Path(path), flat)


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
      >>> sorted(load_params(ASSETS / "mnist_cnn.npz"))
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


def _load_cnn_params(path: str | Path) -> Params:
    params = load_params(path)
    images = jax.ShapeDtypeStruct((1, *IMAGE_SHAPE), jnp.float32)
    expected = jax.eval_shape(CNN().init, jax.random.key(0), images)["params"]
    shapes, wanted = (jax.tree.map(jnp.shape, tree) for tree in (params, expected))
    if shapes != wanted:
        raise ValueError(f"{path}: the weights must have the shapes {wanted}, got {shapes}.")
    return params


def _write_atomically(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    # The temporary file lies in the same folder: os.replace is atomic only within a file system.
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            # The stub reads ** as a clash with allow_pickle; no leaf has that name.
            np.savez_compressed(file, **arrays)  # pyright: ignore[reportArgumentType]
        os.chmod(temporary, 0o644)  # mkstemp makes it readable by its owner alone.
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
