"""The trained autoencoder as an object, on a workdir that a job wrote."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import vision_reference

import psvae_jax
from psvae_jax import checkpoint, train
from psvae_jax.config import MeshConfig
from psvae_jax.config import parser as config_parser
from psvae_jax.evaluators import image_metrics
from psvae_jax.export import export
from psvae_jax.models.autoencoder import Autoencoder
from psvae_jax.psvae import stages_with_checkpoints
from psvae_jax.sharding import make_mesh
from psvae_jax.tasks import make_task
from psvae_jax.writers import write_json_atomic

STAGES = ("svae", "psvae")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
  """(workdir, stage → (task, state after training)) of a job of 2 + 2 steps."""
  folder = tmp_path_factory.mktemp("job")
  raw = tiny.config(tiny.save_encoder(folder / "encoder"), steps=2)
  raw.eval.num_images = raw.eval.num_samples = 4
  config = config_parser.parse(raw)
  workdir = folder / "run"
  write_json_atomic(workdir / "config.json", config_parser.with_defaults(raw))
  mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
  trained = {}
  for stage in STAGES:
    task = make_task(stage, config, workdir)
    task.evaluate = lambda *args: {}  # its figures are not looked at here
    trained[stage] = task, train.run_stage(task, config, mesh, workdir).state
  return workdir, trained


@pytest.fixture(scope="module")
def vaes(job):
  return {
    stage: psvae_jax.PSVAE.from_pretrained(job[0], stage=stage)
    for stage in STAGES
  }


def images(count, side=40):
  return tiny.batch(count, side)["image"]


@pytest.mark.parametrize("stage, side", [("svae", 40), ("psvae", 32)])
def test_equals_the_trained_modules(job, vaes, stage, side):
  task, state = job[1][stage]
  params = {"encoder": task.frozen["teacher"], **state.ema_params}

  @jax.jit
  def expected(params, image):
    x = image.astype(jnp.float32) / 127.5 - 1.0
    features = task.model.features(params["encoder"], x)
    z = task.model.posterior(params["semantic_encoder"], features).mean
    return features, z, task.model.decode_pixels(params["pixel_decoder"], z)

  features, z, pixels = expected(params, images(4, side))
  vae = vaes[stage]
  np.testing.assert_allclose(
    vae.features(images(4, side)), features, rtol=1e-5, atol=1e-5
  )
  np.testing.assert_allclose(
    vae.encode(images(4, side)), z, rtol=1e-5, atol=1e-5
  )
  levels = (np.asarray(pixels) + 1) * 127.5
  made = vae.reconstruct(images(4, side))
  np.testing.assert_allclose(made, levels.clip(0, 255), atol=0.5 + 1e-3)


def test_equals_the_evaluators_reconstruction(job, vaes):
  task, state = job[1]["psvae"]
  mask = np.ones(4, bool)
  batch = {"image": images(4), "mask": mask, "index": np.arange(4)}
  out = task._evaluator._reconstruct(state.ema_params, batch)
  made = vaes["psvae"].reconstruct(images(4))
  np.testing.assert_allclose(
    image_metrics.psnr(made, images(4)), out["figures"]["psnr"], rtol=1e-5
  )


def test_stages_differ(vaes):
  z = {stage: vae.encode(images(2)) for stage, vae in vaes.items()}
  assert np.abs(z["svae"] - z["psvae"]).max() > 1e-4
  same = np.array_equal(
    vaes["svae"].features(images(2)), vaes["psvae"].features(images(2))
  )
  assert not same  # stage 2 tunes the encoder


def test_types_shapes_and_attributes(job, vaes):
  vae = vaes["psvae"]
  assert (vae.image_size, vae.output_size) == (32, 40)
  assert (vae.channels, vae.grid, vae.stage) == (4, 4, "psvae")
  assert vae.fingerprint == job[1]["psvae"][0].fingerprint
  assert "40×40" in repr(vae)
  for count in (0, 3):
    z = vae.encode(images(count))
    assert (z.shape, z.dtype) == ((count, 4, 4, 4), np.float32)
    features = vae.features(images(count))
    assert (features.shape, features.dtype) == ((count, 4, 4, 16), np.float32)
    x = vae.decode(z)
    assert (x.shape, x.dtype) == ((count, 40, 40, 3), np.uint8)
  np.testing.assert_array_equal(
    vae.decode(jnp.asarray(vae.encode(jnp.asarray(images(3))))),
    vae.reconstruct(images(3)),
  )


def test_decode_rounds(job):
  """A decoder whose pixels are known: truncation would be 12 levels lower."""
  vae = psvae_jax.PSVAE.from_pretrained(job[0])
  head = vae._params["pixel_decoder"]["head"]
  head["kernel"] = jnp.zeros_like(head["kernel"])
  level = 12.75 / 127.5 - 1.0
  head["bias"] = jnp.full_like(head["bias"], level)
  assert set(vae.decode(np.zeros((1, 4, 4, 4), np.float32)).ravel()) == {13}


def test_long_inputs_are_cut_padded_and_compiled_once(job, monkeypatch):
  traced = []
  features = Autoencoder.features

  def counted(self, params, x):
    traced.append(x.shape)
    return features(self, params, x)

  monkeypatch.setattr(Autoencoder, "features", counted)
  vae = psvae_jax.PSVAE.from_pretrained(job[0], batch_size=4)
  with jax.transfer_guard("disallow"):
    whole = vae.encode(images(11))
    again = vae.encode(images(8))
  assert traced == [(4, 40, 40, 3)]
  np.testing.assert_array_equal(whole[:8], again)
  alone = np.concatenate([vae.encode(images(11)[i : i + 1]) for i in range(11)])
  np.testing.assert_allclose(whole, alone, rtol=1e-5, atol=1e-5)
  assert traced == [(4, 40, 40, 3), (1, 40, 40, 3)]


def test_few_programs_for_all_numbers_of_images(job, monkeypatch):
  traced = []
  decode = Autoencoder.decode_pixels

  def counted(self, params, z):
    traced.append(z.shape[0])
    return decode(self, params, z)

  monkeypatch.setattr(Autoencoder, "decode_pixels", counted)
  vae = psvae_jax.PSVAE.from_pretrained(job[0], batch_size=6)
  z = np.random.default_rng(0).standard_normal((13, 4, 4, 4), np.float32)
  made = {count: vae.decode(z[:count]) for count in (13, 6, 5, 3, 4, 2, 1)}
  assert traced == [6, 4, 2, 1]
  for count, images in made.items():
    assert images.shape == (count, 40, 40, 3)
    difference = images.astype(int) - made[13][:count]
    assert np.abs(difference).max() <= 1  # where a level lies on an edge
    assert (difference != 0).mean() < 1e-3


@pytest.mark.parametrize(
  "array, message",
  [
    (np.zeros((1, 40, 40, 3)), "uint8 .* got float64"),
    (np.zeros((40, 40, 3), np.uint8), r"\(40, 40, 3\); one image is images\["),
    (np.zeros((1, 40, 40, 4), np.uint8), r"\(B, H, W, 3\)"),
    (np.zeros((1, 36, 36, 3), np.uint8), "36×36.*32×32 .*40×40"),
    (np.zeros((1, 32, 40, 3), np.uint8), "32×40"),
  ],
)
def test_bad_images_are_named(vaes, array, message):
  for method in ("encode", "features", "reconstruct"):
    with pytest.raises(ValueError, match=message):
      getattr(vaes["svae"], method)(array)


@pytest.mark.parametrize(
  "array, message",
  [
    (np.zeros((1, 4, 4, 4), np.uint8), "floating point, got uint8"),
    (np.zeros((1, 4, 4, 5), np.float32), r"\(B, 4, 4, 4\), got \(1, 4, 4, 5\)"),
    (np.zeros((4, 4, 4), np.float32), r"got \(4, 4, 4\)"),
  ],
)
def test_bad_latents_are_named(vaes, array, message):
  with pytest.raises(ValueError, match=message):
    vaes["svae"].decode(array)


def copy(job, tmp_path, *stages):
  """The workdir with some stages only."""
  workdir = tmp_path / "copy"
  workdir.mkdir()
  for name in (*stages, "frozen"):
    shutil.copytree(job[0] / name, workdir / name)
  shutil.copy(job[0] / "config.json", workdir)
  return workdir


def test_the_last_stage_with_a_checkpoint_is_taken(job, tmp_path):
  assert stages_with_checkpoints(job[0]) == ["svae", "psvae"]
  assert psvae_jax.PSVAE.from_pretrained(job[0]).stage == "psvae"
  workdir = copy(job, tmp_path, "svae")
  assert psvae_jax.PSVAE.from_pretrained(workdir).stage == "svae"
  with pytest.raises(ValueError, match="no checkpoint of stage 'psvae'.*svae"):
    psvae_jax.PSVAE.from_pretrained(workdir, stage="psvae")


def test_the_encoder_is_the_frozen_copy_or_the_configs(job, vaes, tmp_path):
  workdir = copy(job, tmp_path, "svae")
  path = workdir / "config.json"
  raw = json.loads(path.read_text())
  raw["model"]["encoder"] = str(tmp_path / "moved_away")
  path.write_text(json.dumps(raw))
  expected = vaes["svae"].encode(images(2))
  found = psvae_jax.PSVAE.from_pretrained(workdir).encode(images(2))
  np.testing.assert_array_equal(found, expected)
  # A stage that is not finished has no copy yet.
  shutil.rmtree(workdir / "frozen")
  with pytest.raises(FileNotFoundError, match="moved_away"):
    psvae_jax.PSVAE.from_pretrained(workdir)
  shutil.copy(job[0] / "config.json", workdir)
  found = psvae_jax.PSVAE.from_pretrained(workdir).encode(images(2))
  np.testing.assert_array_equal(found, expected)


def test_a_stages_own_config_comes_before_the_last_jobs(job, vaes, tmp_path):
  """Another job, here one of another kind, has used the workdir since."""
  workdir = copy(job, tmp_path, "svae")
  shutil.copy(job[0] / "config.json", workdir / "svae" / "config.json")
  (workdir / "config.json").write_text('{"stages": ["encoder"]}')
  found = psvae_jax.PSVAE.from_pretrained(workdir).encode(images(2))
  np.testing.assert_array_equal(found, vaes["svae"].encode(images(2)))


def test_a_workdir_that_is_none_is_named(job, tmp_path):
  load = psvae_jax.PSVAE.from_pretrained
  with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
    load(tmp_path / "nowhere")
  with pytest.raises(FileNotFoundError, match="has no config.json"):
    load(tmp_path)
  path = tmp_path / "config.json"
  path.write_text("{}")
  with pytest.raises(ValueError, match="has no stages"):
    load(tmp_path)
  path.write_text('{"stages": ["encoder"]}')
  with pytest.raises(ValueError, match="trains encoder, not an autoencoder"):
    load(tmp_path)
  path.write_text((job[0] / "config.json").read_text())
  with pytest.raises(FileNotFoundError, match="looked for svae/checkpoints"):
    load(tmp_path)


def test_another_models_config_is_an_error(job, tmp_path):
  workdir = copy(job, tmp_path, "svae")
  path = workdir / "config.json"
  raw = json.loads(path.read_text())
  raw["model"]["channels"] = 6
  path.write_text(json.dumps(raw))
  with pytest.raises(
    checkpoint.CheckpointError, match="another model|channels"
  ):
    psvae_jax.PSVAE.from_pretrained(workdir)


def test_batch_size_is_positive(job):
  with pytest.raises(ValueError, match="batch_size must be at least 1"):
    psvae_jax.PSVAE.from_pretrained(pathlib.Path(job[0]), batch_size=0)


@pytest.fixture(scope="module")
def export_folder(job):
  """An export of the job's last stage, its tuned encoder in "tuned" beside."""
  folder = job[0].parent / "exported"
  export(job[0], folder, encoder=folder.with_name("tuned"))
  return folder


def test_an_export_decodes_to_the_bit(vaes, export_folder):
  loaded, vae = psvae_jax.PSVAE.from_pretrained(export_folder), vaes["psvae"]
  assert loaded.latent_fingerprint == vae.latent_fingerprint
  z = np.random.default_rng(0).standard_normal((3, 4, 4, 4), np.float32)
  np.testing.assert_array_equal(loaded.decode(z), vae.decode(z))
  np.testing.assert_array_equal(loaded.encode(images(3)), vae.encode(images(3)))


def test_the_tuned_encoder_opens_in_transformers(job, vaes, export_folder):
  torch = pytest.importorskip("torch")
  transformers = vision_reference.import_transformers()
  folder = export_folder.with_name("tuned")
  model, info = transformers.AutoModel.from_pretrained(
    folder, output_loading_info=True
  )
  assert not any(info.values()), info
  processor = transformers.AutoImageProcessor.from_pretrained(folder)
  pixels = (images(3, 32) / 255.0 - processor.image_mean) / processor.image_std
  pixels = torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2)
  with torch.no_grad():
    tokens = model.eval()(pixels).last_hidden_state
  registers = model.config.num_register_tokens
  wanted = tokens[:, 1 + registers :].reshape(3, 4, 4, -1).numpy()
  found = vaes["psvae"].features(images(3, 32))
  np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
  # It is the tuned one: the frozen encoder's features are others.
  frozen = vaes["svae"].features(images(3, 32))
  assert np.abs(frozen - wanted).max() > 1e-3
