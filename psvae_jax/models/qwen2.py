"""Qwen2.5's decoder: the block stack that PS-VAE's generator starts from.

Contract: embeddings (B, N, D), a boolean mask of pairs and positions in, the
final-normed residual stream (B, N, D) out. Blocks take mask and positions as
arguments, so that text may be causal and images bidirectional, see
`masked_attention.transfusion_mask`. Parameters are float32; matrix products
run in `dtype`; norms, rotation, logits and softmax run in float32 or wider. The
residual stream keeps `dtype`.

Architecture: Qwen2 (arXiv 2407.10671) and Qwen2.5 (arXiv 2412.15115): pre-norm
with RMS norms, grouped-query attention with biases on query, key and value
only, rotary positions (arXiv 2104.09864) and SwiGLU.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.models.layers import wide
from psvae_jax.models.masked_attention import attend, causal_mask

Dtype = Any
# cos and sin of every token's angles, (B or 1, N, 1, d/2) each.
Rotation = tuple[jax.Array, jax.Array]

# No model is near this; larger numbers in a config file overflow shapes.
_MAX_SIZE = 2**24
_INIT = nn.initializers.normal(0.02)


@dataclasses.dataclass(frozen=True)
class Qwen2Config:
  """Hyper-parameters, named as published configs name them.

  Attributes:
    vocab_size: rows of the token embedding.
    hidden_size: token dimension D.
    intermediate_size: hidden width of the SwiGLU.
    num_hidden_layers: number of blocks.
    num_attention_heads: heads of the query; divides `hidden_size`.
    num_key_value_heads: heads of key and value; divides the former.
    rope_theta: ratio of the fastest to the slowest rotation, about.
    rms_norm_eps: epsilon of every RMS norm.
  """

  vocab_size: int
  hidden_size: int
  intermediate_size: int
  num_hidden_layers: int
  num_attention_heads: int
  num_key_value_heads: int
  rope_theta: float = 1e6
  rms_norm_eps: float = 1e-6

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if field.type is int and not 1 <= value <= _MAX_SIZE:
        raise ValueError(f"{field.name} {value} is not in [1, {_MAX_SIZE}]")
    if not (math.isfinite(self.rope_theta) and self.rope_theta > 0):
      raise ValueError(f"rope_theta {self.rope_theta} is not positive")
    if self.hidden_size % (2 * self.num_attention_heads):
      raise ValueError(
        f"hidden_size {self.hidden_size} does not split into "
        f"{self.num_attention_heads} heads of an even width"
      )
    if self.num_attention_heads % self.num_key_value_heads:
      raise ValueError(
        f"num_attention_heads {self.num_attention_heads} is not a multiple of "
        f"num_key_value_heads {self.num_key_value_heads}"
      )

  @property
  def head_dim(self) -> int:
    """Width of one attention head d."""
    return self.hidden_size // self.num_attention_heads


def rotation(
  positions: jax.Array, head_dim: int, theta: float, dtype: Dtype
) -> Rotation:
  """cos and sin of rotary angles, position · theta^(−2i/d).

  Args:
    positions: (B or 1, N) integers.
    head_dim: d.
    theta: base of the frequencies.
    dtype: of angles and result; float32 or wider.

  Returns:
    Two arrays (B or 1, N, 1, d/2).
  """
  frequencies = theta ** (-np.arange(0, head_dim, 2) / head_dim)
  angles = positions[..., None, None].astype(dtype)
  angles = angles * jnp.asarray(frequencies, dtype)
  return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, by: Rotation) -> jax.Array:
  """Turns channels (i, i + d/2) of (B, N, H, d); at least float32."""
  cos, sin = by
  first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )


class RmsNorm(nn.Module):
  """x / rms(x) · scale over the last axis, computed wide."""

  epsilon: float
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    x = x.astype(wide(x.dtype))
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(mean_square + self.epsilon)
    return (x * scale.astype(x.dtype)).astype(self.dtype)


class Qwen2Attention(nn.Module):
  """Grouped-query self-attention: (B, N, D) → (B, N, D)."""

  config: Qwen2Config
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array, by: Rotation) -> jax.Array:
    config = self.config
    batch, length, width = x.shape

    # Plain Dense + reshape: DenseGeneral cannot be constrained under a mesh.
    def project(name, heads):
      features = heads * config.head_dim
      dense = nn.Dense(features, kernel_init=_INIT, dtype=self.dtype, name=name)
      return dense(x).reshape(batch, length, heads, config.head_dim)

    query = project("query", config.num_attention_heads)
    key = project("key", config.num_key_value_heads)
    value = project("value", config.num_key_value_heads)
    query = rotate(query, by).astype(self.dtype)
    key = rotate(key, by).astype(self.dtype)
    out = attend(query, key, value, mask).reshape(batch, length, width)
    return _dense(width, self.dtype, "out")(out)


class Qwen2Mlp(nn.Module):
  """SwiGLU without biases: (B, N, D) → (B, N, D)."""

  config: Qwen2Config
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    hidden = self.config.intermediate_size
    gate = nn.silu(_dense(hidden, self.dtype, "gate")(x))
    up = _dense(hidden, self.dtype, "fc1")(x)
    return _dense(x.shape[-1], self.dtype, "fc2")(gate * up)


class Qwen2Block(nn.Module):
  """Pre-norm block; x (B, N, D), mask (B or 1, 1, N, N), see `rotation`."""

  config: Qwen2Config
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array, by: Rotation) -> jax.Array:
    config = self.config

    def norm(name):
      return RmsNorm(config.rms_norm_eps, self.dtype, name=name)

    attention = Qwen2Attention(config, self.dtype, name="attention")
    x = x + attention(norm("norm1")(x), mask, by)
    mlp = Qwen2Mlp(config, self.dtype, name="mlp")
    return x + mlp(norm("norm2")(x))


class Qwen2BlockStack(nn.Module):
  """All blocks under one `nn.scan`: parameters lead with depth.

  Attributes are those of `layers.BlockStack`; depth is in `config`.
  """

  config: Qwen2Config
  remat: bool = False
  unroll: int = 1
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, mask: jax.Array, positions: jax.Array
  ) -> jax.Array:
    """Runs the blocks.

    Args:
      x: (B, N, D).
      mask: (B or 1, 1, N, N) bool, True where a query may see a key.
      positions: (B or 1, N) integers.

    Returns:
      (B, N, D) in `dtype`, before any final norm.
    """
    config = self.config

    def body(block, carry, mask, by):
      return block(carry, mask, by), None

    # prevent_cse only guards against CSE outside a scan; inside it costs time.
    if self.remat:
      body = nn.remat(body, prevent_cse=False)
    scan = nn.scan(
      body,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, nn.broadcast),
      length=config.num_hidden_layers,
      unroll=self.unroll,
    )
    by = rotation(
      positions, config.head_dim, config.rope_theta, wide(self.dtype)
    )
    block = Qwen2Block(config, self.dtype, name="block")
    x, _ = scan(block, x.astype(self.dtype), mask, by)
    return x


class Qwen2(nn.Module):
  """Embeddings (B, N, D) → final-normed features (B, N, D).

  Attributes:
    config: the architecture.
    token_embedding: whether there is a table for `embed_tokens`; without one
      the caller brings all embeddings.
    remat: recompute each block's activations in the backward pass.
    unroll: blocks per iteration of the compiled loop. It changes speed and
      compile time, never parameters or values.
    dtype: compute dtype of matrix products and of the residual stream.
  """

  config: Qwen2Config
  token_embedding: bool = False
  remat: bool = False
  unroll: int = 1
  dtype: Dtype = jnp.float32

  def setup(self):
    config = self.config
    if self.token_embedding:
      self.embed = nn.Embed(
        config.vocab_size,
        config.hidden_size,
        embedding_init=_INIT,
        dtype=self.dtype,
      )
    self.blocks = Qwen2BlockStack(config, self.remat, self.unroll, self.dtype)
    self.final_norm = RmsNorm(config.rms_norm_eps, wide(self.dtype))

  def __call__(
    self,
    embeddings: jax.Array,
    mask: jax.Array | None = None,
    positions: jax.Array | None = None,
  ) -> jax.Array:
    """Computes features.

    Args:
      embeddings: (B, N, D), of tokens or anything else.
      mask: (B or 1, 1, N, N) bool, True where a query may see a key; None is
        causal.
      positions: (B or 1, N) integers; None is 0, 1, …, N − 1.

    Returns:
      (B, N, D), float32 or wider.

    Raises:
      ValueError: a wrong shape or dtype; an additive mask is none.
    """
    _check(embeddings, mask, positions, self.config.hidden_size)
    length = embeddings.shape[1]
    if self.token_embedding and self.is_initializing():
      self.embed(jnp.zeros((1, 1), jnp.int32))  # or it would have no table
    if mask is None:
      mask = causal_mask(length)
    if positions is None:
      positions = jnp.arange(length)[None]
    return self.final_norm(self.blocks(embeddings, mask, positions))

  def embed_tokens(self, tokens: jax.Array) -> jax.Array:
    """Token ids (B, N) → embeddings (B, N, D) in `dtype`.

    For `module.apply(variables, tokens, method="embed_tokens")`.

    Raises:
      ValueError: the module was built without `token_embedding`.
    """
    if not self.token_embedding:
      raise ValueError(
        "this backbone has no token_embedding; build it with one"
      )
    return self.embed(tokens)


def _dense(features: int, dtype: Dtype, name: str) -> nn.Dense:
  return nn.Dense(
    features, use_bias=False, kernel_init=_INIT, dtype=dtype, name=name
  )


def _check(
  embeddings: jax.Array,
  mask: jax.Array | None,
  positions: jax.Array | None,
  width: int,
) -> None:
  if embeddings.ndim != 3 or embeddings.shape[2] != width:
    raise ValueError(
      f"embeddings must be (batch, length, {width}), got {embeddings.shape}"
    )
  batch, length, _ = embeddings.shape
  shapes = [(n, 1, length, length) for n in (batch, 1)]
  if mask is not None and (mask.shape not in shapes or mask.dtype != bool):
    raise ValueError(
      f"mask must be boolean, {shapes[0]} or {shapes[1]}, got {mask.dtype} "
      f"{mask.shape}"
    )
  shapes = [(n, length) for n in (batch, 1)]
  if positions is not None and (
    positions.shape not in shapes
    or not jnp.issubdtype(positions.dtype, jnp.integer)
  ):
    raise ValueError(
      f"positions must be integers, {shapes[0]} or {shapes[1]}, got "
      f"{positions.dtype} {positions.shape}"
    )
