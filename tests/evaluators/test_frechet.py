"""Fréchet distance: other formulas, closed forms, and streams."""

import numpy as np
import pytest
import scipy.linalg

from psvae_jax.evaluators.frechet import (
  FeatureMoments,
  distance_between,
  frechet_distance,
)


def _features(seed, count, width, rank=None):
  """Correlated features with a mean, of full rank unless stated."""
  rng = np.random.default_rng(seed)
  mixing = rng.normal(size=(rank or width, width))
  return rng.normal(size=(count, rank or width)) @ mixing + rng.normal(
    size=width
  )


def _of(features):
  return FeatureMoments().update(features)


def _by_sqrtm(x, y):
  """The formula as pytorch-fid has it."""
  covariances = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
  root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
  shift = x.mean(0) - y.mean(0)
  return shift @ shift + sum(map(np.trace, covariances)) - 2 * np.trace(root)


def _by_examples(x, y):
  """From the examples themselves: no covariance, for any number of them."""
  shift = x.mean(0) - y.mean(0)
  x, y = ((a - a.mean(0)) / np.sqrt(len(a) - 1) for a in (x, y))
  overlap = np.linalg.norm(x @ y.T, "nuc")
  return shift @ shift + np.square(x).sum() + np.square(y).sum() - 2 * overlap


@pytest.mark.parametrize("count", [40, 1000])
def test_equals_the_matrix_square_root(count):
  x, y = _features(0, count, 24), _features(1, 700, 24)
  expected = _by_sqrtm(x, y)
  assert distance_between(_of(x), _of(y)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("counts", [(9, 12), (9, 500), (2, 2)])
def test_fewer_examples_than_dimensions(counts):
  x, y = _features(0, counts[0], 64), _features(1, counts[1], 64)
  expected = _by_examples(x, y)
  assert distance_between(_of(x), _of(y)) == pytest.approx(expected, rel=1e-6)


def test_rank_deficient_features():
  x, y = _features(0, 400, 64, rank=5), _features(1, 400, 64, rank=7)
  expected = _by_examples(x, y)
  assert distance_between(_of(x), _of(y)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [10, 500])
def test_equal_sets_have_none_and_a_shift_its_square(count):
  x = 100 * _features(0, count, 48)
  assert 0 <= distance_between(_of(x), _of(x)) < 1e-6
  shift = np.random.default_rng(1).normal(size=48)
  got = distance_between(_of(x), _of(x + shift))
  assert got == pytest.approx(shift @ shift, rel=1e-6)


def test_diagonal_gaussians():
  a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
  zero = np.zeros(3)
  got = frechet_distance(zero, np.diag(a), zero, np.diag(b))
  assert got == pytest.approx(np.square(np.sqrt(a) - np.sqrt(b)).sum())


def test_moments_do_not_depend_on_batches():
  x = _features(0, 101, 8) + 1e4
  whole = _of(x)
  parts = FeatureMoments()
  for start in range(0, 101, 7):
    parts.update(x[start : start + 7])
  merged = _of(x[60:])
  merged.merge(FeatureMoments())
  merged.merge(_of(x[:60]))
  for moments in (whole, parts, merged):
    assert moments.count == 101
    np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(
      moments.covariance, np.cov(x, rowvar=False), rtol=1e-9, atol=1e-9
    )


def test_float32_features_are_summed_in_float64():
  x = (_features(0, 5000, 4) + 1000).astype(np.float32)
  np.testing.assert_allclose(
    _of(x).covariance, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-9
  )


def test_what_is_not_finite_is_nan_and_too_few_is_an_error():
  x = _features(0, 10, 4)
  broken = x.copy()
  broken[3, 1] = np.inf
  with np.errstate(invalid="ignore"):
    assert np.isnan(distance_between(_of(x), _of(broken)))
  with pytest.raises(ValueError, match="1 examples were added, at least 2"):
    distance_between(_of(x[:1]), _of(x))
  with pytest.raises(ValueError, match="5 dimensions, earlier ones had 4"):
    _of(x).update(np.zeros((2, 5)))
  with pytest.raises(ValueError, match="must be"):
    _of(np.zeros(3))


@pytest.mark.parametrize(
  "counts, width", [((700, 900), 96), ((40, 900), 96), ((30, 50), 96)]
)
def test_equals_pytorch_fid_for_given_statistics(counts, width):
  pytest.importorskip("torchvision_ops")
  fid_score = pytest.importorskip("pytorch_fid.fid_score")
  x, y = _features(3, counts[0], width), _features(4, counts[1], width)
  ours = [_of(features) for features in (x, y)]
  statistics = [(m.mean, m.covariance) for m in ours]
  want = fid_score.calculate_frechet_distance(*statistics[0], *statistics[1])
  got = frechet_distance(*statistics[0], *statistics[1])
  assert got == pytest.approx(want, rel=1e-6)


def test_any_split_over_batches_and_hosts_gives_the_same():
  x = _features(5, 500, 16) + 300
  whole = _of(x)
  rng = np.random.default_rng(6)
  for _ in range(5):
    order, hosts = rng.permutation(500), [FeatureMoments() for _ in range(4)]
    cuts = np.sort(rng.choice(499, 20, replace=False) + 1)
    for part in np.split(order, cuts):
      hosts[rng.integers(4)].update(x[part])
    total = FeatureMoments()
    for host in hosts:
      total.merge(host)
    for name in ("mean", "covariance"):
      got, want = getattr(total, name), getattr(whole, name)
      assert np.abs(got - want).max() <= 1e-12 * np.abs(want).max()


def test_what_is_saved_goes_on_with_the_same_bits():
  x = _features(0, 90, 5)
  straight = _of(x[:50]).update(x[50:])
  saved = _of(x[:50]).to_arrays()
  resumed = FeatureMoments.from_arrays(saved).update(x[50:])
  assert resumed.count == straight.count
  np.testing.assert_array_equal(resumed.mean, straight.mean)
  np.testing.assert_array_equal(resumed.covariance, straight.covariance)
  empty = FeatureMoments.from_arrays(FeatureMoments().to_arrays())
  assert empty.count == 0


def test_other_dimensions_are_an_error():
  x, y = _of(_features(0, 9, 4)), _of(_features(0, 9, 5))
  with pytest.raises(ValueError, match=r"got \(4,\) and \(4, 4\) against \(5,"):
    distance_between(x, y)
