"""How far sample latents lie from real ones.

The paper's measure in its toy experiment (section 3.2): the distance of a
sample to its nearest real point, and its mean over the farthest 5 %. There the
data are two-dimensional and the real points dense; a bank of real latents is
not, so real latents outside of the bank are measured the same way, and only
the comparison with them says something. It is blind to one thing: a blurred
sample lies nearer to the middle of all latents, and is not punished.
"""

import math

import numpy as np

TAIL = 0.05
_CHUNK = 256


class LatentBank:
  """Real latents to measure distances to.

  Args:
    latents: (N, …) normalised, N ≥ 1.
  """

  def __init__(self, latents: np.ndarray) -> None:
    if not len(latents):
      raise ValueError("a bank of no latents; is the training split empty?")
    self._bank = _flat(latents)
    # About their middle, squares are small and float32 tells them apart.
    self._middle = self._bank.mean(0)
    self._bank -= self._middle
    self._squares = np.square(self._bank).sum(1)

  def __len__(self) -> int:
    return len(self._bank)

  def distances(self, latents: np.ndarray) -> np.ndarray:
    """Distance of each latent to its nearest one in the bank.

    The nearest is found by float32 matrix products, a part at a time, and its
    distance is then computed anew in float64.

    Args:
      latents: (M, …), of the bank's shape.

    Returns:
      float64 (M,): root mean square difference a latent value, so that a size
      of latents does not matter. NaN where a latent is not finite.

    Raises:
      ValueError: latents of another size.
    """
    flat = _flat(latents)
    if not len(flat):
      return np.zeros(0)
    if flat.shape[1] != self._bank.shape[1]:
      raise ValueError(
        f"latents have {flat.shape[1]} values, the bank's {self._bank.shape[1]}"
      )
    flat -= self._middle
    return np.concatenate(
      [
        self._chunk(flat[start : start + _CHUNK])
        for start in range(0, len(flat), _CHUNK)
      ]
    )

  def _chunk(self, flat: np.ndarray) -> np.ndarray:
    # |a − b|² without |a|², which is the same for every b.
    nearest = np.argmin(self._squares - 2.0 * (flat @ self._bank.T), axis=1)
    difference = flat.astype(np.float64) - self._bank[nearest]
    return np.sqrt(np.mean(np.square(difference), axis=1))


def tail_mean(distances: np.ndarray, share: float = TAIL) -> float:
  """Mean of the farthest `share`, at least one; (N,) with N ≥ 1."""
  count = max(1, math.ceil(share * len(distances) - 1e-9))
  return float(np.sort(distances)[-count:].mean())


def share_beyond(
  distances: np.ndarray, real: np.ndarray, share: float = TAIL
) -> float:
  """Share of samples farther than all but the farthest `share` of real ones.

  Real latents themselves would have `share`.
  """
  limit = np.quantile(real, 1.0 - share)
  # What is not finite is as far off as can be.
  return float(np.mean(~(distances <= limit)))


def manifold_metrics(
  distances: np.ndarray, real: np.ndarray
) -> dict[str, float]:
  """Metric name → value, of samples and of real latents outside of the bank."""
  return {
    "eval/manifold_distance": float(np.mean(distances)),
    "eval/manifold_distance_real": float(np.mean(real)),
    "eval/manifold_distance_tail": tail_mean(distances),
    "eval/manifold_distance_tail_real": tail_mean(real),
    "eval/off_manifold_share": share_beyond(distances, real),
  }


def _flat(latents: np.ndarray) -> np.ndarray:
  """(N, …) → float32 (N, values), a copy."""
  size = int(np.prod(latents.shape[1:]))
  return np.array(latents, np.float32).reshape(len(latents), size)
