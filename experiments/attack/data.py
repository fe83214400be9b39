"""Images for the attack experiments: MNIST's test set, IDX or picture folders, tensorflow-datasets.

The IDX format is the one of LeCun, Cortes and Burges, "The MNIST database of handwritten digits"
(1998): two zero bytes, a type code, the rank, one big-endian 32-bit size per dimension, the data.
The package idx2numpy trusts the sizes in a header, for which it may reserve all memory.
Nothing is read, downloaded or imported before `load` asks for it.
"""

import gzip
import io
import math
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import numpy as np

__all__ = ["ASSETS", "IMAGE_SHAPES", "NUM_CLASSES", "load", "read_idx"]

ASSETS = Path(__file__).parent / "assets"
IMAGE_SHAPES = ((28, 28, 1), (32, 32, 3))
NUM_CLASSES = 10

_PREFIXES = {"train": "train", "test": "t10k"}
_TFDS = "tfds:"
_PICTURES = {".jpg", ".jpeg", ".png"}
_IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_MAX_RANK = 8
_MAX_BYTES = 2**31  # A gzip file of 2 MB can inflate to 2 GB: stop there, whatever the header says.
_CHUNK = 2**20


def load(dataset: str, *, split: str = "test") -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of one split of a data set of ten classes.

    Args:
      dataset: one of
        - "mnist": the MNIST test set that lies beside this file (no train split);
        - "tfds:NAME": a tensorflow-datasets name, such as "tfds:mnist" or "tfds:cifar10" (its first
          use downloads it, for which that library needs TensorFlow; later ones do not);
        - a folder of IDX files under their usual names (`train-images-idx3-ubyte`,
          `t10k-labels-idx1-ubyte`, ...), with or without `.gz`;
        - a folder or a tar file of pictures, `train/CLASS/*.jpg` and `test/CLASS/*.jpg` (or .png),
          classes in the order of their names; the first pictures of all classes come first, then
          the second ones.
      split: "test" or "train".

    Returns:
      Images, float32 of shape (n, 28, 28, 1) or (n, 32, 32, 3) in [0, 1] (pixel / 255), and labels,
      int32 of shape (n,) in [0, 9].

    Raises:
      ValueError: an unknown split, the train split of "mnist", or data of the wrong kind.
      FileNotFoundError: the folder, the tar file, or what should be in it, is missing.
      ImportError: "tfds:NAME" without tensorflow-datasets or something that it needs.
      RuntimeError: tensorflow-datasets could not find, download or prepare the data set.

    Example:
      >>> images, labels = load("mnist")
      >>> images.shape, images.dtype, labels[:5].tolist()
      ((10000, 28, 28, 1), dtype('float32'), [7, 2, 1, 0, 4])
    """
    if split not in _PREFIXES:
        raise ValueError(f"split must be 'train' or 'test', got {split!r}.")
    if not dataset or dataset == _TFDS:
        raise ValueError(f"dataset must be 'mnist', 'tfds:NAME' or a folder, got {dataset!r}.")
    if dataset == "mnist" and split != "test":
        raise ValueError(
            f"split must be 'test' for the bundled 'mnist', got {split!r}: for the training images "
            "pass a folder of IDX files or 'tfds:mnist'."
        )
    if dataset.startswith(_TFDS):
        images, labels = _read_tfds(dataset.removeprefix(_TFDS), split)
    else:
        path = ASSETS if dataset == "mnist" else Path(dataset).expanduser()
        has_pictures = path.is_file() or (path / split).is_dir()
        images, labels = (_read_pictures if has_pictures else _read_folder)(path, split)
    _check(images, labels, f"dataset {dataset!r}, split {split!r}")
    return images.astype(np.float32) / np.float32(255), labels.astype(np.int32)


def read_idx(path: str | Path) -> np.ndarray:
    """The array in an IDX file, plain or gzip (told apart by content, not by name).

    Memory follows what the file holds, not what its header claims.

    Args:
      path: the file.

    Returns:
      An array of the file's shape and element type, in native byte order.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: not an IDX file, damaged, shorter or longer than its header says, of a rank
        outside [1, 8], with an empty dimension, or over 2 GiB.

    Example:
      >>> read_idx(ASSETS / "t10k-labels-idx1-ubyte.gz").shape
      (10000,)
    """
    with open(path, "rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        try:
            if not is_gzip:
                return _parse_idx(raw, path)
            with gzip.GzipFile(fileobj=raw) as file:
                return _parse_idx(cast(BinaryIO, file), path)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is a damaged or truncated gzip file: {error}.") from error


def _parse_idx(file: BinaryIO, path: str | Path) -> np.ndarray:
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in _IDX_DTYPES:
        raise ValueError(f"{path} is not an IDX file: it begins with the bytes {magic.hex(' ')!r}.")
    dtype, rank = np.dtype(_IDX_DTYPES[magic[2]]), magic[3]
    if not 1 <= rank <= _MAX_RANK:
        raise ValueError(f"{path}: the rank must be in [1, {_MAX_RANK}], got {rank}.")
    sizes = file.read(4 * rank)
    if len(sizes) < 4 * rank:
        raise ValueError(f"{path} is truncated: it ends inside its header.")
    shape = tuple(np.frombuffer(sizes, ">u4").tolist())
    expected = math.prod(shape) * dtype.itemsize
    if not 0 < expected <= _MAX_BYTES:
        raise ValueError(
            f"{path}: the data must have between 1 and {_MAX_BYTES} bytes, "
            f"got a header of shape {shape}, {expected} bytes."
        )
    payload = _read_at_most(file, expected + 1)
    if len(payload) < expected:
        raise ValueError(
            f"{path} is truncated: shape {shape} needs {expected} bytes, got {len(payload)}."
        )
    if len(payload) > expected:
        raise ValueError(f"{path} holds more than the {expected} bytes that shape {shape} needs.")
    return np.frombuffer(payload, dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _read_at_most(file: BinaryIO, limit: int) -> bytearray:
    # One read(limit) would reserve all of `limit` at once, which a lying header chooses.
    payload = bytearray()
    while chunk := file.read(min(_CHUNK, limit - len(payload))):
        payload += chunk
    return payload


def _read_folder(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    if not folder.is_dir():
        raise FileNotFoundError(
            f"dataset: there is no folder {str(folder)!r} (nor is it 'mnist' or 'tfds:NAME')."
        )
    images = read_idx(_find(folder, f"{_PREFIXES[split]}-images-idx3-ubyte"))
    labels = read_idx(_find(folder, f"{_PREFIXES[split]}-labels-idx1-ubyte"))
    if images.ndim != 3:
        raise ValueError(
            f"the {split} images in {folder} must have rank 3 (n, rows, columns), "
            f"got shape {images.shape}."
        )
    return images[..., None], labels


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"dataset: the folder {folder} has neither {name} nor {name}.gz.")


def _read_pictures(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    by_name = dict(_pictures(path, split))
    if not by_name:
        raise FileNotFoundError(f"dataset: {path} has no pictures {split}/CLASS/*.jpg or *.png.")
    classes = sorted({name.parent.name for name in by_name})
    names = _dealt(sorted(by_name))
    images = [_decoded(by_name[name], f"{path}: {name}") for name in names]
    if len({image.shape for image in images}) > 1:
        raise ValueError(f"{path}: all pictures of {split} must have one size.")
    return np.stack(images), np.asarray([classes.index(name.parent.name) for name in names])


def _dealt(names: list[PurePosixPath]) -> list[PurePosixPath]:
    """One of each class after another, so that the first few are a sample of all."""
    seen: Counter[str] = Counter()
    rounds = []
    for name in names:
        rounds.append((seen[name.parent.name], name))
        seen[name.parent.name] += 1
    return [name for _, name in sorted(rounds)]


def _pictures(path: Path, split: str) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Names and contents of the pictures `split/CLASS/*`, of a folder or a tar file."""
    if path.is_dir():
        for file in sorted((path / split).glob("*/*")):
            if file.suffix.lower() in _PICTURES:
                yield PurePosixPath(*file.relative_to(path).parts), file.read_bytes()
        return
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                parts = name.parts
                if not member.isfile() or len(parts) != 3 or parts[0] != split:
                    continue
                if name.suffix.lower() in _PICTURES and member.size <= _CHUNK:
                    yield name, cast(BinaryIO, tar.extractfile(member)).read()
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise ValueError(f"{path} is not a readable tar file of pictures: {error}") from error


def _decoded(content: bytes, source: str) -> np.ndarray:
    """A picture's pixels, uint8 (height, width, channels)."""
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(io.BytesIO(content))
        shape = (picture.height, picture.width)
        if shape not in {wanted[:2] for wanted in IMAGE_SHAPES}:  # before a byte is decoded
            raise ValueError(f"{source}: the picture has {shape} pixels.")
        pixels = np.asarray(picture.convert("L" if picture.mode == "L" else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{source} is not a readable picture: {error}") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _read_tfds(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        import tensorflow_datasets as tfds

        source: Any = tfds.data_source(name, split=split)
        pairs = [(example["image"], example["label"]) for example in source]
    except ImportError as error:
        # tensorflow-datasets 4.9.10 needs the last two here without declaring them.
        raise ImportError(
            f"dataset 'tfds:{name}' needs a package that is missing ({error}): "
            "pip install tensorflow-datasets array_record importlib_resources pillow"
        ) from error
    except KeyError as error:
        raise ValueError(f"dataset 'tfds:{name}' has no feature {error}.") from error
    except Exception as error:  # The library raises whatever its downloader and builders raise.
        raise RuntimeError(
            f"dataset 'tfds:{name}' could not be downloaded or prepared "
            f"({type(error).__name__}: {error}). Its first use needs a network and TensorFlow "
            "(pip install tensorflow); without them, pass a folder of IDX files."
        ) from error
    images, labels = zip(*pairs, strict=True)
    return np.stack(images), np.asarray(labels)


def _check(images: np.ndarray, labels: np.ndarray, source: str) -> None:
    if labels.ndim != 1:
        raise ValueError(f"{source}: labels must have rank 1, got shape {labels.shape}.")
    if len(images) != len(labels):
        raise ValueError(f"{source}: got {len(images)} images but {len(labels)} labels.")
    if images.shape[1:] not in IMAGE_SHAPES or images.dtype != np.uint8:
        raise ValueError(
            f"{source}: images must be uint8 of 28 x 28 grey or 32 x 32 coloured pixels, "
            f"got {images.dtype} of shape {images.shape}."
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{source}: labels must be integers, got {labels.dtype}.")
    if labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise ValueError(
            f"{source}: labels must be in [0, {NUM_CLASSES - 1}], "
            f"got [{labels.min()}, {labels.max()}]."
        )
