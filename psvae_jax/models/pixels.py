"""Pixel decoders: latents (B, h, w, C) → images (B, H, W, 3), float32.

Two architectures behind one call:

* `ConvPixelDecoder`, LDM's (arXiv 2112.10752), which the paper adopts.
* `ViTPixelDecoder`, RAE's kind (arXiv 2510.11690), with overlapping patches
  where RAE's are disjoint and leave seams.

The last layer is computed in float32, because bfloat16 resolves an image in
[−1, 1] only to half an 8-bit level. It is also where LDM's adaptive GAN weight
compares gradients: `last_layer` finds it in a tree of parameters or gradients.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.models import layers
from psvae_jax.models.conv_blocks import (
  NUM_GROUPS,
  AttentionBlock,
  ResBlock,
  conv3x3,
  group_norm,
  nearest_double,
)
from psvae_jax.models.latent import sincos_positions


class ConvPixelDecoder(nn.Module):
  """LDM's convolutional decoder.

  conv_in → res, attention, res → one level per entry of `channel_mult`, read
  from the last to the first: `num_res_blocks` + 1 res blocks, then (except in
  the last level) nearest ×2 and a convolution → norm, SiLU, conv_out. With the
  defaults and 96 latent channels that is 41.7 M parameters. There is no
  `post_quant_conv` in front: a 1×1 convolution merges into `conv_in` up to
  the border.

  Attributes:
    channels: width of the finest level.
    channel_mult: width multiplier of each level, finest first; the output is
      2^(levels−1) · `output_patch` times the latent's size.
    num_res_blocks: residual blocks of a level, less one.
    attention: single-head attention in the middle and after every res block
      of the coarsest level (LDM's `attn_resolutions: [16]` at 16×16 latents).
    output_patch: side of the pixel square that each position of `conv_out`
      predicts. 2 replaces LDM's costliest level by a depth-to-space.
    out_channels: image channels.
    remat: recompute res and attention blocks in the backward pass.
    dtype: compute dtype; norms, softmax and `conv_out` are float32.
    convolution: "native" or "matmul"; see `models.convolution`.
    attention_levels: levels, 0 the coarsest, with attention after every res
      block. None leaves it to `attention`, which says no more than the middle
      otherwise.
    num_groups: of every GroupNorm, or as many as divide.
  """

  channels: int = 128
  channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
  num_res_blocks: int = 2
  attention: bool = True
  output_patch: int = 1
  out_channels: int = 3
  remat: bool = False
  dtype: layers.Dtype = jnp.float32
  convolution: str = "native"
  attention_levels: tuple[int, ...] | None = None
  num_groups: int = NUM_GROUPS

  @property
  def last_layer_path(self) -> tuple[str, ...]:
    return ("conv_out", "kernel")

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    res_block = nn.remat(ResBlock) if self.remat else ResBlock
    attention = nn.remat(AttentionBlock) if self.remat else AttentionBlock
    widths = [self.channels * mult for mult in reversed(self.channel_mult)]
    how, groups = (self.dtype, self.convolution), self.num_groups
    attended = self.attention_levels
    if attended is None:
      attended = (0,) if self.attention else ()

    x = conv3x3(widths[0], *how, "conv_in")(z)
    x = res_block(widths[0], *how, groups, name="mid_res0")(x)
    if self.attention:
      x = attention(self.dtype, groups, name="mid_attention")(x)
    x = res_block(widths[0], *how, groups, name="mid_res1")(x)
    for level, width in enumerate(widths):
      for i in range(self.num_res_blocks + 1):
        x = res_block(width, *how, groups, name=f"up{level}_res{i}")(x)
        if level in attended:
          name = f"up{level}_attention{i}"
          x = attention(self.dtype, groups, name=name)(x)
      if level < len(widths) - 1:
        x = nearest_double(x)
        x = conv3x3(width, *how, f"up{level}_upsample")(x)
    x = nn.silu(group_norm(x, "norm_out", groups))
    outputs = self.output_patch**2 * self.out_channels
    wide = layers.wide(self.dtype)
    x = conv3x3(outputs, wide, self.convolution, "conv_out")(x)
    return _depth_to_space(x, self.output_patch)


class ViTPixelDecoder(nn.Module):
  """Transformer decoder with overlapping output patches.

  Dense → + fixed positions → blocks → LayerNorm → linear `head` to pixels.
  The grid h×w is read from the latent; a token owns a p×p square with
  p = `output_size` / h. It predicts (p + 2·overlap)² pixels, and neighbours
  are blended by overlap-add under windows that sum to one at every pixel: a
  transposed convolution with kernel p + 2·overlap and stride p, written as a
  matrix product and a static fold.

  Attributes:
    block: hyper-parameters of the blocks.
    depth: number of blocks.
    output_size: side of the square image, a multiple of the latent's side.
    overlap: pixels by which a patch reaches into its neighbours on each side;
      0 (RAE: disjoint patches) to p / 2.
    refine_channels: hidden channels of a residual pair of 3×3 convolutions at
      full resolution; 0 leaves it out.
    out_channels: image channels.
    remat: recompute block activations in the backward pass.
    unroll: blocks per iteration of the compiled loop.
    dtype: compute dtype; the last layer is float32.
    convolution: of the refinement, "native" or "matmul".
  """

  block: layers.BlockConfig
  depth: int
  output_size: int
  overlap: int = 0
  refine_channels: int = 0
  out_channels: int = 3
  remat: bool = False
  unroll: int = 1
  dtype: layers.Dtype = jnp.float32
  convolution: str = "native"

  @property
  def last_layer_path(self) -> tuple[str, ...]:
    return ("refine_out" if self.refine_channels else "head", "kernel")

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    batch, height, width, _ = z.shape
    if height != width or self.output_size % height:
      raise ValueError(
        f"output_size {self.output_size} must be a multiple of the side of "
        f"a square latent grid, got {height}x{width}"
      )
    patch = self.output_size // height
    reach = patch + 2 * self.overlap
    dim = self.block.width

    x = nn.Dense(dim, dtype=self.dtype, name="proj_in")(z)
    x = x + sincos_positions(height, width, dim, self.dtype)
    x = layers.BlockStack(
      config=self.block,
      depth=self.depth,
      remat=self.remat,
      unroll=self.unroll,
      dtype=self.dtype,
      name="blocks",
    )(x.reshape(batch, height * width, dim))
    epsilon, wide = self.block.layer_norm_eps, layers.wide(self.dtype)
    x = layers.LayerNorm(epsilon=epsilon, dtype=wide, name="norm")(x)
    outputs = reach * reach * self.out_channels
    x = nn.Dense(outputs, dtype=wide, name="head")(x)
    x = x.reshape(batch, height, width, reach, reach, self.out_channels)
    image = overlap_add(x, self.overlap)
    if not self.refine_channels:
      return image
    y = conv3x3(
      self.refine_channels, self.dtype, self.convolution, "refine_in"
    )(image)
    y = nn.gelu(y, approximate=False)
    return image + conv3x3(
      self.out_channels, wide, self.convolution, "refine_out"
    )(y)


def last_layer(
  decoder: ConvPixelDecoder | ViTPixelDecoder, params: Any
) -> jax.Array:
  """The decoder's last kernel, out of its parameters or their gradient."""
  for key in decoder.last_layer_path:
    params = params[key]
  return params


def overlap_add(patches: jax.Array, overlap: int) -> jax.Array:
  """Blends overlapping patches into images.

  Along each axis the weight of a patch is sin² rising over the 2·overlap
  pixels that it shares with a neighbour, cos² falling over those it shares
  with the next, and 1 between. Weights at a pixel sum to one, so patches cut
  out of an image give that image back. What reaches beyond the image's border
  is dropped.

  Args:
    patches: (B, h, w, k, k, C) with k = p + 2·overlap.
    overlap: 0 ≤ overlap ≤ p / 2.

  Returns:
    (B, h·p, w·p, C).
  """
  batch, height, width, reach, _, channels = patches.shape
  patch = reach - 2 * overlap
  if overlap < 0 or 2 * overlap > patch:
    raise ValueError(
      f"overlap must lie between 0 and half the patch's {patch} pixels, got "
      f"{overlap}"
    )
  if overlap:
    rows = _blend_weights(height, patch, overlap)[:, None, :, None, None]
    columns = _blend_weights(width, patch, overlap)[:, None, :, None]
    patches = patches * jnp.asarray(rows * columns, patches.dtype)
    patches = _fold(patches, 1, 3, patch, overlap)
    patches = _fold(patches, 2, 4, patch, overlap)
  image = patches.transpose(0, 1, 3, 2, 4, 5)
  return image.reshape(batch, height * patch, width * patch, channels)


def _blend_weights(cells: int, patch: int, overlap: int) -> np.ndarray:
  """1-D weights of every cell's pixels, (cells, patch + 2·overlap)."""
  ramp = np.sin(np.pi / 2 * (np.arange(2 * overlap) + 0.5) / (2 * overlap)) ** 2
  weights = np.ones((cells, patch + 2 * overlap))
  weights[1:, : 2 * overlap] = ramp
  weights[:-1, patch:] = ramp[::-1]
  return weights


def _fold(
  x: jax.Array, cell_axis: int, pixel_axis: int, patch: int, overlap: int
) -> jax.Array:
  """Adds each cell's overhanging pixels to its neighbours', along one axis."""

  def take(cells, pixels):
    index = [slice(None)] * x.ndim
    index[cell_axis], index[pixel_axis] = cells, pixels
    return x[tuple(index)]

  def place(part, cells, pixels):
    padding = [(0, 0)] * x.ndim
    padding[cell_axis], padding[pixel_axis] = cells, pixels
    return jnp.pad(part, padding)

  inside = take(slice(None), slice(overlap, overlap + patch))
  before = take(slice(1, None), slice(None, overlap))
  after = take(slice(None, -1), slice(overlap + patch, None))
  rest = patch - overlap
  return (
    inside + place(before, (0, 1), (rest, 0)) + place(after, (1, 0), (0, rest))
  )


def _depth_to_space(x: jax.Array, patch: int) -> jax.Array:
  if patch == 1:
    return x
  batch, height, width, features = x.shape
  channels = features // patch**2
  x = x.reshape(batch, height, width, patch, patch, channels)
  return overlap_add(x, 0)
