"""Figures of an autoencoder do not depend on how they are computed."""

import jax
import numpy as np
import pytest
import tiny
import tiny_autoencoder

from psvae_jax import sharding
from psvae_jax.config import MeshConfig
from psvae_jax.data.scenes import SceneSource
from psvae_jax.evaluators.autoencoder import AutoencoderEvaluator
from psvae_jax.evaluators.scenes import CheckerScore


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
  return tiny.save_encoder(tmp_path_factory.mktemp("encoder"))


def evaluate(encoder_folder, folder=None, devices=1, **changes):
  """All figures, and the frozen encoder's."""
  sizes = dict(num_images=11, num_probe_train=40, num_probe_test=24)
  job = tiny_autoencoder.build(
    encoder_folder, eval=dict(probe="scenes", num_samples=5) | sizes | changes
  )
  evaluator = AutoencoderEvaluator(job.model, job.config)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
  with jax.set_mesh(mesh):
    params = sharding.put_tree(job.params, mesh)
    return (
      evaluator.evaluate(params, mesh, folder, params["encoder"]),
      evaluator.encoder_floor(params["encoder"], mesh),
    )


@pytest.fixture(scope="module")
def reference(encoder_folder, tmp_path_factory):
  folder = tmp_path_factory.mktemp("reference")
  return folder, evaluate(encoder_folder, folder)


@pytest.mark.parametrize("size, devices", [(16, 1), (3, 1), (16, 8)])
def test_batch_size_and_devices_change_nothing(
  encoder_folder, reference, size, devices
):
  _, expected = reference
  found = evaluate(encoder_folder, batch_size=size, devices=devices)
  for a, b in zip(found, expected, strict=True):
    flat_a, flat_b = jax.tree.leaves(a), jax.tree.leaves(b)
    np.testing.assert_allclose(flat_a, flat_b, rtol=1e-4, atol=1e-6)


def test_figures_are_complete_and_in_range(reference):
  _, (metrics, references) = reference
  shares = [k for k in metrics if "accuracy" in k or "checker" in k]
  assert {
    "eval/probe_accuracy",
    "eval/probe_accuracy_latent",
    "eval/probe_accuracy_decoded",
    "eval/checker_accuracy",
  } <= set(shares)
  assert all(0 <= metrics[k] <= 1 for k in shares)
  assert {"eval/psnr", "eval/ssim", "eval/kl", "eval/latent_std"} <= set(
    metrics
  )
  assert references["eval/probe_accuracy_chance"] == 0.5


def test_samples_are_the_first_images_of_the_split(reference):
  folder, _ = reference
  with np.load(folder / "samples" / "validation.npz") as saved:
    original, reconstruction = saved["original"], saved["reconstruction"]
  source = SceneSource("validation", 12, 40)
  assert original.shape == reconstruction.shape == (5, 40, 40, 3)
  for i in range(5):
    np.testing.assert_array_equal(original[i], source[i]["image"])
  with np.load(folder / "latents.npz") as saved:
    assert saved["kl"].shape == (4,)


def test_checker_score_reads_the_scenes_own_images():
  source = SceneSource("validation", 20)
  score = CheckerScore(source)
  images = [source[i]["image"] for i in range(20)]
  score.update(np.arange(20), np.stack(images))
  assert score.result()["eval/checker_accuracy"] == 1.0
  score.update(np.arange(20), np.stack(images[1:] + images[:1]))
  assert score.result()["eval/checker_accuracy"] < 0.7
