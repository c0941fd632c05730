"""Kernel distance: the definition, its lack of bias, its subsets."""

import itertools

import numpy as np
import pytest

from psvae_jax.evaluators.kernel_distance import (
  kernel_distance,
  squared_discrepancy,
)

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(7, 5)), RNG.normal(size=(9, 5)) + 0.5


def _kernel(a, b):
  return (a @ b / 5 + 1) ** 3


def test_equals_the_sums_of_the_definition():
  xx = [_kernel(*pair) for pair in itertools.permutations(X, 2)]
  yy = [_kernel(*pair) for pair in itertools.permutations(Y, 2)]
  xy = [_kernel(a, b) for a in X for b in Y]
  expected = np.mean(xx) + np.mean(yy) - 2 * np.mean(xy)
  assert squared_discrepancy(X, Y) == pytest.approx(expected, rel=1e-12)


def test_unbiased_where_the_distributions_are_equal():
  draws = np.random.default_rng(1).normal(size=(400, 2, 10, 6))
  estimates = [squared_discrepancy(x, y) for x, y in draws]
  error = np.std(estimates) / np.sqrt(len(estimates))
  assert abs(np.mean(estimates)) < 3 * error
  assert min(estimates) < 0


def test_grows_with_a_shift_and_is_deterministic():
  rng = np.random.default_rng(2)
  x, y = rng.normal(size=(300, 8)), rng.normal(size=(500, 8))
  means = [kernel_distance(x + d, y)[0] for d in (0.0, 0.5, 1.0)]
  assert means[0] < 0.05 < means[1] < means[2]
  assert kernel_distance(x, y) == kernel_distance(x, y)
  assert kernel_distance(x, y) != kernel_distance(x, y, seed=1)


def test_subsets_no_larger_than_a_set():
  mean, std = kernel_distance(X, Y[:7], subset_size=1000, num_subsets=5)
  # All of each: the same estimate every time.
  assert mean == pytest.approx(squared_discrepancy(X, Y[:7]), rel=1e-12)
  assert std < 1e-12


def test_bad_input():
  with pytest.raises(ValueError, match=r"got \(1, 5\) and \(9, 5\)"):
    kernel_distance(X[:1], Y)
  with pytest.raises(ValueError, match="kernel distance takes"):
    kernel_distance(X[:, :4], Y)
  assert np.isnan(kernel_distance(X * np.nan, Y)).all()
