"""The diffusion transformer's block: what adaLN-zero adds to attention.

Contract: as `layers.py`. Norms, modulation and the rotation of queries and keys
run in float32 or wider, matrix products in `dtype`, the residual stream keeps
`dtype`.

A block reads its conditions through shift, scale and gate of both branches
(adaLN-zero, DiT, arXiv 2212.09748): all start at zero, and so does what a block
adds. RMS norms, normed queries and keys and SwiGLU are LightningDiT's.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax import sharding
from psvae_jax.models import layers, products, rotary

Dtype = Any

_EPSILON = 1e-6


def rms_norm(x: jax.Array) -> jax.Array:
  """x / rms(x) over the last axis, at least float32."""
  x = x.astype(layers.wide(x.dtype))
  mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(mean_square + _EPSILON)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
  """rms_norm(x) · (1 + scale) + shift, at least float32."""
  normed = rms_norm(x)
  return normed * (1 + scale.astype(normed.dtype)) + shift.astype(normed.dtype)


@dataclasses.dataclass(frozen=True)
class DiTBlockConfig:
  """Shape of one block.

  Attributes:
    width: token dimension D.
    num_heads: attention heads.
    mlp_hidden: hidden width of the SwiGLU.
    products: how Dense layers multiply, one of `products.KINDS`.
  """

  width: int
  num_heads: int
  mlp_hidden: int
  products: str = "native"

  def __post_init__(self):
    if self.width % self.num_heads:
      raise ValueError(
        f"width {self.width} is not a multiple of num_heads {self.num_heads}"
      )

  @property
  def head_dim(self) -> int:
    return self.width // self.num_heads


def block_config(
  width: int, num_heads: int, mlp_ratio: float, products: str = "native"
) -> DiTBlockConfig:
  """A block whose SwiGLU is about width · mlp_ratio wide.

  To the nearest multiple of 8, from 1024 on of 128: a TPU pads to that anyway.
  """
  hidden = width * mlp_ratio
  multiple = 8 if hidden < 1024 else 128
  hidden = max(1, round(hidden / multiple)) * multiple
  return DiTBlockConfig(width, num_heads, hidden, products)


class Modulation(nn.Module):
  """Condition → `count` vectors: (B, G, K) → `count` × (B, G, D), zero at init.

  The activation before the product is the caller's: blocks share its result.
  """

  count: int
  width: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, condition: jax.Array) -> list[jax.Array]:
    dense = nn.Dense(
      self.count * self.width,
      kernel_init=nn.initializers.zeros,
      dtype=self.dtype,
      name="dense",
    )
    # A split over the vectors' channels would not survive their separation.
    vectors = sharding.constrain_batch(dense(condition))
    return jnp.split(vectors, self.count, axis=-1)


class JointAttention(nn.Module):
  """Attention with normed, rotated queries and keys: (B, N, D) → (B, M, D).

  Attributes:
    config: the block's shape.
    first: queries start at this token, M = N − first.
    dtype: compute dtype.
  """

  config: DiTBlockConfig
  first: int = 0
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, angles: jax.Array, mask: jax.Array | None
  ) -> jax.Array:
    heads, head_dim = self.config.num_heads, self.config.head_dim

    # Plain Dense + reshape: DenseGeneral cannot be constrained under a mesh.
    def dense(tokens, name):
      layer = nn.Dense(
        self.config.width,
        dtype=self.dtype,
        dot_general=products.dot_general(self.config.products),
        name=name,
      )
      return layer(tokens)

    def project(tokens, name):
      projected = dense(tokens, name)
      return projected.reshape(*tokens.shape[:2], heads, head_dim)

    def normed(tokens, angles, name):
      scale = self.param(f"{name}_norm", nn.initializers.ones, (head_dim,))
      tokens = rms_norm(project(tokens, name))
      tokens = tokens * scale.astype(tokens.dtype)
      return rotary.rotate(tokens, angles).astype(self.dtype)

    query = normed(x[:, self.first :], angles[self.first :], "query")
    key = normed(x, angles, "key")
    out = layers.attend(query, key, project(x, "value"), mask)
    out = out.reshape(*out.shape[:2], self.config.width)
    return dense(out, "out")


class DiTBlock(nn.Module):
  """One modulated block: (B, N, D) → (B, N, D), or the noisy tokens alone.

  Attributes:
    config: the block's shape.
    clean: None where each token has a condition of its own. Otherwise there
      are two conditions: of the first `clean` tokens and of the others.
    noisy_only: return the tokens after the first `clean` alone; what nothing
      else reads is not computed.
    dtype: compute dtype.
  """

  config: DiTBlockConfig
  clean: int | None = None
  noisy_only: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    condition: jax.Array,
    angles: jax.Array,
    mask: jax.Array | None = None,
  ) -> jax.Array:
    """Runs the block.

    Args:
      x: (B, N, D) tokens.
      condition: (B, 2, K), or (B, N, K) with `clean` None, after its
        activation.
      angles: (N, d/2) of the rotary positions.
      mask: bool (B, N), False at tokens that nobody attends to.
    """
    config = self.config
    width = config.width
    modulation = Modulation(6, width, self.dtype, name="modulation")(condition)
    shift1, scale1, *rest = modulation
    shift1, scale1 = self._spread(shift1, x), self._spread(scale1, x)
    normed = modulate(x, shift1, scale1).astype(self.dtype)
    first = self.clean if self.noisy_only else 0
    attention = JointAttention(config, first, self.dtype, name="attention")
    branch = attention(normed, angles, mask)
    if self.noisy_only:
      x, rest = x[:, first:], [m[:, 1:] for m in rest]
    else:
      rest = [self._spread(m, x) for m in rest]
    gate1, shift2, scale2, gate2 = rest
    x = self._add(x, gate1, branch)
    normed = modulate(x, shift2, scale2).astype(self.dtype)
    mlp = layers.BlockConfig(
      width, config.num_heads, config.mlp_hidden, swiglu=True
    )
    dot_general = products.dot_general(config.products)
    branch = layers.Mlp(mlp, self.dtype, dot_general, name="mlp")(normed)
    return self._add(x, gate2, branch)

  def _spread(self, vectors: jax.Array, x: jax.Array) -> jax.Array:
    """Each token's modulation: (B, N, D), or a shape that broadcasts to it."""
    if self.clean is None:
      return vectors
    noisy = np.arange(x.shape[1])[:, None] >= self.clean
    return jnp.where(noisy, vectors[:, 1:], vectors[:, :1])

  def _add(self, x: jax.Array, gate: jax.Array, branch: jax.Array):
    """x + gate · branch, wide inside."""
    wide = layers.wide(self.dtype)
    added = x.astype(wide) + gate.astype(wide) * branch.astype(wide)
    return added.astype(self.dtype)
