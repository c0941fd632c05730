"""Discriminators: images in [−1, 1] → real-or-fake logits.

* `PatchDiscriminator`, LDM's PatchGAN (arXiv 1611.07004, 2112.10752).
* `DinoDiscriminator`, RAE's (arXiv 2510.11690), which is StyleGAN-T's (arXiv
  2301.09515): heads on the features of a frozen DINO ViT-S/8.

`build_discriminator` puts either behind one object. Norms, spectral norms and
the last layers are computed in float32 or wider. No norm keeps a running
average: a discriminator is only ever used in training.
"""

import dataclasses
import math
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from psvae_jax.config import ComputeConfig, DiscriminatorConfig, nearest
from psvae_jax.models import layers
from psvae_jax.models.convolution import convolution
from psvae_jax.models.spectral import SpectralConv, advance_spectral

KINDS = ("patch", "dino")
NORMS = ("group", "batch", "instance")
LEAK = 0.2  # negative slope of every LeakyReLU


class Norm(nn.Module):
  """GroupNorm, batch norm or instance norm, with a gain and a bias.

  Attributes:
    kind: where mean and variance come from. "group": an image's positions and
      the channels of one of up to 32 groups of at least two, whatever else is
      in the batch. "batch": positions of `images` consecutive images, channel
      by channel. "instance": the same of each image alone.
    images: images of a "batch" group; 0 takes the whole (global) batch.
    epsilon: added to the variance.
    scale_stddev: spread of the initial gain about 1.
  """

  kind: str = "group"
  images: int = 0
  epsilon: float = 1e-5
  scale_stddev: float = 0.0

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, …, C) → the same, wide.

    Raises:
      ValueError: unknown kind, or a batch of unequal groups.
    """
    if self.kind not in NORMS:
      raise ValueError(
        f"unknown norm {self.kind!r}; {nearest(str(self.kind), NORMS)}"
      )
    batch, channels = x.shape[0], x.shape[-1]
    sets, groups = batch, channels
    if self.kind == "group":
      groups = _num_groups(channels)
    elif self.kind == "batch":
      # As published: as many sets as are needed, all of one size.
      sets = math.ceil(batch / self.images) if self.images else 1
      if batch % sets:
        raise ValueError(
          f"a batch of {batch} images does not divide into groups of "
          f'{self.images} for norm="batch"; make it a multiple of '
          f'{self.images}, or use norm="group"'
        )
    dtype = layers.wide(x.dtype)
    y = x.astype(dtype).reshape(sets, -1, groups, channels // groups)
    y = y - jnp.mean(y, axis=(1, 3), keepdims=True)
    variance = jnp.mean(jnp.square(y), axis=(1, 3), keepdims=True)
    y = (y * jax.lax.rsqrt(variance + self.epsilon)).reshape(x.shape)

    def gain(rng, shape):
      noise = jax.random.normal(rng, shape, jnp.float32)
      return 1.0 + self.scale_stddev * noise

    scale = self.param("scale", gain, (channels,))
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    return y * scale + bias


def _num_groups(channels: int) -> int:
  """The most groups, up to 32, of equal size and at least two channels."""
  # One channel a group would undo any bias in front of the norm.
  most = max(1, min(32, channels // 2))
  return max(n for n in range(1, most + 1) if channels % n == 0)


def _leaky(x: jax.Array) -> jax.Array:
  return nn.leaky_relu(x, negative_slope=LEAK)


class PatchDiscriminator(nn.Module):
  """LDM's PatchGAN: a logit for every overlapping patch of an image.

  4×4 convolutions, `num_layers` of stride 2 and two of stride 1; all but the
  first and the last are normalised. Widths double up to 8 · `channels`.
  Convolutions start at N(0, 0.02), gains at N(1, 0.02), biases at 0.

  Attributes:
    channels: width of the first layer.
    num_layers: layers of stride 2. LDM's 3 give patches of 70 pixels.
    norm: "group"; "batch", LDM's, with the statistics of the global batch;
      or "instance". A convolution before the latter two has no bias: their
      mean takes it out.
    dtype: compute dtype.
    convolution: "native" or "matmul"; see `models.convolution`.
  """

  channels: int = 64
  num_layers: int = 3
  norm: str = "group"
  dtype: layers.Dtype = jnp.float32
  convolution: str = "native"

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Judges images.

    Args:
      images: (B, H, W, 3) in [−1, 1].

    Returns:
      (B, H/2ⁿ − 2, W/2ⁿ − 2, 1) float32, n = `num_layers`, halves rounded
      down: large is real.

    Raises:
      ValueError: the images are too small for `num_layers`.
    """
    self._check(images.shape)

    def conv(features, stride, name, bias=True, dtype=self.dtype):
      return nn.Conv(
        features,
        (4, 4),
        strides=stride,
        padding=1,
        use_bias=bias,
        kernel_init=nn.initializers.normal(0.02),
        dtype=dtype,
        conv_general_dilated=convolution(self.convolution),
        name=name,
      )

    x = _leaky(conv(self.channels, 2, "conv_in")(images))
    for i in range(1, self.num_layers + 1):
      features = self.channels * min(2**i, 8)
      stride = 2 if i < self.num_layers else 1
      bias = self.norm == "group"
      x = conv(features, stride, f"conv{i}", bias)(x)
      norm = Norm(self.norm, scale_stddev=0.02, name=f"norm{i}")
      x = _leaky(norm(x)).astype(self.dtype)
    wide = layers.wide(self.dtype)
    return conv(1, 1, "conv_out", dtype=wide)(x.astype(wide))

  def _check(self, shape: tuple[int, ...]) -> None:
    if len(shape) != 4:
      raise ValueError(f"images must be (B, H, W, 3), got {shape}")
    if self.num_layers < 1:
      raise ValueError(f"num_layers {self.num_layers} must be at least 1")
    side, least = min(shape[1:3]), 3 * 2**self.num_layers
    if side < least:
      most = (side // 3).bit_length() - 1
      fits = f"at most num_layers={most} fits" if most > 0 else "none fits"
      raise ValueError(
        f"images of {shape[1]}x{shape[2]} are too small for a patch "
        f"discriminator with num_layers={self.num_layers}: it needs {least} "
        f"pixels a side; {fits} these images"
      )


class DinoHead(nn.Module):
  """One head: (B, N, D) features → (B, N) logits.

  conv 1 → norm → LeakyReLU → (conv `kernel_size` → norm → LeakyReLU, plus the
  input, over √2) → conv 1 to a single channel. See `DinoDiscriminator`.
  """

  kernel_size: int
  norm: str
  norm_images: int
  epsilon: float
  dtype: layers.Dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width = x.shape[-1]

    def stage(x, kernel_size, name):
      bias = self.norm == "group"  # other norms take it out again
      conv = SpectralConv(
        width, kernel_size, bias, self.dtype, name=f"conv_{name}"
      )
      norm = Norm(
        self.norm, self.norm_images, self.epsilon, name=f"norm_{name}"
      )
      return _leaky(norm(conv(x))).astype(self.dtype)

    x = stage(x, 1, "in")
    x = (x + stage(x, self.kernel_size, "mid")) * 2**-0.5
    conv = SpectralConv(1, 1, dtype=layers.wide(self.dtype), name="conv_out")
    return conv(x)[..., 0]


class DinoDiscriminator(nn.Module):
  """RAE's trained part: one head for each feature map of the frozen DINO.

  Variables are {"params": …, "spectral": …}; see `SpectralConv`.

  Attributes:
    kernel_size: taps of each head's residual convolution. It runs along the
      tokens in row-major order.
    norm: "group"; "batch", StyleGAN-T's, over `norm_images` images; or
      "instance", RAE's own: its code has StyleGAN-T's norm with groups of a
      single image.
    norm_images: consecutive images that share "batch" statistics.
    epsilon: of the norms.
    dtype: compute dtype.
  """

  kernel_size: int = 9
  norm: str = "group"
  norm_images: int = 8
  epsilon: float = 1e-6
  dtype: layers.Dtype = jnp.float32

  @nn.compact
  def __call__(self, features: tuple[jax.Array, ...]) -> jax.Array:
    """Judges images by their features.

    Args:
      features: K arrays (B, N, D), without CLS.

    Returns:
      (B, K · N) float32, one map after the other: large is real.

    Raises:
      ValueError: a batch that does not divide into `norm_images`, with
        norm="batch"; an even `kernel_size`.
    """
    if self.kernel_size % 2 == 0:
      raise ValueError(f"kernel_size {self.kernel_size} must be odd")
    logits = [
      DinoHead(
        kernel_size=self.kernel_size,
        norm=self.norm,
        norm_images=self.norm_images,
        epsilon=self.epsilon,
        dtype=self.dtype,
        name=f"head{i}",
      )(x)
      for i, x in enumerate(features)
    ]
    return jnp.concatenate(logits, axis=1)


class FeatureNetwork(Protocol):
  """The frozen network under a `DinoDiscriminator`."""

  def features(self, params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
    """(B, H, W, 3) in [−1, 1] → feature maps (B, N, D); pure."""
    ...


@dataclasses.dataclass(frozen=True)
class Discriminator:
  """Either discriminator behind one interface; pure functions, no arrays.

  Attributes:
    module: the trained network.
    network: the frozen one under it, or None.
  """

  module: PatchDiscriminator | DinoDiscriminator
  network: FeatureNetwork | None = None

  def init(
    self, rng: jax.Array, image_size: int, frozen: Any
  ) -> tuple[Any, Any]:
    """Initial (params, state). `frozen` as in `logits`; traceable."""
    images = jnp.zeros((1, image_size, image_size, 3), jnp.float32)
    variables = self.module.init(rng, self._see(frozen, images))
    return variables["params"], dict(variables.get("spectral", {}))

  def logits(
    self, params: Any, state: Any, frozen: Any, images: jax.Array
  ) -> jax.Array:
    """Judges images.

    Args:
      params: trained parameters.
      state: arrays that follow the parameters and have no gradient: {}, or
        the vectors of the spectral norms.
      frozen: parameters of the frozen network; {} without one.
      images: (B, S, S, 3) in [−1, 1].

    Returns:
      (B, …) float32 logits: large is real.
    """
    variables = {"params": params}
    if state:
      variables["spectral"] = state
    return self.module.apply(variables, self._see(frozen, images))

  def advance(self, params: Any, state: Any) -> Any:
    """The state of the next step, after a step that ran `logits`."""
    return advance_spectral(params, state) if state else state

  def _see(self, frozen: Any, images: jax.Array) -> Any:
    if self.network is None:
      return images
    return self.network.features(frozen, images)


def build_discriminator(
  config: DiscriminatorConfig,
  compute: ComputeConfig,
  dino: FeatureNetwork | None = None,
) -> Discriminator:
  """Builds the discriminator that a config asks for.

  Args:
    config: its section; `weights` and `augment` are the caller's.
    compute: gives the compute dtype.
    dino: the loaded feature network, for kind "dino".

  Raises:
    ValueError: unknown kind or norm, or no feature network for "dino".
  """
  for name, value, valid in (
    ("kind", config.kind, KINDS),
    ("norm", config.norm, NORMS),
  ):
    if value not in valid:
      raise ValueError(
        f"config.discriminator.{name}={value!r} is unknown; "
        f"{nearest(str(value), valid)}"
      )
  dtype = jnp.dtype(compute.dtype)
  if config.kind == "patch":
    module = PatchDiscriminator(
      config.channels,
      config.num_layers,
      config.norm,
      dtype,
      compute.convolution,
    )
    return Discriminator(module)
  if dino is None:
    raise ValueError(
      'config.discriminator.kind="dino" stands on a frozen DINO ViT-S/8: '
      "load it with psvae_jax.pretrained.dino.load_dino and pass it in"
    )
  return Discriminator(DinoDiscriminator(norm=config.norm, dtype=dtype), dino)
