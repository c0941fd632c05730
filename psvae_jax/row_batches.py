"""Rows of host arrays through a compiled function, in batches of few shapes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from psvae_jax import sharding


class RowBatches:
  """Splits rows into parts of one size and joins what comes of them.

  Args:
    batch_size: most rows at once. Fewer run in the next power of two.
    mesh: parts are split over its data and fsdp; None is the default device.

  Raises:
    ValueError: a batch size under 1.
  """

  def __init__(self, batch_size: int, mesh: Mesh | None = None) -> None:
    if batch_size < 1:
      raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    self._batch_size = batch_size
    self._mesh = mesh

  def apply(
    self,
    function: Callable[[dict[str, jax.Array]], Any],
    rows: dict[str, np.ndarray],
  ) -> np.ndarray:
    """Applies `function` to parts of one size; joins what it returns.

    Args:
      function: named device arrays (size, …) → array (size, …), on devices or
        on the host, whole on every host.
      rows: named host arrays (N, …), N ≥ 1, equal on every host.

    Returns:
      (N, …) on the host.
    """
    count = len(next(iter(rows.values())))
    outputs = []
    with self._set_mesh():
      for part in self._parts(rows, count):
        outputs.append(jax.device_get(function(part)))
    return np.concatenate(outputs)[:count]

  def put_whole(self, value: np.ndarray) -> jax.Array:
    """The same host array on every host → whole on every device."""
    if self._mesh is None:
      return jax.device_put(value)
    return _put(np.asarray(value), sharding.replicated(self._mesh))

  def _parts(
    self, rows: dict[str, np.ndarray], count: int
  ) -> Iterator[dict[str, jax.Array]]:
    """Equal parts on the devices; the last repeats its last row to fit."""
    # The next power of two: at most twice the work, far fewer compilations.
    size = min(1 << (count - 1).bit_length(), self._batch_size)
    if self._mesh is not None:
      shards = sharding.batch_shards(self._mesh)
      size = -(-size // shards) * shards
    for start in range(0, count, size):
      index = np.minimum(np.arange(start, start + size), count - 1)
      yield {name: self._put_rows(value[index]) for name, value in rows.items()}

  def _put_rows(self, value: np.ndarray) -> jax.Array:
    """The same host array on every host → split over the mesh."""
    if self._mesh is None:
      return jax.device_put(value)
    return _put(value, sharding.batch_sharding(self._mesh))

  def _set_mesh(self) -> contextlib.AbstractContextManager:
    if self._mesh is None:
      return contextlib.nullcontext()
    return jax.set_mesh(self._mesh)


def _put(value: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
  return jax.make_array_from_callback(
    value.shape, where, lambda index: value[index]
  )
