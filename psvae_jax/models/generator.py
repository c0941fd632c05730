"""The generator and what it stands on: text → DiT → latents → image.

    text ─► text encoder ─► DiT on normalised z_t ─► z ─► pixel decoder ─► image
    image ─► encoder, semantic encoder ─► z   (training; the source of an edit)

The object holds no parameters. `params` is the DiT's; `frozen` is

    {"autoencoder": {"encoder", "semantic_encoder", "pixel_decoder"},
     "text_encoder": its parameters, or {},
     "latent_stats": {"mean": (C,), "std": (C,)},
     "null": the condition of no prompt, with one row,
     "original_encoder": E before any tuning; evaluations alone read it}

A condition is a dict: {"text" (B, L, D), "text_mask" bool (B, L)}, or
{"labels" int32 (B,)} of a class-conditional generator.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from psvae_jax.config import ComputeConfig, GeneratorModel
from psvae_jax.models.autoencoder import Autoencoder
from psvae_jax.models.dit import DiT
from psvae_jax.models.layers import wide
from psvae_jax.models.text import T5Encoder

Condition = dict[str, jax.Array]
Params = dict[str, Any]

# What of the autoencoder a generator needs.
MODULES = ("encoder", "semantic_encoder", "pixel_decoder")


@dataclasses.dataclass(frozen=True)
class Generator:
  """Modules and sizes of one generator.

  Attributes:
    config: the model section.
    autoencoder: gives latents their meaning.
    dit: predicts the velocity of normalised latents.
    text_encoder: None for a class-conditional generator.
  """

  config: GeneratorModel
  autoencoder: Autoencoder
  dit: DiT
  text_encoder: T5Encoder | None

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """(h, w, C)."""
    grid = self.autoencoder.grid
    return grid, grid, self.autoencoder.config.channels

  def posterior_mean(self, frozen: Params, images: jax.Array) -> jax.Array:
    """uint8 (B, S, S, 3) → μ (B, h, w, C) float32, not normalised."""
    params = frozen["autoencoder"]
    dtype = wide(self.autoencoder.encoder.dtype)
    x = images.astype(dtype) / 127.5 - 1.0
    features = self.autoencoder.features(params["encoder"], x)
    posterior = self.autoencoder.posterior(params["semantic_encoder"], features)
    return posterior.mode()

  def normalise(self, frozen: Params, z: jax.Array) -> jax.Array:
    """z → (z − mean) / std per channel, float32 or wider."""
    stats = frozen["latent_stats"]
    return (z.astype(wide(z.dtype)) - stats["mean"]) / stats["std"]

  def denormalise(self, frozen: Params, z: jax.Array) -> jax.Array:
    stats = frozen["latent_stats"]
    return z.astype(wide(z.dtype)) * stats["std"] + stats["mean"]

  def encode(self, frozen: Params, images: jax.Array) -> jax.Array:
    """uint8 (B, S, S, 3) → normalised latents (B, h, w, C)."""
    return self.normalise(frozen, self.posterior_mean(frozen, images))

  def decode(self, frozen: Params, z: jax.Array) -> jax.Array:
    """Normalised latents → images (B, S, S, 3) in [−1, 1], not clipped."""
    z = self.denormalise(frozen, z)
    decoder = frozen["autoencoder"]["pixel_decoder"]
    return self.autoencoder.decode_pixels(decoder, z)

  def encode_text(
    self, frozen: Params, tokens: jax.Array, mask: jax.Array
  ) -> jax.Array:
    """Tokens, mask (B, L) → features (B, L, D); finite where padded."""
    return self.text_encoder.apply(
      {"params": frozen["text_encoder"]}, tokens, mask
    )

  def image_features(self, frozen: Params, images: jax.Array) -> jax.Array:
    """What the original encoder says of uint8 images: (B, D) float32.

    The mean of its patch tokens. `frozen["original_encoder"]` holds it; the
    autoencoder's own may be tuned.
    """
    dtype = wide(self.autoencoder.encoder.dtype)
    x = images.astype(dtype) / 127.5 - 1.0
    tokens = self.autoencoder.features(frozen["original_encoder"], x)
    return jnp.mean(tokens, axis=(1, 2)).astype(jnp.float32)

  def text_features(
    self, frozen: Params, tokens: jax.Array, mask: jax.Array
  ) -> jax.Array:
    """Mean of the text encoder's real tokens: (B, D) float32."""
    text = self.encode_text(frozen, tokens, mask).astype(jnp.float32)
    total = jnp.sum(jnp.where(mask[..., None], text, 0), axis=1)
    return total / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)

  def null_condition(self, frozen: Params, count: int) -> Condition:
    """`count` rows of no prompt: the encoded empty one, or the null class."""
    return jax.tree.map(
      lambda x: jnp.broadcast_to(x, (count, *x.shape[1:])), frozen["null"]
    )

  def drop(
    self, frozen: Params, condition: Condition, dropped: jax.Array
  ) -> Condition:
    """Puts no prompt in the rows where `dropped` (B,) is True."""
    null = self.null_condition(frozen, dropped.shape[0])

    def one(given, null):
      rows = dropped.reshape((-1,) + (1,) * (given.ndim - 1))
      return jnp.where(rows, null.astype(given.dtype), given)

    return jax.tree.map(one, condition, null)

  def velocity(
    self,
    params: Params,
    z_t: jax.Array,
    t: jax.Array,
    condition: Condition,
    source: jax.Array | None = None,
    source_mask: jax.Array | None = None,
  ) -> jax.Array:
    """v = ε − z of normalised latents.

    Args:
      params: the DiT's.
      z_t: (B, h, w, C).
      t: (B,) in [0, 1], 1 is noise.
      condition: see the module docstring.
      source: (B, h, w, C) normalised latents of the image to edit.
      source_mask: (B,) False where the source is left out.

    Returns:
      (B, h, w, C) float32.
    """
    return self.dit.apply(
      {"params": params},
      z_t,
      t,
      source=source,
      source_mask=source_mask,
      **condition,
    )

  def init(self, rng: jax.Array) -> Params:
    """Fresh parameters of the DiT."""
    z = jnp.zeros((1, *self.latent_shape), jnp.float32)
    condition = self.abstract_condition()
    condition = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), condition)
    t = jnp.zeros((1,), jnp.float32)
    # With a source, so that a text-to-image model can be continued in edits.
    return self.dit.init(rng, z, t, source=z, **condition)["params"]

  def abstract_condition(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a condition with one row."""
    if self.text_encoder is None:
      return {"labels": jax.ShapeDtypeStruct((1,), jnp.int32)}
    length = self.config.text_length
    width = self.text_encoder.config.d_model
    return {
      "text": jax.ShapeDtypeStruct((1, length, width), jnp.float32),
      "text_mask": jax.ShapeDtypeStruct((1, length), jnp.bool_),
    }


def build(
  config: GeneratorModel,
  compute: ComputeConfig,
  autoencoder: Autoencoder,
  text_encoder: T5Encoder | None,
) -> Generator:
  """Builds the DiT for an autoencoder's latents and a text encoder's tokens."""
  is_text = text_encoder is not None
  dit = DiT(
    config=config.dit,
    channels=autoencoder.config.channels,
    text_dim=text_encoder.config.d_model if is_text else 0,
    text_length=config.text_length if is_text else 0,
    num_classes=0 if is_text else config.num_classes,
    remat=compute.remat,
    unroll=compute.unroll,
    dtype=jnp.dtype(compute.dtype),
    products=compute.products,
  )
  return Generator(config, autoencoder, dit, text_encoder)
