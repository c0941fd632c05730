"""Sample sets: what a report shows is what the model does."""

import jax
import numpy as np
import pytest
import tiny
import tiny_autoencoder

from psvae_jax import sharding
from psvae_jax.config import MeshConfig
from psvae_jax.evaluators import photographs
from psvae_jax.evaluators.autoencoder import AutoencoderEvaluator
from psvae_jax.evaluators.feature_colors import FeatureColors
from psvae_jax.evaluators.pictures import latent_pictures

COUNT = 5


class Job:
  """A tiny autoencoder whose encoder was tuned away from its teacher."""

  def __init__(self, folder, **data):
    tiny_model = tiny_autoencoder.build(
      folder, eval=dict(num_images=6, num_samples=COUNT), data=data
    )
    self.model, self.teacher = tiny_model.model, tiny_model.teacher
    self.params = tiny.randomise(tiny_model.params)
    self.evaluator = AutoencoderEvaluator(self.model, tiny_model.config)

  def evaluate(self, folder, *, tuned=True, devices=1):
    """Runs the evaluation; returns the sample sets it wrote."""
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
      teacher = sharding.put_tree(self.teacher, mesh)
      params = sharding.put_tree(self.params, mesh)
      if not tuned:
        params["encoder"] = teacher
      self.evaluator.evaluate(params, mesh, folder, teacher)
    return samples_of(folder)


def samples_of(folder):
  sets = {}
  for path in sorted((folder / "samples").iterdir()):
    with np.load(path) as arrays:
      sets[path.name] = dict(arrays)
  return sets


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
  return tiny.save_encoder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def job(encoder_folder):
  return Job(encoder_folder)


@pytest.fixture(scope="module")
def samples(job, tmp_path_factory):
  return job.evaluate(tmp_path_factory.mktemp("tuned"))


def test_both_sets_are_there_and_whole(samples):
  assert list(samples) == ["photographs.npz", "validation.npz"]
  for arrays in samples.values():
    shapes = {k: v.shape for k, v in arrays.items()}
    assert shapes == {
      "original": (COUNT, 40, 40, 3),
      "reconstruction": (COUNT, 40, 40, 3),
      "caption": (COUNT,),
      "features_frozen": (COUNT, 4, 4, 3),
      "features_tuned": (COUNT, 4, 4, 3),
      "features_decoded": (COUNT, 4, 4, 3),
      "latent": (COUNT, 4, 4, 4),
      "latent_channel": (4,),
    }
    dtypes = {v.dtype for k, v in arrays.items() if k.startswith("features")}
    assert dtypes == {np.dtype(np.uint8)}
    assert all(arrays["caption"])


def test_photographs_are_the_fixed_ones(samples):
  images, captions = photographs.load(40, COUNT)
  arrays = samples["photographs.npz"]
  np.testing.assert_array_equal(arrays["original"], images)
  assert arrays["caption"].tolist() == captions


def test_pictures_are_the_models(job, samples):
  arrays = samples["validation.npz"]
  x = arrays["original"].astype(np.float32) / 127.5 - 1

  @jax.jit
  def run(params, teacher, x):
    f = job.model.features(params["encoder"], x)
    z = job.model.posterior(params["semantic_encoder"], f).mean
    return {
      "frozen": job.model.features(teacher, x),
      "tuned": f,
      "decoded": job.model.decode_features(params["semantic_decoder"], z),
      "pixels": job.model.decode_pixels(params["pixel_decoder"], z),
    }

  out = jax.device_get(run(job.params, job.teacher, x))
  pixels = np.clip((out.pop("pixels") + 1) * 127.5, 0, 255)
  assert np.abs(arrays["reconstruction"] - pixels).max() <= 0.51
  colors = FeatureColors(out["frozen"])
  for name, value in out.items():
    found = arrays[f"features_{name}"].astype(int)
    assert np.abs(found - colors(value)).max() <= 1, name
  differ = arrays["features_tuned"] != arrays["features_frozen"]
  assert differ.mean() > 0.1


def test_a_stage_with_a_frozen_encoder_shows_it_once(job, samples, tmp_path):
  frozen = job.evaluate(tmp_path, tuned=False)
  for name, arrays in frozen.items():
    assert "features_tuned" not in arrays
    # One basis for all stages: it comes from the frozen encoder alone.
    np.testing.assert_array_equal(
      arrays["features_frozen"], samples[name]["features_frozen"]
    )


def test_eight_devices_make_the_same_pictures(job, samples, tmp_path):
  found = job.evaluate(tmp_path, devices=8)
  for name, arrays in samples.items():
    for key, array in arrays.items():
      if array.dtype == np.uint8:
        difference = found[name][key].astype(int) - array
        assert np.abs(difference).max() <= 1, (name, key)


def test_no_photographs_beside_photographs(encoder_folder, tmp_path):
  job = Job(encoder_folder, source="bundled", num_train=0, num_eval=8)
  samples = job.evaluate(tmp_path)
  assert list(samples) == ["validation.npz"]


def test_missing_photographs_leave_the_reason(job, tmp_path, monkeypatch):
  def missing(size, count):
    raise FileNotFoundError("no pictures here")

  monkeypatch.setattr(photographs, "load", missing)
  samples = job.evaluate(tmp_path)
  assert samples["photographs.npz"] == {"note": "no pictures here"}
  assert len(samples["validation.npz"]["original"]) == COUNT


def test_latent_pictures_are_the_telling_channels_around_their_mean():
  statistics = {
    "kl": np.array([0.5, 9, 0.1, 8, 7, 6, 5, 4, 3, 2]),
    "mean": np.arange(10.0),
    "std": np.full(10, 2.0),
  }
  mu = np.zeros((1, 1, 3, 10)) + np.arange(10.0)
  mu[0, 0, 1] += 3 * 2.0
  mu[0, 0, 2] -= 1000.0
  pictures = latent_pictures(mu, statistics)
  channels = pictures["latent_channel"]
  np.testing.assert_array_equal(channels, [1, 3, 4, 5, 6, 7, 8, 9])
  np.testing.assert_array_equal(
    pictures["latent"][0, 0], [[128] * 8, [255] * 8, [1] * 8]
  )
