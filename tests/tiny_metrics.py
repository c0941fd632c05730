"""Networks of metrics that cost nothing: colours of a few places."""

import jax.numpy as jnp
import numpy as np

from psvae_jax.evaluation.networks import Networks
from psvae_jax.evaluators.feature_networks import DINOV2, FeatureNetwork

_WIDTHS = {"pool": 6, "spatial": 5, "logits": 12}


def inception(seed=0):
  """Random projections of a coarse picture, with Inception's kinds."""
  rng = np.random.default_rng(seed)
  params = {
    kind: rng.normal(size=(27, width)).astype(np.float32)
    for kind, width in _WIDTHS.items()
  }

  def features(params, images):
    flat = _coarse(images)
    return {kind: flat @ kernel for kind, kernel in params.items()}

  protocol = {"inception": "tiny", "inception_fingerprint": f"seed {seed}"}
  return FeatureNetwork("inception", params, features, tuple(_WIDTHS), protocol)


def dinov2():
  def features(params, images):
    return {DINOV2: _coarse(images)[:, :4] * params["scale"]}

  params = {"scale": np.float32(2)}
  return FeatureNetwork(
    "dinov2", params, features, (DINOV2,), {"encoder": "tiny"}
  )


def networks(**others):
  return Networks(inception=inception(), dinov2=dinov2(), **others)


def _coarse(images):
  """(B, S, S, 3) → (B, 27): means of nine parts."""
  x = images.astype(jnp.float32) / 255
  side = x.shape[1] // 3
  x = x[:, : 3 * side, : 3 * side].reshape(-1, 3, side, 3, side, 3)
  return x.mean((2, 4)).reshape(-1, 27)
