"""Improved precision and recall of Kynkäänniemi et al. (2019).

Each set's manifold is the union of balls around its features, each reaching
to the k-th nearest other feature of the set. Precision is the share of
generated images in the real manifold, recall that of real images in the
generated one.

Distances are float32 matrix products on the devices, block by block: of
50 000 × 50 000 distances 16 MiB exist at once on a device. What float32 does
not tell apart counts as inside, so that a copy lies in its original's ball.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from psvae_jax import sharding

NEIGHBOURS = 3
_ROWS = 1024  # of a block, for each device
_COLUMNS = 4096


def precision_recall(
  generated: np.ndarray,
  real: np.ndarray,
  *,
  neighbours: int = NEIGHBOURS,
  mesh: Mesh | None = None,
  block: tuple[int, int] = (_ROWS, _COLUMNS),
) -> tuple[float, float]:
  """Precision and recall, in [0, 1].

  Args:
    generated: (N, D) features. A memory-mapped array is read by blocks.
    real: (M, D).
    neighbours: k.
    mesh: rows of a block are split over its data and fsdp.
    block: rows and columns of a block.

  Returns:
    (precision, recall); NaN where a feature is not finite.

  Raises:
    ValueError: not more than k examples in each, or another shape.
  """
  generated, real = np.asarray(generated), np.asarray(real)
  if generated.ndim != 2 or generated.shape[1:] != real.shape[1:]:
    raise ValueError(
      "precision and recall take (N, D) and (M, D) of one D, got "
      f"{generated.shape} and {real.shape}"
    )
  if min(len(generated), len(real)) <= neighbours:
    raise ValueError(
      f"precision and recall with {neighbours} neighbours need more than "
      f"{neighbours} images of each kind, got {len(generated)} and {len(real)}"
    )
  # About the middle, squares are small and float32 tells them apart.
  middle = np.mean(real, axis=0, dtype=np.float64).astype(np.float32)
  most = max(len(generated), len(real))
  distances = _Distances(middle, neighbours, mesh, block, most)
  if not (distances.is_finite(generated) and distances.is_finite(real)):
    return float("nan"), float("nan")
  return (
    distances.share_inside(generated, real, distances.radii(real)),
    distances.share_inside(real, generated, distances.radii(generated)),
  )


class _Distances:
  """Distances between rows of host arrays, reduced block by block."""

  def __init__(
    self,
    middle: np.ndarray,
    neighbours: int,
    mesh: Mesh | None,
    block: tuple[int, int],
    most: int,
  ) -> None:
    self._middle, self._neighbours, self._mesh = middle, neighbours, mesh
    shards = 1 if mesh is None else sharding.batch_shards(mesh)
    # No larger than the larger set needs: the rest would be padding.
    self._rows = min(block[0], _power_of_two(-(-most // shards))) * shards
    self._columns = min(block[1], _power_of_two(most))

  def is_finite(self, features: np.ndarray) -> bool:
    size = self._columns
    return all(
      np.isfinite(features[start : start + size]).all()
      for start in range(0, len(features), size)
    )

  def radii(self, features: np.ndarray) -> np.ndarray:
    """Squared distance of each row to its k-th nearest other, (N,)."""
    found = []
    for start, rows, count in self._parts(features, self._rows, split=True):
      nearest = jnp.full((len(rows), self._neighbours), jnp.inf)
      nearest = self._put(nearest, split=True)
      for at, columns, size in self._parts(features, self._columns):
        nearest = _nearest(nearest, rows, columns, start, at, size)
      found.append(np.asarray(jax.device_get(nearest[:, -1]))[:count])
    return np.concatenate(found)

  def share_inside(
    self, features: np.ndarray, others: np.ndarray, radii: np.ndarray
  ) -> float:
    """Share of the rows that lie in a ball around one of `others`."""
    inside = 0
    for _, rows, count in self._parts(features, self._rows, split=True):
      found = self._put(np.zeros(len(rows), bool), split=True)
      for at, columns, size in self._parts(others, self._columns):
        balls = np.full(self._columns, -np.inf, np.float32)  # none in padding
        balls[:size] = radii[at : at + size]
        found = _is_inside(found, rows, columns, self._put(balls))
      inside += int(np.asarray(jax.device_get(found))[:count].sum())
    return inside / len(features)

  def _parts(self, features: np.ndarray, size: int, split: bool = False) -> Any:
    """(start, rows padded to `size` on the devices, how many are real)."""
    for start in range(0, len(features), size):
      part = np.asarray(features[start : start + size], np.float32)
      count = len(part)
      part = np.pad(part - self._middle, [(0, size - count), (0, 0)])
      yield start, self._put(part, split), count

  def _put(self, value: Any, split: bool = False) -> jax.Array:
    if self._mesh is None:
      return jax.device_put(value)
    if split:
      return jax.device_put(value, sharding.batch_sharding(self._mesh))
    return jax.device_put(value, sharding.replicated(self._mesh))


def _power_of_two(count: int) -> int:
  """The next one: sets of similar sizes share their programs."""
  return 1 << (count - 1).bit_length()


def _squared(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Squared distances (R, C), and how much float32 may be off."""
  products = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
  sums = jnp.sum(x * x, axis=1)[:, None] + jnp.sum(y * y, axis=1)
  slack = 8 * jnp.finfo(jnp.float32).eps * sums
  return jnp.maximum(sums - 2.0 * products, 0.0), slack


@jax.jit
def _nearest(
  nearest: jax.Array,
  rows: jax.Array,
  columns: jax.Array,
  start: int,
  at: int,
  size: int,
) -> jax.Array:
  """The k smallest distances of rows so far, to others than themselves."""
  squares, _ = _squared(rows, columns)
  column = jnp.arange(len(columns))
  itself = (start + jnp.arange(len(rows)))[:, None] == at + column
  squares = jnp.where(itself | (column >= size), jnp.inf, squares)
  joined = jnp.concatenate([nearest, squares], axis=1)
  return -jax.lax.top_k(-joined, nearest.shape[1])[0]


@jax.jit
def _is_inside(
  found: jax.Array, rows: jax.Array, columns: jax.Array, radii: jax.Array
) -> jax.Array:
  squares, slack = _squared(rows, columns)
  return found | jnp.any(squares <= radii + slack, axis=1)
