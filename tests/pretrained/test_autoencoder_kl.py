"""diffusers' AutoencoderKL: parity, its folders, and what is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_diffusers

from psvae_jax.models.kl_autoencoder import KLAutoencoder
from psvae_jax.pretrained import autoencoder_kl

TOLERANCE = dict(rtol=2e-4, atol=2e-4)
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  """Name → (diffusers' model, the folder that it saved), made when asked."""
  made = {}

  def get(name):
    if name not in made:
      model = tiny_diffusers.kl(name)
      folder = tmp_path_factory.mktemp(name)
      model.save_pretrained(folder)
      made[name] = model, folder
    return made[name]

  return get


@pytest.fixture
def saved(models, tmp_path):
  """A copy of a small folder that a test may damage."""
  _, folder = models("flux")
  for path in folder.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  return tmp_path


def edit_config(folder, **changes):
  path = folder / "config.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# T7. Sizes of one that is square and of one that is not.
@pytest.mark.parametrize(
  "name, height, width",
  [("sd", 12, 20), ("va-vae", 12, 12), ("mar", 6, 14), ("flux", 8, 8)],
)
def test_parity_with_diffusers(models, name, height, width):
  torch = pytest.importorskip("torch")
  model, folder = models(name)
  config, params = autoencoder_kl.read_folder(folder)
  module = KLAutoencoder(config)
  images = tiny_diffusers.images(2, height, width) / np.float32(127.5) - 1
  with torch.no_grad():
    expected = model.encode(tiny_diffusers.to_torch(images)).latent_dist
    pixels = model.decode(expected.mean).sample

  @jax.jit
  def run(params, images):
    def apply(x, name):
      return module.apply({"params": params}, x, method=name)

    posterior = apply(images, "posterior")
    return posterior, apply(posterior.mode(), "decode")

  posterior, decoded = run(params, images)
  mean = tiny_diffusers.to_numpy(expected.mean)
  assert np.abs(mean).mean() > 0.1  # there is something to compare
  np.testing.assert_allclose(posterior.mean, mean, **TOLERANCE)
  np.testing.assert_allclose(
    posterior.logvar, tiny_diffusers.to_numpy(expected.logvar), **TOLERANCE
  )
  pixels = tiny_diffusers.to_numpy(pixels)
  assert decoded.shape == (2, height, width, 3)
  np.testing.assert_allclose(decoded, pixels, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd", "va-vae-f16d32"])
def test_parity_at_full_size(name, tmp_path):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  config = autoencoder_kl.PUBLISHED[name]
  raw = autoencoder_kl.format_config(config)
  model = diffusers.AutoencoderKL.from_config(raw)
  tiny_diffusers.randomise(model).save_pretrained(tmp_path)
  read, params = autoencoder_kl.read_folder(tmp_path)
  assert read == config
  images = tiny_diffusers.images(1, 96, 128) / np.float32(127.5) - 1
  with torch.no_grad():
    z = model.encode(tiny_diffusers.to_torch(images)).latent_dist.mean
    pixels = tiny_diffusers.to_numpy(model.decode(z).sample)
  z = tiny_diffusers.to_numpy(z)
  module = KLAutoencoder(config)
  run = jax.jit(module.apply, static_argnames="method")
  encoded = run({"params": params}, images, method="encode")
  np.testing.assert_allclose(encoded, z, **TOLERANCE)
  decoded = run({"params": params}, z, method="decode")
  np.testing.assert_allclose(decoded, pixels, **TOLERANCE)


@pytest.mark.parametrize("name", list(tiny_diffusers.KL))
def test_config_survives_both_ways(models, name):
  model, folder = models(name)
  config, _ = autoencoder_kl.read_folder(folder)
  assert config.scaling_factor == model.config.scaling_factor
  assert config.shift_factor == (model.config.shift_factor or 0.0)
  assert config.sample_size == 16
  raw = autoencoder_kl.format_config(config)
  assert autoencoder_kl.parse_config(raw, folder) == config
  theirs = {key: model.config[key] for key in raw if key != "_class_name"}
  ours = {key: raw[key] for key in theirs}
  if theirs["shift_factor"] is None:
    theirs["shift_factor"] = 0.0
  assert json.dumps(ours) == json.dumps(theirs)


def test_diffusers_reads_what_is_written(models, tmp_path):
  diffusers = pytest.importorskip("diffusers")
  model, folder = models("va-vae")
  config, params = autoencoder_kl.read_folder(folder)
  tensors = autoencoder_kl.mapping.export_params(
    autoencoder_kl.rules(config), params
  )
  raw = autoencoder_kl.format_config(config)
  autoencoder_kl.write_folder(tmp_path / "new", raw, tensors)
  again = diffusers.AutoencoderKL.from_pretrained(tmp_path / "new")
  state = again.state_dict()
  assert state.keys() == model.state_dict().keys()
  for key, tensor in model.state_dict().items():
    np.testing.assert_array_equal(state[key].numpy(), tensor.numpy())


def test_old_names_of_attention(models, tmp_path):
  _, folder = models("va-vae")
  _, expected = autoencoder_kl.read_folder(folder)
  old = {
    "to_q": "query",
    "to_k": "key",
    "to_v": "value",
    "to_out.0": "proj_attn",
  }
  tensors = safetensors.numpy.load_file(folder / FILE)
  renamed = {}
  for key, tensor in tensors.items():
    for new, name in old.items():
      key = key.replace(f".{new}.", f".{name}.")
    # Some were saved as the 1×1 convolutions they had been in LDM's code.
    if ".query.weight" in key:
      tensor = tensor[:, :, None, None]
    renamed[key] = tensor
  assert sum("proj_attn" in key for key in renamed) == 2 * (2 + 2 + 3)
  autoencoder_kl.write_folder(
    tmp_path, json.loads((folder / "config.json").read_text()), renamed
  )
  _, params = autoencoder_kl.read_folder(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_sharded_files(models, tmp_path):
  model, folder = models("flux")
  model.save_pretrained(tmp_path, max_shard_size="40KB")
  assert len(list(tmp_path.glob("diffusion_pytorch_model-*"))) > 1
  _, expected = autoencoder_kl.read_folder(folder)
  _, params = autoencoder_kl.read_folder(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize(
  "name, count",
  [
    ("stabilityai/sd-vae-ft-ema", 83_653_863),
    ("black-forest-labs/FLUX.1-dev", 83_819_683),
    ("mar-kl16", None),
    ("ldm-kl-f16", None),
    ("va-vae-f16d32", None),
  ],
)
def test_published_parameter_counts(name, count):
  torch = pytest.importorskip("torch")
  diffusers = pytest.importorskip("diffusers")
  config = autoencoder_kl.PUBLISHED[name]
  shapes = autoencoder_kl.param_shapes(config)
  sizes = [leaf.size for leaf in jax.tree.leaves(shapes)]
  with torch.device("meta"):
    raw = autoencoder_kl.format_config(config)
    model = diffusers.AutoencoderKL.from_config(raw)
  theirs = sum(parameter.numel() for parameter in model.parameters())
  assert sum(sizes) == theirs == (count or theirs)
  assert len(autoencoder_kl.rules(config)) == len(sizes)


def test_decoder_of_the_paper_s_kind_has_its_size():
  config = autoencoder_kl.PUBLISHED["ldm-kl-f16"]
  config = dataclasses.replace(config, latent_channels=96)
  decoder = autoencoder_kl.param_shapes(config)["decoder"]
  size = sum(leaf.size for leaf in jax.tree.leaves(decoder))
  assert round(size / 1e6, 1) == 41.7


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"_class_name": "AutoencoderKLWan"}, "_class_name 'AutoencoderKLWan'"),
    ({"in_channels": 4}, "in_channels 4 is not 3"),
    ({"out_channels": 1}, "out_channels 1 is not 3"),
    ({"act_fn": "gelu"}, "act_fn 'gelu' is not 'silu'"),
    ({"latents_mean": [0.0] * 6}, "latents_mean .* is not None"),
    ({"down_block_types": ["CrossAttnDownBlock2D"] * 2}, "down_block_types"),
    ({"up_block_types": ["UpDecoderBlock2D"]}, "up_attention is of 1 levels"),
    ({"block_out_channels": [16, "24"]}, "block_out_channels .* whole"),
    ({"block_out_channels": []}, "block_out_channels has 0 levels"),
    ({"block_out_channels": [16, 10**9]}, r"block_out_channels\[1\]"),
    ({"layers_per_block": 10**9}, "layers_per_block 1000000000"),
    ({"latent_channels": 0}, "latent_channels 0 is not in"),
    ({"norm_num_groups": 5}, "norm_num_groups 5 does not divide"),
    ({"use_quant_conv": "yes"}, "use_quant_conv is 'yes'"),
    ({"scaling_factor": 0.0}, "scaling_factor 0.0 is not positive"),
    ({"sample_size": 1.5}, "sample_size is 1.5"),
  ],
)
def test_config_that_is_refused(saved, changes, message):
  edit_config(saved, **changes)
  with pytest.raises(ValueError, match=message) as raised:
    autoencoder_kl.read_folder(saved)
  assert str(raised.value).startswith(str(saved / "config.json"))


def test_what_a_config_may_leave_out_or_write_otherwise(saved):
  expected, _ = autoencoder_kl.read_folder(saved)
  raw = json.loads((saved / "config.json").read_text())
  for name in ("in_channels", "out_channels", "act_fn", "force_upcast"):
    del raw[name]
  raw["sample_size"] = [16, 16]
  assert autoencoder_kl.parse_config(raw, saved) == expected
  del raw["shift_factor"], raw["scaling_factor"]
  config = autoencoder_kl.parse_config(raw, saved)
  assert (config.scaling_factor, config.shift_factor) == (0.18215, 0.0)


def test_tensors_that_do_not_fit_are_named(saved):
  path = saved / FILE
  tensors = safetensors.numpy.load_file(path)
  del tensors["encoder.conv_in.bias"]
  tensors["decoder.conv_out.bias"] = np.zeros(4, np.float32)
  tensors["quant_conv.weight"] = np.zeros((12, 12, 1, 1), np.float32)
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(ValueError, match="does not fit its config.json") as error:
    autoencoder_kl.read_folder(saved)
  said = str(error.value)
  assert "missing: encoder.conv_in.bias" in said
  assert "unexpected: quant_conv.weight" in said
  assert "decoder.conv_out.bias (file (4,), model (3,))" in said


def test_a_folder_of_transformers_names_is_no_folder_of_diffusers(saved):
  (saved / FILE).rename(saved / "model.safetensors")
  with pytest.raises(FileNotFoundError, match=FILE):
    autoencoder_kl.read_folder(saved)
