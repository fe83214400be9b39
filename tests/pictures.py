"""Small data sets on disk, as the attack experiments read them."""

import gzip
import tarfile

import numpy as np
from PIL import Image

IDX_CODES = {"u1": 0x08, "i1": 0x09, "i2": 0x0B, "i4": 0x0C, "f4": 0x0D, "f8": 0x0E}
NAMES = {
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("test", "images"): "t10k-images-idx3-ubyte",
    ("test", "labels"): "t10k-labels-idx1-ubyte",
}


def idx_bytes(array, *, shape=None):
    """An IDX file of `array`; `shape` is what the header claims."""
    shape = array.shape if shape is None else shape
    code = IDX_CODES[array.dtype.str[1:]]
    header = bytes([0, 0, code, len(shape)]) + np.asarray(shape, ">u4").tobytes()
    return header + array.astype(array.dtype.newbyteorder(">")).tobytes()


def digits(count, seed=0):
    """Images of uint8 noise, and labels that one can learn: where the bright band lies."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 10, count).astype(np.uint8)
    images = rng.integers(0, 60, (count, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[2 * label + 4 : 2 * label + 6] = 255
    return images, labels


def write_folder(folder, *, split="test", zipped=False, images=None, labels=None):
    default = digits(6)
    arrays = {
        "images": default[0] if images is None else images,
        "labels": default[1] if labels is None else labels,
    }
    for kind, array in arrays.items():
        content, name = idx_bytes(array), NAMES[split, kind]
        if zipped:
            content, name = gzip.compress(content), f"{name}.gz"
        (folder / name).write_bytes(content)
    return arrays["images"], arrays["labels"]


def write_pictures(folder, *, split="test", size=(32, 32), mode="RGB", count=3):
    """Pictures of two classes, boats and fewer cats; their pixels and classes, by turns."""
    rng = np.random.default_rng(0)
    written = []
    for label, name in enumerate(("boat", "cat")):
        (folder / split / name).mkdir(parents=True)
        for i in range(count // 2 if label else count - count // 2):
            shape = (*size, 3) if mode == "RGB" else size
            image = rng.integers(0, 256, shape).astype(np.uint8)
            Image.fromarray(image).save(folder / split / name / f"{i:02d}.png")
            written.append((i, label, image.reshape(*size, -1)))
    _, labels, pixels = zip(*sorted(written, key=lambda one: one[:2]), strict=True)
    return np.stack(pixels), np.array(labels)


def packed(folder, path, mode="w"):
    with tarfile.open(path, mode) as tar:
        for file in sorted(folder.rglob("*"), reverse=True):
            tar.add(file, file.relative_to(folder), recursive=False)
    return str(path)
