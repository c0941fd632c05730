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


def test_equals_torch_fidelity_and_torchmetrics():
  """One subset of all examples: nothing depends on a seed."""
  pytest.importorskip("torchvision_ops")
  torch = pytest.importorskip("torch")
  fidelity = pytest.importorskip("torch_fidelity.metric_kid")
  metrics = pytest.importorskip("torchmetrics.image.kid")
  rng = np.random.default_rng(3)
  x = np.abs(rng.normal(size=(60, 32)))
  y = np.abs(rng.normal(size=(60, 32)) + 0.3)
  got, spread = kernel_distance(x, y, num_subsets=3, subset_size=60)
  pair = torch.from_numpy(x), torch.from_numpy(y)
  want = fidelity.kid_features_to_metric(
    *pair, kid_subsets=1, kid_subset_size=60, verbose=False
  )[fidelity.KEY_METRIC_KID_MEAN]
  assert got == pytest.approx(want, rel=1e-9)
  assert got == pytest.approx(float(metrics.poly_mmd(*pair)), rel=1e-9)
  assert spread < 1e-12


def test_memory_mapped_features_stay_on_disk(tmp_path):
  path = tmp_path / "x.npy"
  np.save(path, X.astype(np.float32))
  mapped = np.load(path, mmap_mode="r")
  assert kernel_distance(mapped, Y, subset_size=4) == kernel_distance(
    X.astype(np.float32), Y, subset_size=4
  )
