"""The four modules of a PS-VAE and how they connect.

    image → encoder → f′ → semantic_encoder → z → semantic_decoder → f″
                                              └──→ pixel_decoder → image

Images are (B, S, S, 3) float32 in [−1, 1]; features (B, h, w, D); latents
(B, h, w, C). The object holds no parameters: every method takes them.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from psvae_jax.config import (
  AutoencoderModel,
  ComputeConfig,
  ConfigError,
  PixelDecoderConfig,
)
from psvae_jax.models.latent import DiagonalGaussian
from psvae_jax.models.layers import BlockConfig
from psvae_jax.models.pixels import ConvPixelDecoder, ViTPixelDecoder
from psvae_jax.models.resize import resize_bicubic
from psvae_jax.models.semantic import (
  SemanticDecoder,
  SemanticEncoder,
  last_blocks,
)
from psvae_jax.models.vit import ViT, ViTConfig

MODULES = ("encoder", "semantic_encoder", "semantic_decoder", "pixel_decoder")

# Positions, windows and resizing are made on the host, of any size that a
# config.json claims.
_MOST_PIXELS = 8192  # a side
_MOST_NUMBERS = 2**24  # in all tokens of an image
_MOST_LEVELS = 16


@dataclasses.dataclass(frozen=True)
class Autoencoder:
  """Modules, sizes and preprocessing of one autoencoder.

  Attributes:
    config: the model section.
    encoder: representation encoder E.
    mean, std: E's preprocessing constants, for images in [0, 1].
    semantic_encoder, semantic_decoder, pixel_decoder: see the module docstring.
  """

  config: AutoencoderModel
  encoder: ViT
  mean: tuple[float, ...]
  std: tuple[float, ...]
  semantic_encoder: SemanticEncoder
  semantic_decoder: SemanticDecoder
  pixel_decoder: nn.Module

  @property
  def grid(self) -> int:
    """Side of the token grid."""
    return self.config.image_size // self.encoder.config.patch_size

  def features(self, params: Any, images: jax.Array) -> jax.Array:
    """Images at E's size or the product's → f (B, h, w, D) float32.

    Raises:
      ValueError: images of any other size.
    """
    sizes = (self.config.image_size, self.config.output_size)
    side = images.shape[1]
    if images.shape[1] != images.shape[2] or side not in sizes:
      raise ValueError(
        f"images are {images.shape[1]}×{images.shape[2]}; this autoencoder "
        f"takes {sizes[0]}×{sizes[0]} (the encoder's size) or "
        f"{sizes[1]}×{sizes[1]} (the product's)"
      )
    if side != self.config.image_size:
      images = resize_bicubic(images, (sizes[0], sizes[0]))
    unit = 0.5 * images + 0.5
    mean = jnp.asarray(self.mean, images.dtype)
    std = jnp.asarray(self.std, images.dtype)
    return self.encoder.apply({"params": params}, (unit - mean) / std)

  def posterior(self, params: Any, features: jax.Array) -> DiagonalGaussian:
    return self.semantic_encoder.apply({"params": params}, features)

  def decode_features(self, params: Any, z: jax.Array) -> jax.Array:
    return self.semantic_decoder.apply({"params": params}, z)

  def decode_pixels(self, params: Any, z: jax.Array) -> jax.Array:
    """z → images (B, S, S, 3) float32, not clipped."""
    return self.pixel_decoder.apply({"params": params}, z)

  def init(self, rng: jax.Array, encoder_params: Any) -> dict[str, Any]:
    """Fresh parameters of everything but E."""
    rngs = jax.random.split(rng, 3)
    width = self.encoder.config.width
    tokens = jnp.zeros((1, self.grid, self.grid, width), jnp.float32)
    z = jnp.zeros((1, self.grid, self.grid, self.config.channels), jnp.float32)
    params = {
      "semantic_encoder": self.semantic_encoder.init(rngs[0], tokens),
      "semantic_decoder": self.semantic_decoder.init(rngs[1], z),
      "pixel_decoder": self.pixel_decoder.init(rngs[2], z),
    }
    params = {name: value["params"] for name, value in params.items()}
    for name in ("semantic_encoder", "semantic_decoder"):
      section = getattr(self.config, name)
      if section.from_encoder:
        blocks = last_blocks(
          encoder_params["blocks"], section.depth, params[name]["blocks"]
        )
        params[name]["blocks"] = jax.tree.map(jnp.copy, blocks)
    return params


def build(
  config: AutoencoderModel,
  compute: ComputeConfig,
  encoder: ViT,
  mean: tuple[float, ...],
  std: tuple[float, ...],
) -> Autoencoder:
  """Builds the modules around a loaded encoder.

  Raises:
    ConfigError: sizes that do not fit together.
  """
  check_sizes(config, encoder.config)
  block = encoder.config.block
  shared = dict(
    remat=compute.remat, unroll=compute.unroll, dtype=jnp.dtype(compute.dtype)
  )

  def semantic(section):
    return dict(
      block=block,
      depth=section.depth,
      mlp_hidden=section.mlp_hidden or block.width,
      **shared,
    )

  return Autoencoder(
    config=config,
    encoder=encoder,
    mean=tuple(mean),
    std=tuple(std),
    semantic_encoder=SemanticEncoder(
      channels=config.channels, **semantic(config.semantic_encoder)
    ),
    semantic_decoder=SemanticDecoder(
      final_norm=config.final_norm, **semantic(config.semantic_decoder)
    ),
    pixel_decoder=_pixel_decoder(
      config.pixel_decoder, config.output_size, compute.convolution, shared
    ),
  )


def check_sizes(config: AutoencoderModel, encoder: ViTConfig) -> None:
  """Checks the model section against the encoder it is built around.

  Raises:
    ConfigError: sizes that do not fit together.
  """
  patch, size = encoder.patch_size, config.image_size
  for name in ("image_size", "output_size"):
    if getattr(config, name) > _MOST_PIXELS:
      raise ConfigError(
        f"config.model.{name}={getattr(config, name)} is beyond what this code "
        f"is made for; {_MOST_PIXELS} is the most"
      )
  if size % patch:
    raise ConfigError(
      f"config.model.image_size={size} is not a multiple of the encoder's "
      f"patch size {patch}; {_nearest_multiple(size, patch)} would be"
    )
  tokens = (size // patch) ** 2
  width = max(encoder.width, config.pixel_decoder.width)
  if tokens * width > _MOST_NUMBERS:
    raise ConfigError(
      f"config.model.image_size={size} makes {tokens:,} tokens of width "
      f"{width:,}, which is beyond what this code is made for; the paper has "
      "256 of 768"
    )
  if encoder.width % 4:  # no published encoder, and sin-cos needs it
    raise ConfigError(
      f"config.model.encoder={config.encoder!r} has width {encoder.width}, "
      "which is not a multiple of 4; facebook/dinov2-with-registers-base has "
      "768"
    )
  for name in ("semantic_encoder", "semantic_decoder"):
    section = getattr(config, name)
    if section.from_encoder and section.depth > encoder.depth:
      raise ConfigError(
        f"config.model.{name}.depth={section.depth} cannot start from the "
        f"encoder's last blocks, of which there are {encoder.depth}; set depth="
        f"{encoder.depth} or from_encoder=False"
      )
  check = _check_vit_decoder
  if config.pixel_decoder.kind == "conv":
    check = _check_conv_decoder
  check(config.pixel_decoder, size // patch, config.output_size)


def _nearest_multiple(value: int, factor: int) -> int:
  return max(factor, (value + factor // 2) // factor * factor)


def _check_vit_decoder(
  config: PixelDecoderConfig, grid: int, output_size: int
) -> None:
  if output_size % grid:
    raise ConfigError(
      f"config.model.output_size={output_size} is not a multiple of the "
      f"{grid}×{grid} token grid; {_nearest_multiple(output_size, grid)} would "
      "be"
    )
  most = output_size // grid // 2
  if config.overlap > most:
    raise ConfigError(
      f"config.model.pixel_decoder.overlap={config.overlap} is more than half "
      f"of a token's {output_size // grid} pixels; {most} is the most"
    )


def _check_conv_decoder(
  config: PixelDecoderConfig, grid: int, output_size: int
) -> None:
  levels = len(config.channel_mult)
  if not 1 <= levels <= _MOST_LEVELS:
    raise ConfigError(
      f"config.model.pixel_decoder.channel_mult has {levels} levels, not 1 to "
      f"{_MOST_LEVELS}; e.g. {PixelDecoderConfig().channel_mult}"
    )
  factor = 2 ** (levels - 1) * config.output_patch
  if grid * factor != output_size:
    raise ConfigError(
      f"config.model.pixel_decoder upsamples {factor}× ("
      f"{levels} levels of channel_mult, output_patch "
      f"{config.output_patch}), so a {grid}×{grid} grid gives "
      f"{grid * factor} pixels, not config.model.output_size={output_size}; "
      f"output_size={grid * factor} would do"
    )


def _pixel_decoder(
  config: PixelDecoderConfig, output_size: int, convolution: str, shared: dict
) -> nn.Module:
  """The decoder that `config.kind` names."""
  if config.kind == "vit":
    block = BlockConfig(
      width=config.width,
      num_heads=config.num_heads,
      mlp_hidden=int(config.width * config.mlp_ratio),
      layerscale_init=None,
    )
    return ViTPixelDecoder(
      block=block,
      depth=config.depth,
      output_size=output_size,
      overlap=config.overlap,
      refine_channels=config.refine_channels,
      convolution=convolution,
      **shared,
    )
  return ConvPixelDecoder(
    channels=config.channels,
    channel_mult=config.channel_mult,
    num_res_blocks=config.num_res_blocks,
    output_patch=config.output_patch,
    remat=shared["remat"],
    dtype=shared["dtype"],
    convolution=convolution,
  )
