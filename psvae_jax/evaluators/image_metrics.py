"""Reference-based image metrics: PSNR, SSIM and relative sharpness.

Contract of every metric here: `images` and `references` have one shape,
(B, H, W, C), and hold 8-bit levels in [0, 255], either as uint8 or as floating
point numbers that were already rounded (see `to_uint8`). The result is float32
of shape (B,): one figure an image, never a mean over the batch, so that the
caller can leave padding out (see `MeanAccumulator`). All of them can be jitted
and use no matrix product, so no precision setting of the device changes them.
"""

from collections.abc import Mapping
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.evaluators.comparison import decibels

ROUNDINGS = ("round", "truncate")
_LEVELS = 255.0
_WINDOW = 11
_SIGMA = 1.5
_C1 = (0.01 * _LEVELS) ** 2
_C2 = (0.03 * _LEVELS) ** 2
_FLAT_GRADIENT = 0.01  # levels a pixel; below it an image counts as flat


def to_uint8(images: jax.Array, rounding: str = "round") -> jax.Array:
  """Float images in [-1, 1] → uint8: rounded (ties to even), then clamped.

  Truncation in place of rounding darkens every image by half a level. It is
  here for figures that are to compare with published ones: RAE truncates.

  Args:
    images: floating point array of any shape; values outside [-1, 1] clamp.
    rounding: "round" or "truncate".

  Returns:
    uint8 array of the same shape.

  Raises:
    ValueError: if `images` is not floating point, e.g. uint8 already, or the
      rounding is not known.
  """
  if rounding not in ROUNDINGS:
    raise ValueError(f"rounding {rounding!r} is none of {', '.join(ROUNDINGS)}")
  if not jnp.issubdtype(images.dtype, jnp.floating):
    raise ValueError(
      f"to_uint8 takes floating point images in [-1, 1], got {images.dtype}; "
      "pass images that are uint8 already as they are"
    )
  levels = (images.astype(jnp.float32) + 1.0) * (_LEVELS / 2)
  levels = jnp.round(levels) if rounding == "round" else jnp.floor(levels)
  return jnp.clip(levels, 0.0, _LEVELS).astype(jnp.uint8)


def psnr(images: jax.Array, references: jax.Array) -> jax.Array:
  """Peak signal-to-noise ratio in dB, at most 100; the peak is 255."""
  images, references = _levels(images, references)
  mse = _image_mean(jnp.square(images - references))
  return decibels(mse, jnp)


def ssim(images: jax.Array, references: jax.Array) -> jax.Array:
  """Structural similarity (Wang et al. 2004) in [-1, 1].

  Gaussian window of 11×11 with σ = 1.5, K1 = 0.01, K2 = 0.03, range 255; each
  channel by itself, then the mean over channels and all positions. Windows
  that cross the border see the image reflected, as in torchmetrics.

  Args:
    images: (B, H, W, C).
    references: (B, H, W, C).

  Returns:
    (B,).

  Raises:
    ValueError: if an image is smaller than the window.
  """
  x, y = _levels(images, references)
  height, width = x.shape[1:3]
  if min(height, width) < _WINDOW:
    raise ValueError(
      f"SSIM needs images of at least {_WINDOW}×{_WINDOW} pixels, got "
      f"{height}×{width}"
    )
  # Variances do not depend on the origin, but E[x²] − E[x]² in float32 does:
  # it is most exact around the mean.
  center = 0.5 * jnp.mean(x + y, axis=(1, 2), keepdims=True)
  x, y = x - center, y - center
  # One blur of all four maps side by side: a quarter of the compile time.
  maps = jnp.concatenate([x, y, x * x + y * y, x * y], axis=-1)
  mean_x, mean_y, power, product = jnp.split(_gaussian_blur(maps), 4, axis=-1)
  variances = jnp.maximum(power - mean_x**2 - mean_y**2, 0.0)
  covariance = product - mean_x * mean_y
  mean_x, mean_y = mean_x + center, mean_y + center
  luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
  structure = (2 * covariance + _C2) / (variances + _C2)
  return _image_mean(luminance * structure)


def gradient_sharpness(images: jax.Array, references: jax.Array) -> jax.Array:
  """Mean gradient magnitude of the image over that of its reference.

  1 is as sharp as the reference, less is blurred, more is sharper or noisier.
  Gradients are forward differences of each channel. A mean below 0.01 levels a
  pixel counts as 0.01, so that two flat images give 1 and none gives infinity.

  Args:
    images: (B, H, W, C) with H, W ≥ 2.
    references: (B, H, W, C).

  Returns:
    (B,), positive.

  Raises:
    ValueError: if an image has a side of one pixel.
  """
  images, references = _levels(images, references)
  if min(images.shape[1:3]) < 2:
    raise ValueError(
      "sharpness needs images of at least 2×2 pixels, got "
      f"{images.shape[1]}×{images.shape[2]}"
    )
  image, reference = _mean_gradient(images), _mean_gradient(references)
  return jnp.maximum(image, _FLAT_GRADIENT) / jnp.maximum(
    reference, _FLAT_GRADIENT
  )


class MeanAccumulator:
  """Means of per-example figures over the examples that are not padding.

  Sums are float64 on the host. A float32 figure has 24 significant bits, so
  sums of figures of similar size carry no rounding error and the mean does not
  depend on how examples were cut into batches.
  """

  def __init__(self) -> None:
    self._sums: dict[str, float] = {}
    self._counts: dict[str, int] = {}

  def update(
    self, values: Mapping[str, Any], mask: jax.Array | None = None
  ) -> None:
    """Adds one batch.

    Args:
      values: figure name → array (B,).
      mask: (B,), true for real examples; None if all are. What padded places
        hold does not matter, NaN included.

    Raises:
      ValueError: if a figure or the mask is not of shape (B,).
    """
    values, mask = jax.device_get((dict(values), mask))
    for name, value in values.items():
      value = np.asarray(value, np.float64)
      keep = np.ones(value.shape, bool) if mask is None else np.asarray(mask)
      if value.ndim != 1 or keep.shape != value.shape:
        raise ValueError(
          f"{name!r} has shape {value.shape} and its mask {keep.shape}; both "
          "must be (B,), one value an example"
        )
      value = value[keep.astype(bool)]
      self._sums[name] = self._sums.get(name, 0.0) + float(value.sum())
      self._counts[name] = self._counts.get(name, 0) + value.size

  def merge(self, other: "MeanAccumulator") -> None:
    """Adds everything that `other` has seen; `other` is not changed."""
    for name in other._sums:
      self._sums[name] = self._sums.get(name, 0.0) + other._sums[name]
      self._counts[name] = self._counts.get(name, 0) + other._counts[name]

  def totals(self) -> dict[str, tuple[float, int]]:
    """Figure name → sum and number of examples."""
    return {name: (self._sums[name], self._counts[name]) for name in self._sums}

  @classmethod
  def from_totals(
    cls, totals: Mapping[str, tuple[float, int]]
  ) -> "MeanAccumulator":
    """Inverse of `totals`."""
    means = cls()
    means._sums = {name: float(total) for name, (total, _) in totals.items()}
    means._counts = {name: int(count) for name, (_, count) in totals.items()}
    return means

  def result(self) -> dict[str, float]:
    """Mean of every figure over its unmasked examples.

    Raises:
      ValueError: if a figure has no unmasked example.
    """
    empty = sorted(name for name, count in self._counts.items() if not count)
    if empty or not self._counts:
      raise ValueError(
        f"no unmasked example was added for {empty or 'any figure'}; is the "
        "evaluation split empty?"
      )
    return {name: self._sums[name] / self._counts[name] for name in self._sums}


def _levels(
  images: jax.Array, references: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Checks the contract of this file and returns both as float32."""
  images, references = jnp.asarray(images), jnp.asarray(references)
  chex.assert_rank([images, references], 4)
  chex.assert_equal_shape([images, references])
  for array in (images, references):
    if array.dtype != jnp.uint8 and not jnp.issubdtype(
      array.dtype, jnp.floating
    ):
      raise ValueError(
        "image metrics take uint8 or floating point levels in [0, 255], got "
        f"{array.dtype}"
      )
  return images.astype(jnp.float32), references.astype(jnp.float32)


def _image_mean(x: jax.Array) -> jax.Array:
  """Mean of each image, (B, H, W, C) → (B,).

  Row by row: one running float32 sum over a whole image, which is what
  unoptimised CPU code makes of it, is off by several units in the sixth digit.
  """
  return jnp.mean(jnp.mean(x, axis=(2, 3)), axis=1)


def _gaussian_blur(x: jax.Array) -> jax.Array:
  """Separable 11×11 Gaussian of (B, H, W, C) with reflected borders.

  A sum of shifted copies: XLA fuses it, where its depthwise convolution takes
  three to ten times as long on a CPU.
  """
  half = _WINDOW // 2
  taps = np.exp(-0.5 * (np.arange(-half, half + 1) / _SIGMA) ** 2)
  taps = taps / taps.sum()
  for axis in (1, 2):
    length = x.shape[axis]
    pads = [(half, half) if i == axis else (0, 0) for i in range(4)]
    padded = jnp.pad(x, pads, mode="reflect")
    # Differences from the middle: rounding errors are of their size, not of
    # the values'.
    x = x + sum(
      float(tap) * (jax.lax.slice_in_dim(padded, i, i + length, axis=axis) - x)
      for i, tap in enumerate(taps)
      if i != half
    )
  return x


def _mean_gradient(x: jax.Array) -> jax.Array:
  """Mean length of the forward difference of (B, H, W, C) → (B,)."""
  down = x[:, 1:, :-1] - x[:, :-1, :-1]
  right = x[:, :-1, 1:] - x[:, :-1, :-1]
  return _image_mean(jnp.sqrt(down**2 + right**2))
