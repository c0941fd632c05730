"""Colours of features: fixed directions, fixed range, and nothing random."""

import numpy as np

from psvae_jax.evaluators.feature_colors import FeatureColors

RNG = np.random.default_rng(0)
# Orthonormal directions in 8 dimensions.
AXES = np.linalg.qr(RNG.standard_normal((8, 8)))[0]


def features(scales=(9.0, 4.0, 1.0), count=400):
  """(count, 8): independent along the axes, at these scales; and those."""
  parts = RNG.uniform(-1, 1, (count, len(scales))) * scales
  return parts @ AXES[: len(scales)] + 5.0, parts


def test_strongest_directions_become_red_green_and_blue():
  x, parts = features()
  colors = FeatureColors(x)(x)
  assert colors.shape == (400, 3) and colors.dtype == np.uint8
  for channel in range(3):
    correlation = np.corrcoef(colors[:, channel], parts[:, channel])[0, 1]
    assert abs(correlation) > 0.99


def test_any_order_and_shape_give_the_same_colours():
  x, _ = features()
  expected = FeatureColors(x)(x)
  shuffled = FeatureColors(RNG.permutation(x).reshape(4, 10, 10, 8))
  found = shuffled(x.reshape(20, 20, 8)).reshape(-1, 3)
  assert np.abs(found.astype(int) - expected).max() <= 1


def test_a_direction_points_where_its_largest_weight_does():
  for seed in range(4):
    axes = np.linalg.qr(np.random.default_rng(seed).standard_normal((8, 8)))[0]
    parts = features()[1]
    x = parts @ axes[:3]
    for channel, axis in enumerate(axes[:3]):
      axis = axis * np.sign(axis[np.abs(axis).argmax()])
      step = 0.3 * np.ptp(parts[:, channel]) * axis
      low, high = FeatureColors(x)(np.stack([-step, step]))
      assert high[channel] > low[channel]


def test_other_features_are_seen_in_the_range_of_the_fitted_ones():
  x, _ = features()
  colors = FeatureColors(x)
  faded = x.mean(0) + 0.5 * (x - x.mean(0))
  assert colors(faded)[:, 0].std() < 0.6 * colors(x)[:, 0].std()
  far = colors(x.mean(0) + 100 * (x - x.mean(0)))
  assert np.isin(far[:, 0], (0, 255)).mean() > 0.95


def test_an_outlier_does_not_take_the_range():
  x, _ = features()
  with_outlier = np.concatenate([x, x[:1] + 1000 * AXES[0]])
  spread = FeatureColors(with_outlier)(x)[:, 0]
  assert np.ptp(spread.astype(int)) > 200


def test_degenerate_and_broken_features_are_still_colours():
  for level in (0.0, 1.0, 0.1):
    even = np.full((2, 3, 3, 8), level)
    np.testing.assert_array_equal(FeatureColors(even)(even), 128)
  two = FeatureColors(RNG.standard_normal((50, 2)))(np.zeros((4, 2)))
  np.testing.assert_array_equal(two[:, 2], 128)
  broken = np.full((5, 8), np.nan)
  broken[0] = np.inf
  assert FeatureColors(broken)(broken).shape == (5, 3)
