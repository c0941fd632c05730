"""diffusers' AutoencoderRAE: parity, its folders, and what is refused."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import tiny_diffusers

from psvae_jax.models.rae_autoencoder import RAE
from psvae_jax.pretrained import autoencoder_rae

TOLERANCE = dict(rtol=1e-4, atol=1e-4)
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
  """(diffusers' model, the folder that it saved)."""
  model = tiny_diffusers.rae("dinov2")
  folder = tmp_path_factory.mktemp("dinov2")
  model.save_pretrained(folder)
  return model, folder


@pytest.fixture
def saved(dinov2, tmp_path):
  """A copy of the folder that a test may damage."""
  for path in dinov2[1].iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  return tmp_path


def run(folder, images):
  """(latents, images in [0, 1] made of them) of a folder, by our modules."""
  config, params = autoencoder_rae.read_folder(folder)
  module = RAE(config, params["latents_mean"].shape)

  @jax.jit
  def both(params, images):
    z = module.apply({"params": params}, images, method="encode")
    return z, module.apply({"params": params}, z, method="decode")

  z, decoded = both(params, images / np.float32(127.5) - 1)
  return np.asarray(z), np.asarray(decoded) / 2 + 0.5


# T8. The encoder's own size, and that of the decoder's images, resized.
@pytest.mark.parametrize("side", [42, 12])
def test_parity_with_diffusers(dinov2, side):
  torch = pytest.importorskip("torch")
  model, folder = dinov2
  images = tiny_diffusers.images(2, side, side)
  with torch.no_grad():
    z = model.encode(tiny_diffusers.to_torch(images / np.float32(255))).latent
    pixels = tiny_diffusers.to_numpy(model.decode(z).sample)
  ours, decoded = run(folder, images)
  # diffusers' latents are scaled for a generator, ours are not.
  expected = tiny_diffusers.to_numpy(z) / model.config.scaling_factor
  assert np.abs(expected).mean() > 0.1
  np.testing.assert_allclose(ours, expected, **TOLERANCE)
  assert decoded.shape == (2, 12, 12, 3)
  np.testing.assert_allclose(decoded, pixels, **TOLERANCE)


def test_parity_with_mae(tmp_path):
  torch = pytest.importorskip("torch")
  model = tiny_diffusers.rae("mae")
  model.save_pretrained(tmp_path)
  images = tiny_diffusers.images(1, 48, 48)
  with torch.no_grad():
    z = model.encode(tiny_diffusers.to_torch(images / np.float32(255))).latent
    pixels = tiny_diffusers.to_numpy(model.decode(z).sample)
  ours, decoded = run(tmp_path, images)
  expected = tiny_diffusers.to_numpy(z) / model.config.scaling_factor
  np.testing.assert_allclose(ours, expected, **TOLERANCE)
  np.testing.assert_allclose(decoded, pixels, **TOLERANCE)


def test_parity_with_siglip2(tmp_path):
  """diffusers cannot build this one beside transformers 5: its parts can be."""
  torch = pytest.importorskip("torch")
  pytest.importorskip("diffusers")
  transformers = pytest.importorskip("transformers")
  from diffusers.models.autoencoders import autoencoder_rae as reference

  options = tiny_diffusers.rae_options("siglip2")
  encoder = transformers.SiglipVisionModel(
    transformers.SiglipVisionConfig(
      hidden_size=64,
      num_hidden_layers=2,
      num_attention_heads=1,
      patch_size=16,
      image_size=256,
    )
  )
  tiny_diffusers.randomise(encoder, seed=5)
  encoder.post_layernorm.weight = encoder.post_layernorm.bias = None
  decoder = reference.RAEDecoder(
    hidden_size=64,
    decoder_hidden_size=24,
    decoder_num_hidden_layers=2,
    decoder_num_attention_heads=2,
    decoder_intermediate_size=40,
    num_patches=9,
    patch_size=4,
    image_size=12,
  )
  tiny_diffusers.randomise(decoder, seed=6)
  mean, std = (
    np.array(options[f"latents_{name}"], np.float32) for name in ("mean", "std")
  )
  tensors = {"_latents_mean": mean, "_latents_std": std}
  for name, part in (("encoder.", encoder), ("decoder.", decoder)):
    for key, value in part.state_dict().items():
      tensors[name + key] = value.numpy()
  safetensors.numpy.save_file(tensors, tmp_path / FILE)
  raw = {**options, "_class_name": "AutoencoderRAE"}
  del raw["latents_mean"], raw["latents_std"]  # those of the file count
  (tmp_path / "config.json").write_text(json.dumps(raw))

  images = tiny_diffusers.images(1, 48, 48)
  normal = images / np.float32(255) - options["encoder_norm_mean"]
  normal = (normal / options["encoder_norm_std"]).astype(np.float32)
  with torch.no_grad():
    tokens = encoder(
      tiny_diffusers.to_torch(normal), interpolate_pos_encoding=True
    ).last_hidden_state
    pixels = decoder.unpatchify(decoder(tokens).logits)
  features = tokens.numpy().reshape(1, 3, 3, 64)
  mean, std = mean.transpose(1, 2, 0), std.transpose(1, 2, 0)
  ours, decoded = run(tmp_path, images)
  np.testing.assert_allclose(
    ours, (features - mean) / (std + 1e-5), **TOLERANCE
  )
  pixels = tiny_diffusers.to_numpy(pixels) * options["encoder_norm_std"]
  pixels += options["encoder_norm_mean"]
  np.testing.assert_allclose(decoded, pixels, **TOLERANCE)

  # Older transformers wrote the encoder's tensors under a prefix.
  _, found = autoencoder_rae.read_folder(tmp_path)
  tensors = {
    key.replace("encoder.", "encoder.vision_model.", 1)
    if key.startswith("encoder.")
    else key: tensor
    for key, tensor in tensors.items()
  }
  safetensors.numpy.save_file(tensors, tmp_path / FILE)
  _, params = autoencoder_rae.read_folder(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, found)


@pytest.mark.parametrize("kind", ["dinov2", "mae"])
def test_published_names_of_the_encoder(dinov2, tmp_path, kind):
  """transformers 5 renamed parts; folders written before have the old names."""
  folder = dinov2[1]
  if kind == "mae":
    folder = tmp_path / "mae"
    tiny_diffusers.rae("mae").save_pretrained(folder)
  _, expected = autoencoder_rae.read_folder(folder)
  new = ("q_proj", "k_proj", "v_proj", "o_proj")
  old = tuple(f"attention.{name}" for name in ("query", "key", "value"))
  pairs = dict(zip(new, (*old, "output.dense"), strict=True))
  if kind == "mae":
    pairs |= {
      "encoder.layers": "encoder.encoder.layer",
      "mlp.fc1": "intermediate.dense",
      "mlp.fc2": "output.dense",
    }
  tensors = {}
  for key, tensor in safetensors.numpy.load_file(folder / FILE).items():
    for name, published in pairs.items():
      if key.startswith("encoder."):
        key = key.replace(name, published)
    tensors[key] = tensor
  assert sum("attention.attention.query" in key for key in tensors) == 4
  raw = (folder / "config.json").read_text()
  (tmp_path / "config.json").write_text(raw)
  safetensors.numpy.save_file(tensors, tmp_path / FILE)
  _, params = autoencoder_rae.read_folder(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, params, expected)


def test_latent_norms_by_name(saved):
  """Near a deviation of 0 the two differ: pinned on a tiny variance."""
  images = tiny_diffusers.images(1, 42, 42) / np.float32(127.5) - 1
  path = saved / FILE
  tensors = safetensors.numpy.load_file(path)
  # RAE's statistics are variances; folders are published with this root.
  variance = np.geomspace(1e-6, 4, 64 * 9).reshape(64, 3, 3)
  tensors["_latents_std"] = np.sqrt(variance + 1e-5).astype(np.float32)
  safetensors.numpy.save_file(tensors, path)
  z = {}
  for name in ("diffusers", "rae"):
    config, params = autoencoder_rae.read_folder(saved, name)
    module = RAE(config, params["latents_mean"].shape)
    encode = jax.jit(functools.partial(module.apply, method="encode"))
    z[name] = np.asarray(encode({"params": params}, images))
  root = np.sqrt(variance.transpose(1, 2, 0) + 1e-5)
  features = z["diffusers"] * (root + 1e-5)
  np.testing.assert_allclose(z["rae"], features / root, rtol=1e-5, atol=1e-5)
  assert np.abs(z["rae"] - z["diffusers"]).max() > 1e-3
  with pytest.raises(ValueError, match="latent_norm is one of .*'torch'"):
    autoencoder_rae.read_folder(saved, "torch")


def test_statistics_of_other_shapes(saved):
  """One number, or one a channel, as far as torch broadcasts it."""
  path = saved / FILE
  tensors = safetensors.numpy.load_file(path)
  tensors["_latents_mean"] = np.zeros(1, np.float32)
  tensors["_latents_std"] = np.arange(1, 65, dtype=np.float32)[:, None, None]
  safetensors.numpy.save_file(tensors, path)
  _, params = autoencoder_rae.read_folder(saved)
  np.testing.assert_array_equal(params["latents_mean"], np.zeros((1, 1, 64)))
  np.testing.assert_array_equal(params["latents_std"].ravel(), np.arange(1, 65))
  tensors["_latents_std"] = np.ones(64, np.float32)
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(ValueError, match=r"_latents_std has the shape \(64,\)"):
    autoencoder_rae.read_folder(saved)


def test_the_file_s_pixel_statistics_count(saved):
  config, _ = autoencoder_rae.read_folder(saved)
  np.testing.assert_allclose(config.mean, (0.4, 0.5, 0.6), rtol=1e-6)
  path = saved / FILE
  tensors = safetensors.numpy.load_file(path)
  tensors["encoder_std"] = np.array([0.1, 0.2, 0.3], np.float32)
  safetensors.numpy.save_file(tensors, path)
  config, _ = autoencoder_rae.read_folder(saved)
  np.testing.assert_allclose(config.std, (0.1, 0.2, 0.3), rtol=1e-6)
  tensors["encoder_std"] = np.zeros(3, np.float32)
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(ValueError, match="encoder_std .* is not positive"):
    autoencoder_rae.read_folder(saved)


@pytest.mark.parametrize(
  "changes, message",
  [
    (
      {"encoder_type": "dinov3"},
      "encoder_type 'dinov3' is not .*dinov2, siglip2, mae",
    ),
    ({"encoder_hidden_size": 96}, "encoder_hidden_size 96 is not a multiple"),
    ({"encoder_num_hidden_layers": 10**6}, "encoder_num_hidden_layers 1000000"),
    ({"encoder_input_size": 43}, "encoder_input_size 43 is not a multiple"),
    ({"encoder_input_size": 14 * 10**6}, "encoder_input_size over"),
    ({"decoder_hidden_size": 10**9}, "decoder_hidden_size 1000000000"),
    ({"decoder_hidden_size": 26}, "decoder_hidden_size 26 is not a multiple"),
    ({"decoder_num_attention_heads": 0}, "decoder_num_attention_heads 0"),
    (
      {"decoder_hidden_size": 2**16, "encoder_input_size": 14 * 512},
      "65536 of 262144 tokens",
    ),
    ({"num_channels": 1}, "num_channels 1 is not 3"),
    ({"reshape_to_2d": False}, "reshape_to_2d False"),
    ({"image_size": 13}, "image_size 13 is not 12"),
    ({"encoder_norm_std": [0.1, 0.2]}, "encoder_norm_std .* 3 finite numbers"),
  ],
)
def test_config_that_is_refused(dinov2, tmp_path, changes, message):
  raw = json.loads((dinov2[1] / "config.json").read_text())
  path = tmp_path / "config.json"
  path.write_text(json.dumps({**raw, **changes}))
  with pytest.raises(ValueError, match=message) as raised:
    autoencoder_rae.read_folder(tmp_path)
  assert str(raised.value).startswith(str(path))


def test_tensors_that_do_not_fit_are_named(saved):
  path = saved / FILE
  tensors = safetensors.numpy.load_file(path)
  tensors["decoder.decoder_pos_embed"] = np.zeros((1, 10, 24), np.float32)
  safetensors.numpy.save_file(tensors, path)
  autoencoder_rae.read_folder(saved)  # older files hold it
  for wrong in ("decoder.extra", "encoder.extra", "extra"):
    safetensors.numpy.save_file({**tensors, wrong: np.zeros(1)}, path)
    name = wrong.removeprefix("encoder.")
    with pytest.raises(ValueError, match=f"unexpected: {name}$"):
      autoencoder_rae.read_folder(saved)
  del tensors["_latents_mean"]
  safetensors.numpy.save_file(tensors, path)
  with pytest.raises(ValueError, match="no tensor _latents_mean"):
    autoencoder_rae.read_folder(saved)


def test_published_architectures():
  """The base DINOv2 and RAE's ViT-XL decoder, as their papers count them."""
  ids = list(autoencoder_rae.PUBLISHED)
  assert all(name.startswith("nyu-visionx/RAE-") for name in ids)
  config = autoencoder_rae.PUBLISHED[
    "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08"
  ]
  assert (config.grid, config.output_size) == (16, 256)
  shapes = autoencoder_rae.param_shapes(config)
  sizes = {
    name: sum(leaf.size for leaf in jax.tree.leaves(part))
    for name, part in shapes.items()
  }
  assert round(sizes["encoder"] / 1e6, 1) == 86.6
  assert round(sizes["decoder"] / 1e6) == 415
  large = autoencoder_rae.PUBLISHED[
    "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08-i512"
  ]
  assert (large.grid, large.output_size) == (32, 512)
  assert dataclasses.replace(large, input_size=224) == config
