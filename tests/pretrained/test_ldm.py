"""Checkpoints in LDM's layout → diffusers' folders."""

import dataclasses

import numpy as np
import pytest
import tiny_diffusers

from psvae_jax.pretrained import autoencoder_kl, ldm, mapping


def checkpoint(name):
  """(config, tensors of diffusers, the same tensors by LDM's names)."""
  model = tiny_diffusers.kl(name)
  raw = {**model.config, "_class_name": "AutoencoderKL"}
  raw = {key: list(v) if type(v) is tuple else v for key, v in raw.items()}
  config = autoencoder_kl.parse_config(raw, "config.json")
  tensors = {key: value.numpy() for key, value in model.state_dict().items()}
  params = mapping.import_params(
    autoencoder_kl.rules(config),
    tensors,
    autoencoder_kl.param_shapes(config),
    source=name,
  )
  rules = autoencoder_kl.rules(config, autoencoder_kl.LDM)
  return config, tensors, mapping.export_params(rules, params)


@pytest.fixture(scope="module")
def mar():
  return checkpoint("mar")


@pytest.fixture
def published(mar, monkeypatch):
  monkeypatch.setitem(autoencoder_kl.PUBLISHED, "tiny", mar[0])


def test_names_are_ldm_s():
  """Counted by hand on two levels of 32 and 64 channels, two res blocks."""
  _, _, tensors = checkpoint("va-vae")

  def res(block, shortcut=False):
    names = ["norm1", "conv1", "norm2", "conv2"]
    return {f"{block}.{n}" for n in names + ["nin_shortcut"] * shortcut}

  def attention(block):
    return {f"{block}.{n}" for n in ("norm", "q", "k", "v", "proj_out")}

  wanted = {"quant_conv", "post_quant_conv", "encoder.down.0.downsample.conv"}
  wanted |= {"decoder.up.1.upsample.conv"}
  for side in ("encoder", "decoder"):
    wanted |= {f"{side}.{n}" for n in ("conv_in", "conv_out", "norm_out")}
    wanted |= res(f"{side}.mid.block_1") | res(f"{side}.mid.block_2")
    wanted |= attention(f"{side}.mid.attn_1")
  for i in range(2):
    wanted |= res(f"encoder.down.0.block.{i}")
    wanted |= res(f"encoder.down.1.block.{i}", shortcut=i == 0)
    wanted |= attention(f"encoder.down.1.attn.{i}")
  for i in range(3):
    wanted |= res(f"decoder.up.1.block.{i}")
    wanted |= attention(f"decoder.up.1.attn.{i}")
    wanted |= res(f"decoder.up.0.block.{i}", shortcut=i == 0)
  ends = ("weight", "bias")
  assert tensors.keys() == {f"{n}.{end}" for n in wanted for end in ends}
  shapes = {key: tensor.shape for key, tensor in tensors.items()}
  assert shapes["encoder.mid.attn_1.q.weight"] == (64, 64, 1, 1)
  assert shapes["decoder.up.0.block.0.nin_shortcut.weight"] == (32, 64, 1, 1)
  assert shapes["decoder.up.1.upsample.conv.weight"] == (64, 64, 3, 3)


def test_diffusers_own_converter_agrees():
  pytest.importorskip("diffusers")
  from diffusers.loaders import single_file_utils

  config, tensors, named = checkpoint("sd")
  torch = pytest.importorskip("torch")
  theirs = single_file_utils.convert_ldm_vae_checkpoint(
    {key: torch.from_numpy(value) for key, value in named.items()},
    autoencoder_kl.format_config(config),
  )
  assert theirs.keys() == tensors.keys()
  for key, value in tensors.items():
    np.testing.assert_array_equal(theirs[key].numpy(), value)


def test_conversion_is_exact(mar):
  config, tensors, named = mar
  raw, converted = ldm.convert(named)
  assert converted.keys() == tensors.keys()
  for key, value in tensors.items():
    assert converted[key].dtype == np.float32
    np.testing.assert_array_equal(converted[key], value)
  inferred = autoencoder_kl.parse_config(raw, "config.json")
  for name in ("block_out_channels", "down_attention", "up_attention"):
    assert getattr(inferred, name) == getattr(config, name)
  # The factors are not in the tensors: latents as they come.
  assert (inferred.scaling_factor, inferred.shift_factor) == (1.0, 0.0)


def test_a_name_brings_the_factors(mar, published):
  raw, _ = ldm.convert(mar[2], "tiny")
  assert autoencoder_kl.parse_config(raw, "config.json") == mar[0]


def test_another_architecture_is_inferred():
  config, _, named = checkpoint("va-vae")
  inferred = ldm.infer_config(named, "kl.ckpt")
  wanted = dict(scaling_factor=1.0, sample_size=256)
  assert inferred == dataclasses.replace(config, **wanted)


def test_widths_that_ldm_s_norms_do_not_take():
  _, _, named = checkpoint("flux")
  with pytest.raises(ValueError, match="kl.ckpt .* 32 does not divide the 16"):
    ldm.infer_config(named, "kl.ckpt")


def test_only_the_autoencoder_is_taken(mar):
  _, tensors, named = mar
  other = np.zeros(3, np.float32)
  extra = {
    "loss.discriminator.main.0.weight": other,
    "foundation_model.model.cls_token": other,
    "linear_proj.weight": other,
  }
  _, converted = ldm.convert({**named, **extra})
  assert converted.keys() == tensors.keys()
  whole = {f"first_stage_model.{key}": value for key, value in named.items()}
  whole |= {"model.diffusion_model.out.0.weight": other, "betas": other}
  _, converted = ldm.convert(whole)
  assert converted.keys() == tensors.keys()


def test_what_does_not_fit_is_named(mar, published):
  named = mar[2]
  with pytest.raises(ValueError, match="kl.ckpt .*unexpected: extra.weight"):
    ldm.convert({**named, "extra.weight": np.zeros(1)}, source="kl.ckpt")
  missing = {k: v for k, v in named.items() if k != "encoder.norm_out.bias"}
  with pytest.raises(ValueError, match="missing: encoder.norm_out.bias"):
    ldm.convert(missing)
  with pytest.raises(ValueError, match="unknown autoencoder 'tinny'.*'tiny'"):
    ldm.convert(named, "tinny")
  with pytest.raises(ValueError, match="kl.ckpt is not mar-kl16: it has block"):
    ldm.convert(named, "mar-kl16", source="kl.ckpt")
  with pytest.raises(ValueError, match="no convolution decoder.conv_in.*a.b"):
    ldm.convert({"a.b": np.zeros(1)}, source="kl.ckpt")
