"""What a report shows of an autoencoder on a handful of fixed images.

A sample set is written as one `.npz`:

    original, reconstruction   uint8 (N, S, S, 3)
    caption                    text (N,), "" where there is none
    features_frozen            uint8 (N, h, w, 3): features of the frozen
    features_tuned             encoder, of the tuned one (left out where E does
    features_decoded           not train) and decoded from z, as colours
    latent, latent_channel     uint8 (N, h, w, K): K channels of μ, and which

A set that could not be made holds only `note`, a text that says why. The
arrays are pictures already and a report needs no model.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from psvae_jax import sharding
from psvae_jax.evaluators import image_metrics
from psvae_jax.evaluators.feature_colors import FeatureColors
from psvae_jax.models.autoencoder import Autoencoder

_LATENT_CHANNELS = 8
_LATENT_RANGE = 3.0  # standard deviations from a channel's mean to the ends


class Samples(NamedTuple):
  """Fixed images.

  Attributes:
    images: uint8 (N, S, S, 3), the same on every host.
    captions: N texts, "" where there is none.
  """

  images: np.ndarray
  captions: list[str]


class Pictures:
  """Runs one `Autoencoder` on sample images.

  Args:
    model: the modules.
  """

  def __init__(self, model: Autoencoder) -> None:
    self._model = model
    self._forward = jax.jit(self._forward_fn)

  def _forward_fn(
    self, params: Any, teacher: Any, images: jax.Array
  ) -> dict[str, jax.Array]:
    """Everything a sample set is made of; `teacher` None where E is frozen."""
    model = self._model
    x = images.astype(jnp.float32) / 127.5 - 1.0
    features = model.features(params["encoder"], x)
    z = model.posterior(params["semantic_encoder"], features).mode()
    pixels = model.decode_pixels(params["pixel_decoder"], z)
    out = {
      "reconstruction": image_metrics.to_uint8(pixels.astype(jnp.float32)),
      "features_frozen": features,
      "features_decoded": model.decode_features(params["semantic_decoder"], z),
      "latent": z,
    }
    if teacher is not None:
      out["features_frozen"] = model.features(teacher, x)
      out["features_tuned"] = features
    return jax.tree.map(
      lambda v: sharding.constrain(v.astype(jnp.float32)), out
    )

  def __call__(
    self,
    params: dict[str, Any],
    teacher: Any,
    samples: Samples,
    latents: dict[str, np.ndarray],
    mesh: Mesh,
  ) -> dict[str, np.ndarray]:
    """The arrays of one sample set; every host takes part and gets them.

    Args:
      params: module → parameters on `mesh`, E included.
      teacher: the frozen encoder's parameters; None if it is not at hand,
        which leaves the feature pictures out.
      samples: the images.
      latents: statistics of μ by channel, from `LatentMoments.result`.
      mesh: the mesh.
    """
    tunes = teacher is not None and teacher is not params["encoder"]
    count = len(samples.images)
    batch = _put_padded(samples.images, mesh)
    out = self._forward(params, teacher if tunes else None, batch)
    out = {k: v[:count] for k, v in jax.device_get(out).items()}
    arrays = {
      "original": samples.images,
      "reconstruction": out["reconstruction"].astype(np.uint8),
      "caption": np.array(samples.captions, dtype=np.str_),
      **latent_pictures(out["latent"], latents),
    }
    if teacher is not None:
      colors = FeatureColors(out["features_frozen"])
      arrays |= {
        name: colors(value)
        for name, value in out.items()
        if name.startswith("features_")
      }
    return arrays


def latent_pictures(
  mu: np.ndarray, statistics: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """The channels that say most, as grey levels: 128 is the channel's mean.

  Args:
    mu: (N, h, w, C).
    statistics: "mean", "std" and "kl" by channel, (C,).

  Returns:
    "latent" uint8 (N, h, w, K) and "latent_channel" int (K,), rising.
  """
  order = np.argsort(-statistics["kl"], kind="stable")
  chosen = np.sort(order[:_LATENT_CHANNELS])
  spread = _LATENT_RANGE * np.maximum(statistics["std"][chosen], 1e-12)
  share = (mu[..., chosen] - statistics["mean"][chosen]) / spread
  share = np.where(np.isfinite(share), share, 0.0)
  levels = np.round(128 + 127 * np.clip(share, -1.0, 1.0))
  return {"latent": levels.astype(np.uint8), "latent_channel": chosen}


def _put_padded(images: np.ndarray, mesh: Mesh) -> jax.Array:
  """The same host images everywhere → one batch over the mesh.

  Black images fill it up to what the mesh divides.
  """
  missing = -len(images) % sharding.batch_shards(mesh)
  padded = np.pad(images, [(0, missing)] + [(0, 0)] * (images.ndim - 1))
  return jax.make_array_from_callback(
    padded.shape, sharding.batch_sharding(mesh), lambda index: padded[index]
  )
