"""T5 encoder: token ids to one feature vector per token.

Contract: tokens (B, L) int32 and mask (B, L) bool (True = a real token) →
features (B, L, D) in `dtype`, float32 or bfloat16. Features at padded positions
are finite and meaningless. Parameters are float32; matrix products run in
`dtype`; norms, softmax and the residual stream are float32 whatever `dtype`
is: T5's residual stream grows by orders of magnitude with depth, and what
later blocks add to it is lost in bfloat16's 8 bits.

Architecture: Raffel et al., arXiv 1910.10683 (v1.0: ReLU) and its v1.1 update
(gated GELU). What differs from the vision block in `layers.py`: RMS norms, no
biases, no 1/sqrt(d_kv) in the attention (initialisation absorbs it), and a
learned bias by relative distance that all layers share.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.models import layers

Dtype = Any


@dataclasses.dataclass(frozen=True)
class T5Config:
  """Hyper-parameters of a T5 encoder, named as published configs name them.

  Attributes:
    vocab_size: rows of the token embedding.
    d_model: feature width D.
    d_kv: width of one attention head; `num_heads · d_kv` need not be D.
    d_ff: width of the feed-forward's hidden layer.
    num_layers: number of blocks.
    num_heads: attention heads.
    relative_attention_num_buckets: rows of the relative position bias.
    relative_attention_max_distance: all distances from here on share a bucket.
    feed_forward_proj: activation of the feed-forward, "gated-" in front when
      a second projection multiplies it: "relu" (v1.0), "gated-gelu" (v1.1).
    layer_norm_eps: epsilon of every RMS norm.
  """

  vocab_size: int = 32128
  d_model: int = 512
  d_kv: int = 64
  d_ff: int = 2048
  num_layers: int = 6
  num_heads: int = 8
  relative_attention_num_buckets: int = 32
  relative_attention_max_distance: int = 128
  feed_forward_proj: str = "relu"
  layer_norm_eps: float = 1e-6

  def __post_init__(self):
    if self.activation not in layers.ACTIVATIONS:
      known = sorted(layers.ACTIVATIONS)
      raise ValueError(
        f"feed_forward_proj {self.feed_forward_proj!r} is not an activation, "
        f'or "gated-" and an activation, of {known}'
      )
    buckets = self.relative_attention_num_buckets
    if buckets % 4:
      # Two directions, and in each one half exact and one half logarithmic.
      raise ValueError(
        f"relative_attention_num_buckets {buckets} is not a multiple of 4"
      )
    if self.relative_attention_max_distance <= buckets // 4:
      raise ValueError(
        "relative_attention_max_distance "
        f"{self.relative_attention_max_distance} does not exceed the "
        f"{buckets // 4} distances that have a bucket of their own"
      )

  @property
  def gated(self) -> bool:
    """Whether a second projection multiplies the activation."""
    return self.feed_forward_proj.startswith("gated-")

  @property
  def activation(self) -> str:
    """The feed-forward's activation, a key of `layers.ACTIVATIONS`."""
    # The published v1.1 configs say "gated-gelu" and mean the tanh form.
    if self.feed_forward_proj == "gated-gelu":
      return "gelu_new"
    return self.feed_forward_proj.removeprefix("gated-")


def relative_position_buckets(
  length: int, num_buckets: int, max_distance: int
) -> np.ndarray:
  """Bucket of every (query, key) pair, both directions (arXiv 1910.10683 §2.1).

  Half of the buckets serve keys after the query. Within a direction the first
  half are exact distances and the rest widen logarithmically up to
  `max_distance`, where the last bucket takes everything.

  Args:
    length: sequence length L.
    num_buckets: rows of the bias table.
    max_distance: first distance that falls in the last bucket in any case.

  Returns:
    (L, L) int32 in [0, num_buckets), indexed [query, key].
  """
  positions = np.arange(length)
  offset = positions[None, :] - positions[:, None]
  side = num_buckets // 2
  exact = side // 2
  # float32 throughout, and in this order: the published models were trained
  # with it, and float64 puts distances on a bucket's edge one bucket away.
  ratio = np.maximum(np.abs(offset), 1).astype(np.float32) / np.float32(exact)
  widening = np.log(ratio) / np.float32(math.log(max_distance / exact))
  logarithmic = exact + (widening * np.float32(side - exact)).astype(np.int32)
  distance = np.abs(offset)
  bucket = np.where(
    distance < exact, distance, np.minimum(logarithmic, side - 1)
  )
  return (bucket + side * (offset > 0)).astype(np.int32)


class RmsNorm(nn.Module):
  """x / rms(x) · scale over the last axis, in float32, returned in `dtype`."""

  epsilon: float = 1e-6
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(mean_square + self.epsilon)
    return (x * scale.astype(jnp.float32)).astype(self.dtype)


def _dense(
  features: int, fan: int, dtype: Dtype, name: str, **options
) -> nn.Dense:
  """A bias-free Dense initialised as T5 is: normal with std 1/sqrt(fan)."""
  init = nn.initializers.normal(1 / math.sqrt(fan))
  return nn.Dense(
    features,
    use_bias=False,
    kernel_init=init,
    dtype=dtype,
    name=name,
    **options,
  )


# For the layers that write to the residual stream: the product's float32
# accumulator is added to it without a detour through `dtype`.
_float32_output = functools.partial(
  jax.lax.dot_general, preferred_element_type=jnp.float32
)


class T5Attention(nn.Module):
  """Self-attention with additive bias: (B, L, D) → float32 (B, L, D)."""

  config: T5Config
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, bias: jax.Array, mask: jax.Array
  ) -> jax.Array:
    config = self.config
    batch, length, width = x.shape
    inner = config.num_heads * config.d_kv
    heads = (batch, length, config.num_heads, config.d_kv)

    def project(name, fan):
      return _dense(inner, fan, self.dtype, name)(x).reshape(heads)

    # T5 folds 1/sqrt(d_kv) into the query's initialisation.
    query = project("query", width * config.d_kv)
    key, value = project("key", width), project("value", width)
    out = jax.nn.dot_product_attention(
      query, key, value, bias=bias, mask=mask, scale=1.0
    )
    out = out.reshape(batch, length, inner)
    return _dense(width, inner, self.dtype, "out", dot_general=_float32_output)(
      out
    )


class T5FeedForward(nn.Module):
  """Dense → activation [· Dense] → Dense: (B, L, D) → float32 (B, L, D)."""

  config: T5Config
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = self.config
    width = x.shape[-1]
    activation = layers.ACTIVATIONS[config.activation]
    hidden = _dense(config.d_ff, width, self.dtype, "fc1")(x)
    if config.gated:
      gate = _dense(config.d_ff, width, self.dtype, "gate")(x)
      hidden = activation(gate) * hidden
    else:
      hidden = activation(hidden)
    return _dense(
      width, config.d_ff, self.dtype, "fc2", dot_general=_float32_output
    )(hidden)


class T5Block(nn.Module):
  """Pre-norm block; the residual stream x is float32 (B, L, D)."""

  config: T5Config
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, bias: jax.Array, mask: jax.Array
  ) -> jax.Array:
    config = self.config

    def norm(name):
      return RmsNorm(config.layer_norm_eps, self.dtype, name=name)

    attention = T5Attention(config, self.dtype, name="attention")
    x = x + attention(norm("norm1")(x), bias, mask)
    mlp = T5FeedForward(config, self.dtype, name="mlp")
    return x + mlp(norm("norm2")(x))


class T5BlockStack(nn.Module):
  """`num_layers` blocks under one `nn.scan`: parameters lead with depth.

  Attributes are those of `layers.BlockStack`; depth is in `config`.
  """

  config: T5Config
  remat: bool = False
  unroll: int = 1
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, bias: jax.Array, mask: jax.Array
  ) -> jax.Array:
    def body(block, carry, bias, mask):
      return block(carry, bias, mask), None

    # prevent_cse only guards against CSE outside a scan; inside it costs time.
    if self.remat:
      body = nn.remat(body, prevent_cse=False)
    scan = nn.scan(
      body,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      in_axes=(nn.broadcast, nn.broadcast),
      length=self.config.num_layers,
      unroll=self.unroll,
    )
    block = T5Block(self.config, self.dtype, name="block")
    x, _ = scan(block, x, bias, mask)
    return x


class T5Encoder(nn.Module):
  """T5 encoder: tokens and mask (B, L) → features (B, L, D).

  Attributes:
    config: the architecture.
    remat: recompute each block's activations in the backward pass.
    unroll: blocks per iteration of the compiled loop. It changes speed and
      compile time, never parameters or values.
    dtype: compute dtype, and that of the features.
  """

  config: T5Config
  remat: bool = False
  unroll: int = 1
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    config = self.config
    if tokens.ndim != 2 or mask.shape != tokens.shape:
      raise ValueError(
        "tokens and mask must both be (batch, length), not "
        f"{tokens.shape} and {mask.shape}"
      )
    embed = nn.Embed(
      config.vocab_size,
      config.d_model,
      embedding_init=nn.initializers.normal(1.0),
      dtype=jnp.float32,
      name="embed",
    )
    blocks = T5BlockStack(
      config, self.remat, self.unroll, self.dtype, name="blocks"
    )
    x = blocks(
      embed(tokens),
      self._position_bias(tokens.shape[1]),
      mask.astype(bool)[:, None, None, :],
    )
    return RmsNorm(config.layer_norm_eps, self.dtype, name="final_norm")(x)

  def _position_bias(self, length: int) -> jax.Array:
    """The attention bias all layers share: float32 (1, heads, L, L)."""
    config = self.config
    buckets = relative_position_buckets(
      length,
      config.relative_attention_num_buckets,
      config.relative_attention_max_distance,
    )
    table = nn.Embed(
      config.relative_attention_num_buckets,
      config.num_heads,
      embedding_init=nn.initializers.normal(1 / math.sqrt(config.d_model)),
      dtype=jnp.float32,
      name="relative_bias",
    )
    return jnp.transpose(table(buckets), (2, 0, 1))[None]
