"""Autoencoders as an evaluation sees them: theirs and ours, at any size."""

import jax
import numpy as np
import pytest
import tiny

from psvae_jax.autoencoders import ImportedAutoencoder
from psvae_jax.evaluation import models
from psvae_jax.models.kl_autoencoder import KLConfig
from psvae_jax.pretrained import autoencoder_kl
from psvae_jax.psvae import PSVAE

KL = KLConfig(
  block_out_channels=(8, 16),
  layers_per_block=1,
  latent_channels=3,
  down_attention=(False, False),
  up_attention=(False, False),
  mid_attention=False,
  norm_num_groups=4,
  sample_size=24,
)


def _images(size, count=3):
  rng = np.random.default_rng(0)
  return rng.integers(0, 256, (count, size, size, 3), np.uint8)


def _made(model, images, rounding="round"):
  function = jax.jit(model.at(images.shape[1], rounding))
  made, finite = function(model.params, images)
  np.testing.assert_array_equal(finite, 1)
  return np.asarray(made).astype(int)


def test_ours_is_what_psvae_reconstructs():
  vae = PSVAE.from_pretrained("embedded")
  model = models.load("embedded")
  assert (model.size, model.divisor, model.dtype) == (48, 0, "float32")
  assert not model.takes(96)
  images = _images(48)
  want = vae.reconstruct(images).astype(int)
  # Two compiled programs: a value at half a level may round either way.
  difference = np.abs(_made(model, images) - want)
  assert difference.max() <= 1 and (difference > 0).mean() < 1e-3
  assert model.fingerprint == models.of_psvae("x", vae).fingerprint


def test_imported_ones_take_multiples_of_their_factor():
  shapes = autoencoder_kl.param_shapes(KL)
  params = tiny.randomise(
    jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)
  )
  vae = ImportedAutoencoder(KL, params, name="tiny")
  model = models.of_imported("tiny", vae)
  assert (model.size, model.divisor) == (24, 2)
  assert model.takes(16) and not model.takes(17)
  images = _images(16)
  difference = np.abs(_made(model, images) - vae.reconstruct(images))
  assert difference.max() <= 1 and (difference > 0).mean() < 1e-2
  truncated = _made(model, images, "truncate")
  rounded = _made(model, images)
  assert set(np.unique(rounded - truncated)) == {0, 1}
  half = models.of_imported("tiny", vae, "bfloat16")
  traced = jax.make_jaxpr(half.at(16, "round"))(half.params, images)
  assert half.dtype == "bfloat16" and "bf16" in str(traced)


def test_names():
  with pytest.raises(FileNotFoundError):
    models.load("no/such/model/anywhere")
