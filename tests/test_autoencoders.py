"""Autoencoders of others behind PSVAE's surface."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import tiny_diffusers

from psvae_jax import PSVAE
from psvae_jax.autoencoders import (
  ImportedAutoencoder,
  load_autoencoder,
  published,
)
from psvae_jax.models.kl_autoencoder import KLAutoencoder
from psvae_jax.pretrained import autoencoder_kl, autoencoder_rae

NAMES = ("sd", "flux", "rae")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """Name → (diffusers' model, its folder, what we load of it)."""
  out = {}
  for name in NAMES:
    kind = tiny_diffusers.rae if name == "rae" else tiny_diffusers.kl
    model = kind("dinov2" if name == "rae" else name)
    folder = tmp_path_factory.mktemp(name)
    model.save_pretrained(folder)
    out[name] = model, folder, load_autoencoder(folder, batch_size=4)
  return out


@pytest.fixture
def kl(made):
  return made["sd"][2]


@pytest.mark.parametrize("name", ["sd", "rae"])
def test_reconstructions_are_diffusers_to_a_level(made, name):
  torch = pytest.importorskip("torch")
  model, _, vae = made[name]
  side = vae.image_size
  images = tiny_diffusers.images(3, side, side)
  x = tiny_diffusers.to_torch(images / np.float32(255))
  with torch.no_grad():
    if name == "rae":
      pixels = model.decode(model.encode(x).latent).sample
    else:
      z = model.encode(x * 2 - 1).latent_dist.mean
      pixels = model.decode(z).sample / 2 + 0.5
  levels = tiny_diffusers.to_numpy(pixels) * 255
  assert levels.std() > 10
  difference = vae.reconstruct(images) - levels.clip(0, 255)
  assert np.abs(difference).max() < 0.5 + 0.05  # rounded, not cut off


def test_sizes_and_types(made):
  kl, rae = made["sd"][2], made["rae"][2]
  assert (kl.image_size, kl.output_size) == (16, 16)
  assert (kl.grid, kl.channels) == (4, 4)
  assert (rae.image_size, rae.output_size) == (42, 12)
  assert (rae.grid, rae.channels) == (3, 64)
  for vae in (kl, rae):
    for count in (0, 5):  # none, and more than the batch of 4
      side = vae.image_size
      z = vae.encode(tiny_diffusers.images(count, side, side))
      assert z.shape == (count, vae.grid, vae.grid, vae.channels)
      x = vae.decode(z)
      assert x.shape == (count, vae.output_size, vae.output_size, 3)
      assert (z.dtype, x.dtype) == (np.float32, np.uint8)


def test_factors_for_generators(made):
  factors = {
    name: (vae.scaling_factor, vae.shift_factor)
    for name, (_, _, vae) in made.items()
  }
  assert factors == {
    "sd": (0.18215, 0.0),
    "flux": (0.3611, 0.1159),
    "rae": (2.0, 0.0),
  }


def test_any_multiple_of_the_factor(kl):
  images = tiny_diffusers.images(2, 8, 24)
  with jax.transfer_guard("disallow"):
    z = kl.encode(images)
    assert z.shape == (2, 2, 6, 4)
    assert kl.decode(z).shape == images.shape
  for height, width in ((10, 8), (8, 9), (0, 8)):
    said = f"{height}×{width}; .* multiples of 4"
    with pytest.raises(ValueError, match=said):
      kl.encode(np.zeros((1, height, width, 3), np.uint8))


def test_the_nominal_size_may_be_chosen(made):
  folder = made["sd"][1]
  vae = load_autoencoder(folder, image_size=24)
  assert (vae.image_size, vae.output_size, vae.grid) == (24, 24, 6)
  with pytest.raises(ValueError, match="30×30; .* multiples of 4"):
    load_autoencoder(folder, image_size=30)
  with pytest.raises(ValueError, match="16×16; .* 42×42 .* 12×12"):
    load_autoencoder(made["rae"][1], image_size=16)


@pytest.mark.parametrize(
  "name, images, message",
  [
    ("sd", np.zeros((1, 8, 8, 3)), "uint8 .* got float64"),
    ("sd", np.zeros((8, 8, 3), np.uint8), r"one image is images\[None\]"),
    ("rae", np.zeros((1, 16, 16, 3), np.uint8), "16×16.*42×42 .*12×12"),
  ],
)
def test_bad_images_are_named(made, name, images, message):
  with pytest.raises(ValueError, match=message):
    made[name][2].encode(images)


@pytest.mark.parametrize(
  "name, shape, message",
  [
    ("sd", (1, 3, 3, 5), r"\(B, h, w, 4\), got \(1, 3, 3, 5\)"),
    ("sd", (1, 0, 3, 4), r"\(B, h, w, 4\), got \(1, 0, 3, 4\)"),
    ("rae", (1, 4, 4, 64), r"\(B, 3, 3, 64\), got \(1, 4, 4, 64\)"),
  ],
)
def test_bad_latents_are_named(made, name, shape, message):
  with pytest.raises(ValueError, match=message):
    made[name][2].decode(np.zeros(shape, np.float32))


def test_identity(made, kl):
  folder = made["sd"][1]
  assert kl.name == str(folder)
  assert re.fullmatch("[0-9a-f]{16}", kl.fingerprint)
  assert json.loads(json.dumps(kl.description)) == kl.description
  assert kl.description["class"] == "AutoencoderKL"
  assert repr(kl) == (
    f"ImportedAutoencoder({folder}, 16×16 pixels ↔ 4×4×4, {kl.fingerprint})"
  )
  # Another decoder on the same encoder: another model, the same latents.
  config, params = autoencoder_kl.read_folder(folder)
  params["decoder"]["conv_in"]["bias"] += 1
  other = ImportedAutoencoder(config, params, name="other")
  assert other.fingerprint != kl.fingerprint
  assert other.latent_fingerprint == kl.latent_fingerprint
  params["quant_conv"]["bias"] += 1
  other = ImportedAutoencoder(config, params, name="other")
  assert other.latent_fingerprint != kl.latent_fingerprint


def test_one_architecture_shares_programs(made, kl, monkeypatch):
  images = tiny_diffusers.images(4, 16, 16)
  expected = kl.reconstruct(images)
  config, params = autoencoder_kl.read_folder(made["sd"][1])

  def traced(*_):
    raise AssertionError("compiled again")

  monkeypatch.setattr(KLAutoencoder, "encode", traced)
  monkeypatch.setattr(KLAutoencoder, "decode", traced)
  same = ImportedAutoencoder(config, params, name="same", batch_size=4)
  np.testing.assert_array_equal(same.reconstruct(images), expected)
  params["decoder"]["conv_out"]["bias"] += 1  # parameters are its own
  other = ImportedAutoencoder(config, params, name="other", batch_size=4)
  assert other.reconstruct(images).mean() > expected.mean() + 10


def test_a_pipeline_s_folder(made, kl, tmp_path):
  shutil.copytree(made["sd"][1], tmp_path / "vae")
  (tmp_path / "model_index.json").write_text("{}")
  assert load_autoencoder(tmp_path).fingerprint == kl.fingerprint


def test_rae_s_norm_is_passed_on(made):
  _, folder, vae = made["rae"]
  other = load_autoencoder(folder, latent_norm="rae")
  assert other.fingerprint != vae.fingerprint
  images = tiny_diffusers.images(4, 42, 42)
  assert not np.array_equal(other.encode(images), vae.encode(images))


def test_half_precision_is_near(made, kl):
  half = load_autoencoder(made["sd"][1], dtype="bfloat16")
  images = tiny_diffusers.images(4, 16, 16)
  z, expected = half.encode(images), kl.encode(images)
  assert z.dtype == np.float32
  error = np.abs(z - expected).max() / expected.std()
  assert 0 < error < 0.2


def test_random_architectures(made, monkeypatch):
  config, _ = autoencoder_kl.read_folder(made["sd"][1])
  monkeypatch.setitem(autoencoder_kl.PUBLISHED, "tiny/kl", config)
  config, _ = autoencoder_rae.read_folder(made["rae"][1])
  monkeypatch.setitem(autoencoder_rae.PUBLISHED, "tiny/rae", config)
  for name in ("random:tiny/kl", "random:tiny/rae"):
    vae = load_autoencoder(name)
    again = load_autoencoder(name)
    assert vae.fingerprint == again.fingerprint
    assert vae.name == name
    side = vae.image_size
    z = vae.encode(tiny_diffusers.images(4, side, side))
    assert 1e-3 < z.std() < 1e3
    assert vae.decode(z).std() > 0
  assert "mar-kl16" in published() and "tiny/rae" in published()
  with pytest.raises(ValueError, match="'random:mar-kl17'.*'mar-kl16'"):
    load_autoencoder("random:mar-kl17")


def test_ours(tmp_path):
  vae = load_autoencoder("embedded", batch_size=2)
  assert isinstance(vae, PSVAE)
  assert (vae.name, vae.batch_size) == ("embedded", 2)
  own = vae.model.encoder.dtype.name
  other = "float32" if own == "bfloat16" else "bfloat16"
  with pytest.raises(ValueError, match=f"computes in {own}, .* not in {other}"):
    load_autoencoder("embedded", dtype=other)
  with pytest.raises(ValueError, match="pixels a side, not 17"):
    load_autoencoder("embedded", image_size=17)
  with pytest.raises(FileNotFoundError, match="has no config.json"):
    load_autoencoder(tmp_path)


def test_what_cannot_be_loaded_is_named(made, tmp_path):
  folder = made["flux"][1]
  with pytest.raises(ValueError, match="is no workdir: it has no stage 'svae'"):
    load_autoencoder(folder, stage="svae")
  file = tmp_path / "kl16.ckpt"
  file.touch()
  with pytest.raises(ValueError, match="kl16.ckpt is a file.*convert autoenc"):
    load_autoencoder(file)
  (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
  with pytest.raises(ValueError, match="'VQModel' is not supported.*erRAE"):
    load_autoencoder(tmp_path)
  with pytest.raises(FileNotFoundError, match="nobody/nothing"):
    load_autoencoder("nobody/nothing")
  with pytest.raises(ValueError, match="batch_size must be at least 1"):
    load_autoencoder(folder, batch_size=0)


def test_a_hub_id_is_downloaded(made, kl, monkeypatch, tmp_path):
  import huggingface_hub

  asked = []

  def download(name, allow_patterns):
    asked.append((name, allow_patterns))
    return str(tmp_path if "empty" in name else made["sd"][1])

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  vae = load_autoencoder("somebody/sd-vae")
  assert (vae.name, vae.fingerprint) == ("somebody/sd-vae", kl.fingerprint)
  ((name, patterns),) = asked
  assert name == "somebody/sd-vae"
  # Not the half-precision copies, nor the rest of a pipeline.
  assert "vae/diffusion_pytorch_model.safetensors" in patterns
  assert not any(pattern.endswith("*") for pattern in patterns)
  with pytest.raises(ValueError, match="somebody/empty .* no autoencoder of"):
    load_autoencoder("somebody/empty")
