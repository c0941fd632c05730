"""LDM's KL autoencoder (arXiv 2112.10752): images ↔ moments of a posterior.

That of Stable Diffusion 1 to 3, SDXL and FLUX (f8), of LDM, MAR and VA-VAE
(f16). They differ in widths, in where attention is, in latent channels and in
whether 1×1 convolutions stand around the latent.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from psvae_jax.models import layers
from psvae_jax.models.conv_blocks import (
  AttentionBlock,
  ResBlock,
  conv3x3,
  group_norm,
  halve,
)
from psvae_jax.models.latent import DiagonalGaussian
from psvae_jax.models.pixels import ConvPixelDecoder

# No model is near these; larger numbers in a config file take all memory.
_MAX_WIDTH = 2**14
_MAX_LEVELS = 10
_MAX_LAYERS = 64
_MAX_SIDE = 2**16


@dataclasses.dataclass(frozen=True)
class KLConfig:
  """Hyper-parameters of a KL autoencoder, named as in diffusers' config.json.

  Attributes:
    block_out_channels: width of each level, finest first.
    layers_per_block: res blocks of a level of the encoder; the decoder's have
      one more.
    latent_channels: C.
    down_attention: of each level of the encoder, finest first: whether
      attention follows every res block.
    up_attention: the same of the decoder, coarsest first.
    mid_attention: whether there is attention in the middles.
    norm_num_groups: groups of every GroupNorm; divides the widths.
    use_quant_conv: whether a 1×1 convolution makes the moments.
    use_post_quant_conv: whether one takes the latent.
    scaling_factor: 1 / standard deviation of the latents, which a generator
      multiplies them with. The modules do not.
    shift_factor: mean of the latents, which a generator subtracts before.
    sample_size: side of the images it was trained for, pixels.
  """

  block_out_channels: tuple[int, ...]
  layers_per_block: int
  latent_channels: int
  down_attention: tuple[bool, ...]
  up_attention: tuple[bool, ...]
  mid_attention: bool = True
  norm_num_groups: int = 32
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  scaling_factor: float = 1.0
  shift_factor: float = 0.0
  sample_size: int = 256

  def __post_init__(self):
    widths = self.block_out_channels
    if not 1 <= len(widths) <= _MAX_LEVELS:
      raise ValueError(
        f"block_out_channels has {len(widths)} levels, not 1 to {_MAX_LEVELS}"
      )
    bounds = {
      "layers_per_block": (self.layers_per_block, _MAX_LAYERS),
      "latent_channels": (self.latent_channels, _MAX_WIDTH),
      "norm_num_groups": (self.norm_num_groups, _MAX_WIDTH),
      "sample_size": (self.sample_size, _MAX_SIDE),
      **{
        f"block_out_channels[{i}]": (width, _MAX_WIDTH)
        for i, width in enumerate(widths)
      },
    }
    for name, (value, most) in bounds.items():
      if not 1 <= value <= most:
        raise ValueError(f"{name} {value} is not in [1, {most}]")
    for width in widths:
      if width % self.norm_num_groups:
        raise ValueError(
          f"norm_num_groups {self.norm_num_groups} does not divide the "
          f"{width} of block_out_channels"
        )
    for name in ("down_attention", "up_attention"):
      if len(getattr(self, name)) != len(widths):
        raise ValueError(
          f"{name} is of {len(getattr(self, name))} levels, "
          f"block_out_channels of {len(widths)}"
        )
    if not self.scaling_factor > 0:
      raise ValueError(f"scaling_factor {self.scaling_factor} is not positive")

  @property
  def factor(self) -> int:
    """Pixels along a side of a latent's position, f."""
    return 2 ** (len(self.block_out_channels) - 1)


class ConvEncoder(nn.Module):
  """LDM's encoder: images (B, H, W, 3) → (B, H/f, W/f, 2C), wide.

  conv_in → levels of res blocks, each but the last halved → res, attention,
  res → norm, SiLU, conv_out.

  Attributes:
    config: hyper-parameters.
    dtype: compute dtype; norms, softmax and `conv_out` are float32.
    convolution: "native" or "matmul"; see `models.convolution`.
  """

  config: KLConfig
  dtype: layers.Dtype = jnp.float32
  convolution: str = "native"

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    config, how = self.config, (self.dtype, self.convolution)
    widths, groups = config.block_out_channels, config.norm_num_groups

    x = conv3x3(widths[0], *how, "conv_in")(images)
    for level, width in enumerate(widths):
      for i in range(config.layers_per_block):
        x = ResBlock(width, *how, groups, name=f"down{level}_res{i}")(x)
        if config.down_attention[level]:
          name = f"down{level}_attention{i}"
          x = AttentionBlock(self.dtype, groups, name=name)(x)
      if level < len(widths) - 1:
        x = halve(x, *how, f"down{level}_downsample")
    x = ResBlock(widths[-1], *how, groups, name="mid_res0")(x)
    if config.mid_attention:
      x = AttentionBlock(self.dtype, groups, name="mid_attention")(x)
    x = ResBlock(widths[-1], *how, groups, name="mid_res1")(x)
    x = nn.silu(group_norm(x, "norm_out", groups))
    wide = layers.wide(self.dtype)
    moments = 2 * config.latent_channels
    return conv3x3(moments, wide, self.convolution, "conv_out")(x)


class KLAutoencoder(nn.Module):
  """Encoder, decoder and the 1×1 convolutions between them.

  Attributes:
    config: hyper-parameters.
    dtype: compute dtype; moments and images are float32.
    convolution: "native" or "matmul"; see `models.convolution`.
  """

  config: KLConfig
  dtype: layers.Dtype = jnp.float32
  convolution: str = "native"

  def setup(self):
    config, wide = self.config, layers.wide(self.dtype)
    self.encoder = ConvEncoder(config, self.dtype, self.convolution)
    # Its widths are multiples of `channels`: of 1 they may be any.
    self.decoder = ConvPixelDecoder(
      channels=1,
      channel_mult=config.block_out_channels,
      num_res_blocks=config.layers_per_block,
      attention=config.mid_attention,
      dtype=self.dtype,
      convolution=self.convolution,
      attention_levels=tuple(
        level for level, attended in enumerate(config.up_attention) if attended
      ),
      num_groups=config.norm_num_groups,
    )
    if config.use_quant_conv:
      self.quant_conv = nn.Dense(2 * config.latent_channels, dtype=wide)
    if config.use_post_quant_conv:
      self.post_quant_conv = nn.Dense(config.latent_channels, dtype=wide)

  def posterior(self, images: jax.Array) -> DiagonalGaussian:
    """Encodes.

    Args:
      images: (B, H, W, 3) in [−1, 1], H and W multiples of `config.factor`.

    Returns:
      The posterior over (B, H/f, W/f, C), not scaled.

    Raises:
      ValueError: another shape.
    """
    factor = self.config.factor
    if images.ndim != 4 or images.shape[3] != 3:
      raise ValueError(f"images must be (B, H, W, 3), got {images.shape}")
    if images.shape[1] % factor or images.shape[2] % factor:
      raise ValueError(
        f"image size {images.shape[1]}x{images.shape[2]} is not a multiple of "
        f"{factor}; resize or crop the images first"
      )
    moments = self.encoder(images)
    if self.config.use_quant_conv:
      moments = self.quant_conv(moments)
    return DiagonalGaussian.from_moments(moments)

  def encode(self, images: jax.Array) -> jax.Array:
    """Images as for `posterior` → its mean (B, H/f, W/f, C), not scaled."""
    return self.posterior(images).mode()

  def decode(self, z: jax.Array) -> jax.Array:
    """Latents (B, h, w, C), not scaled → images (B, h·f, w·f, 3) in [−1, 1]."""
    if self.config.use_post_quant_conv:
      z = self.post_quant_conv(z)
    return self.decoder(z)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Images → their reconstruction through the posterior's mean."""
    return self.decode(self.encode(images))
