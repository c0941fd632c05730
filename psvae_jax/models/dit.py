"""Diffusion transformer: one stream over source, text and noisy tokens.

    [source latents ; text or class ; noisy latents] ─► trunk ─► DDT head ─► v

Contract: `DiT` predicts the velocity v = ε − x0 of noisy latents x_t, t = 1
being noise (DESIGN section 3). Latents are (B, h, w, C), normalised per
channel; v is float32. Parameters are float32; see `dit_block` for the rest.

How it is conditioned:
* All tokens attend to each other, except that nobody attends to padded text
  or to a source that is left out: as if these were not there.
* Source and noisy tokens of a place share its rotary position and its fixed
  sin-cos code (both, as LightningDiT: attention sees offsets, and every token
  knows where it is), and differ by a type embedding. Text has learned positions
  and is not rotated.
* adaLN-zero reads time and pooled text (or the class). Source and text tokens
  are modulated at t = 0, which they are, noisy ones at t: two conditions an
  example, and not one a token.
* A wide and shallow head ("DDT", arXiv 2504.05741, at RAE's width and depth,
  arXiv 2510.11690) embeds the noisy latents anew, reads the trunk's noisy
  tokens through adaLN, and predicts v. Narrow trunks need it: they cannot carry
  noise of more channels than they are wide.

At initialisation all gates and the output are zero: v = 0.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.config import DiTConfig
from psvae_jax.models import rotary
from psvae_jax.models.dit_block import (
  DiTBlock,
  DiTBlockConfig,
  Modulation,
  block_config,
  modulate,
  rms_norm,
)
from psvae_jax.models.latent import sincos_positions
from psvae_jax.models.layers import wide

Dtype = Any

# Rows of the type embedding.
_SOURCE, _TEXT, _NOISY = range(3)
_TIME_CHANNELS = 256  # sinusoids of t, as DiT
_embedding_init = nn.initializers.normal(0.02)
# Added to latent and text tokens, whose entries have variance 1: to be seen.
_mark_init = nn.initializers.normal(0.5)


def trunk_config(config: DiTConfig, products: str = "native") -> DiTBlockConfig:
  """Shape of a block of the trunk."""
  return block_config(
    config.width, config.num_heads, config.mlp_ratio, products
  )


def head_config(config: DiTConfig, products: str = "native") -> DiTBlockConfig:
  """Shape of a block of the head."""
  return block_config(
    config.head_width, config.head_num_heads, config.mlp_ratio, products
  )


class TimeEmbedding(nn.Module):
  """t in [0, 1] of any shape → (…, D): sinusoids, Dense, SiLU, Dense (DiT)."""

  width: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, t: jax.Array) -> jax.Array:
    half = _TIME_CHANNELS // 2
    t = t.astype(wide(t.dtype))
    # DiT's frequencies are for 1000 steps.
    frequencies = 1000 * 10_000.0 ** (-np.arange(half) / half)
    angles = t[..., None] * jnp.asarray(frequencies, t.dtype)
    waves = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
    x = nn.Dense(self.width, dtype=self.dtype, name="fc1")(waves)
    return nn.Dense(self.width, dtype=self.dtype, name="fc2")(nn.silu(x))


class TextCondition(nn.Module):
  """Text features → tokens (B, L, D) and their pooled vector (B, D)."""

  width: int
  length: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, text: jax.Array, mask: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    # Whatever stands at padded positions, not even NaN gets further.
    text = jnp.where(mask[..., None], rms_norm(text), 0)
    tokens = nn.Dense(self.width, dtype=self.dtype, name="text_embedding")(text)
    positions = self.param(
      "position_embedding", _mark_init, (self.length, self.width)
    )
    tokens = tokens + positions[: text.shape[1]].astype(self.dtype)
    count = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    pooled = jnp.sum(text, axis=1) / count.astype(text.dtype)
    x = nn.Dense(self.width, dtype=self.dtype, name="pooled1")(pooled)
    x = nn.Dense(self.width, dtype=self.dtype, name="pooled2")(nn.silu(x))
    return tokens, x


class FinalLayer(nn.Module):
  """Modulated norm and a linear layer that starts at zero: → (B, n, C) wide."""

  channels: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
    modulation = Modulation(2, x.shape[-1], self.dtype, name="modulation")
    x = modulate(x, *modulation(condition))
    # In full precision: this is the product, and one thin matrix.
    dense = nn.Dense(
      self.channels,
      kernel_init=nn.initializers.zeros,
      dtype=wide(self.dtype),
      name="velocity",
    )
    return dense(x)


class DDTHead(nn.Module):
  """Wide and shallow head over the noisy tokens: → velocity (B, n, C).

  Attributes:
    config: shape of its blocks.
    depth: their number.
    channels: latent channels C.
    remat: recompute block activations in the backward pass.
    dtype: compute dtype.
  """

  config: DiTBlockConfig
  depth: int
  channels: int
  remat: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self, latents: jax.Array, tokens: jax.Array, grid: tuple[int, int]
  ) -> jax.Array:
    """Predicts the velocity.

    Args:
      latents: (B, n, C) noisy latents.
      tokens: (B, n, D) what the trunk and the time say about each.
      grid: (h, w), h · w = n.
    """
    width = self.config.width

    def dense(x, name):
      return nn.Dense(width, dtype=self.dtype, name=name)(x)

    condition = nn.silu(dense(nn.silu(tokens), "condition"))
    x = dense(latents, "latent_embedding")
    angles = rotary.grid_angles(*grid, self.config.head_dim)
    block = nn.remat(DiTBlock) if self.remat else DiTBlock
    for i in range(self.depth):
      layer = block(self.config, dtype=self.dtype, name=f"block{i}")
      x = layer(x, condition, jnp.asarray(angles, wide(self.dtype)))
    return FinalLayer(self.channels, self.dtype, name="final")(x, condition)


class Trunk(nn.Module):
  """`depth` blocks over the whole sequence: → noisy tokens (B, n, D).

  All but the last are one `nn.scan`. The last computes what the noisy tokens
  need of it and no more.

  Attributes:
    config: shape of the blocks.
    depth: number of blocks.
    clean: number of source and text tokens, which come first.
    remat: recompute each block's activations in the backward pass.
    unroll: blocks per iteration of the compiled loop; changes speed alone.
    dtype: compute dtype.
  """

  config: DiTBlockConfig
  depth: int
  clean: int
  remat: bool = False
  unroll: int = 1
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    condition: jax.Array,
    angles: jax.Array,
    mask: jax.Array | None,
  ) -> jax.Array:
    def body(block, carry, *rest):
      return block(carry, *rest), None

    if self.depth > 1:
      # prevent_cse only guards against CSE outside a scan.
      scan = nn.scan(
        nn.remat(body, prevent_cse=False) if self.remat else body,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=self.depth - 1,
        unroll=self.unroll,
      )
      block = DiTBlock(self.config, self.clean, dtype=self.dtype, name="block")
      x, _ = scan(block, x, condition, angles, mask)
    last = nn.remat(DiTBlock) if self.remat else DiTBlock
    last = last(self.config, self.clean, True, self.dtype, name="last")
    return last(x, condition, angles, mask)


class DiT(nn.Module):
  """Noisy latents, time and condition → velocity.

  Attributes:
    config: shape of trunk and head.
    channels: latent channels C.
    text_dim: width of the text features; 0 with classes.
    text_length: most tokens of a prompt; 0 with classes.
    num_classes: labels, without the null one, which is `num_classes` itself; 0
      with text.
    remat: recompute each block's activations in the backward pass.
    unroll: blocks per iteration of the trunk's compiled loop.
    dtype: compute dtype.
    products: how the blocks' Dense layers multiply, see `products`.
  """

  config: DiTConfig
  channels: int
  text_dim: int = 0
  text_length: int = 0
  num_classes: int = 0
  remat: bool = False
  unroll: int = 1
  dtype: Dtype = jnp.float32
  products: str = "native"

  @nn.compact
  def __call__(
    self,
    noisy: jax.Array,
    t: jax.Array,
    *,
    text: jax.Array | None = None,
    text_mask: jax.Array | None = None,
    labels: jax.Array | None = None,
    source: jax.Array | None = None,
    source_mask: jax.Array | None = None,
  ) -> jax.Array:
    """Predicts v = ε − x0.

    Args:
      noisy: (B, h, w, C) x_t, normalised.
      t: (B,) in [0, 1], 1 is noise.
      text: (B, L, text_dim) features; L may be below `text_length`.
      text_mask: bool (B, L), True at real tokens; None: all are.
      labels: int (B,), instead of `text`.
      source: (B, h, w, C) latents of the image to edit; None: no source.
      source_mask: bool (B,), False in rows without one; None: all have one.

    Returns:
      (B, h, w, C) float32 (float64 where `dtype` is).

    Raises:
      ValueError: inputs that the attributes do not fit.
    """
    self._check(noisy, text, labels, source)
    config, batch, grid = self.config, noisy.shape[0], noisy.shape[1:3]
    if source is not None and source_mask is None:
      source_mask = jnp.ones((batch,), bool)
    shape = trunk_config(config, self.products)
    given, text_mask, pooled = self._condition(text, text_mask, labels)
    parts = self._parts(given, text_mask, noisy, source, source_mask)
    tokens, masks, angles = zip(*parts, strict=True)

    times = jnp.stack([jnp.zeros_like(t), t], axis=1)  # clean, noisy
    condition = TimeEmbedding(config.width, self.dtype, name="time")(times)
    condition = condition + pooled[:, None]
    trunk = Trunk(
      shape,
      config.depth,
      clean=sum(part.shape[1] for part in tokens[:-1]),
      remat=self.remat,
      unroll=self.unroll,
      dtype=self.dtype,
      name="trunk",
    )
    x = trunk(
      jnp.concatenate(tokens, axis=1),
      nn.silu(condition),
      jnp.asarray(np.concatenate(angles), wide(self.dtype)),
      jnp.concatenate(masks, axis=1),
    )
    condition = condition[:, 1:]
    if config.head_depth:
      head = DDTHead(
        head_config(config, self.products),
        config.head_depth,
        self.channels,
        self.remat,
        self.dtype,
        name="head",
      )
      x = rms_norm(x).astype(self.dtype) + condition
      latents = noisy.reshape(batch, -1, self.channels)
      return head(latents, x, grid).reshape(noisy.shape)
    final = FinalLayer(self.channels, self.dtype, name="final")
    return final(x, nn.silu(condition)).reshape(noisy.shape)

  def _parts(
    self,
    given: jax.Array,
    given_mask: jax.Array,
    noisy: jax.Array,
    source: jax.Array | None,
    source_mask: jax.Array | None,
  ) -> list[tuple[jax.Array, jax.Array, np.ndarray]]:
    """Of source, condition and noisy latents, in this order: tokens (B, n, D),
    which of them are there (B, n), and their rotary angles (n, d/2)."""
    grid, width = noisy.shape[1:3], self.config.width
    head_dim = trunk_config(self.config).head_dim
    embed = nn.Dense(width, dtype=self.dtype, name="latent_embedding")
    types = self.param("type_embedding", _mark_init, (3, width))
    types = types.astype(self.dtype)
    places = sincos_positions(*grid, width, self.dtype).reshape(-1, width)
    turns = rotary.grid_angles(*grid, head_dim)
    still = np.zeros((given.shape[1], head_dim // 2))

    def latent_tokens(latents, kind):
      latents = latents.reshape(latents.shape[0], -1, self.channels)
      return embed(latents) + places + types[kind]

    there = jnp.ones((noisy.shape[0], grid[0] * grid[1]), bool)
    parts = [
      (given + types[_TEXT], given_mask, still),
      (latent_tokens(noisy, _NOISY), there, turns),
    ]
    if source is not None:
      source = jnp.where(source_mask[:, None, None, None], source, 0)
      kept = there & source_mask[:, None]
      parts.insert(0, (latent_tokens(source, _SOURCE), kept, turns))
    return parts

  def _condition(
    self,
    text: jax.Array | None,
    text_mask: jax.Array | None,
    labels: jax.Array | None,
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens (B, L, D), which are real (B, L), and what adaLN reads (B, D)."""
    width = self.config.width
    if labels is None:
      if text_mask is None:
        text_mask = jnp.ones(text.shape[:2], bool)
      module = TextCondition(width, self.text_length, self.dtype, name="text")
      tokens, pooled = module(text, text_mask)
      return tokens, text_mask, pooled
    embed = nn.Embed(
      self.num_classes + 1,
      width,
      embedding_init=_embedding_init,
      dtype=self.dtype,
      name="label",
    )
    pooled = embed(labels)
    return pooled[:, None], jnp.ones((*labels.shape, 1), bool), pooled

  def _check(self, noisy, text, labels, source) -> None:
    """Errors in terms of what the caller passed."""
    if bool(self.text_dim) == bool(self.num_classes):
      raise ValueError(
        "a DiT is conditioned by text or by classes: set one of text_dim "
        f"{self.text_dim} and num_classes {self.num_classes}"
      )
    if (text is None) == bool(self.text_dim) or (labels is None) == bool(
      self.num_classes
    ):
      wanted = "text" if self.text_dim else "labels"
      raise ValueError(f"this DiT is conditioned by {wanted}: pass that alone")
    if noisy.shape[-1] != self.channels:
      raise ValueError(
        f"noisy latents {noisy.shape} do not have {self.channels} channels"
      )
    if source is not None and source.shape != noisy.shape:
      raise ValueError(
        f"source latents {source.shape} and noisy ones {noisy.shape} differ "
        "in shape"
      )
    if text is None:
      return
    if text.shape[-1] != self.text_dim:
      raise ValueError(
        f"text features {text.shape} do not have width {self.text_dim}"
      )
    if text.shape[1] > self.text_length:
      raise ValueError(
        f"text of {text.shape[1]} tokens is longer than {self.text_length}"
      )
