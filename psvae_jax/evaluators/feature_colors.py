"""Features as colours: three principal components as red, green and blue.

Colours compare only within one basis. So the basis comes from the frozen
encoder, and tuned and decoded features are put into it as they are: where they
kept the semantics, they keep the colours.
"""

import numpy as np

# Of the fitted features, by component; what lies outside is clipped.
_PERCENTILES = (2.0, 98.0)


class FeatureColors:
  """Three fixed directions in a feature space, and the range of each.

  Deterministic: of a component's two signs the one is taken that makes its
  largest weight positive.

  Args:
    features: (..., D), the features to fit; all positions weigh alike.
  """

  def __init__(self, features: np.ndarray) -> None:
    width = features.shape[-1]
    flat = _finite(features).reshape(-1, width)
    self._mean = flat.mean(0)
    centred = flat - self._mean
    # The same directions as of the features themselves, but D × D: in float64
    # the first three lose nothing by it.
    _, _, rows = np.linalg.svd(centred.T @ centred, hermitian=True)
    rows = rows[:3]
    largest = np.abs(rows).argmax(1)
    signs = np.where(rows[np.arange(len(rows)), largest] < 0, -1.0, 1.0)
    # Fewer than three features: the other colours stay even.
    self._basis = np.zeros((3, width))
    self._basis[: len(rows)] = rows * signs[:, None]
    self._low, high = np.percentile(
      self._components(flat), _PERCENTILES, axis=0
    )
    extent = high - self._low
    # A component without spread would blow up rounding errors to colours.
    rounding = max(1e-6 * extent.max(), 1e-9 * np.abs(flat).max())
    self._even = extent <= rounding
    self._extent = np.where(self._even, 1.0, extent)

  def __call__(self, features: np.ndarray) -> np.ndarray:
    """(..., D) → uint8 (..., 3)."""
    components = self._components(_finite(features))
    share = np.clip((components - self._low) / self._extent, 0.0, 1.0)
    share = np.where(self._even, 0.5, share)
    return np.round(255 * share).astype(np.uint8)

  def _components(self, features: np.ndarray) -> np.ndarray:
    return (features - self._mean) @ self._basis.T


def _finite(features: np.ndarray) -> np.ndarray:
  """As float64; a diverged model's NaN and infinity become zeros."""
  features = np.asarray(features, np.float64)
  return np.where(np.isfinite(features), features, 0.0)
