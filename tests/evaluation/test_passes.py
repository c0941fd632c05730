"""Passes over images: restarts, damage, padding, devices."""

import dataclasses

import numpy as np
import pytest
import tiny_metrics

from psvae_jax import sharding
from psvae_jax.config import MeshConfig
from psvae_jax.evaluation import passes
from psvae_jax.evaluation.image_sets import open_set
from psvae_jax.evaluators.feature_networks import FeatureExtractor

COUNT = 45


@pytest.fixture(scope="module")
def mesh():
  return sharding.make_mesh(MeshConfig())


@pytest.fixture(scope="module")
def work(mesh):
  extractor = FeatureExtractor([tiny_metrics.inception()], mesh)

  def step(image, index):
    return extractor(image), {"mean": image.astype(np.float32).mean((1, 2, 3))}

  return passes.Pass(
    "tiny",
    open_set("scenes", size=16, count=COUNT),
    step,
    {"model": 1},
    moments=["pool", "spatial"],
    rows=["pool"],
    score=True,
  )


def _figures(result):
  moments = result.statistics.moments
  return [
    result.count,
    *(m.mean for m in moments.values()),
    *(m.covariance for m in moments.values()),
    result.statistics.score.result(),
    result.statistics.means.result()["mean"],
    np.array(result.rows["pool"]),
  ]


def _assert_same(first, second):
  for a, b in zip(_figures(first), _figures(second), strict=True):
    np.testing.assert_array_equal(a, b)


def test_equals_what_the_network_gives_by_itself(work, mesh, tmp_path):
  result = passes.run(work, tmp_path, mesh, batch_size=13)
  assert passes.whole_batch(13, COUNT, mesh) == 16
  network = tiny_metrics.inception()
  images = np.concatenate(
    [b["image"][b["mask"]] for b in work.images.batches(45)]
  )
  want = np.asarray(network.features(network.params, images)["pool"])
  np.testing.assert_allclose(result.rows["pool"], want, rtol=1e-5, atol=1e-5)
  assert isinstance(result.rows["pool"], np.memmap)
  moments = result.statistics.moments["pool"]
  np.testing.assert_allclose(moments.mean, want.mean(0), rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(
    moments.covariance, np.cov(want.T), rtol=1e-4, atol=1e-6
  )
  assert result.count == COUNT and result.bad == ()


@pytest.mark.parametrize("stop", [1, 2, 3, 5])
def test_an_interrupted_pass_ends_with_the_same_bits(
  work, mesh, tmp_path, stop
):
  options = dict(batch_size=8, save_every=2)
  whole = passes.run(work, tmp_path / "whole", mesh, **options)

  def interrupt(done):
    if done == stop:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    passes.run(work, tmp_path / "cut", mesh, on_batch=interrupt, **options)
  seen = []
  resumed = passes.run(
    work, tmp_path / "cut", mesh, on_batch=seen.append, **options
  )
  assert seen == list(range(stop // 2 * 2 + 1, 7))
  _assert_same(resumed, whole)
  again = passes.run(
    work, tmp_path / "cut", mesh, on_batch=seen.append, **options
  )
  assert len(seen) == len(set(seen))  # nothing was computed
  _assert_same(again, whole)


def test_other_settings_begin_anew(work, mesh, tmp_path):
  passes.run(work, tmp_path, mesh, batch_size=16)
  seen = []
  other = dataclasses.replace(work, identity={"model": 2})
  passes.run(other, tmp_path, mesh, batch_size=16, on_batch=seen.append)
  assert seen == [1, 2, 3]


@pytest.mark.parametrize("damage", ["cut", "rows", "text"])
def test_damaged_files_begin_anew(work, mesh, tmp_path, capsys, damage):
  whole = passes.run(work, tmp_path, mesh, batch_size=16)
  (state,) = tmp_path.glob("*.npz")
  (rows,) = tmp_path.glob("*.rows")
  if damage == "cut":
    state.write_bytes(state.read_bytes()[:-40])
  elif damage == "rows":
    rows.write_bytes(rows.read_bytes()[:-4])
  else:
    state.write_text("x")
  capsys.readouterr()
  _assert_same(passes.run(work, tmp_path, mesh, batch_size=16), whole)
  assert "cannot be used" in capsys.readouterr().out


def test_device_count_changes_only_rounding(work, mesh, tmp_path):
  import jax

  one = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  extractor = FeatureExtractor([tiny_metrics.inception()], one)
  single = dataclasses.replace(
    work,
    step=lambda image, index: (
      extractor(image),
      {"mean": image.astype(np.float32).mean((1, 2, 3))},
    ),
  )
  first = passes.run(single, tmp_path / "one", one, batch_size=7)
  second = passes.run(work, tmp_path / "eight", mesh, batch_size=16)
  for a, b in zip(_figures(first), _figures(second), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_unreadable_images_do_not_count(work, mesh, tmp_path):
  from PIL import Image

  folder = tmp_path / "images"
  folder.mkdir()
  rng = np.random.default_rng(0)
  for i in range(20):
    pixels = rng.integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{i:02d}.png")
  for i in (4, 17):
    (folder / f"{i:02d}.png").write_bytes(b"x")
  images = open_set(str(folder), size=16, max_bad_share=0.2)
  result = passes.run(
    dataclasses.replace(work, images=images), tmp_path / "state", mesh
  )
  assert result.count == 18 and result.bad == (4, 17)
  assert len(result.rows["pool"]) == 18
