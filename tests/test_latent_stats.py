"""Latent statistics: exact, whatever the order; bound to one autoencoder."""

import json

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from psvae_jax import latent_stats
from psvae_jax.latent_stats import STD_FLOOR, LatentMoments, LatentStats


def latents(count=40, channels=3, seed=0):
  """Channels of different offset and spread, the last far from zero."""
  z = np.random.default_rng(seed).standard_normal((count, 4, 5, channels))
  offset = np.array([0.0, -2.5, 1000.0])[:channels]
  return (z * np.array([1.0, 30.0, 1e-2])[:channels] + offset).astype(
    np.float32
  )


def moments(*batches):
  total = LatentMoments(batches[0].shape[-1])
  for batch in batches:
    total.update(batch)
  return total


def assert_equal(a, b):
  """Bit for bit."""
  np.testing.assert_array_equal(a.mean, b.mean)
  np.testing.assert_array_equal(a.std, b.std)
  assert a.count == b.count


def test_mean_and_deviation_to_the_last_bit():
  z = latents()
  stats = moments(z).result("a")
  flat = z.reshape(-1, 3).astype(np.longdouble)
  np.testing.assert_array_equal(stats.mean, flat.mean(0).astype(np.float32))
  np.testing.assert_array_equal(stats.std, flat.std(0).astype(np.float32))
  assert stats.mean.dtype == stats.std.dtype == np.float32
  assert stats.count == 40


@pytest.mark.parametrize("size", [1, 3, 7, 40])
def test_batch_size_and_order_change_nothing(size):
  z = latents()
  order = np.random.default_rng(1).permutation(40)
  parts = [z[order[i : i + size]] for i in range(0, 40, size)]
  assert_equal(moments(*parts).result("a"), moments(z).result("a"))


def test_small_chunks_change_nothing(monkeypatch):
  whole = moments(latents()).result("a")
  monkeypatch.setattr(latent_stats, "_CHUNK", 7)
  assert_equal(moments(latents()).result("a"), whole)


@pytest.mark.parametrize("hosts", [2, 3])
def test_hosts_change_nothing(hosts):
  z = latents()
  total = LatentMoments(3)
  for host in range(hosts):
    # As bytes, the way hosts exchange them.
    part = moments(z[host::hosts])
    total.merge(part._unpack(part._pack()))
  assert_equal(total.result("a"), moments(z).result("a"))


def test_extreme_values():
  z = np.zeros((2, 1, 2, 2), np.float32)
  z[..., 0] = [[[1e38, -1e38]], [[1e-45, 0]]]  # 1e-45 is subnormal
  z[..., 1] = 1e-30 * np.array([[[1, -1]], [[3, -3]]])
  stats = moments(z).result("a")
  np.testing.assert_allclose(stats.mean, [3.5e-46, 0], atol=1e-45)
  assert stats.std[0] == pytest.approx(1e38 / np.sqrt(2))
  assert stats.std[1] == np.float32(STD_FLOOR)


def test_masked_rows_do_not_count():
  z = latents()
  broken = z.copy()
  broken[::2] = np.nan
  total = LatentMoments(3)
  total.update(broken, np.arange(40) % 2 == 1)
  assert_equal(total.result("a"), moments(z[1::2]).result("a"))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_smaller_types_count_as_they_are(dtype):
  z = latents().astype(dtype)
  assert_equal(
    moments(z).result("a"), moments(z.astype(np.float32)).result("a")
  )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(value):
  z = latents()
  z[3, 0, 0, 1] = value
  with pytest.raises(ValueError, match="latents of 1 of 40 images are not fin"):
    LatentMoments(3).update(z)


@pytest.mark.parametrize(
  "z, message",
  [
    (np.zeros((2, 4, 5, 4), np.float32), r"\(B, h, w, 3\), got \(2, 4, 5, 4\)"),
    (np.zeros((4, 5, 3), np.float32), r"got \(4, 5, 3\)"),
    (np.zeros((2, 4, 5, 3)), "float32 or smaller, got float64"),
  ],
)
def test_bad_latents(z, message):
  with pytest.raises(ValueError, match=message):
    LatentMoments(3).update(z)


def test_nothing_to_measure():
  with pytest.raises(ValueError, match="of no images"):
    LatentMoments(3).result("a")
  with pytest.raises(ValueError, match="is empty"):
    latent_stats.measure([], fingerprint="a")
  with pytest.raises(ValueError, match="of 2 and 3 channels"):
    LatentMoments(3).merge(LatentMoments(2))


def test_stored_latents_leave_out_replacements():
  z = latents()
  elements = [{"latent": z[i], "index": i} for i in range(40)]
  elements[5] = elements[9]  # record 5 is bad, and 9 stands for it
  kept = moments(np.delete(z[:20], 5, axis=0)).result("a")
  for size in (1, 7, 64):
    found = latent_stats.measure(
      elements, fingerprint="a", count=20, batch_size=size
    )
    assert_equal(found, kept)


@pytest.mark.parametrize("xp", [np, jnp])
def test_normalising(xp):
  z = latents(200)
  stats = moments(z).result("a")
  normal = stats.normalise(xp.asarray(z))
  assert isinstance(normal, xp.ndarray) and normal.dtype == np.float32
  flat = np.asarray(normal, np.float64).reshape(-1, 3)
  np.testing.assert_allclose(flat.mean(0), 0, atol=3e-3)
  np.testing.assert_allclose(flat.std(0), 1, atol=1e-3)
  np.testing.assert_allclose(stats.denormalise(normal), z, rtol=1e-6, atol=1e-5)
  half = stats.normalise(xp.asarray(z[..., :3], np.float16))
  assert half.dtype == np.float32


def test_a_channel_that_does_not_vary():
  z = latents()
  z[..., 1] = 0.3
  stats = moments(z).result("a")
  assert stats.std[1] == np.float32(STD_FLOOR)
  normal = stats.normalise(z)
  assert np.isfinite(normal).all() and not normal[..., 1].any()
  assert (stats.denormalise(normal)[..., 1] == np.float32(0.3)).all()


def test_saved_and_loaded(tmp_path):
  data = {"source": "scenes", "num_examples": 40}
  stats = moments(latents()).result("abc", data)
  path = tmp_path / "new" / "latent_stats.json"
  stats.save(path)
  assert_equal(LatentStats.load(path, "abc"), stats)
  assert LatentStats.load(path, "abc").data == data
  raw = json.loads(path.read_text())
  assert raw["fingerprint"] == "abc" and raw["count"] == 40


def test_another_autoencoder_is_refused(tmp_path):
  path = tmp_path / "latent_stats.json"
  moments(latents()).result("abc").save(path)
  with pytest.raises(ValueError, match=r"stats\.json is of .* abc, not of def"):
    LatentStats.load(path, "def")
  with pytest.raises(FileNotFoundError, match=r"other\.json is missing"):
    LatentStats.load(tmp_path / "other.json", "abc")


@pytest.mark.parametrize(
  "change",
  [
    {"mean": [0.0]},
    {"std": [1.0, -1.0, 1.0]},
    {"std": [1.0, float("nan"), 1.0]},
    {"count": None},
    {"mean": None},
    {"data": 3},
  ],
)
def test_damaged_file(tmp_path, change):
  path = tmp_path / "latent_stats.json"
  moments(latents()).result("abc").save(path)
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(ValueError, match="does not hold latent statistics"):
    LatentStats.load(path, "abc")
  path.write_text(path.read_text()[:50])
  with pytest.raises(ValueError, match="does not hold latent statistics"):
    LatentStats.load(path, "abc")
