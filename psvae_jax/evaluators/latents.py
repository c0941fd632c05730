"""Streaming per-channel statistics of latent posteriors.

Everything is float64 on the host, merged by the rule of Chan et al. (1979), so
a result does not depend on batch size, order or the number of hosts beyond
float64 rounding.
"""

from typing import Any

import jax
import numpy as np

# log σ² is clamped to the same range as in the KL loss.
LOGVAR_RANGE = (-30.0, 20.0)
# A channel whose mean KL is below this (nats per latent dimension) says nothing
# about the image: its posterior is the prior.
COLLAPSED_KL = 0.01


class LatentMoments:
  """Moments of q(z | image) = N(μ, σ²) over examples and positions.

  Every `update` weighs each unmasked position alike; padding has no influence.
  """

  def __init__(self) -> None:
    self._count = 0
    # Rows: μ, σ², KL; columns: channels. None until the first real example.
    self._mean: np.ndarray | None = None
    self._squares: np.ndarray | None = None  # Σ (μ − mean μ)² per channel

  def update(self, mean: Any, logvar: Any, mask: Any | None = None) -> None:
    """Adds one batch.

    Args:
      mean: posterior mean μ, (B, …, C).
      logvar: log σ², the same shape; clamped to `LOGVAR_RANGE`.
      mask: (B,), true for real examples; None if all are.

    Raises:
      ValueError: if the shapes do not fit each other or earlier batches.
    """
    mean, logvar, mask = jax.device_get((mean, logvar, mask))
    mean, logvar = np.asarray(mean), np.asarray(logvar)
    if mean.ndim < 2 or mean.shape != logvar.shape:
      raise ValueError(
        "mean and logvar must both be (B, …, C), got shapes "
        f"{mean.shape} and {logvar.shape}"
      )
    if mask is not None:
      mask = np.asarray(mask).astype(bool)
      if mask.shape != mean.shape[:1]:
        raise ValueError(
          f"mask has shape {mask.shape}, expected {mean.shape[:1]}: one "
          "value an example"
        )
      mean, logvar = mean[mask], logvar[mask]
    channels = mean.shape[-1]
    mu = mean.astype(np.float64).reshape(-1, channels)
    log_variance = np.clip(logvar.astype(np.float64), *LOGVAR_RANGE)
    log_variance = log_variance.reshape(-1, channels)
    variance = np.exp(log_variance)
    # expm1: no cancellation where σ² ≈ 1, i.e. in collapsed channels.
    kl = 0.5 * (mu**2 + np.expm1(log_variance) - log_variance)
    if mu.size:
      means = np.stack([mu.mean(0), variance.mean(0), kl.mean(0)])
      squares = np.square(mu - means[0]).sum(0)
      self._add(len(mu), means, squares)

  def merge(self, other: "LatentMoments") -> None:
    """Adds everything that `other` has seen; `other` is not changed.

    Raises:
      ValueError: if the numbers of channels differ.
    """
    if other._mean is not None:
      self._add(other._count, other._mean, other._squares)

  def result(self) -> dict[str, Any]:
    """The statistics so far.

    Returns:
      A dict with float64 arrays of shape (C,):
        "mean", "std": of μ over examples and positions (population std);
        "variance": mean posterior variance σ²;
        "kl": mean KL to N(0, I), nats per latent dimension;
      and numbers:
        "kl_mean": mean of "kl" over channels, as in the KL loss;
        "collapsed": share of channels with KL < `COLLAPSED_KL`, in [0, 1];
        "count": positions seen.

    Raises:
      ValueError: if no unmasked example was added.
    """
    if self._mean is None or self._squares is None:
      raise ValueError(
        "no unmasked example was added; is the evaluation split empty?"
      )
    mean, variance, kl = self._mean.copy()
    return {
      "mean": mean,
      "std": np.sqrt(self._squares / self._count),
      "variance": variance,
      "kl": kl,
      "kl_mean": float(kl.mean()),
      "collapsed": float(np.mean(kl < COLLAPSED_KL)),
      "count": self._count,
    }

  def _add(self, count: int, mean: np.ndarray, squares: np.ndarray) -> None:
    """Merges the moments of `count` further positions."""
    if self._mean is None or self._squares is None:
      self._count = count
      self._mean, self._squares = mean.copy(), squares.copy()
      return
    if mean.shape != self._mean.shape:
      raise ValueError(
        f"latents have {mean.shape[1]} channels, earlier ones had "
        f"{self._mean.shape[1]}"
      )
    total = self._count + count
    delta = mean - self._mean
    self._squares = (
      self._squares + squares + delta[0] ** 2 * (self._count * count / total)
    )
    self._mean = self._mean + delta * (count / total)
    self._count = total
