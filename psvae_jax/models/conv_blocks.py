"""Blocks of LDM's convolutional autoencoders (arXiv 2112.10752).

Images and latents are (B, H, W, C). Convolutions run in `dtype`, norms and
softmax wide, see `layers.wide`.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from psvae_jax.models import layers
from psvae_jax.models.convolution import convolution

GROUP_NORM_EPS = 1e-6  # LDM's, not the framework's 1e-5
NUM_GROUPS = 32  # LDM's


class ResBlock(nn.Module):
  """(norm, SiLU, conv) twice, plus the input: (B, H, W, C) → (B, H, W, D).

  Attributes:
    features: D.
    dtype: compute dtype.
    convolution: "native" or "matmul"; see `models.convolution`.
    num_groups: of the norms, or as many as divide.
  """

  features: int
  dtype: layers.Dtype = jnp.float32
  convolution: str = "native"
  num_groups: int = NUM_GROUPS

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = nn.silu(group_norm(x, "norm1", self.num_groups)).astype(self.dtype)
    y = conv3x3(self.features, self.dtype, self.convolution, "conv1")(y)
    y = nn.silu(group_norm(y, "norm2", self.num_groups)).astype(self.dtype)
    y = conv3x3(self.features, self.dtype, self.convolution, "conv2")(y)
    if x.shape[-1] != self.features:
      x = nn.Dense(self.features, dtype=self.dtype, name="shortcut")(x)
    return x + y


class AttentionBlock(nn.Module):
  """Single-head self-attention over positions, residual: (B, H, W, C).

  Its weights are (H·W)² numbers an image: at 128×128, of an f8 autoencoder at
  1024 pixels, 1 GiB in float32.

  Attributes:
    dtype: compute dtype.
    num_groups: of the norm, or as many as divide.
  """

  dtype: layers.Dtype = jnp.float32
  num_groups: int = NUM_GROUPS

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    batch, height, width, channels = x.shape
    y = group_norm(x, "norm", self.num_groups).astype(self.dtype)
    y = y.reshape(batch, height * width, channels)

    def project(name):
      dense = nn.Dense(channels, dtype=self.dtype, name=name)
      return dense(y)[:, :, None]  # one head

    query, key, value = project("query"), project("key"), project("value")
    y = layers.attend(query, key, value)[:, :, 0]
    y = nn.Dense(channels, dtype=self.dtype, name="out")(y)
    return x + y.reshape(x.shape)


def conv3x3(
  features: int, dtype: layers.Dtype, kind: str, name: str
) -> nn.Conv:
  """A 3×3 convolution that keeps the image's size."""
  return nn.Conv(
    features,
    (3, 3),
    padding=1,
    dtype=dtype,
    conv_general_dilated=convolution(kind),
    name=name,
  )


def halve(x: jax.Array, dtype: layers.Dtype, kind: str, name: str) -> jax.Array:
  """(B, H, W, C) → (B, H/2, W/2, C): a 3×3 convolution of stride 2.

  It is padded below and to the right alone, as LDM's.
  """
  return nn.Conv(
    x.shape[-1],
    (3, 3),
    strides=(2, 2),
    padding=((0, 1), (0, 1)),
    dtype=dtype,
    conv_general_dilated=convolution(kind),
    name=name,
  )(x)


def group_norm(
  x: jax.Array, name: str, num_groups: int = NUM_GROUPS
) -> jax.Array:
  """GroupNorm, computed wide, with as many of the groups as divide."""
  return nn.GroupNorm(
    num_groups=math.gcd(num_groups, x.shape[-1]),
    epsilon=GROUP_NORM_EPS,
    use_fast_variance=False,
    dtype=layers.wide(x.dtype),
    name=name,
  )(x.astype(layers.wide(x.dtype)))


def nearest_double(x: jax.Array) -> jax.Array:
  """(B, H, W, C) → (B, 2H, 2W, C): every pixel four times."""
  batch, height, width, channels = x.shape
  x = jnp.broadcast_to(
    x[:, :, None, :, None], (batch, height, 2, width, 2, channels)
  )
  return x.reshape(batch, 2 * height, 2 * width, channels)
