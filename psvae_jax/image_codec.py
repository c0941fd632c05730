"""What every autoencoder object does with arrays: images ↔ latents.

Arrays go in as numpy or JAX arrays and come out as numpy arrays, on the host:
an input may be longer than what the device holds. It is cut into parts of one
size, the last one padded. The size is a power of two or `batch_size`, so that
few programs are compiled, whatever the numbers of images: for each kind of
input (images of one size, latents of one) one for each of 1, 2, 4, 8, 16 and
32 with the default `batch_size`, as they are needed.
"""

import abc
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Compiled: parameters and a batch → a batch.
Program = Callable[[Any, jax.Array], jax.Array]


class ImageCodec(abc.ABC):
  """Encodes and decodes with fixed parameters.

  Args:
    params: of the modules, which go to the default device.
    name: where it came from, for messages and records.
    fingerprint: of what it is.
    batch_size: longest batch that is computed at once; changes memory and
      speed, not results beyond rounding.

  Attributes:
    name: see above.
    fingerprint: see above.
    batch_size: see above.
  """

  def __init__(
    self,
    params: dict[str, Any],
    *,
    name: str,
    fingerprint: str,
    batch_size: int = 32,
  ) -> None:
    if batch_size < 1:
      raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    self.name = name
    self.fingerprint = fingerprint
    self.batch_size = batch_size
    self._params = jax.device_put(params)
    self._encode_fn, self._decode_fn = self._programs()

  @property
  def params(self) -> dict[str, Any]:
    """Parameters of the modules, on the default device."""
    return self._params

  @property
  @abc.abstractmethod
  def image_size(self) -> int:
    """Side of the images that the encoder sees, pixels."""

  @property
  @abc.abstractmethod
  def output_size(self) -> int:
    """Side of the images that `decode` makes, pixels."""

  @property
  @abc.abstractmethod
  def channels(self) -> int:
    """Latent channels C."""

  @property
  @abc.abstractmethod
  def grid(self) -> int:
    """Side h = w of the latent grid."""

  @abc.abstractmethod
  def _programs(self) -> tuple[Program, Program]:
    """What encodes and decodes a batch; asked for once.

    Returns:
      uint8 (B, H, W, 3) → float32 (B, h, w, C), and that → uint8
      (B, H, W, 3).
    """

  def encode(self, images: np.ndarray | jax.Array) -> np.ndarray:
    """Images → mean of the posterior.

    Args:
      images: uint8 (B, H, W, 3) of a size that it takes: the encoder's, taken
        as it is, or that which `decode` makes, resized inside. A KL autoencoder
        takes any multiples of its factor and resizes nothing.

    Returns:
      float32 (B, h, w, C).

    Raises:
      ValueError: another dtype, shape or size.
    """
    return self._in_batches(self._encode_fn, self._check_images(images))

  def decode(self, z: np.ndarray | jax.Array) -> np.ndarray:
    """Latents (B, h, w, C) → uint8 (B, S, S, 3) at the product's size, rounded.

    Raises:
      ValueError: not floating point, or of another shape.
    """
    return self._in_batches(self._decode_fn, self._check_latents(z))

  def reconstruct(self, images: np.ndarray | jax.Array) -> np.ndarray:
    """Images as for `encode` → uint8 (B, S, S, 3): `decode(encode(images))`."""
    return self.decode(self.encode(images))

  def _in_batches(self, function: Callable, inputs: np.ndarray) -> np.ndarray:
    """Applies a jitted function part by part; the parts have one shape."""
    count = len(inputs)
    if not count:
      empty = jax.eval_shape(function, self._params, np.zeros_like(inputs))
      return np.zeros(empty.shape, empty.dtype)
    # The next power of two: at most twice the work, far fewer compilations.
    size = min(1 << (count - 1).bit_length(), self.batch_size)
    outputs = []
    for start in range(0, count, size):
      part = inputs[start : start + size]
      padding = [(0, size - len(part))] + [(0, 0)] * (part.ndim - 1)
      # Explicit copies, which a transfer guard allows.
      part = jax.device_put(np.pad(part, padding))
      outputs.append(jax.device_get(function(self._params, part)))
    return np.concatenate(outputs)[:count]

  def _check_images(self, images: Any) -> np.ndarray:
    images = np.asarray(jax.device_get(images))
    if images.dtype != np.uint8:
      raise ValueError(f"images must be uint8 in [0, 255], got {images.dtype}")
    if images.ndim != 4 or images.shape[-1] != 3:
      hint = "; one image is images[None]" if images.ndim == 3 else ""
      raise ValueError(
        f"images must have the shape (B, H, W, 3), got {images.shape}{hint}"
      )
    self._check_size(*images.shape[1:3])
    return images

  def _check_size(self, height: int, width: int) -> None:
    """Raises a ValueError that names a size of images it does not take."""
    sizes = (self.image_size, self.output_size)
    if (height, width) not in [(size, size) for size in sizes]:
      raise ValueError(
        f"images are {height}×{width}; this autoencoder "
        f"takes {sizes[0]}×{sizes[0]} (the encoder's size) or "
        f"{sizes[1]}×{sizes[1]} (the product's)"
      )

  def _check_latents(self, z: Any) -> np.ndarray:
    z = np.asarray(jax.device_get(z))
    if not jnp.issubdtype(z.dtype, jnp.floating):
      raise ValueError(f"latents must be floating point, got {z.dtype}")
    grid = self._latent_grid()
    good = z.ndim == 4 and z.shape[-1] == self.channels and min(z.shape[1:]) > 0
    if not good or (grid is not None and z.shape[1:3] != (grid, grid)):
      height, width = (grid, grid) if grid is not None else ("h", "w")
      raise ValueError(
        f"latents must have the shape (B, {height}, {width}, "
        f"{self.channels}), got {z.shape}"
      )
    return z.astype(np.float32)

  def _latent_grid(self) -> int | None:
    """The one grid that `decode` takes; None if it takes any."""
    return self.grid
