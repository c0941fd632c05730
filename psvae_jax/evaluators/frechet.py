"""Fréchet distance between two sets of features, in float64.

The distance of Dowson and Landau (1982) between Gaussians, which FID (Heusel
et al. 2017) takes between features of images:

    |μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁ Σ₂)^½

The last trace is the sum of the singular values of L₁ᵀ L₂ for any Σ = L Lᵀ,
and L comes from `eigh`. There is no matrix square root, whose imaginary parts
and 1e-6 on the diagonal other implementations need where there are fewer
examples than dimensions.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np


class FeatureMoments:
  """Mean and covariance of features over a stream of batches.

  Merged by the rule of Chan et al. (1979), so that the result does not depend
  on batch size or order beyond float64 rounding.
  """

  def __init__(self) -> None:
    self.count = 0
    self._mean: np.ndarray | None = None
    self._scatter: np.ndarray | None = None  # Σ (x − mean)(x − mean)ᵀ

  def update(self, features: Any) -> "FeatureMoments":
    """Adds one batch (B, D); returns itself.

    Raises:
      ValueError: another shape than (B, D), or another D than before.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2:
      raise ValueError(f"features must be (B, D), got shape {features.shape}")
    if len(features):
      mean = features.mean(0)
      centred = features - mean
      self._add(len(features), mean, centred.T @ centred)
    return self

  def merge(self, other: "FeatureMoments") -> None:
    """Adds everything that `other` has seen; `other` is not changed."""
    if other.count:
      self._add(other.count, other._mean, other._scatter)

  def to_arrays(self) -> dict[str, np.ndarray]:
    """Everything, bit by bit, as arrays for an .npz."""
    arrays = {"count": np.int64(self.count)}
    if self.count:
      arrays |= {"mean": self._mean, "scatter": self._scatter}
    return arrays

  @classmethod
  def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "FeatureMoments":
    """Inverse of `to_arrays`."""
    moments = cls()
    moments.count = int(arrays["count"])
    if moments.count:
      moments._mean = np.array(arrays["mean"], np.float64)
      moments._scatter = np.array(arrays["scatter"], np.float64)
    return moments

  @property
  def mean(self) -> np.ndarray:
    """float64 (D,)."""
    self._check(1)
    return self._mean

  @property
  def covariance(self) -> np.ndarray:
    """float64 (D, D), unbiased: over count − 1, as `numpy.cov`."""
    self._check(2)
    return self._scatter / (self.count - 1)

  def _check(self, least: int) -> None:
    if self.count < least:
      raise ValueError(
        f"{self.count} examples were added, at least {least} are needed; is "
        "the evaluation split too small?"
      )

  def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
    if not self.count:
      self.count, self._mean, self._scatter = count, mean, scatter
      return
    if mean.shape != self._mean.shape:
      raise ValueError(
        f"features have {len(mean)} dimensions, earlier ones had "
        f"{len(self._mean)}"
      )
    total = self.count + count
    delta = mean - self._mean
    between = np.outer(delta, delta) * (self.count * count / total)
    self._scatter = self._scatter + scatter + between
    self._mean = self._mean + delta * (count / total)
    self.count = total


def frechet_distance(
  mean: np.ndarray,
  covariance: np.ndarray,
  other_mean: np.ndarray,
  other_covariance: np.ndarray,
) -> float:
  """Squared Fréchet distance between two Gaussians.

  Args:
    mean, other_mean: (D,).
    covariance, other_covariance: (D, D), symmetric and positive semi-definite;
      of any rank.

  Returns:
    The distance, ≥ 0; 0 for equal Gaussians, |δ|² for a mean shifted by δ. NaN
    where an input is not finite.

  Raises:
    ValueError: the two have different dimensions.
  """
  inputs = (mean, covariance, other_mean, other_covariance)
  shapes = [np.shape(x) for x in inputs]
  width = shapes[0]
  if shapes != [width, width * 2] * 2 or len(width) != 1:
    raise ValueError(
      "a Fréchet distance takes means (D,) and covariances (D, D) of one D, "
      f"got {shapes[0]} and {shapes[1]} against {shapes[2]} and {shapes[3]}"
    )
  if not all(np.isfinite(x).all() for x in inputs):
    return float("nan")
  cross = _factor(covariance).T @ _factor(other_covariance)
  overlap = np.linalg.svd(cross, compute_uv=False).sum()
  shift = np.square(np.asarray(mean, np.float64) - other_mean).sum()
  traces = np.trace(covariance) + np.trace(other_covariance)
  return max(0.0, float(shift + traces - 2.0 * overlap))


def distance_between(first: FeatureMoments, second: FeatureMoments) -> float:
  """`frechet_distance` between two sets of features.

  Raises:
    ValueError: one has fewer than two examples.
  """
  return frechet_distance(
    first.mean, first.covariance, second.mean, second.covariance
  )


def _factor(covariance: np.ndarray) -> np.ndarray:
  """L (D, rank) with L Lᵀ = covariance."""
  values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
  # Eigenvalues at rounding level are zeros of a rank-deficient covariance;
  # their roots would be 1e8 times as large.
  least = len(values) * np.finfo(np.float64).eps * max(values.max(), 0.0)
  kept = values > least
  return vectors[:, kept] * np.sqrt(values[kept])
