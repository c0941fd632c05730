"""Resampling that gives the same numbers as PyTorch's or TensorFlow 1's.

`jax.image.resize` differs from `torch.nn.functional.interpolate`: another
cubic (a = -0.5 against -0.75), other borders, and antialiasing by default.
Published encoders were trained and measured with PyTorch's, so this is it.

A resampling along one axis is a constant (out, in) matrix that depends on the
two sizes alone. It is built by numpy at trace time; applying it is a matrix
product, which suits a TPU better than gathers and has an exact gradient.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
  """Keys' cubic convolution kernel with free parameter `a`."""
  x = np.abs(x)
  near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
  far = a * (((x - 5.0) * x + 8.0) * x - 4.0)
  return np.where(x <= 1.0, near, np.where(x < 2.0, far, 0.0))


@functools.lru_cache(maxsize=64)
def bicubic_matrix(
  in_size: int, out_size: int, antialias: bool = False
) -> np.ndarray:
  """Weights of a bicubic resampling along one axis.

  Equals `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)`
  for the same `antialias`. As there, the plain filter has a = -0.75 and
  repeats the border; the antialiased one has a = -0.5, widens when it shrinks
  the axis, and renormalises at the border.

  Args:
    in_size: samples along the axis, at least 1.
    out_size: samples wanted, at least 1.
    antialias: which of the two filters.

  Returns:
    (out_size, in_size) float64 array, read-only; every row sums to 1.

  Raises:
    ValueError: a size is below 1.
  """
  _check_sizes(in_size, out_size)
  # PyTorch computes sample positions in float32. At 256 pixels their rounding
  # alone moves results by 5e-5, so it is part of being equal.
  scale = np.float32(in_size) / np.float32(out_size)
  center = scale * (np.arange(out_size, dtype=np.float32) + np.float32(0.5))
  if antialias:
    stretch = max(float(scale), 1.0)
    samples = np.arange(in_size) + 0.5
    matrix = _cubic((samples - center[:, None]) / stretch, a=-0.5)
    matrix /= matrix.sum(axis=1, keepdims=True)
  else:
    center = (center - np.float32(0.5)).astype(np.float64)
    first = np.floor(center).astype(np.int64) - 1
    taps = first[:, None] + np.arange(4)[None, :]
    weights = _cubic(taps - center[:, None], a=-0.75)
    matrix = np.zeros((out_size, in_size))
    rows = np.broadcast_to(np.arange(out_size)[:, None], taps.shape)
    np.add.at(matrix, (rows, np.clip(taps, 0, in_size - 1)), weights)
  matrix.flags.writeable = False
  return matrix


@functools.lru_cache(maxsize=64)
def bilinear_matrix(in_size: int, out_size: int) -> np.ndarray:
  """Weights of a bilinear resampling along one axis, without antialiasing.

  Equals `torch.nn.functional.interpolate(mode="bilinear",
  align_corners=False)`: two neighbouring samples, whatever the scale.

  Args:
    in_size: samples along the axis, at least 1.
    out_size: samples wanted, at least 1.

  Returns:
    (out_size, in_size) float64 array, read-only; every row sums to 1.

  Raises:
    ValueError: a size is below 1.
  """
  _check_sizes(in_size, out_size)
  half = np.float32(0.5)  # positions in float32, see `bicubic_matrix`
  scale = np.float32(in_size) / np.float32(out_size)
  center = scale * (np.arange(out_size, dtype=np.float32) + half) - half
  return _two_taps(np.maximum(center, np.float32(0.0)), in_size)


@functools.lru_cache(maxsize=64)
def bilinear_tf1_matrix(in_size: int, out_size: int) -> np.ndarray:
  """Weights of TensorFlow 1's bilinear resampling along one axis.

  `tf.image.resize_bilinear(align_corners=False, half_pixel_centers=False)`:
  sample i stands at i · in / out, so that pictures move up and left by half a
  pixel of the larger grid. Networks of that time were trained so.

  Args:
    in_size: samples along the axis, at least 1.
    out_size: samples wanted, at least 1.

  Returns:
    (out_size, in_size) float64 array, read-only; every row sums to 1.

  Raises:
    ValueError: a size is below 1.
  """
  _check_sizes(in_size, out_size)
  scale = np.float32(in_size) / np.float32(out_size)
  return _two_taps(scale * np.arange(out_size, dtype=np.float32), in_size)


def _check_sizes(in_size: int, out_size: int) -> None:
  if in_size < 1 or out_size < 1:
    raise ValueError(f"cannot resize an axis of {in_size} to {out_size}")


def _two_taps(position: np.ndarray, in_size: int) -> np.ndarray:
  """Matrix that interpolates between the neighbours of each position ≥ 0."""
  first = np.minimum(position.astype(np.int64), in_size - 1)
  second = np.minimum(first + 1, in_size - 1)
  weight = (position - first.astype(np.float32)).astype(np.float64)
  matrix = np.zeros((len(position), in_size))
  rows = np.arange(len(position))
  np.add.at(matrix, (rows, first), 1.0 - weight)
  np.add.at(matrix, (rows, second), weight)
  matrix.flags.writeable = False
  return matrix


def resize_bicubic(
  images: jax.Array, size: tuple[int, int], *, antialias: bool = False
) -> jax.Array:
  """Resizes images as PyTorch's bicubic `interpolate` does.

  Args:
    images: (..., H, W, C) floating point, any range. The result may overshoot
      that range a little, as any bicubic filter does; it is not clipped.
    size: the (height, width) wanted.
    antialias: PyTorch's `antialias` argument.

  Returns:
    (..., height, width, C) in the dtype of `images`, computed in float32 (or
    wider, if `images` is).

  Raises:
    ValueError: `images` has fewer than 3 axes or is not floating point.
  """
  return _resize(
    images, size, functools.partial(bicubic_matrix, antialias=antialias)
  )


def resize_bilinear(images: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Resizes images as PyTorch's bilinear `interpolate` does.

  Args:
    images: (..., H, W, C) floating point, any range.
    size: the (height, width) wanted.

  Returns:
    (..., height, width, C) in the dtype of `images`, computed in float32 (or
    wider, if `images` is).

  Raises:
    ValueError: `images` has fewer than 3 axes or is not floating point.
  """
  return _resize(images, size, bilinear_matrix)


def resize_bilinear_tf1(images: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Resizes images as TensorFlow 1's bilinear resizing does by default.

  Args:
    images: (..., H, W, C) floating point, any range.
    size: the (height, width) wanted.

  Returns:
    (..., height, width, C) in the dtype of `images`, computed in float32 (or
    wider, if `images` is).

  Raises:
    ValueError: `images` has fewer than 3 axes or is not floating point.
  """
  return _resize(images, size, bilinear_tf1_matrix)


def _resize(
  images: jax.Array,
  size: tuple[int, int],
  matrix: Callable[[int, int], np.ndarray],
) -> jax.Array:
  images = jnp.asarray(images)
  if images.ndim < 3 or not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      "resizing wants floating point images (..., H, W, C), got "
      f"{images.dtype} {images.shape}"
    )
  height, width = images.shape[-3:-1]
  if (height, width) == tuple(size):
    return images
  dtype = jnp.promote_types(images.dtype, jnp.float32)
  rows = jnp.asarray(matrix(height, size[0]), dtype)
  columns = jnp.asarray(matrix(width, size[1]), dtype)
  # HIGHEST: the default TPU product rounds to bfloat16, a visible error here.
  product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
  out = product("oh,...hwc->...owc", rows, images.astype(dtype))
  out = product("pw,...owc->...opc", columns, out)
  return out.astype(images.dtype)
