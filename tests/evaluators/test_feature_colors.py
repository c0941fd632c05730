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


def test_the_sign_of_a_direction_is_fixed():
  # A reflected copy has the same principal axes, with either sign.
  x, _ = features()
  centre = x.mean(0)
  for scale, axis in zip((9.0, 4.0, 1.0), AXES[:3], strict=True):
    pair = np.stack([centre - 0.3 * scale * axis, centre + 0.3 * scale * axis])
    change = [
      np.sign(np.diff(FeatureColors(fitted)(pair).astype(int), axis=0))
      for fitted in (x, 2 * centre - x)
    ]
    np.testing.assert_array_equal(*change)
    assert np.any(change[0])


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
  even = FeatureColors(np.ones((2, 3, 3, 8)))(np.ones((2, 3, 3, 8)))
  np.testing.assert_array_equal(even, 128)
  two = FeatureColors(RNG.standard_normal((50, 2)))(np.zeros((4, 2)))
  np.testing.assert_array_equal(two[:, 2], 128)
  broken = np.full((5, 8), np.nan)
  broken[0] = np.inf
  assert FeatureColors(broken)(broken).shape == (5, 3)
