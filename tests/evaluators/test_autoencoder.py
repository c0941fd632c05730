"""Figures of an autoencoder do not depend on how they are computed."""

import jax
import numpy as np
import pytest
import tiny
import tiny_autoencoder
from PIL import Image

from psvae_jax import sharding
from psvae_jax.config import MeshConfig
from psvae_jax.config import parser as config_parser
from psvae_jax.data import quarantine
from psvae_jax.data.scenes import SceneSource
from psvae_jax.evaluators.autoencoder import AutoencoderEvaluator
from psvae_jax.evaluators.image_metrics import MeanAccumulator
from psvae_jax.evaluators.scenes import CheckerScore
from psvae_jax.tasks import make_task
from psvae_jax.tasks.base import EvalContext


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


@pytest.mark.parametrize("chief", [True, False])
def test_every_host_keeps_the_place_of_a_vanished_file(
  encoder_folder, tmp_path, monkeypatch, chief
):
  """Only one host has a folder to write to; all must see the same data."""
  root = tmp_path / "images"
  root.mkdir()
  for i in range(12):
    Image.new("RGB", (40, 40), (20 * i, 0, 0)).save(root / f"{i:02d}.png")
  raw = tiny.config(encoder_folder)
  raw.data = dict(source="folder", root=str(tmp_path), eval_root=str(root))
  raw.data.update(max_bad_share=0.2, augment="center")
  raw.eval.update(num_images=12, probe="none")
  config = config_parser.parse(raw)
  file = tmp_path / "quarantine.jsonl"
  (root / "03.png").rename(tmp_path / "03.png")
  quarantine.Quarantine(
    split="train", source=str(root), num_records=12, max_bad_share=1, file=file
  ).add({3: ("03.png", quarantine.Fault("image", "gone"))})
  seen, update = [], MeanAccumulator.update

  def updated(self, values, mask=None):
    seen.append(np.asarray(mask))
    update(self, values, mask)

  monkeypatch.setattr(MeanAccumulator, "update", updated)
  task = make_task("svae", config, encoder_folder)
  mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
  with jax.set_mesh(mesh):
    params = jax.jit(task.model.init)(jax.random.key(0), task.frozen["teacher"])
    folder = tmp_path / "svae" if chief else None
    task.evaluate(params, task.frozen, EvalContext(mesh, folder, file))
  mask = np.concatenate(seen)
  assert np.flatnonzero(~mask[:12]).tolist() == [3]
  assert (tmp_path / "svae" / "latents.npz").exists() == chief


def test_checker_score_reads_the_scenes_own_images():
  source = SceneSource("validation", 20)
  score = CheckerScore(source)
  images = [source[i]["image"] for i in range(20)]
  score.update(np.arange(20), np.stack(images))
  assert score.result()["eval/checker_accuracy"] == 1.0
  score.update(np.arange(20), np.stack(images[1:] + images[:1]))
  assert score.result()["eval/checker_accuracy"] < 0.7
