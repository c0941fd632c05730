"""Transformer blocks shared by every vision model of the project.

Contract: token arrays are (B, N, D). Parameters are float32; matrix products
run in `dtype`; norms and softmax run in float32 or wider, see `wide`. The
residual stream keeps `dtype`.

The block is DINOv2's: pre-norm, LayerScale on both branches, MLP or SwiGLU.
Models without LayerScale set `layerscale_init=None`. What else published vision
encoders do differently is a field of `BlockConfig`.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.models import rotary

Dtype = Any

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": functools.partial(nn.gelu, approximate=False),
  "gelu_new": functools.partial(nn.gelu, approximate=True),
  "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
  "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
  "relu": nn.relu,
  "relu2": lambda x: jnp.square(nn.relu(x)),
  "silu": nn.silu,
}


def wide(dtype: Dtype) -> Dtype:
  """`dtype`, but at least float32: for norms, losses and posteriors.

  float64 stays what it is, so that a run in double precision is one throughout.
  """
  return jnp.promote_types(dtype, jnp.float32)


@dataclasses.dataclass(frozen=True)
class BlockConfig:
  """Hyper-parameters of one transformer block.

  Attributes:
    width: token dimension D.
    num_heads: attention heads; divides `width`.
    mlp_hidden: width of the MLP's hidden layer.
    swiglu: gate the MLP (DINOv2-giant) in place of `activation`.
    activation: a key of `ACTIVATIONS`.
    qkv_bias: whether query, key and value projections have a bias.
    layerscale_init: initial LayerScale value; None leaves LayerScale out.
    layer_norm_eps: epsilon of every LayerNorm.
    key_bias: whether the key projection has a bias, where the others have.
    rotary_base: base of DINOv3's rotary positions, see `rotary.centre_angles`;
      None leaves them out. A stack is told the tokens' angles, see `angles`.
  """

  width: int
  num_heads: int
  mlp_hidden: int
  swiglu: bool = False
  activation: str = "gelu"
  qkv_bias: bool = True
  layerscale_init: float | None = 1.0
  layer_norm_eps: float = 1e-6
  key_bias: bool = True
  rotary_base: float | None = None

  def angles(
    self, rows: int, columns: int, prefix: int = 0
  ) -> np.ndarray | None:
    """Rotary angles of a grid's tokens, which stand after `prefix` others.

    Returns:
      (prefix + rows · columns, width / num_heads / 2) float64: what a stack of
      such blocks takes. None where blocks know no positions.

    Raises:
      ValueError: the heads' width is not a multiple of 4.
    """
    if self.rotary_base is None:
      return None
    grid = rotary.centre_angles(
      rows, columns, self.width // self.num_heads, self.rotary_base
    )
    return np.pad(grid, ((prefix, 0), (0, 0)))


class LayerNorm(nn.Module):
  """LayerNorm over the last axis, computed wide, returned in `dtype`."""

  epsilon: float = 1e-6
  affine: bool = True
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    norm = nn.LayerNorm(
      epsilon=self.epsilon,
      use_bias=self.affine,
      use_scale=self.affine,
      use_fast_variance=False,  # E[x²] − E[x]² cancels for large means
      dtype=wide(x.dtype),
      name="norm",
    )
    return norm(x.astype(wide(x.dtype))).astype(self.dtype)


def attend(
  query: jax.Array,
  key: jax.Array,
  value: jax.Array,
  mask: jax.Array | None = None,
) -> jax.Array:
  """Softmax attention, heads apart: three (B, N, H, d) → (B, N, H, d).

  Keys where `mask` (B, N) is False get no weight; each row has one that is
  True. Logits and softmax are wide. `jax.nn.dot_product_attention` fixes them
  at float32, which a run in float64 would not survive.
  """
  dtype = wide(query.dtype)
  scale = query.shape[-1] ** -0.5
  # Heads before tokens: each head's matrices lie in one piece, which
  # is a third faster on a CPU; compilers that choose layouts do not mind.
  query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
  logits = scale * jnp.einsum(
    "bhqd,bhkd->bhqk", query, key, preferred_element_type=dtype
  )
  if mask is not None:
    least = jnp.finfo(dtype).min
    logits = jnp.where(mask[:, None, None], logits, least)
  # Softmax with its division after the product, where there is d/N as much to
  # divide: a third of the time on a CPU. The largest weight is 1 before it.
  peak = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
  weights = jnp.exp(logits - peak)
  out = jnp.einsum(
    "bhqk,bhkd->bhqd",
    weights.astype(value.dtype),
    value,
    preferred_element_type=dtype,
  )
  out = (out / weights.sum(-1, keepdims=True)).astype(value.dtype)
  return jnp.swapaxes(out, 1, 2)


class Attention(nn.Module):
  """Multi-head self-attention: (B, N, D) → (B, N, D).

  `angles` (N, d/2) turn queries and keys, where the tokens have any.
  """

  config: BlockConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, angles: np.ndarray | None = None
  ) -> jax.Array:
    config = self.config
    if config.width % config.num_heads:
      raise ValueError(
        f"width {config.width} is not a multiple of num_heads "
        f"{config.num_heads}"
      )
    batch, length, width = x.shape
    heads = (batch, length, config.num_heads, width // config.num_heads)

    # Plain Dense + reshape: DenseGeneral cannot be constrained under a mesh.
    def project(name, bias):
      dense = nn.Dense(width, use_bias=bias, dtype=self.dtype, name=name)
      return dense(x).reshape(heads)

    bias = config.qkv_bias
    query = project("query", bias)
    key = project("key", bias and config.key_bias)
    value = project("value", bias)
    if angles is not None:
      query = rotary.rotate(query, angles).astype(self.dtype)
      key = rotary.rotate(key, angles).astype(self.dtype)
    out = attend(query, key, value)
    out = out.reshape(batch, length, width)
    return nn.Dense(width, dtype=self.dtype, name="out")(out)


class Mlp(nn.Module):
  """Dense → activation → Dense, or its SwiGLU form: (…, D) → (…, D).

  Attributes:
    config: the block's hyper-parameters.
    dtype: compute dtype.
    dot_general: of the Dense layers; None is JAX's.
  """

  config: BlockConfig
  dtype: Dtype = jnp.float32
  dot_general: Any = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = self.config

    def dense(x, width, name):
      layer = nn.Dense(
        width, dtype=self.dtype, dot_general=self.dot_general, name=name
      )
      return layer(x)

    hidden = dense(x, config.mlp_hidden, "fc1")
    if config.swiglu:
      hidden = nn.silu(dense(x, config.mlp_hidden, "gate")) * hidden
    else:
      hidden = ACTIVATIONS[config.activation](hidden)
    return dense(hidden, x.shape[-1], "fc2")


class LayerScale(nn.Module):
  """Learned per-channel gain of a residual branch."""

  init: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param(
      "scale", nn.initializers.constant(self.init), (x.shape[-1],)
    )
    return x * scale.astype(x.dtype)


class Block(nn.Module):
  """Pre-norm transformer block: (B, N, D) → (B, N, D)."""

  config: BlockConfig
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, x: jax.Array, angles: np.ndarray | None = None
  ) -> jax.Array:
    config = self.config

    def norm(name):
      return LayerNorm(
        epsilon=config.layer_norm_eps, dtype=self.dtype, name=name
      )

    def scale(branch, name):
      if config.layerscale_init is None:
        return branch
      return LayerScale(config.layerscale_init, name=name)(branch)

    attention = Attention(config, self.dtype, name="attention")
    x = x + scale(attention(norm("norm1")(x), angles), "scale1")
    mlp = Mlp(config, self.dtype, name="mlp")
    return x + scale(mlp(norm("norm2")(x)), "scale2")


class BlockStack(nn.Module):
  """`depth` equal blocks under one `nn.scan`: parameters lead with depth.

  Attributes:
    config: the block's hyper-parameters.
    depth: number of blocks.
    remat: recompute each block's activations in the backward pass.
    unroll: blocks per iteration of the compiled loop. It changes speed and
      compile time, never parameters or values.
    dtype: compute dtype.
  """

  config: BlockConfig
  depth: int
  remat: bool = False
  unroll: int = 1
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    taps: tuple[int, ...] = (),
    angles: np.ndarray | None = None,
  ) -> Any:
    """Runs the blocks.

    Args:
      x: (B, N, D) tokens.
      taps: ascending indices of blocks whose outputs are wanted.
      angles: (N, d/2) of the tokens' rotary positions: `config.angles(…)`.

    Returns:
      (B, N, D), the last block's output; with `taps` a tuple of theirs, and
      the blocks after the last of them do not run.
    """
    if taps and not self.is_initializing():
      return self._tapped(x, taps, angles)

    def body(block, carry):
      return block(carry, angles), None

    # prevent_cse only guards against CSE outside a scan; inside it costs time.
    if self.remat:
      body = nn.remat(body, prevent_cse=False)
    scan = nn.scan(
      body,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=self.depth,
      unroll=self.unroll,
    )
    block = Block(self.config, self.dtype, name="block")
    x, _ = scan(block, x.astype(self.dtype))
    return (x,) * len(taps) if taps else x

  def _tapped(
    self, x: jax.Array, taps: tuple[int, ...], angles: np.ndarray | None
  ) -> tuple:
    """Outputs of some blocks: one loop from each to the next.

    A single loop would write out the output of every block.
    """
    block = Block(self.config, self.dtype, parent=None)
    params = self.variables["params"]["block"]

    def body(x, params):
      return block.apply({"params": params}, x, angles), None

    if self.remat:
      body = jax.checkpoint(body, prevent_cse=False)
    outputs, start, x = [], 0, x.astype(self.dtype)
    for tap in taps:
      part = jax.tree.map(operator.itemgetter(slice(start, tap + 1)), params)
      x, _ = jax.lax.scan(body, x, part, unroll=self.unroll)
      outputs.append(x)
      start = tap + 1
    return tuple(outputs)
