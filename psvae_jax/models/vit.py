"""Vision transformer of the DINOv2 family: images to patch features.

Sequence: [CLS + position, registers (no position), patches + position], as in
DINOv2 with registers (arXiv 2304.07193, 2309.16588). Only patch tokens leave
the module.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from psvae_jax.models import layers, resize

# No model is near this; larger numbers in a config file overflow shapes.
_MAX_SIZE = 2**24

FinalNorm = Literal["affine", "affine_free"]


@dataclasses.dataclass(frozen=True)
class ViTConfig:
  """Hyper-parameters of a vision transformer.

  Attributes:
    width: token dimension D.
    depth: number of blocks.
    num_heads: attention heads; divides `width`.
    patch_size: side of a patch, pixels.
    image_size: side, in pixels, of the square image that the position
      embeddings belong to.
    mlp_ratio: hidden width of the MLP over `width`.
    num_registers: register tokens.
    swiglu: SwiGLU in place of the MLP (DINOv2-giant).
    activation: a key of `layers.ACTIVATIONS`, for the plain MLP.
    layer_norm_eps: epsilon of every LayerNorm.
    qkv_bias: whether query, key and value projections have a bias.
    layerscale_init: initial LayerScale value; None leaves LayerScale out.
    position_antialias: whether position embeddings are resized with an
      antialiasing filter. None means as published: with registers yes,
      without no. The two differ by far more than rounding.
  """

  width: int
  depth: int
  num_heads: int
  patch_size: int
  image_size: int
  mlp_ratio: float
  num_registers: int = 0
  swiglu: bool = False
  activation: str = "gelu"
  layer_norm_eps: float = 1e-6
  qkv_bias: bool = True
  layerscale_init: float | None = 1.0
  position_antialias: bool | None = None

  def __post_init__(self):
    sizes = {
      "width": self.width,
      "depth": self.depth,
      "num_heads": self.num_heads,
      "patch_size": self.patch_size,
      "image_size": self.image_size,
      "MLP hidden width": int(self.width * self.mlp_ratio),
    }
    for name, value in sizes.items():
      if not 1 <= value <= _MAX_SIZE:
        raise ValueError(f"{name} {value} is not in [1, {_MAX_SIZE}]")
    if not 0 <= self.num_registers <= _MAX_SIZE:
      raise ValueError(
        f"num_registers {self.num_registers} is not in [0, {_MAX_SIZE}]"
      )
    if self.width % self.num_heads:
      raise ValueError(
        f"width {self.width} is not a multiple of num_heads {self.num_heads}"
      )
    if self.image_size < self.patch_size:
      raise ValueError(
        f"image_size {self.image_size} is below patch_size {self.patch_size}"
      )
    if self.activation not in layers.ACTIVATIONS:
      raise ValueError(
        f"unknown activation {self.activation!r}; known: "
        f"{', '.join(layers.ACTIVATIONS)}"
      )

  @property
  def grid(self) -> int:
    """Patches along a side of the native image."""
    return self.image_size // self.patch_size

  @property
  def antialias(self) -> bool:
    """`position_antialias` with None resolved."""
    if self.position_antialias is None:
      return self.num_registers > 0
    return self.position_antialias

  @property
  def block(self) -> layers.BlockConfig:
    """The same hyper-parameters for one block."""
    hidden = int(self.width * self.mlp_ratio)
    if self.swiglu:
      # Two thirds keep the parameter count of the plain MLP, as DINOv2.
      hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    return layers.BlockConfig(
      width=self.width,
      num_heads=self.num_heads,
      mlp_hidden=hidden,
      swiglu=self.swiglu,
      activation=self.activation,
      qkv_bias=self.qkv_bias,
      layerscale_init=self.layerscale_init,
      layer_norm_eps=self.layer_norm_eps,
    )


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
  """(B, H, W, C) → (B, H/p, W/p, p·p·C), pixels in (row, column, C) order."""
  batch, height, width, channels = images.shape
  rows, columns = height // patch_size, width // patch_size
  images = images.reshape(
    batch, rows, patch_size, columns, patch_size, channels
  )
  images = images.transpose(0, 1, 3, 2, 4, 5)
  return images.reshape(batch, rows, columns, patch_size**2 * channels)


class ViT(nn.Module):
  """Normalised images → patch features.

  Attributes:
    config: hyper-parameters.
    final_norm: "affine" as published, or "affine_free" (no parameters; the
      targets of RAE).
    remat: recompute each block's activations in the backward pass.
    unroll: blocks per iteration of the compiled loop.
    dtype: compute dtype of matrix products.
    taps: ascending indices of blocks, from 0, whose patch tokens are returned
      in place of the final norm's, which there is none of then.
  """

  config: ViTConfig
  final_norm: FinalNorm = "affine"
  remat: bool = False
  unroll: int = 1
  dtype: Any = jnp.float32
  taps: tuple[int, ...] = ()

  @nn.compact
  def __call__(self, images: jax.Array) -> Any:
    """Computes patch features.

    Args:
      images: (B, H, W, 3) float32, already normalised by the encoder's mean
        and std. H and W are multiples of the patch size, and need not be the
        native size: position embeddings are resized to the image.

    Returns:
      (B, H/p, W/p, D) float32: patch tokens after the final norm. With `taps`
      a tuple of (B, H/p · W/p, D) float32, as the blocks leave them.

    Raises:
      ValueError: bad image shape, `taps`, or unknown `final_norm`.
    """
    config = self.config
    if self.final_norm not in ("affine", "affine_free"):
      raise ValueError(
        f'final_norm is "affine" or "affine_free", not {self.final_norm!r}'
      )
    taps, depth = self.taps, config.depth
    if list(taps) != sorted({tap for tap in taps if 0 <= tap < depth}):
      raise ValueError(f"taps {taps} must ascend within {depth} blocks")
    patch = config.patch_size
    if images.ndim != 4 or images.shape[3] != 3:
      raise ValueError(f"images must be (B, H, W, 3), got {images.shape}")
    if images.shape[1] % patch or images.shape[2] % patch:
      raise ValueError(
        f"image size {images.shape[1]}x{images.shape[2]} is not a multiple "
        f"of the patch size {patch}; resize the images first"
      )

    # A patch convolution is a matrix product; as one it is faster on a CPU.
    embed = nn.Dense(config.width, dtype=self.dtype, name="patch_embed")
    patches = embed(patchify(images, patch))
    batch, rows, columns, width = patches.shape
    patches = patches.reshape(batch, rows * columns, width)

    cls_position, patch_positions = self._positions(rows, columns)
    cls_token = self._token("cls_token", 1) + cls_position
    prefix = [cls_token]
    if config.num_registers:
      prefix.append(self._token("register_tokens", config.num_registers))
    prefix = jnp.concatenate(prefix, axis=1).astype(self.dtype)
    prefix = jnp.broadcast_to(prefix, (batch, *prefix.shape[1:]))
    patches = patches + patch_positions.astype(self.dtype)
    tokens = jnp.concatenate([prefix, patches], axis=1)

    tokens = layers.BlockStack(
      config.block,
      config.depth,
      remat=self.remat,
      unroll=self.unroll,
      dtype=self.dtype,
      name="blocks",
    )(tokens, taps)
    if taps:
      skip = prefix.shape[1]
      return tuple(x[:, skip:].astype(layers.wide(self.dtype)) for x in tokens)
    # The norm acts on each token alone: drop CLS and registers before it.
    patches = tokens[:, prefix.shape[1] :]
    patches = layers.LayerNorm(
      epsilon=config.layer_norm_eps,
      affine=self.final_norm == "affine",
      dtype=layers.wide(self.dtype),
      name="norm",
    )(patches)
    return patches.reshape(batch, rows, columns, width)

  def _token(self, name: str, count: int) -> jax.Array:
    # Not zeros: equal registers get equal gradients and stay equal for ever.
    init = nn.initializers.truncated_normal(0.02)
    return self.param(name, init, (1, count, self.config.width))

  def _positions(self, rows: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """Position embeddings (1, 1, D) of CLS, (1, rows·columns, D) of patches."""
    grid = self.config.grid
    positions = self._token("pos_embed", 1 + grid * grid)
    cls_position, patch_positions = positions[:, :1], positions[:, 1:]
    if (rows, columns) != (grid, grid):
      square = patch_positions.reshape(1, grid, grid, -1)
      square = resize.resize_bicubic(
        square, (rows, columns), antialias=self.config.antialias
      )
      patch_positions = square.reshape(1, rows * columns, -1)
    return cls_position, patch_positions
