"""Exported folders: what is written, what is read, what is refused."""

import json
import re
import shutil

import numpy as np
import pytest
import safetensors
import tiny
import tiny_generator
from tiny_generator import export_autoencoder as write

import psvae_jax
from psvae_jax import exported
from psvae_jax.export import export
from psvae_jax.pretrained import files
from psvae_jax.psvae import PSVAE


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
  encoder = tiny.save_encoder(tmp_path_factory.mktemp("encoder"))
  return tiny_generator.autoencoder(encoder)


@pytest.fixture(scope="module")
def folder(vae, tmp_path_factory):
  return write(vae, tmp_path_factory.mktemp("exported") / "vae")


def images(count):
  return tiny.batch(count)["image"]


def test_a_round_trip_is_exact(vae, folder):
  loaded = PSVAE.from_pretrained(folder)
  np.testing.assert_array_equal(loaded.encode(images(2)), vae.encode(images(2)))
  np.testing.assert_array_equal(
    loaded.reconstruct(images(2)), vae.reconstruct(images(2))
  )
  assert loaded.stage == "psvae"
  assert loaded.fingerprint == vae.fingerprint
  assert loaded.latent_fingerprint == vae.latent_fingerprint
  assert loaded.description == vae.description


def test_bfloat16_halves_the_files_and_keeps_the_identity(
  vae, folder, tmp_path
):
  small = write(vae, tmp_path / "small", "bfloat16")
  for name in ("encoder", "pixel_decoder"):
    path = small / name / "model.safetensors"
    with safetensors.safe_open(path, framework="np") as file:
      (kind,) = {file.get_slice(key).get_dtype() for key in file.keys()}
    assert kind == "BF16"
  loaded = PSVAE.from_pretrained(small)
  assert loaded.latent_fingerprint == vae.latent_fingerprint
  z, expected = loaded.encode(images(2)), vae.encode(images(2))
  error = np.abs(z - expected).max() / expected.std()
  assert 0 < error < 0.1


def test_latent_fingerprint_names_what_makes_latents(vae, folder):
  def with_changed(name):
    params = {**vae.params, name: tiny.randomise(vae.params[name], scale=1e-3)}
    return PSVAE(
      vae.model, params, stage="psvae", fingerprint=vae.fingerprint
    ).latent_fingerprint

  assert re.fullmatch("[0-9a-f]{16}", vae.latent_fingerprint)
  assert with_changed("encoder") != vae.latent_fingerprint
  assert with_changed("semantic_encoder") != vae.latent_fingerprint
  assert with_changed("pixel_decoder") == vae.latent_fingerprint
  other = PSVAE(vae.model, vae.params, stage="psvae", fingerprint="another")
  assert other.latent_fingerprint != vae.latent_fingerprint


@pytest.fixture
def copy(folder, tmp_path):
  return shutil.copytree(folder, tmp_path / "copy")


def change(folder, **fields):
  path = folder / "config.json"
  raw = json.loads(path.read_text()) | fields
  path.write_text(json.dumps(raw))


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"format": "other"}, "format is 'other'"),
    ({"format_version": 2}, "format_version is 2, .* reads 1; install"),
    ({"kind": "audio"}, "kind is 'audio', not autoencoder or generator"),
    ({"fingerprint": "0" * 16}, "do not belong together"),
    ({"model": {"channels": 9}}, "do not belong together"),
    ({"description": None}, "'description' is missing or not of the right"),
    ({"encoder": None}, "'encoder' is missing"),
    ({"preprocessing": {"mean": [0, 0, 0]}}, "'std' is missing"),
    ({"compute": {"dtype": "int8"}}, "config.compute.dtype='int8' is unknown"),
    ({"stage": "t2i"}, "stage is 't2i', not one of svae, psvae"),
  ],
)
def test_a_damaged_config_is_named(copy, fields, message):
  change(copy, **fields)
  with pytest.raises(ValueError, match=message) as error:
    PSVAE.from_pretrained(copy)
  assert str(copy) in str(error.value)


def test_tensors_that_do_not_fit_are_named(copy):
  path = copy / "pixel_decoder"
  tensors = files.read_safetensors(path)
  shape = tensors["head/bias"].shape
  tensors["extra/kernel"] = tensors.pop("head/kernel")
  tensors["head/bias"] = np.zeros((1, 2), np.float32)
  files.write_safetensors(path / "model.safetensors", tensors)
  with pytest.raises(ValueError) as error:
    PSVAE.from_pretrained(copy)
  message = str(error.value)
  assert "missing: head/kernel" in message
  assert "unexpected: extra/kernel" in message
  assert f"head/bias (file (1, 2), model {shape})" in message
  shutil.rmtree(path)
  with pytest.raises(FileNotFoundError, match="pixel_decoder has neither"):
    PSVAE.from_pretrained(copy)


def test_another_stage_is_refused(folder):
  with pytest.raises(ValueError, match="exported from stage 'psvae'.*'svae'"):
    PSVAE.from_pretrained(folder, stage="svae")


def test_embedded_is_a_name(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(exported, "_ASSETS", tmp_path)
  with pytest.raises(FileNotFoundError, match="no embedded autoencoder"):
    PSVAE.from_pretrained("embedded")
  shutil.copytree(folder, tmp_path / "autoencoder")
  assert PSVAE.from_pretrained("embedded").stage == "psvae"


def test_only_an_earlier_export_is_replaced(vae, tmp_path):
  out = tmp_path / "out"
  out.mkdir()
  write(vae, out)  # an empty folder is fine
  (out / "stale").mkdir()
  write(vae, out)
  assert not (out / "stale").exists()
  assert [path.name for path in tmp_path.iterdir()] == ["out"]
  precious = tmp_path / "precious"
  precious.mkdir()
  (precious / "thesis.txt").write_text("x")
  with pytest.raises(FileExistsError, match="is not an exported folder"):
    write(vae, precious)
  with pytest.raises(FileExistsError, match="is not an exported folder"):
    write(vae, precious / "thesis.txt")
  assert (precious / "thesis.txt").read_text() == "x"


def test_a_failed_export_leaves_the_earlier_one(folder, tmp_path):
  out = shutil.copytree(folder, tmp_path / "out")
  with pytest.raises(OSError), exported.new_folder(out) as partial:
    (partial / "config.json").write_text("{}")
    raise OSError("disk full")
  assert PSVAE.from_pretrained(out).stage == "psvae"
  assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_export_of_an_autoencoder(vae, folder, tmp_path):
  """An exported folder can be exported again, and gives the tuned encoder."""
  said = export(
    folder, tmp_path / "again", dtype="bfloat16", encoder=tmp_path / "tuned"
  )
  assert "psvae" in said
  assert PSVAE.from_pretrained(tmp_path / "again").stage == "psvae"
  tuned = psvae_jax.load_encoder(tmp_path / "tuned")
  np.testing.assert_allclose(
    tuned(images(2)[:, :32, :32]),
    vae.features(images(2)[:, :32, :32]),
    atol=1e-5,
  )
  with pytest.raises(ValueError, match="--autoencoder is for generators"):
    export(folder, tmp_path / "again", autoencoder="embedded")
