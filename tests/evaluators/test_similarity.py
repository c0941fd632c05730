"""The map from captions to image features: ridge by its definition."""

import numpy as np
import pytest

from psvae_jax.evaluators import similarity
from psvae_jax.evaluators.similarity import fit_caption_map


def _pairs(seed, count, noise=0.0):
  """Texts (count, 12), one of whose columns says nothing, and images (…, 6)."""
  rng = np.random.default_rng(seed)
  text = rng.normal(size=(count, 12)) * np.linspace(1, 30, 12) + 5
  text[:, 3] = 7.0
  mixing = (
    np.random.default_rng(99).normal(size=(12, 6))
    / np.linspace(1, 30, 12)[:, None]
  )
  features = text @ mixing + noise * rng.normal(size=(count, 6)) + 3
  return text, features


def test_a_linear_relation_is_found():
  known = fit_caption_map(*_pairs(0, 200))
  text, features = _pairs(1, 100)
  matched, shuffled = known.similarity(text, features)
  assert matched > 0.9999
  assert abs(shuffled) < 0.1
  assert known.l2 == min(similarity._L2_GRID)


def test_noise_is_not_fitted():
  rng = np.random.default_rng(0)
  text, _ = _pairs(0, 60)
  known = fit_caption_map(text, rng.normal(size=(60, 6)))
  assert known.l2 == max(similarity._L2_GRID)
  matched, _ = known.similarity(_pairs(1, 200)[0], rng.normal(size=(200, 6)))
  assert abs(matched) < 0.2


def test_shuffled_is_the_mean_over_all_other_pairs():
  known = fit_caption_map(*_pairs(0, 50, noise=1.0))
  text, features = _pairs(1, 9, noise=1.0)
  a = known.predict(text)
  b = features - known.feature_mean
  cosines = (a @ b.T) / np.outer(
    np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
  )
  others = cosines[~np.eye(9, dtype=bool)].mean()
  got = known.similarity(text, features)
  np.testing.assert_allclose(got, (np.trace(cosines) / 9, others), rtol=1e-9)
  assert np.isnan(known.similarity(text[:1], features[:1])[1])


def _solve(text, features, l2):
  """Ridge by the normal equations of standardised text, intercept apart."""
  mean, std = text.mean(0), text.std(0)
  std[std < 1e-9] = np.inf
  x = (text - mean) / std
  normal = x.T @ x / len(x) + l2 * np.eye(x.shape[1])
  weights = np.linalg.solve(
    normal, x.T @ (features - features.mean(0)) / len(x)
  )
  return weights / std[:, None]


def test_weights_and_the_choice_of_l2():
  text, features = _pairs(0, 40, noise=2.0)
  known = fit_caption_map(text, features)
  np.testing.assert_allclose(
    known.weights, _solve(text, features, known.l2), rtol=1e-7, atol=1e-10
  )

  # Leaving each pair out in turn, with the statistics of all.
  mean, std = text.mean(0), text.std(0)
  std[std < 1e-9] = np.inf
  x = np.hstack([(text - mean) / std, np.ones((40, 1))])
  penalty = np.diag([1.0] * 12 + [0.0])

  def error(l2):
    total = 0.0
    for i in range(40):
      rest = np.arange(40) != i
      normal = x[rest].T @ x[rest] + 40 * l2 * penalty
      weights = np.linalg.solve(
        normal + 1e-12 * np.eye(13), x[rest].T @ features[rest]
      )
      total += np.square(x[i] @ weights - features[i]).sum()
    return total

  assert known.l2 == min(similarity._L2_GRID, key=error)


def test_bad_input():
  text, features = _pairs(0, 5)
  with pytest.raises(ValueError, match="5 texts and 4 images"):
    fit_caption_map(text, features[:4])
  with pytest.raises(ValueError, match="NaN"):
    fit_caption_map(text * np.nan, features)
