"""Images → latents outside of the step, on this host's devices."""

import jax
import numpy as np
import pytest
import tiny
import tiny_generator

from psvae_jax.tasks.local_encoder import LocalEncoder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  folder = tiny.save_encoder(tmp_path_factory.mktemp("encoder"))
  return tiny_generator.build(folder)


@pytest.mark.parametrize("size", [8, 6, 3])
def test_encodes_as_the_step_does(made, size):
  """Also batches that 8 devices do not divide."""
  side = made.generator.autoencoder.config.image_size
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (size, side, side, 3), np.uint8)
  local = LocalEncoder(made.generator, made.frozen["autoencoder"], size)
  got = np.asarray(local(images))
  want = jax.jit(made.generator.posterior_mean)(made.frozen, images)
  np.testing.assert_allclose(got, want, atol=1e-5)
  local.release()
  assert local._on_devices is None
  np.testing.assert_array_equal(local(images), got)
