"""Vision transformer of published encoders: images to patch features.

Sequence: [CLS + position, registers (no position), patches + position], as in
DINOv2 with registers (arXiv 2304.07193, 2309.16588). Families differ by fields
of `ViTConfig`: SigLIP has no CLS, DINOv3 turns queries and keys in place of
adding positions, CLIP norms its tokens before the first block. Patch tokens
leave the module, or CLS.
"""

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from psvae_jax.models import layers, resize

# No model is near this; larger numbers in a config file overflow shapes.
_MAX_SIZE = 2**24
_MAX_REGISTERS = 2**10
# Rotary angles are made on the host: of every token, half as many as these.
_MAX_ROTARY_WIDTH = 2**12

FinalNorm = Literal["affine", "affine_free"]
Output = Literal["patches", "cls"]
Positions = Literal["learned", "fixed", "rotary"]

_POSITIONS = ("learned", "fixed", "rotary")


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
    mlp_ratio: hidden width of the MLP over `width`, of which a gated one keeps
      two thirds; unused where `mlp_hidden` says it outright.
    num_registers: register tokens.
    swiglu: SwiGLU in place of the MLP (DINOv2-giant).
    activation: a key of `layers.ACTIVATIONS`, for the plain MLP.
    layer_norm_eps: epsilon of every LayerNorm.
    qkv_bias: whether query, key and value projections have a bias.
    layerscale_init: initial LayerScale value; None leaves LayerScale out.
    position_antialias: whether position embeddings are resized with an
      antialiasing filter. None means as published: with registers yes,
      without no. The two differ by far more than rounding.
    mlp_hidden: hidden width of the MLP, gated or not; None takes `mlp_ratio`.
    cls_token: whether a CLS token stands before all others.
    positions: "learned" embeddings; "fixed" ones, parameters that start as
      MAE's sin-cos code and get no gradient; or "rotary", in every block's
      attention and without parameters (DINOv3).
    rotary_base: base of the rotary positions' frequencies.
    key_bias: whether the key projection has a bias, where the others have.
    patch_bias: whether the patch embedding has a bias.
    pre_norm: a LayerNorm before the first block (CLIP).
  """

  width: int
  depth: int
  num_heads: int
  patch_size: int
  image_size: int
  mlp_ratio: float = 4.0
  num_registers: int = 0
  swiglu: bool = False
  activation: str = "gelu"
  layer_norm_eps: float = 1e-6
  qkv_bias: bool = True
  layerscale_init: float | None = 1.0
  position_antialias: bool | None = None
  mlp_hidden: int | None = None
  cls_token: bool = True
  positions: Positions = "learned"
  rotary_base: float = 100.0
  key_bias: bool = True
  patch_bias: bool = True
  pre_norm: bool = False

  def __post_init__(self):
    sizes = {
      "width": self.width,
      "depth": self.depth,
      "num_heads": self.num_heads,
      "patch_size": self.patch_size,
      "image_size": self.image_size,
    }
    if self.mlp_hidden is not None:
      sizes["MLP hidden width"] = self.mlp_hidden
    for name, value in sizes.items():
      if not 1 <= value <= _MAX_SIZE:
        raise ValueError(f"{name} {value} is not in [1, {_MAX_SIZE}]")
    # Before it becomes an integer: infinity has none.
    if self.mlp_hidden is None and not (
      1 <= self.width * self.mlp_ratio <= _MAX_SIZE
    ):
      raise ValueError(
        f"mlp_ratio {self.mlp_ratio} makes an MLP hidden width that is not in "
        f"[1, {_MAX_SIZE}]"
      )
    if not 0 <= self.num_registers <= _MAX_REGISTERS:
      raise ValueError(
        f"num_registers {self.num_registers} is not in [0, {_MAX_REGISTERS}]"
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
    self._check_positions()

  def _check_positions(self):
    if self.positions not in _POSITIONS:
      raise ValueError(
        f"unknown positions {self.positions!r}; known: {', '.join(_POSITIONS)}"
      )
    head_dim = self.width // self.num_heads
    if self.positions == "rotary" and (
      head_dim % 4 or head_dim > _MAX_ROTARY_WIDTH
    ):
      raise ValueError(
        f"rotary positions need heads whose width is a multiple of 4, not "
        f"{head_dim} (width {self.width}, num_heads {self.num_heads}), and at "
        f"most {_MAX_ROTARY_WIDTH}"
      )
    if self.positions == "rotary" and not self.rotary_base > 1:
      raise ValueError(f"rotary_base {self.rotary_base} is not above 1")
    if self.positions == "fixed" and self.width % 4:
      raise ValueError(
        f"sin-cos positions need a width that is a multiple of 4, not "
        f"{self.width}"
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
    hidden = self.mlp_hidden
    if hidden is None:
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
      key_bias=self.key_bias,
      rotary_base=self.rotary_base if self.positions == "rotary" else None,
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
    output: "patches", or "cls" for the CLS token after the final norm. The
      parameters are the same. `taps` are patch tokens whatever it is.
  """

  config: ViTConfig
  final_norm: FinalNorm = "affine"
  remat: bool = False
  unroll: int = 1
  dtype: Any = jnp.float32
  taps: tuple[int, ...] = ()
  output: Output = "patches"

  @nn.compact
  def __call__(self, images: jax.Array) -> Any:
    """Computes patch features.

    Args:
      images: (B, H, W, 3) float32, already normalised by the encoder's mean
        and std. H and W are multiples of the patch size, and need not be the
        native size: position embeddings are resized to the image. A native
        size that is no multiple (SigLIP so400m/14 at 384) is taken as well:
        pixels right of and below the last whole patch are not looked at, as
        by the convolution that the patch embedding was published as.

    Returns:
      (B, H/p, W/p, D) float32: patch tokens after the final norm. With output
      "cls" (B, D) float32. With `taps` a tuple of (B, H/p · W/p, D) float32,
      as the blocks leave them.

    Raises:
      ValueError: bad image shape, `taps`, unknown `final_norm` or `output`, or
        the CLS token of a network that has none.
    """
    config = self.config
    self._check_options()
    rows, columns = self._grid(images.shape)
    patch = config.patch_size
    images = images[:, : rows * patch, : columns * patch]

    # A patch convolution is a matrix product; as one it is faster on a CPU.
    embed = nn.Dense(
      config.width,
      use_bias=config.patch_bias,
      dtype=self.dtype,
      name="patch_embed",
    )
    patches = embed(patchify(images, patch))
    batch, _, _, width = patches.shape
    patches = patches.reshape(batch, rows * columns, width)
    tokens, prefix = self._sequence(patches, rows, columns)
    if config.pre_norm:
      tokens = self._norm("pre_norm", self.dtype)(tokens)

    tokens = layers.BlockStack(
      config.block,
      config.depth,
      remat=self.remat,
      unroll=self.unroll,
      dtype=self.dtype,
      name="blocks",
    )(tokens, self.taps, config.block.angles(rows, columns, prefix))
    if self.taps:
      wide = layers.wide(self.dtype)
      return tuple(x[:, prefix:].astype(wide) for x in tokens)
    # The norm acts on each token alone: drop the others before it.
    tokens = tokens[:, 0] if self.output == "cls" else tokens[:, prefix:]
    affine = self.final_norm == "affine"
    tokens = self._norm("norm", layers.wide(self.dtype), affine)(tokens)
    if self.output == "cls":
      return tokens
    return tokens.reshape(batch, rows, columns, width)

  def _check_options(self):
    if self.final_norm not in ("affine", "affine_free"):
      raise ValueError(
        f'final_norm is "affine" or "affine_free", not {self.final_norm!r}'
      )
    taps, depth = self.taps, self.config.depth
    if list(taps) != sorted({tap for tap in taps if 0 <= tap < depth}):
      raise ValueError(f"taps {taps} must ascend within {depth} blocks")
    if self.output not in ("patches", "cls"):
      raise ValueError(f'output is "patches" or "cls", not {self.output!r}')
    if self.output == "cls" and not self.config.cls_token:
      raise ValueError(
        'output="cls" wants a CLS token, which this network has none of (as '
        "all of SigLIP); its patch tokens can be averaged"
      )

  def _grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of whole patches in images of `shape`."""
    patch, native = self.config.patch_size, self.config.image_size
    if len(shape) != 4 or shape[3] != 3:
      raise ValueError(f"images must be (B, H, W, 3), got {shape}")
    sides = shape[1:3]
    if any(side % patch and side != native for side in sides) or 0 in sides:
      raise ValueError(
        f"image size {shape[1]}x{shape[2]} is not a multiple "
        f"of the patch size {patch}; resize the images first"
      )
    return sides[0] // patch, sides[1] // patch

  def _norm(self, name: str, dtype: Any, affine: bool = True):
    return layers.LayerNorm(
      epsilon=self.config.layer_norm_eps,
      affine=affine,
      dtype=dtype,
      name=name,
    )

  def _sequence(
    self, patches: jax.Array, rows: int, columns: int
  ) -> tuple[jax.Array, int]:
    """All tokens, with positions, and how many stand before the patches."""
    config = self.config
    cls_position, patch_positions = self._positions(rows, columns)
    prefix = []
    if config.cls_token:
      cls_token = self._token("cls_token", 1)
      if cls_position is not None:
        cls_token = cls_token + cls_position
      prefix.append(cls_token)
    if config.num_registers:
      prefix.append(self._token("register_tokens", config.num_registers))
    if patch_positions is not None:
      patches = patches + patch_positions.astype(self.dtype)
    if not prefix:
      return patches, 0
    prefix = jnp.concatenate(prefix, axis=1).astype(self.dtype)
    count = prefix.shape[1]
    prefix = jnp.broadcast_to(prefix, (len(patches), *prefix.shape[1:]))
    return jnp.concatenate([prefix, patches], axis=1), count

  def _token(self, name: str, count: int) -> jax.Array:
    # Not zeros: equal registers get equal gradients and stay equal for ever.
    init = nn.initializers.truncated_normal(0.02)
    return self.param(name, init, (1, count, self.config.width))

  def _positions(
    self, rows: int, columns: int
  ) -> tuple[jax.Array | None, jax.Array | None]:
    """Position embeddings (1, 1, D) of CLS, (1, rows·columns, D) of patches.

    None where there are none to add.
    """
    config = self.config
    if config.positions == "rotary":
      return None, None
    grid = config.grid
    prefix = int(config.cls_token)
    if config.positions == "fixed":
      positions = self.param("pos_embed", lambda _: sincos_embedding(config))
      positions = jax.lax.stop_gradient(positions)
    else:
      positions = self._token("pos_embed", prefix + grid * grid)
    cls_position = positions[:, :1] if prefix else None
    patch_positions = positions[:, prefix:]
    if (rows, columns) != (grid, grid):
      square = patch_positions.reshape(1, grid, grid, -1)
      square = resize.resize_bicubic(
        square, (rows, columns), antialias=config.antialias
      )
      patch_positions = square.reshape(1, rows * columns, -1)
    return cls_position, patch_positions


def sincos_embedding(config: ViTConfig, numpy: Any = jnp) -> Any:
  """MAE's fixed position embeddings (1, CLS + grid², D) float32.

  One half of the channels codes the column, the other the row, in this order:
  the published weights hold it so (arXiv 2111.06377, its code). Each half is
  sines, then cosines of place × 10000^(−i / (D / 4)). CLS has zeros.

  Args:
    config: of the network.
    numpy: `jax.numpy`, of which nothing is computed where shapes alone are
      asked for; or `numpy`, for values that are the same on every device.
  """
  quarter = config.width // 4
  frequency = 10_000.0 ** (-numpy.arange(quarter, dtype=float) / quarter)
  angle = numpy.arange(config.grid, dtype=float)[:, None] * frequency
  code = numpy.concatenate([numpy.sin(angle), numpy.cos(angle)], axis=-1)
  shape = (config.grid, config.grid, config.width // 2)
  columns = numpy.broadcast_to(code[None], shape)
  rows = numpy.broadcast_to(code[:, None], shape)
  table = numpy.concatenate([columns, rows], axis=-1).astype(numpy.float32)
  table = table.reshape(1, config.grid**2, config.width)
  return numpy.pad(table, ((0, 0), (int(config.cls_token), 0), (0, 0)))
