"""From floats to codes: `Quantizer`, which finds scales and rounds, and `quantize` for trees.

The uniform quantizer is ZOQO's (Bar & Giryes, arXiv:2501.06736, section III): step
`s = (Rmax - Rmin) / (2^b - 1)`, an integer zero point, so that zero is exactly a level (mid-tread).
Companded quantizers are CAQ-ZO's (Shu & Zhu, arXiv:2605.10673): `Q = inverse . U . forward`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Float32, PyTree

from zoqo_jax.grids import companders
from zoqo_jax.grids.arrays import Grid, QuantizedArray, is_quantized

__all__ = ["Quantizer", "is_matrix", "nf4", "quantize"]

Range = str | float | int | tuple[float | int, float | int]
Where = Callable[[tuple[Any, ...], Any], bool]
_RANGES = ("absmax", "minmax", "percentile", "mse")


@dataclasses.dataclass(frozen=True)
class Quantizer:
    """What turns floats into codes: bits, compander, and where the range comes from.

    Args:
        bits: 2 to 8 bits a code; up to 16 levels are stored two to a byte, up to 4 four to a byte.
        compander: how levels are spaced; uniform by default.
        range: the values that the outermost levels stand for, in value units:
            "absmax" (default) the largest magnitude, symmetric; "minmax" smallest and largest;
            "percentile" the `percentile`-th percentile of the magnitude; "mse" the symmetric range
            of least mean squared rounding error; a number R for [-R, R]; a pair (lo, hi). A given
            range is a bound: a code whose value would lie outside it is not legal. A fitted
            "minmax" is shifted by less than half a step so that zero is a level and every code
            legal.
        axis: None for one scale a tensor, or the axis or axes with a scale for every index
            (channels). With `block`, the one axis cut into blocks, the last by default.
        block: length of a block with its own scale, or None.
        percentile: in (0, 100], for range="percentile".
        scale_dtype: dtype of the stored scales.

    Raises:
        ValueError: an argument outside what is said above, naming it and its value.

    Examples:
        >>> Quantizer(bits=8, range=0.3).grid.low  # 255 of 256 codes lie inside [-0.3, 0.3]
        1
        >>> Quantizer(4, companders.mu_law(), block=32)(jnp.ones((3, 40))).scale.shape
        (3, 2)
    """

    bits: int = 8
    compander: companders.Compander = companders.identity()
    range: Range = "absmax"
    axis: int | tuple[int, ...] | None = None
    block: int | None = None
    percentile: float = 99.9
    scale_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        if not isinstance(self.bits, numbers.Integral) or not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be a whole number in [2, 8], got {self.bits}.")
        levels = self.compander.levels
        if levels is not None and len(levels) > 2**self.bits:
            raise ValueError(
                f"bits={self.bits} holds {2**self.bits} codes, too few for the "
                f"{len(levels)} levels of {self.compander}."
            )
        self._check_range()
        if self.block is not None:
            if not isinstance(self.block, numbers.Integral) or self.block < 1:
                raise ValueError(f"block must be a positive whole number, got {self.block}.")
            if isinstance(self.axis, tuple):
                raise ValueError(f"axis must be one axis when block is given, got {self.axis}.")
        if not 0.0 < self.percentile <= 100.0:
            raise ValueError(f"percentile must be in (0, 100], got {self.percentile}.")
        if not _is_value_dtype(self.scale_dtype):
            raise ValueError(
                f"scale_dtype must be float16, bfloat16 or float32, got {self.scale_dtype}."
            )

    def _check_range(self) -> None:
        if isinstance(self.range, str):
            if self.range not in _RANGES:
                raise ValueError(
                    f"range must be one of {_RANGES}, a number or a pair, got {self.range!r}."
                )
        elif isinstance(self.range, tuple):
            if len(self.range) != 2 or not -math.inf < self.range[0] < self.range[1] < math.inf:
                raise ValueError(
                    f"range must be a finite pair (lo, hi) with lo < hi, got {self.range}."
                )
        elif not isinstance(self.range, numbers.Real):
            raise ValueError(
                f"range must be a name, a number or a pair (lo, hi), got {self.range}."
            )
        elif not 0.0 < self.range < math.inf:
            raise ValueError(f"range must be positive and finite, got {self.range}.")

    @functools.cached_property
    def grid(self) -> Grid:
        """The levels at scale 1 and the legal codes."""
        compander, top = self.compander, 2**self.bits - 1
        if compander.levels is not None:
            return Grid(compander.levels, 0, len(compander.levels) - 1)
        if not self._is_uniform:
            levels = self._bent / self._bent[top]  # so that the outermost stand for the range
            return Grid(tuple(levels.tolist()), 1, top)
        if self.range == "minmax":
            return Grid(tuple(map(float, range(top + 1))), 0, top)
        lo, hi = self._bounds or (-1.0, 1.0)
        zero = round(-lo / (hi - lo) * top)
        tolerance = 1e-9 * top  # a bound that is itself a level must not be lost to rounding
        low = max(0, math.ceil(lo / (hi - lo) * top - tolerance) + zero)
        high = min(top, math.floor(hi / (hi - lo) * top + tolerance) + zero)
        return Grid(tuple(float(n - zero) for n in range(top + 1)), low, high)

    @functools.cached_property
    def _bent(self) -> np.ndarray:
        """The levels of a parametric compander in [-1, 1], float32.

        The last lies half a step in z before the end: at 4 bits that is .61 for the Gaussian.
        """
        # z = (n - 2^(b-1)) Delta with Delta = 2 / (2^b - 1): zero is a level, code 0 falls off
        # [-1, 1].
        top = 2**self.bits - 1
        z = (np.arange(top + 1, dtype=np.float32) - 2 ** (self.bits - 1)) * np.float32(2 / top)
        with jax.ensure_compile_time_eval():
            return np.asarray(self.compander.inverse(jnp.asarray(np.maximum(z, -1.0))))

    @property
    def _is_uniform(self) -> bool:
        return self.compander.name == "identity"

    @property
    def _bounds(self) -> tuple[float, float] | None:
        """The given range as (lo, hi), or None when it is fitted to the data."""
        if isinstance(self.range, str):
            return None
        if isinstance(self.range, tuple):
            return float(self.range[0]), float(self.range[1])
        return -float(self.range), float(self.range)

    def _fit_within(self, lo: float, hi: float) -> tuple[float, float | None]:
        """Scale and offset of a given range, such that rounding takes no legal value out of it."""
        grid, middle = self.grid, 0.0
        if self._is_uniform:
            size = (hi - lo) / (2**self.bits - 1)
        else:
            middle = float(np.float32((hi + lo) / 2))
            size = min(hi - middle, middle - lo)
        scale = np.asarray(size, self.scale_dtype)
        ends = np.asarray([grid.levels[grid.low], grid.levels[grid.high]], np.float32)
        first, last = ends * scale.astype(np.float32) + np.float32(middle)
        if first < np.float32(lo) or last > np.float32(hi):
            scale = np.nextafter(scale, np.zeros_like(scale))
        return float(scale), middle or None

    def __call__(self, values: Float[Array, "..."]) -> QuantizedArray:
        """Fit scale and offset to one array and round it to codes.

        Args:
            values: floats of any shape, also empty; finite (checked unless traced). Those of
                float64 are rounded as float32.

        Returns:
            The array's codes, scales and grid. The value dtype stays that of `values`.

        Raises:
            ValueError: NaN or inf in `values`, another dtype, values too large for `scale_dtype`,
                or an `axis` that `values` lacks.
        """
        return self.quantize(values, *self.scales(*self.calibrate(values)))

    def calibrate(
        self, values: Float[Array, "..."]
    ) -> tuple[Float32[Array, "..."], Float32[Array, "..."]]:
        """The values that the outermost levels are to stand for, (lo, hi), for each block.

        Args:
            values: as for a call.

        Returns:
            Both float32, in the shape of a scale: 1 long along axes that share one.

        Raises:
            ValueError: NaN or inf in `values`, another dtype, or an `axis` that `values` lacks.

        Examples:
            >>> lo, hi = Quantizer(4, range="minmax", axis=0).calibrate(jnp.array([[1.0, 3.0]]))
            >>> lo.tolist(), hi.tolist()
            ([[1.0]], [[3.0]])
        """
        values = _checked(values)
        axes, block = self._layout(values.ndim)
        blocks = _in_blocks(values, block)
        reduced = (*(axis for axis in range(values.ndim) if axis not in axes), -1)
        shape = tuple(n if axis in axes else 1 for axis, n in enumerate(blocks.shape[:-1]))
        if self._bounds is not None:
            lo, hi = self._bounds
            return jnp.full(shape, lo, jnp.float32), jnp.full(shape, hi, jnp.float32)
        if values.size == 0:
            return jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32)
        with jax.debug_nans(False):  # blocks cut short are padded with NaN
            if self.range == "minmax":
                lo, hi = (f(blocks, axis=reduced) for f in (jnp.nanmin, jnp.nanmax))
                return lo.reshape(shape), hi.reshape(shape)
            hi = self._magnitude(blocks, reduced).reshape(shape)
        return -hi, hi

    def scales(
        self, lo: Float32[Array, "..."], hi: Float32[Array, "..."]
    ) -> tuple[Float[Array, "..."], Float32[Array, "..."] | None]:
        """Scale and offset of calibrated ranges.

        Args:
            lo: values of the lowest levels.
            hi: values of the highest levels.

        Returns:
            The scales in `scale_dtype`, and offsets, or None for 0, in value units.

        Raises:
            ValueError: `scale_dtype` cannot hold a scale.

        Examples:
            >>> scale, offset = Quantizer(2).scales(jnp.array([-3.0]), jnp.array([3.0]))
            >>> scale.tolist(), offset
            ([2.0], None)
        """
        top, offset = 2**self.bits - 1, None
        if self._bounds is not None:
            size, middle = self._fit_within(*self._bounds)
            offset = None if middle is None else jnp.full(lo.shape, middle, jnp.float32)
            scale = jnp.full(lo.shape, size, self.scale_dtype)
        elif not self._is_uniform:
            # Levels of a companded grid are for [-1, 1]: the scale is the half-width, the offset
            # the middle.
            scale = ((hi - lo) / 2).astype(self.scale_dtype)
            offset = (hi + lo) / 2 if self.range == "minmax" else None
        elif self.range != "minmax":
            scale = ((hi - lo) * (1 / top)).astype(self.scale_dtype)
        else:
            lo, hi = jnp.minimum(lo, 0.0), jnp.maximum(hi, 0.0)  # zero must be within reach
            scale = jax.lax.reduce_precision((hi - lo) * (1 / top), 8, 15)
            scale = scale.astype(self.scale_dtype)
            zero = jnp.round(-lo / jnp.where(scale > 0, scale, 1).astype(jnp.float32))
            offset = -zero * scale.astype(jnp.float32)
        if not _is_finite(scale):
            raise ValueError(f"scale_dtype must hold the scales, got one beyond {scale.dtype}.")
        return scale, offset

    def quantize(
        self,
        values: Float[Array, "..."],
        scale: Float[Array, "..."],
        offset: Float[Array, "..."] | None = None,
    ) -> QuantizedArray:
        """Round values to the nearest legal codes, by scales that are given.

        Args:
            values: as for a call.
            scale: one for each block, as `scales` gives it.
            offset: likewise, or None for 0.

        Examples:
            >>> Quantizer(2).quantize(jnp.array([0.9, -0.9]), jnp.array([1.0])).codes.tolist()
            [3, 1]
        """
        dtype = jnp.asarray(values).dtype
        values = _checked(values)
        _, block = self._layout(values.ndim)
        empty = jnp.zeros(values.shape, jnp.uint8)
        array = QuantizedArray.from_codes(empty, scale, offset, self.grid, block, dtype)
        of_codes = (x if x is None else array.broadcast_scales(x) for x in (scale, offset))
        return array.with_codes(self._codes(values, *of_codes))

    def _layout(self, ndim: int) -> tuple[tuple[int, ...], tuple[int, int] | None]:
        """The axes that share no scale, and the block; a scalar has neither."""
        if ndim == 0:
            return (), None
        given = self.axis if self.axis is not None else (-1 if self.block is not None else ())
        axes = given if isinstance(given, tuple) else (given,)
        for axis in axes:
            if not -ndim <= axis < ndim:
                raise ValueError(f"axis must be in [{-ndim}, {ndim}), got {axis}.")
        axes = tuple(axis % ndim for axis in axes)
        if self.block is None:
            return axes, None
        return tuple(range(ndim)), (axes[0] - ndim, int(self.block))

    def _magnitude(self, blocks: Array, reduced: tuple[int, ...]) -> Array:
        """The symmetric range fitted to each block."""
        size = jnp.abs(blocks)
        largest = jnp.nanmax(size, axis=reduced, keepdims=True)
        if self.range == "absmax":
            return largest
        if self.range == "percentile":
            percentile = jnp.float32(self.percentile)
            return jnp.nanpercentile(size, percentile, axis=reduced, keepdims=True)

        def error(fraction: Array) -> Array:
            radius = largest * fraction
            scale = radius * (2 / (2**self.bits - 1) if self._is_uniform else 1)
            rounded = self.grid.at(self._codes(blocks, scale, None)) * scale
            return jnp.nanmean((rounded - blocks) ** 2, axis=reduced, keepdims=True)

        fractions = jnp.linspace(1.0, 0.2, 81, dtype=jnp.float32)  # absmax first: it wins ties
        best = jnp.argmin(jax.lax.map(error, fractions), axis=0)
        return largest * fractions[best]

    def _codes(self, values: Array, scale: Array, offset: Array | None) -> Array:
        """Nearest legal code of each value, int32; rounds in z, as Q = inverse . U . forward says.

        XLA may replace a division by a product with the reciprocal, or fuse a product with a sum.
        Neither is left to it here, so that uniform codes are the same compiled or not.
        """
        normalised = _normalised(values, scale, offset)
        grid, top = self.grid, 2**self.bits - 1
        if self._is_uniform:
            z, zero = normalised, -grid.levels[0]
        elif self.compander.levels is not None:
            z, zero = self.compander.forward(normalised), 0.0
        else:
            clipped = jnp.clip(normalised * self._bent[-1], -1.0, 1.0)
            z, zero = self.compander.forward(clipped) * (top / 2), 2.0 ** (self.bits - 1)
        return _rounded(z, scale, zero, grid)


@functools.partial(jax.jit, inline=True)
def _normalised(values: Array, scale: Array, offset: Array | None) -> Array:
    centred = values if offset is None else values - offset
    return centred * (1 / jnp.where(scale > 0, scale, 1).astype(jnp.float32))


@functools.partial(jax.jit, static_argnames=("zero", "grid"), inline=True)
def _rounded(z: Array, scale: Array, zero: float, grid: Grid) -> Array:
    n = jnp.where(scale > 0, jnp.round(z) + zero, float(np.argmin(np.abs(grid.levels))))
    return jnp.clip(n, grid.low, grid.high).astype(jnp.int32)


def _checked(values: Any) -> Float32[Array, "..."]:
    """Values to be quantized, as float32."""
    values = jnp.asarray(values)
    if not _is_value_dtype(values.dtype) and values.dtype != jnp.float64:
        raise ValueError(
            f"values must be float16, bfloat16, float32 or float64, got {values.dtype}."
        )
    if not _is_finite(values):
        raise ValueError("values must be finite, got NaN or inf.")
    return values.astype(jnp.float32)


def nf4(
    block: int | None = 64, *, axis: int | None = None, scale_dtype: Any = jnp.float32
) -> Quantizer:
    """QLoRA's NF4: 16 levels, one absmax for every `block` neighbours along `axis` (the last).

    Source: Dettmers et al., "QLoRA", 2023, arXiv:2305.14314. The scales are frozen in training.

    Examples:
        >>> nf4()(jnp.ones((2, 128))).scale.shape
        (2, 2)
    """
    return Quantizer(4, companders.nf4(), axis=axis, block=block, scale_dtype=scale_dtype)


def is_matrix(path: tuple[Any, ...], leaf: Any) -> bool:
    """`quantize`'s default choice: the weights that multiply, in the names that libraries give.

    Those are arrays of floats of two or more axes, but for

    - biases: leaves whose name has the word "bias", or is "b" in a module;
    - scales and offsets of normalisations, stacked for a scan or not: leaves whose name ends with
      "scale", "offset", "gamma" or "beta", and those that are called, or whose module is called,
      a norm ("LayerNorm_0", "ln_1", "bn", "rms");
    - statistics and caches: "mean", "cached_key" ..., and all in "batch_stats" or "cache";
    - vectors, such as class tokens, weight norm's g and spectral norm's u: one axis alone is longer
      than 1, and no name says "kernel", "weight" or "w".

    What is called a kernel or an embedding is chosen whatever its module is called.

    Examples:
        >>> layers = {"kernel": jnp.ones((3, 4, 4)), "bias": jnp.ones((3, 4))}
        >>> jax.tree_util.tree_map_with_path(is_matrix, layers)
        {'bias': False, 'kernel': True}
    """
    is_array = isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)
    if not is_array or not jnp.issubdtype(leaf.dtype, jnp.floating) or leaf.ndim < 2:
        return False
    keys = [str(getattr(key, "key", getattr(key, "name", ""))) for key in path]
    if keys and keys[-1] in ("value", "raw_value"):  # nnx adds it to each
        keys.pop()
    names = [name for key in keys for name in re.split(r"[./~]+", key) if name]
    if names and names[0] in ("batch_stats", "cache"):
        return False
    own, parent = names[-1] if keys and names else "", names[-2] if len(names) > 1 else ""
    words = _words(own)
    if not words.isdisjoint({"kernel", "embedding"}) or "lora" in _words(parent):
        return True
    long_axes = [axis for axis, length in enumerate(leaf.shape) if length != 1]
    is_column = leaf.ndim == 2 and long_axes == [0] and len(own) > 1
    is_named = not own or is_column or not words.isdisjoint({"weight", "weights", "w"})
    is_vector = len(long_axes) < 2 and not is_named
    is_bias = "bias" in words or (bool(parent) and re.fullmatch(r"b[a-z]?\d*", own) is not None)
    is_norm = _is_norm(own) or _is_norm(parent) or bool(_last(own) & _OF_NORMS)
    return not (is_vector or is_bias or is_norm or own in _STATISTICS)


def _words(name: str) -> frozenset[str]:
    """The words of a name in small letters: "LayerNorm_0" has "layer" and "norm"."""
    return frozenset(word.lower() for word in re.findall(r"[A-Z]*[a-z]+|[A-Z]+", name))


def _last(name: str) -> frozenset[str]:
    """The last word that is no single letter, with what it is part of: "norm" and "layernorm"."""
    parts = [part for part in re.findall(r"[A-Za-z]+", name) if len(part) > 1]
    words = re.findall(r"[A-Z]*[a-z]+|[A-Z]+", parts[-1]) if parts else []
    return frozenset(word.lower() for word in (parts[-1], words[-1])) if parts else frozenset()


def _is_norm(name: str) -> bool:
    return any(word in _NORMS or word.endswith(("norm", "norms")) for word in _last(name))


_NORMS = frozenset({"ln", "bn", "rms"})
_OF_NORMS = frozenset({"scale", "scales", "offset", "gamma", "beta"})
_STATISTICS = frozenset({"mean", "var", "sigma", "position_ids", "cached_key", "cached_value"})
_STATISTICS |= {"running_mean", "running_var", "moving_mean", "moving_variance"}


def quantize(tree: PyTree, quantizer: Quantizer, where: Where | None = None) -> PyTree:
    """Quantize the leaves of a tree that `where` chooses; the others stay as they are, and frozen.

    Args:
        tree: any pytree of arrays.
        quantizer: what to quantize with.
        where: `where(path, leaf) -> bool` with the path as `jax.tree_util` gives it. By default
            `is_matrix`: the weights that multiply.

    Returns:
        The tree with a `QuantizedArray` for each chosen leaf. To a leaf of zeros no range can be
        fitted: it gets 1 / sqrt(its longer axis), which keeps what it makes of inputs of variance
        one in [-1, 1], and a warning names it.

    Raises:
        ValueError: `where` chose no leaf, or a chosen one cannot be quantized; the message names
            it.

    Examples:
        >>> params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
        >>> params = quantize(params, Quantizer(bits=4))
        >>> type(params["kernel"]).__name__, params["bias"].dtype.name
        ('QuantizedArray', 'float32')
    """
    chosen = 0

    def one(path: tuple[Any, ...], leaf: Any) -> Any:
        nonlocal chosen
        if is_quantized(leaf) or not (where or is_matrix)(path, leaf):
            return leaf
        chosen += 1
        try:
            return _quantized(quantizer, path, leaf)
        except ValueError as error:
            raise ValueError(f"leaf {jax.tree_util.keystr(path)}: {error}") from error

    quantized = jax.tree_util.tree_map_with_path(one, tree, is_leaf=is_quantized)
    if not chosen:
        raise ValueError(f"where={where} chose none of the {len(jax.tree.leaves(tree))} leaves.")
    return quantized


def _quantized(quantizer: Quantizer, path: tuple[Any, ...], leaf: Any) -> QuantizedArray:
    """The leaf in codes; one of zeros, as heads often begin, gets a range that can train it.

    Under `jax.jit` the values are not known, so there it gets it without the warning.
    """
    leaf = jnp.asarray(leaf)
    lo, hi = quantizer.calibrate(leaf)
    if isinstance(quantizer.range, str) and leaf.size:
        reach, is_zero = 1.0 / math.sqrt(max(leaf.shape[-2:], default=1)), (leaf == 0).all()
        lo, hi = jnp.where(is_zero, -reach, lo), jnp.where(is_zero, reach, hi)
        if not isinstance(is_zero, Tracer) and is_zero:
            warnings.warn(
                f"leaf {jax.tree_util.keystr(path)} is zero everywhere, so no range can be fitted "
                f"to it: its codes reach {reach:.3g} either way. Choose by "
                "quantizer=Quantizer(range=...).",
                stacklevel=4,
            )
    return quantizer.quantize(leaf, *quantizer.scales(lo, hi))


def _is_value_dtype(dtype: Any) -> bool:
    return jnp.dtype(dtype) in (jnp.float16, jnp.bfloat16, jnp.float32)


def _is_finite(array: Array) -> bool:
    """Whether all of an array is finite, as far as can be told: a traced one counts as finite."""
    return isinstance(array, Tracer) or bool(_are_finite(array))


@jax.jit
def _are_finite(array: Array) -> Array:
    return jnp.isfinite(array).all()


@functools.partial(jax.jit, static_argnames="block", inline=True)
def _in_blocks(values: Array, block: tuple[int, int] | None) -> Array:
    """Move a block's elements to a new last axis, padded with NaN; 1 long without blocks."""
    if block is None:
        return values[..., None]
    axis, length = block
    axis %= values.ndim
    count = -(-values.shape[axis] // length)
    padding = [(0, 0)] * values.ndim
    padding[axis] = (0, count * length - values.shape[axis])
    padded = jnp.pad(values, padding, constant_values=jnp.nan)
    shape = (*values.shape[:axis], count, length, *values.shape[axis + 1 :])
    return jnp.moveaxis(padded.reshape(shape), axis + 1, -1)
