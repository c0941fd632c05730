"""SemanticEncoder and SemanticDecoder: features ↔ compact latent.

Paper section 3.3: "3 Transformer blocks inherited from the representation
encoder + MLP projection" to a diagonal Gaussian, and the mirror image back.
The text does not say whether "inherited" means the block's architecture or
also its weights; both are served: the modules take the encoder's own
`BlockConfig`, and `last_blocks` cuts initial weights from its parameters.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from psvae_jax.models import layers
from psvae_jax.models.latent import DiagonalGaussian, sincos_positions

FINAL_NORMS = ("affine", "affine_free")


class SemanticEncoder(nn.Module):
  """Patch tokens (B, h, w, D) → posterior over latents (B, h, w, C).

  No position code is added: the encoder's tokens carry their positions. Where
  the encoder's blocks turn queries and keys by place (DINOv3), these do too.

  Attributes:
    block: the representation encoder's block; `block.width` is D.
    channels: latent channels C.
    mlp_hidden: hidden width of the projection MLP.
    depth: number of blocks.
    remat: recompute block activations in the backward pass.
    unroll: blocks per iteration of the compiled loop.
    dtype: compute dtype; the moments are always float32.
  """

  block: layers.BlockConfig
  channels: int
  mlp_hidden: int
  depth: int = 3
  remat: bool = False
  unroll: int = 1
  dtype: layers.Dtype = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array) -> DiagonalGaussian:
    batch, height, width, dim = tokens.shape
    if dim != self.block.width:
      raise ValueError(
        f"SemanticEncoder was built for tokens of width {self.block.width}, "
        f"got {tokens.shape}"
      )
    x = tokens.reshape(batch, height * width, dim)
    x = _blocks(self)(x, angles=self.block.angles(height, width))
    epsilon = self.block.layer_norm_eps
    x = layers.LayerNorm(epsilon=epsilon, dtype=self.dtype, name="norm")(x)
    x = nn.Dense(self.mlp_hidden, dtype=self.dtype, name="fc1")(x)
    x = nn.gelu(x, approximate=False)
    # float32: this product is small, and its output is the KL's argument.
    x = nn.Dense(2 * self.channels, dtype=layers.wide(self.dtype), name="fc2")(
      x
    )
    return DiagonalGaussian.from_moments(
      x.reshape(batch, height, width, 2 * self.channels)
    )


class SemanticDecoder(nn.Module):
  """Latents (B, h, w, C) → features f″ (B, h, w, D) float32.

  Sin-cos positions are added to the tokens, beside the rotary ones of an
  encoder whose blocks have them.

  Attributes:
    block: the representation encoder's block; `block.width` is D.
    mlp_hidden: hidden width of the projection MLP.
    depth: number of blocks.
    final_norm: "affine" or "affine_free"; the same as the target features'.
    remat: recompute block activations in the backward pass.
    unroll: blocks per iteration of the compiled loop.
    dtype: compute dtype; the final norm returns float32.
  """

  block: layers.BlockConfig
  mlp_hidden: int
  depth: int = 3
  final_norm: str = "affine"
  remat: bool = False
  unroll: int = 1
  dtype: layers.Dtype = jnp.float32

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    if self.final_norm not in FINAL_NORMS:
      raise ValueError(
        f"final_norm must be one of {FINAL_NORMS}, got {self.final_norm!r}"
      )
    batch, height, width, _ = z.shape
    dim = self.block.width
    x = nn.Dense(self.mlp_hidden, dtype=self.dtype, name="fc1")(z)
    x = nn.gelu(x, approximate=False)
    x = nn.Dense(dim, dtype=self.dtype, name="fc2")(x)
    x = x + sincos_positions(height, width, dim, self.dtype)
    x = x.reshape(batch, height * width, dim)
    x = _blocks(self)(x, angles=self.block.angles(height, width))
    x = layers.LayerNorm(
      epsilon=self.block.layer_norm_eps,
      affine=self.final_norm == "affine",
      dtype=layers.wide(self.dtype),
      name="norm",
    )(x)
    return x.reshape(batch, height, width, dim)


def last_blocks(blocks: Any, depth: int, expected: Any = None) -> Any:
  """Cuts the last `depth` blocks out of a stack's parameters.

  Args:
    blocks: the `blocks` entry of an encoder's parameters: every leaf leads
      with the encoder's depth.
    depth: blocks to keep, counted from the end.
    expected: the `blocks` entry that the result will replace (arrays or
      `jax.ShapeDtypeStruct`s). When given, a missing, extra or differently
      shaped parameter is an error that names it.

  Returns:
    A tree like `blocks` whose leaves lead with `depth`.

  Raises:
    ValueError: too few blocks, or a result that does not fit `expected`.
  """
  found = _by_path(blocks)
  lengths = {
    leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(blocks)
  }
  if len(lengths) != 1:
    raise ValueError(
      "stacked block parameters lead with one common depth, found leading "
      f"sizes {sorted(lengths)}"
    )
  (available,) = lengths
  if not 0 < depth <= available:
    raise ValueError(
      f"cannot take the last {depth} of an encoder's {available} blocks; "
      "choose a depth between 1 and that number"
    )
  if expected is not None:
    wanted = _by_path(expected)
    got = {path: (depth, *shape[1:]) for path, shape in found.items()}
    problems = [
      f"{path}: encoder {got.get(path, 'absent')}, "
      f"module {wanted.get(path, 'absent')}"
      for path in sorted(got.keys() | wanted.keys())
      if got.get(path) != wanted.get(path)
    ]
    if problems:
      raise ValueError(
        "the encoder's blocks do not fit the module they should initialise "
        "(build it with the encoder's own BlockConfig, or initialise it from "
        "scratch):\n  " + "\n  ".join(problems)
      )
  return jax.tree.map(lambda leaf: leaf[available - depth :], blocks)


def _blocks(module: nn.Module) -> layers.BlockStack:
  return layers.BlockStack(
    config=module.block,
    depth=module.depth,
    remat=module.remat,
    unroll=module.unroll,
    dtype=module.dtype,
    name="blocks",
  )


def _by_path(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
    for path, leaf in leaves
  }
