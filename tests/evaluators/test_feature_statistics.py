"""Streaming statistics: splits, padding, restarts."""

import numpy as np
import pytest

from psvae_jax.evaluators.feature_statistics import FeatureStatistics
from psvae_jax.evaluators.inception_score import InceptionScore

RNG = np.random.default_rng(0)
FEATURES = {
  "pool": RNG.normal(size=(60, 5)).astype(np.float32) + 9,
  "logits": RNG.normal(size=(60, 7)).astype(np.float32),
}
FIGURES = {"psnr": RNG.normal(size=60).astype(np.float32) + 25}


def _empty():
  return FeatureStatistics(["pool"], InceptionScore(60))


def _add(statistics, rows, padding=0):
  def padded(x):
    return np.concatenate([x[rows], np.full_like(x[:padding], np.nan)])

  index = np.concatenate([rows, np.full(padding, -1, int)])
  return statistics.update(
    {k: padded(v) for k, v in FEATURES.items()},
    {k: padded(v) for k, v in FIGURES.items()},
    index,
    index >= 0,
  )


def _figures(statistics):
  moments = statistics.moments["pool"]
  return [
    moments.mean,
    moments.covariance.ravel(),
    statistics.score.result(),
    [statistics.means.result()["psnr"], statistics.count],
  ]


def test_any_split_gives_the_same():
  whole = _empty()
  _add(whole, np.arange(60))
  assert whole.count == 60
  parts = [_empty() for _ in range(3)]
  for i, rows in enumerate(np.array_split(RNG.permutation(60), 13)):
    _add(parts[i % 3], rows, padding=i % 4)
  _add(parts[0], np.arange(0), padding=4)
  total = _empty()
  for part in parts:
    total.merge(part)
  for got, want in zip(_figures(total), _figures(whole), strict=True):
    error = np.abs(np.subtract(got, want)).max()
    assert error <= 1e-12 * np.abs(want).max()


def test_a_restart_gives_the_same_bits():
  straight, first, second = _empty(), _empty(), _empty()
  _add(straight, np.arange(40))
  _add(straight, np.arange(40, 60), padding=2)
  _add(first, np.arange(40))
  second.restore(first.to_arrays())
  _add(second, np.arange(40, 60), padding=2)
  for got, want in zip(_figures(second), _figures(straight), strict=True):
    np.testing.assert_array_equal(got, want)
  with pytest.raises(KeyError):
    _empty().restore({})


def test_other_kinds_do_not_merge():
  with pytest.raises(ValueError, match="cannot merge statistics of"):
    _empty().merge(FeatureStatistics(["spatial"]))
