"""CLIP's text encoder: token ids to features, and one embedding a caption.

Contract: tokens (B, L) int32 → features (B, L, D) of every token after the
final norm, and (B, P) of the caption: the feature of its end-of-text token,
projected to the space that images share. Parameters are float32; matrix
products run in `dtype`; norms, softmax and the projection run in float32 or
wider. The residual stream keeps `dtype`.

Architecture: Radford et al., arXiv 2103.00020, section 2.4: a causal pre-norm
transformer with learned positions. A caption's end comes before its padding, so
that padding changes nothing the caller reads.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from psvae_jax.models import layers
from psvae_jax.models.masked_attention import attend, causal_mask

Dtype = Any

# No model is near this; larger numbers in a config file overflow shapes.
_MAX_SIZE = 2**24
# What OpenAI's published configs say, though no vocabulary has its end there.
LEGACY_END = 2


@dataclasses.dataclass(frozen=True)
class ClipTextConfig:
  """Hyper-parameters, named as published configs name them.

  Attributes:
    vocab_size: rows of the token embedding.
    hidden_size: feature width D.
    intermediate_size: hidden width of the MLP.
    num_hidden_layers: number of blocks.
    num_attention_heads: attention heads; divides `hidden_size`.
    max_position_embeddings: longest sequence, start and end included.
    hidden_act: a key of `layers.ACTIVATIONS`.
    layer_norm_eps: epsilon of every LayerNorm.
    eos_token_id: the end-of-text token; 2 says that it is the highest id.
    projection_dim: width P of a caption's embedding; None leaves the
      projection out.
  """

  vocab_size: int = 49408
  hidden_size: int = 512
  intermediate_size: int = 2048
  num_hidden_layers: int = 12
  num_attention_heads: int = 8
  max_position_embeddings: int = 77
  hidden_act: str = "quick_gelu"
  layer_norm_eps: float = 1e-5
  eos_token_id: int = 49407
  projection_dim: int | None = 512

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      least = 0 if field.name == "eos_token_id" else 1
      if type(value) is int and not least <= value <= _MAX_SIZE:
        raise ValueError(
          f"{field.name} {value} is not in [{least}, {_MAX_SIZE}]"
        )
    if self.hidden_size % self.num_attention_heads:
      raise ValueError(
        f"hidden_size {self.hidden_size} is not a multiple of "
        f"num_attention_heads {self.num_attention_heads}"
      )
    if self.hidden_act not in layers.ACTIVATIONS:
      raise ValueError(
        f"unknown hidden_act {self.hidden_act!r}; known: "
        f"{', '.join(layers.ACTIVATIONS)}"
      )

  @property
  def block(self) -> layers.BlockConfig:
    """The same hyper-parameters for one block."""
    return layers.BlockConfig(
      width=self.hidden_size,
      num_heads=self.num_attention_heads,
      mlp_hidden=self.intermediate_size,
      activation=self.hidden_act,
      layerscale_init=None,
      layer_norm_eps=self.layer_norm_eps,
    )


def end_positions(tokens: jax.Array, eos_token_id: int) -> jax.Array:
  """Where captions end: (B, L) token ids → (B,) places.

  The first end-of-text token, as padding may be the same token. A sequence
  without one gives 0. Under the rule of older configs (`LEGACY_END`), the first
  of the highest ids.
  """
  if eos_token_id != LEGACY_END:
    tokens = tokens == eos_token_id
  return jnp.argmax(tokens, axis=1)


class CausalAttention(nn.Module):
  """Self-attention to oneself and what came before: (B, L, D) → (B, L, D)."""

  config: layers.BlockConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    batch, length, width = x.shape
    heads = self.config.num_heads

    # Plain Dense + reshape: DenseGeneral cannot be constrained under a mesh.
    def project(name):
      y = nn.Dense(width, dtype=self.dtype, name=name)(x)
      return y.reshape(batch, length, heads, width // heads)

    query, key, value = project("query"), project("key"), project("value")
    out = attend(query, key, value, mask).reshape(batch, length, width)
    return nn.Dense(width, dtype=self.dtype, name="out")(out)


class ClipTextBlock(nn.Module):
  """Pre-norm block: (B, L, D) and a mask of pairs → (B, L, D)."""

  config: layers.BlockConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    config = self.config

    def norm(name):
      return layers.LayerNorm(
        epsilon=config.layer_norm_eps, dtype=self.dtype, name=name
      )

    attention = CausalAttention(config, self.dtype, name="attention")
    x = x + attention(norm("norm1")(x), mask)
    mlp = layers.Mlp(config, self.dtype, name="mlp")
    return x + mlp(norm("norm2")(x))


class ClipTextBlockStack(nn.Module):
  """All blocks under one `nn.scan`: parameters lead with depth.

  Attributes are those of `layers.BlockStack`.
  """

  config: layers.BlockConfig
  depth: int
  remat: bool = False
  unroll: int = 1
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    def body(block, carry, mask):
      return block(carry, mask), None

    # prevent_cse only guards against CSE outside a scan; inside it costs time.
    if self.remat:
      body = nn.remat(body, prevent_cse=False)
    scan = nn.scan(
      body,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=self.depth,
      unroll=self.unroll,
    )
    block = ClipTextBlock(self.config, self.dtype, name="block")
    x, _ = scan(block, x.astype(self.dtype), mask)
    return x


class ClipText(nn.Module):
  """Tokens (B, L) → features (B, L, D) and embeddings (B, P).

  Attributes:
    config: the architecture.
    remat: recompute each block's activations in the backward pass.
    unroll: blocks per iteration of the compiled loop. It changes speed and
      compile time, never parameters or values.
    dtype: compute dtype.
  """

  config: ClipTextConfig
  remat: bool = False
  unroll: int = 1
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, tokens: jax.Array, mask: jax.Array | None = None
  ) -> tuple[jax.Array, jax.Array]:
    """Encodes captions.

    Args:
      tokens: (B, L) integers, L at most `max_position_embeddings`.
      mask: (B, L) bool, True where a token is not padding; what is not is not
        looked at. Padding after a caption's end needs none.

    Returns:
      Features (B, L, D) and embeddings (B, P), or (B, D) without a
      projection; float32 or wider. Embeddings are not of unit length.

    Raises:
      ValueError: a wrong shape, or too many tokens.
    """
    config, dtype = self.config, layers.wide(self.dtype)
    longest, width = config.max_position_embeddings, config.hidden_size
    if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= longest:
      raise ValueError(
        f"tokens must be (batch, length) with a length of 1 to {longest}, got "
        f"{tokens.shape}"
      )
    if mask is not None and mask.shape != tokens.shape:
      raise ValueError(
        f"mask must be as the tokens, {tokens.shape}, got {mask.shape}"
      )
    length = tokens.shape[1]
    init = nn.initializers.normal(0.02)
    embed = nn.Embed(
      config.vocab_size, width, embedding_init=init, name="embed"
    )
    positions = self.param("pos_embed", init, (longest, width))
    pairs = causal_mask(length)
    if mask is not None:
      pairs = pairs & mask.astype(bool)[:, None, None]
    x = ClipTextBlockStack(
      config.block,
      config.num_hidden_layers,
      self.remat,
      self.unroll,
      self.dtype,
      name="blocks",
    )(embed(tokens) + positions[:length], pairs)
    x = layers.LayerNorm(
      epsilon=config.layer_norm_eps, dtype=dtype, name="final_norm"
    )(x)
    ends = end_positions(tokens, config.eos_token_id)
    pooled = jnp.take_along_axis(x, ends[:, None, None], axis=1)[:, 0]
    if config.projection_dim is not None:
      pooled = nn.Dense(
        config.projection_dim, use_bias=False, dtype=dtype, name="projection"
      )(pooled)
    return x, pooled
