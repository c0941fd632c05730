"""The perceptual network of a pixel loss: LPIPS, frozen.

Its parameters are an argument of the training step, in `frozen`: they are no
part of the model, its fingerprint, its optimizer or its moving averages.
"""

from typing import Any

import jax
import jax.numpy as jnp

from psvae_jax.config import Config, ConfigError
from psvae_jax.models.lpips import Lpips
from psvae_jax.pretrained.lpips import (
  PerceptualNetwork,
  how_to_make,
  load_lpips,
)

PERCEPTUAL = "perceptual"  # its place in `frozen`

_SIDE = 64  # no parameter's shape depends on the image's


def load(config: Config) -> PerceptualNetwork:
  """Loads the network that section `perceptual` names.

  Raises:
    ConfigError: no weights are named; says how to make them.
    FileNotFoundError, ValueError: see `load_lpips`.
  """
  section = config.perceptual
  if not section.weights:
    raise ConfigError(
      "config.perceptual.weights is empty, and LPIPS (loss.lpips) needs its "
      f"network: {how_to_make(section.network)}"
    )
  return load_lpips(
    section.weights, network=section.network, **_options(config)
  )


def abstract(config: Config) -> PerceptualNetwork:
  """The network as shapes: no weights are needed, nothing is allocated."""
  network = config.perceptual.network
  module = Lpips(network, **_options(config))
  image = jax.ShapeDtypeStruct((1, _SIDE, _SIDE, 3), jnp.float32)
  variables = jax.eval_shape(module.init, jax.random.key(0), image, image)
  return PerceptualNetwork(module, variables["params"], network, "")


def _options(config: Config) -> dict[str, Any]:
  # A job in double precision is one throughout.
  double = config.compute.dtype == "float64"
  return dict(
    remat=config.compute.remat,
    dtype=jnp.dtype("float64" if double else config.perceptual.dtype),
    convolution=config.compute.convolution,
  )
