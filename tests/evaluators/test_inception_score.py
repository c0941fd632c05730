"""Inception score: torch-fidelity's, streams, splits."""

import numpy as np
import pytest

from psvae_jax.evaluators.inception_score import (
  InceptionScore,
  inception_score,
)

RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.normal(size=(203, 17))).astype(np.float32)


@pytest.mark.parametrize("shuffle", [True, False])
def test_equals_torch_fidelity(shuffle):
  pytest.importorskip("torchvision_ops")
  torch = pytest.importorskip("torch")
  fidelity = pytest.importorskip("torch_fidelity.metric_isc")
  want = fidelity.isc_features_to_metric(
    torch.from_numpy(LOGITS), splits=10, shuffle=shuffle, rng_seed=2020
  )
  seed = {"seed": 2020} if shuffle else {"seed": None}
  mean, std = inception_score(LOGITS, 10, **seed)
  assert mean == pytest.approx(want["inception_score_mean"], rel=1e-9)
  assert std == pytest.approx(want["inception_score_std"], rel=1e-9)


def test_equals_the_definition_of_one_split():
  p = np.exp(LOGITS.astype(float))
  p /= p.sum(1, keepdims=True)
  divergence = np.sum(p * (np.log(p) - np.log(p.mean(0))), axis=1)
  mean, std = inception_score(LOGITS, 1)
  assert mean == pytest.approx(np.exp(divergence.mean()), rel=1e-12)
  assert std == 0


def test_batches_of_any_order_hosts_and_restarts():
  whole = inception_score(LOGITS)
  order = RNG.permutation(len(LOGITS))
  hosts = [InceptionScore(len(LOGITS)) for _ in range(3)]
  for i, part in enumerate(np.array_split(order, 11)):
    hosts[i % 2].update(LOGITS[part], part)
  hosts[2].restore(hosts[0].to_arrays())
  hosts[2].merge(hosts[1])
  np.testing.assert_allclose(hosts[2].result(), whole, rtol=1e-12)


def test_sure_and_varied_is_the_number_of_classes():
  logits = np.tile(50.0 * np.eye(8), (25, 1))
  assert inception_score(logits, 5, seed=None)[0] == pytest.approx(8, rel=1e-6)
  assert inception_score(np.zeros((20, 8)), 2) == pytest.approx((1, 0))


def test_too_few_images():
  with pytest.raises(ValueError, match="10 splits needs as many .* got 9"):
    inception_score(LOGITS[:9])
  score = InceptionScore(20)
  score.update(LOGITS[:5], np.arange(5))
  with pytest.raises(ValueError, match="splits of the inception score have no"):
    score.result()
  with pytest.raises(ValueError, match="different images"):
    score.merge(InceptionScore(21))
  with pytest.raises(ValueError, match=r"must be \(B, classes\)"):
    score.update(LOGITS[:4], np.arange(5))
