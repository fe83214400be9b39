"""compressed-tensors' matrices without their codes: shape, grid, scales and zero points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from zoqo_jax.interop.formats import words
from zoqo_jax.interop.formats.affine import affine
from zoqo_jax.interop.formats.compressed_schemes import Scheme
from zoqo_jax.interop.formats.frames import Frame, exponents, require_finite
from zoqo_jax.interop.formats.small_floats import E2M1

__all__ = ["frame_of"]


def frame_of(name: str, parts: Mapping[str, np.ndarray], schemes: Sequence[Scheme]) -> Frame:
    """A matrix without its codes; its parts are checked against one another and the schemes.

    Raises:
        ValueError: a part has a wrong shape or holds what is not read, or no scheme fits.

    Examples:
        >>> parts = {"a.weight": np.array([[-3, 5]], np.int8)}
        >>> parts["a.weight_scale"] = np.array([[0.5]], np.float16)
        >>> frame_of("a.weight", parts, (Scheme("I8", 8, None, True),)).shape
        (1, 2)
    """
    packed = parts.get(f"{name}_packed")
    if packed is not None and packed.dtype == np.uint8:
        return _of_floats(name, packed, parts, schemes)
    shape = parts[name].shape if packed is None else _shape(name, packed, parts)
    scales = _per_group(f"{name}_scale", parts, shape)
    groups, is_symmetric = scales.shape[-1], f"{name}_zero_point" not in parts
    bits = _fitting(name, packed, shape, groups, is_symmetric, schemes)
    zeros = _zero_points(name, parts, scales, shape, bits)
    order, length = _order(name, parts, shape, groups), shape[-1] // groups
    return affine(f"{name}_scale", shape, scales, zeros, bits=bits, length=length, block_of=order)


def _of_floats(
    name: str, packed: np.ndarray, parts: Mapping[str, np.ndarray], schemes: Sequence[Scheme]
) -> Frame:
    """NVFP4 if scales are 8-bit floats, else MXFP4."""
    part, scale = f"{name}_scale", parts[f"{name}_scale"]
    shape = (*packed.shape[:-1], packed.shape[-1] * 2)
    is_nv = scale.dtype.name == "float8_e4m3fn"
    length = 16 if is_nv else 32
    if scale.shape != (*shape[:-1], shape[-1] // length) or shape[-1] % length:
        raise ValueError(f"{part} must be one for each {length} of {shape}, got {scale.shape}.")
    if length not in {scheme.length for scheme in schemes if scheme.dtype == "U8"}:
        raise ValueError(f"{part}: no scheme of config_groups has group_size {length}.")
    overall = parts.get(f"{name}_global_scale", np.ones(1, np.float32))
    if overall.size != 1 or not np.isfinite(overall).all() or not overall.all():
        raise ValueError(f"{name}_global_scale must be one finite number, not 0, got {overall}.")
    if not is_nv:
        if f"{name}_global_scale" in parts:
            raise ValueError(f"{name}_global_scale: powers of two have none beside them.")
        return Frame(shape, 4, E2M1.grid, exponents(part, scale), jnp.bfloat16, length)
    require_finite(part, scale)
    numbers = (overall.reshape((1,) * len(shape)), scale)
    return Frame(shape, 4, E2M1.grid, numbers, jnp.bfloat16, length, divides=True)


def _shape(name: str, packed: np.ndarray, parts: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """The shape that `weight_shape` holds; how long rows are, `_fitting` checks."""
    stored = parts[f"{name}_shape"]
    shape = tuple(map(int, stored.ravel()))
    if len(shape) != packed.ndim or shape[:-1] != packed.shape[:-1] or shape[-1] < 1:
        raise ValueError(f"{name}_shape must fit {packed.shape} words, got {stored.tolist()}.")
    return shape


def _per_group(part: str, parts: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Scales as (*rows, groups), or with one number as (1, .., 1)."""
    scale = parts[part]
    if scale.size == 1:
        return scale.reshape((1,) * len(shape))
    groups = scale.shape[-1] if scale.ndim == len(shape) else 0
    if not groups or scale.shape[:-1] != shape[:-1] or shape[-1] % groups:
        raise ValueError(
            f"{part} must be {shape[:-1]} by groups of {shape[-1]}, got {scale.shape}."
        )
    return scale


def _fitting(
    name: str,
    packed: np.ndarray | None,
    shape: tuple[int, ...],
    groups: int,
    is_symmetric: bool,
    schemes: Sequence[Scheme],
) -> int:
    """The width of codes, by the one scheme that explains the stored shapes."""
    fits = set()
    for dtype, bits, length, symmetric in schemes:
        length = min(length or shape[-1], shape[-1])
        if groups * length != shape[-1]:
            continue
        if packed is None:
            is_right = dtype == "I8"
        else:
            is_long = packed.shape[-1] == -(-shape[-1] * bits // 32)
            is_right = dtype == "I32" and is_long and is_symmetric == symmetric
        if is_right:
            fits.add(bits)
    if len(fits) != 1:
        raise ValueError(
            f"{name}: {'no scheme' if not fits else 'more than one scheme'} of config_groups fits "
            f"shape {shape}, {groups} scales a row"
            f"{'' if packed is None else f', {packed.shape[-1]} words a row'}."
        )
    return fits.pop()


def _zero_points(
    name: str, parts: Mapping[str, np.ndarray], scale: np.ndarray, shape: tuple[int, ...], bits: int
) -> np.ndarray:
    """The codes whose value is 0, uint8 in the scale's shape: without others the middle one."""
    part, middle = f"{name}_zero_point", np.uint8(2 ** (bits - 1))
    if part not in parts:
        return np.full(scale.shape, middle)
    stored = parts[part]
    if stored.dtype == np.int8:
        if stored.size != scale.size:
            raise ValueError(f"{part} must have shape {scale.shape}, got {stored.shape}.")
        zeros = stored.view(np.uint8).reshape(scale.shape) + middle
        if zeros.max() >= 2**bits:
            raise ValueError(f"{part}: a zero point has more than {bits} bits.")
        return zeros
    due = (*shape[:-2], -(-shape[-2] * bits // 32), scale.shape[-1])
    if stored.shape != due or scale.shape[:-1] != shape[:-1]:
        raise ValueError(f"{part} must have shape {due}, got {stored.shape}.")
    return words.unpack(stored.swapaxes(-1, -2), bits, shape[-2]).swapaxes(-1, -2)


def _order(
    name: str, parts: Mapping[str, np.ndarray], shape: tuple[int, ...], groups: int
) -> np.ndarray | None:
    """The group of every input, unless they follow one another."""
    part = f"{name}_g_idx"
    if part not in parts:
        return None
    order = parts[part]
    if order.shape != shape[-1:]:
        raise ValueError(f"{part} must have shape {shape[-1:]}, got {order.shape}.")
    if (order == -1).any() or groups == 1:  # -1 says that none was given
        return None
    if order.min() < 0 or order.max() >= groups:
        raise ValueError(f"{part} must be 0 to {groups - 1}, got {order.min()} to {order.max()}.")
    if (order == np.arange(shape[-1]) // (shape[-1] // groups)).all():
        return None
    return order
