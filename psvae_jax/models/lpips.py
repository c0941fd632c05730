"""LPIPS, a learned perceptual distance of two images (arXiv 1801.03924).

A classifier's activations after five of its layers are brought to unit length
at every position; squared differences are weighted by a head's non-negative
vector, averaged over positions and added over the layers. Equal to version
0.1 of the `lpips` package with `net="vgg"` or `net="alex"`.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from psvae_jax.models import layers
from psvae_jax.models.convolution import convolution

# Of images in [−1, 1]: ImageNet's statistics, as the package rounds them.
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_NORM_EPS = 1e-10  # added to the length, not under its root


@dataclasses.dataclass(frozen=True)
class Conv:
  """One convolution, with a bias and a ReLU behind it."""

  features: int
  kernel: int = 3
  stride: int = 1
  padding: int = 1


@dataclasses.dataclass(frozen=True)
class Stage:
  """Max pooling with stride 2, then convolutions; a head reads the last one.

  Attributes:
    pool: side of the pooling's window; 0 leaves it out.
    convs: the convolutions, in order.
  """

  pool: int
  convs: tuple[Conv, ...]


_ALEX = (
  Stage(0, (Conv(64, kernel=11, stride=4, padding=2),)),
  Stage(3, (Conv(192, kernel=5, padding=2),)),
  Stage(3, (Conv(384),)),
  Stage(0, (Conv(256),)),
  Stage(0, (Conv(256),)),
)
_VGG = tuple(
  Stage(pool, (Conv(width),) * count)
  for pool, width, count in (
    (0, 64, 2),
    (2, 128, 2),
    (2, 256, 3),
    (2, 512, 3),
    (2, 512, 3),
  )
)
NETWORKS: dict[str, tuple[Stage, ...]] = {"vgg": _VGG, "alex": _ALEX}
# Below this side a pooling would be left with nothing.
MIN_SIDE = {"vgg": 16, "alex": 31}


class Lpips(nn.Module):
  """The distance of images to references.

  Attributes:
    network: "vgg" (VGG16) or "alex" (AlexNet).
    remat: recompute a stage's activations in the backward pass.
    dtype: compute dtype of the network; distances are float32 or wider.
    convolution: "native" or "matmul"; see `models.convolution`.
  """

  network: str = "vgg"
  remat: bool = False
  dtype: layers.Dtype = jnp.float32
  convolution: str = "native"

  @nn.compact
  def __call__(self, images: jax.Array, references: jax.Array) -> jax.Array:
    """Computes distances, differentiable in both.

    Images and references go through the network apart: where no gradient of
    the references is asked for, none is computed. The gradient is finite
    everywhere, also at equal images (zero) and where all of a position's
    activations are zero.

    Args:
      images: (B, H, W, 3) floating point in [−1, 1].
      references: of the same shape.

    Returns:
      (B,) float32 or wider, not negative.

    Raises:
      ValueError: shapes differ, or are too small for the network.
    """
    self._check(images, references)
    stages = NETWORKS[self.network]
    stage_type = nn.remat(_Stage) if self.remat else _Stage
    x, y = (_scale(z).astype(self.dtype) for z in (images, references))
    total = 0.0
    for i, stage in enumerate(stages):
      module = stage_type(stage, self.dtype, self.convolution, name=f"stage{i}")
      x, y = module(x), module(y)
      head = self.param(
        f"head{i}", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32
      )
      total += _distance(x, y, head)
    return total

  def _check(self, images: jax.Array, references: jax.Array) -> None:
    if self.network not in NETWORKS:
      raise ValueError(
        f"LPIPS's network is one of {tuple(NETWORKS)}, not {self.network!r}"
      )
    shape = images.shape
    if shape != references.shape or len(shape) != 4 or shape[-1] != 3:
      raise ValueError(
        "LPIPS compares images (B, H, W, 3) with as many references, got "
        f"{shape} and {references.shape}"
      )
    if min(shape[1:3]) < MIN_SIDE[self.network]:
      raise ValueError(
        f"LPIPS with {self.network!r} needs images of at least "
        f"{MIN_SIDE[self.network]} pixels a side, got {shape[1]}x{shape[2]}"
      )


class _Stage(nn.Module):
  """`Stage`: (B, H, W, C) → (B, H′, W′, D)."""

  config: Stage
  dtype: layers.Dtype
  convolution: str

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    if self.config.pool:
      x = max_pool(x, self.config.pool)
    # What is asked for in float32 is computed in it, on any device.
    wide = jnp.dtype(self.dtype).itemsize >= 4
    for i, conv in enumerate(self.config.convs):
      x = nn.Conv(
        conv.features,
        (conv.kernel, conv.kernel),
        strides=conv.stride,
        padding=conv.padding,
        dtype=self.dtype,
        precision=jax.lax.Precision.HIGHEST if wide else None,
        conv_general_dilated=convolution(self.convolution),
        name=f"conv{i}",
      )(x)
      x = nn.relu(x)
    return x


def max_pool(x: jax.Array, window: int) -> jax.Array:
  """Max pooling with stride 2 and without padding.

  Where several values are the largest, the gradient goes to the first, as in
  PyTorch; equal neighbours are common in flat parts of images. Slices and
  comparisons are faster on a CPU than a windowed reduction and its gradient.

  Args:
    x: (B, H, W, C), H and W at least `window`.
    window: its side.

  Returns:
    (B, (H − window) // 2 + 1, (W − window) // 2 + 1, C).
  """
  height, width = ((size - window) // 2 + 1 for size in x.shape[1:3])
  out = None
  for i in range(window):
    for j in range(window):
      tap = x[:, i : i + 2 * height - 1 : 2, j : j + 2 * width - 1 : 2]
      out = tap if out is None else jnp.where(tap > out, tap, out)
  return out


def _scale(images: jax.Array) -> jax.Array:
  images = images.astype(layers.wide(images.dtype))
  shift = jnp.asarray(_SHIFT, images.dtype)
  return (images - shift) / jnp.asarray(_SCALE, images.dtype)


def _distance(x: jax.Array, y: jax.Array, head: jax.Array) -> jax.Array:
  """Of activations (B, H, W, C): (B,), float32 or wider."""
  difference = jnp.square(_unit(x) - _unit(y))
  weighted = jnp.matmul(
    difference,
    head.astype(difference.dtype),
    precision=jax.lax.Precision.HIGHEST,
  )
  # One axis at a time: long sums in float32 lose digits.
  return jnp.mean(jnp.mean(weighted, axis=2), axis=1)


def _unit(x: jax.Array) -> jax.Array:
  x = x.astype(layers.wide(x.dtype))
  square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
  # The root has no finite gradient at zero, not even times zero.
  positive = square > 0
  root = jnp.sqrt(jnp.where(positive, square, 1.0))
  return x / (jnp.where(positive, root, 0.0) + _NORM_EPS)
