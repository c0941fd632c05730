"""RAE (arXiv 2510.11690): a frozen ViT's features ↔ images, as in diffusers.

The latent is the encoder's patch features, without the final norm's gain and
bias, standardised by statistics of a data set. The decoder is a ViT like
MAE's, with disjoint patches.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.models import layers, resize, vit
from psvae_jax.models.pixels import overlap_add

# How latents are standardised; the two differ where a deviation is near 0.
LatentNorm = Literal["diffusers", "rae"]
LATENT_NORMS = ("diffusers", "rae")
_EPSILON = 1e-5

# MAE's code counts positions to this, whatever the grid is.
_POSITION_RANGE = 16
# No model is near these; larger numbers in a config file take all memory.
_MAX_DEPTH = 1024
_MAX_GRID = 512
_MAX_PATCH = 256
_MAX_WIDTH = 2**16
_MAX_NUMBERS = (
  2**24
)  # in all tokens of an image: positions are made on the host


@dataclasses.dataclass(frozen=True)
class RAEConfig:
  """Hyper-parameters of an RAE.

  Attributes:
    encoder: of the encoder.
    input_size: side of the images that the encoder sees, pixels.
    decoder: of the decoder's blocks.
    decoder_depth: how many blocks.
    decoder_patch_size: side of the square that a token predicts, pixels.
    mean, std: per channel, of images in [0, 1], which the encoder sees
      normalised and the decoder predicts so.
    latent_norm: "diffusers" divides latents by `latents_std` + 1e-5, "rae" by
      it alone.
    scaling_factor: what diffusers multiplies latents with after that, and a
      generator with it. The modules do not.
  """

  encoder: vit.ViTConfig
  input_size: int
  decoder: layers.BlockConfig
  decoder_depth: int
  decoder_patch_size: int
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  latent_norm: LatentNorm = "diffusers"
  scaling_factor: float = 1.0

  def __post_init__(self):
    block = self.decoder
    bounds = {
      "encoder_num_hidden_layers": (self.encoder.depth, _MAX_DEPTH),
      "decoder_num_hidden_layers": (self.decoder_depth, _MAX_DEPTH),
      "decoder_hidden_size": (block.width, _MAX_WIDTH),
      "decoder_intermediate_size": (block.mlp_hidden, _MAX_WIDTH),
      "decoder_num_attention_heads": (block.num_heads, _MAX_WIDTH),
      "patch_size": (self.decoder_patch_size, _MAX_PATCH),
      "encoder_input_size over encoder_patch_size": (self.grid, _MAX_GRID),
    }
    for name, (value, most) in bounds.items():
      if not 1 <= value <= most:
        raise ValueError(f"{name} {value} is not in [1, {most}]")
    if self.input_size % self.encoder.patch_size:
      raise ValueError(
        f"encoder_input_size {self.input_size} is not a multiple of "
        f"encoder_patch_size {self.encoder.patch_size}"
      )
    width, heads = block.width, block.num_heads
    if width % 4 or width % heads:
      raise ValueError(
        f"decoder_hidden_size {width} is not a multiple of 4 and of "
        f"decoder_num_attention_heads {heads}"
      )
    if self.grid**2 * width > _MAX_NUMBERS:
      raise ValueError(
        f"decoder_hidden_size {width} of {self.grid**2} tokens is beyond what "
        f"this code is made for: {_MAX_NUMBERS} numbers"
      )
    if self.latent_norm not in LATENT_NORMS:
      raise ValueError(
        f"latent_norm is one of {LATENT_NORMS}, not {self.latent_norm!r}"
      )
    if not min(self.std) > 0:
      raise ValueError(f"encoder_norm_std {self.std} is not positive")
    if not self.scaling_factor > 0:
      raise ValueError(f"scaling_factor {self.scaling_factor} is not positive")

  @property
  def grid(self) -> int:
    """Tokens along a side."""
    return self.input_size // self.encoder.patch_size

  @property
  def output_size(self) -> int:
    """Side of the decoder's images, pixels."""
    return self.grid * self.decoder_patch_size


class RAEDecoder(nn.Module):
  """Features (B, h, w, D) → normalised images (B, h·p, w·p, 3), wide.

  Dense → [CLS, patches] + fixed positions → blocks → LayerNorm → Dense to the
  pixels of disjoint patches. The CLS token is learned and its output dropped.

  Attributes:
    block: hyper-parameters of the blocks.
    depth: number of blocks.
    patch_size: p.
    dtype: compute dtype; norms, softmax and the last layer are float32.
  """

  block: layers.BlockConfig
  depth: int
  patch_size: int
  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    batch, height, width, _ = features.shape
    if height != width:
      raise ValueError(f"latents must be square, got {height}x{width}")
    dim, wide = self.block.width, layers.wide(self.dtype)

    x = nn.Dense(dim, dtype=self.dtype, name="embed")(features)
    x = x + positions(height, dim).astype(self.dtype)
    x = x.reshape(batch, height * width, dim)
    init = nn.initializers.truncated_normal(0.02)
    cls = self.param("cls_token", init, (1, 1, dim))  # its position code is 0
    cls = jnp.broadcast_to(cls.astype(self.dtype), (batch, 1, dim))
    x = jnp.concatenate([cls, x], axis=1)
    x = layers.BlockStack(
      self.block, self.depth, dtype=self.dtype, name="blocks"
    )(x)[:, 1:]
    epsilon = self.block.layer_norm_eps
    x = layers.LayerNorm(epsilon=epsilon, dtype=wide, name="norm")(x)
    patch = self.patch_size
    x = nn.Dense(patch * patch * 3, dtype=wide, name="head")(x)
    x = x.reshape(batch, height, width, patch, patch, 3)
    return overlap_add(x, 0)


class RAE(nn.Module):
  """Encoder, statistics of the latents and decoder.

  Its parameters `latents_mean` and `latents_std` are not trained; they
  broadcast against (h, w, D).

  Attributes:
    config: hyper-parameters.
    statistics: shape of mean and of deviation.
    dtype: compute dtype; latents and images are float32.
  """

  config: RAEConfig
  statistics: tuple[int, int, int] = (1, 1, 1)
  dtype: Any = jnp.float32

  def setup(self):
    config = self.config
    self.encoder = vit.ViT(
      config.encoder, final_norm="affine_free", dtype=self.dtype
    )
    self.decoder = RAEDecoder(
      config.decoder,
      config.decoder_depth,
      config.decoder_patch_size,
      dtype=self.dtype,
    )
    shape = self.statistics
    self.latents_mean = self.param("latents_mean", nn.initializers.zeros, shape)
    self.latents_std = self.param("latents_std", nn.initializers.ones, shape)

  def encode(self, images: jax.Array) -> jax.Array:
    """Images → standardised latents.

    Args:
      images: (B, H, W, 3) in [−1, 1]; resized, bicubic without antialiasing,
        where they are not of the encoder's size.

    Returns:
      (B, h, w, D) float32, not scaled by `scaling_factor`.
    """
    config = self.config
    images = images.astype(layers.wide(self.dtype)) * 0.5 + 0.5
    size = (config.input_size, config.input_size)
    images = resize.resize_bicubic(images, size)
    mean, std = self._pixel_statistics()
    z = self.encoder((images - mean) / std)
    return (z - self.latents_mean) / self._divisor()

  def decode(self, z: jax.Array) -> jax.Array:
    """Latents (B, h, w, D) as `encode` gives → (B, H, W, 3) in [−1, 1]."""
    features = z * self._divisor() + self.latents_mean
    mean, std = self._pixel_statistics()
    images = self.decoder(features) * std + mean
    return images * 2.0 - 1.0

  def __call__(self, images: jax.Array) -> jax.Array:
    """Images → their reconstruction."""
    return self.decode(self.encode(images))

  def _divisor(self) -> jax.Array:
    """What standardises: "diffusers" std + 1e-5, "rae" std as it is.

    RAE's own code keeps the variance and divides by √(var + 1e-5); the
    published diffusers folders hold that root as their deviation, to which
    diffusers adds 1e-5 once more.
    """
    if self.config.latent_norm == "rae":
      return self.latents_std
    return self.latents_std + _EPSILON

  def _pixel_statistics(self) -> tuple[jax.Array, jax.Array]:
    dtype = layers.wide(self.dtype)
    config = self.config
    return jnp.asarray(config.mean, dtype), jnp.asarray(config.std, dtype)


def positions(grid: int, dim: int) -> jax.Array:
  """Fixed 2-D sin-cos code of the decoder: (grid, grid, dim) float32.

  The first half of the channels codes the column, the other the row, unlike
  `latent.sincos_positions`; a grid of any size counts from 0 to 16.
  """
  place = np.arange(grid, dtype=np.float32)
  place = place / np.float32(grid / _POSITION_RANGE)
  frequency = 10000.0 ** (-np.arange(dim // 4) / (dim / 4))
  angle = place.astype(np.float64)[:, None] * frequency
  code = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
  shape = (grid, grid, dim // 2)
  columns = np.broadcast_to(code[None], shape)
  rows = np.broadcast_to(code[:, None], shape)
  return jnp.asarray(np.concatenate([columns, rows], axis=-1), jnp.float32)
