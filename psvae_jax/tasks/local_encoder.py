"""Images → posterior means on this host's devices, outside of the step.

What writes a cache does so on every host by itself, however large the mesh is.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from psvae_jax.models.generator import Generator


class LocalEncoder:
  """Callable: uint8 (B, S, S, 3) → μ (B, h, w, C), perhaps still under way.

  The parameters go to the devices with the first call.

  Args:
    generator: encodes.
    params: host arrays of its autoencoder.
    batch_size: B; split over as many devices as divide it.
  """

  def __init__(
    self, generator: Generator, params: Any, batch_size: int
  ) -> None:
    devices = jax.local_devices()
    mesh = Mesh(devices[: math.gcd(batch_size, len(devices))], ("data",))
    self._everywhere = NamedSharding(mesh, PartitionSpec())
    self._split = NamedSharding(mesh, PartitionSpec("data"))
    self._params, self._on_devices = params, None
    self._encode = jax.jit(
      lambda params, images: generator.posterior_mean(
        {"autoencoder": params}, images
      )
    )

  def __call__(self, images: np.ndarray) -> jax.Array:
    if self._on_devices is None:
      self._on_devices = jax.device_put(self._params, self._everywhere)
    return self._encode(self._on_devices, jax.device_put(images, self._split))

  def release(self) -> None:
    """Frees the devices' copy of the parameters; a call makes another."""
    self._on_devices = None
