"""Streaming latent statistics against one pass in numpy float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from psvae_jax.evaluators import latents

COUNT, SIDE, CHANNELS = 23, 4, 6
KEYS = ("mean", "std", "variance", "kl")


def _posteriors():
  """float32 μ and log σ² (23, 4, 4, 6); channel 0 far off, channel 5 empty."""
  rng = np.random.default_rng(0)
  shape = (COUNT, SIDE, SIDE, CHANNELS)
  mean = rng.normal(size=shape) * [1, 0.1, 2, 3, 1, 1e-3]
  mean += [1e4, 0, -2, 0, 0.5, 0]
  logvar = rng.normal(size=shape) - [7, 3, 1, 0, 40, 0]
  logvar[..., 5] *= 1e-3
  logvar[0, 0, 0, 3] = 25.0
  return mean.astype(np.float32), logvar.astype(np.float32)


def _expected():
  mean, logvar = (x.astype(np.float64) for x in _posteriors())
  logvar = np.clip(logvar, -30, 20)
  variance = np.exp(logvar)
  kl = 0.5 * (mean**2 + np.expm1(logvar) - logvar)
  axes = (0, 1, 2)
  return {
    "mean": mean.mean(axes),
    "std": mean.std(axes),
    "variance": variance.mean(axes),
    "kl": kl.mean(axes),
  }


def _streamed(order, batch_size, parts=1, pad=np.nan):
  mean, logvar = _posteriors()
  moments = [latents.LatentMoments() for _ in range(parts)]
  for i, start in enumerate(range(0, COUNT, batch_size)):
    rows = order[start : start + batch_size]
    shape = (batch_size, SIDE, SIDE, CHANNELS)
    batch = [np.full(shape, pad, np.float32) for _ in range(2)]
    for padded, values in zip(batch, (mean, logvar), strict=True):
      padded[: len(rows)] = values[rows]
    mask = np.arange(batch_size) < len(rows)
    moments[i % parts].update(*map(jnp.asarray, batch), jnp.asarray(mask))
  for other in moments[1:]:
    moments[0].merge(other)
  return moments[0].result()


@pytest.mark.parametrize(
  "batch_size,parts", [(1, 1), (4, 1), (5, 2), (8, 3), (23, 1), (32, 4)]
)
def test_equals_one_pass_for_any_batches_and_order(batch_size, parts):
  order = np.random.default_rng(batch_size).permutation(COUNT)
  got, want = _streamed(order, batch_size, parts), _expected()
  for key in KEYS:
    assert got[key].dtype == np.float64
    np.testing.assert_allclose(got[key], want[key], rtol=1e-10, err_msg=key)
  assert got["count"] == COUNT * SIDE * SIDE
  np.testing.assert_allclose(got["kl_mean"], want["kl"].mean(), rtol=1e-10)


def test_collapsed_share():
  got = _streamed(np.arange(COUNT), 8)
  assert got["kl"][5] < latents.COLLAPSED_KL < got["kl"][:5].min()
  assert got["collapsed"] == 1 / CHANNELS
  # The prior itself is all collapsed, and its KL is exactly zero.
  moments = latents.LatentMoments()
  moments.update(np.zeros((2, 3, CHANNELS)), np.zeros((2, 3, CHANNELS)))
  result = moments.result()
  assert result["collapsed"] == 1.0 and result["kl_mean"] == 0.0
  np.testing.assert_array_equal(result["std"], 0)


def test_kl_of_a_known_gaussian():
  moments = latents.LatentMoments()
  moments.update(np.full((1, 1), 2.0), np.full((1, 1), np.log(3.0)))
  want = 0.5 * (4 + 3 - 1 - np.log(3.0))
  np.testing.assert_allclose(moments.result()["kl"], [want], rtol=1e-14)


def test_without_mask_and_result_is_a_copy():
  mean, logvar = _posteriors()
  moments = latents.LatentMoments()
  moments.update(mean, logvar)
  moments.result()["mean"][:] = 0
  got = moments.result()
  for key in KEYS:
    np.testing.assert_allclose(got[key], _expected()[key], rtol=1e-10)


def test_padding_only_batches_change_nothing_and_emptiness_is_an_error():
  mean, logvar = _posteriors()
  moments = latents.LatentMoments()
  moments.update(mean, logvar, np.zeros(COUNT, bool))
  with pytest.raises(ValueError, match="no unmasked example"):
    moments.result()
  moments.merge(latents.LatentMoments())
  moments.update(mean, logvar)
  moments.update(mean * np.nan, logvar, np.zeros(COUNT, bool))
  assert moments.result()["count"] == COUNT * SIDE * SIDE
  empty = latents.LatentMoments()
  empty.merge(moments)
  np.testing.assert_array_equal(empty.result()["kl"], moments.result()["kl"])
  empty.update(mean, logvar)  # must not write into what it was merged from
  np.testing.assert_allclose(
    moments.result()["mean"], _expected()["mean"], rtol=1e-10
  )


def test_bad_shapes_are_refused():
  moments = latents.LatentMoments()
  with pytest.raises(ValueError, match="logvar"):
    moments.update(np.zeros((2, 3, 4)), np.zeros((2, 3, 5)))
  with pytest.raises(ValueError, match="mask"):
    moments.update(np.zeros((2, 3, 4)), np.zeros((2, 3, 4)), np.ones(3, bool))
  moments.update(np.zeros((2, 3, 4)), np.zeros((2, 3, 4)))
  with pytest.raises(ValueError, match="5 channels"):
    moments.update(np.zeros((2, 3, 5)), np.zeros((2, 3, 5)))
