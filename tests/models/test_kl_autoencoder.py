"""LDM's autoencoder; its parity is in tests/pretrained/test_autoencoder_kl."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psvae_jax.models.kl_autoencoder import KLAutoencoder, KLConfig

CONFIG = KLConfig(
  block_out_channels=(8, 16),
  layers_per_block=1,
  latent_channels=3,
  down_attention=(False, True),
  up_attention=(True, False),
  norm_num_groups=4,
)


def shapes(config):
  module = KLAutoencoder(config)
  images = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
  return jax.eval_shape(module.init, jax.random.key(0), images)["params"]


def test_attention_is_where_the_config_says():
  found = shapes(CONFIG)
  assert "down1_attention0" in found["encoder"]
  assert "down0_attention0" not in found["encoder"]
  assert "mid_attention" in found["encoder"]
  assert {"up0_attention0", "up0_attention1"} <= set(found["decoder"])
  assert "up1_attention0" not in found["decoder"]
  moved = dataclasses.replace(
    CONFIG, up_attention=(False, True), mid_attention=False
  )
  found = shapes(moved)["decoder"]
  assert {"up1_attention0", "up1_attention1"} <= set(found)
  assert not {"up0_attention0", "mid_attention"} & set(found)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_shapes_and_types(dtype):
  module = KLAutoencoder(CONFIG, dtype)
  params = {"params": shapes(CONFIG)}
  images = jax.ShapeDtypeStruct((2, 12, 20, 3), jnp.float32)

  def both(params, images):
    posterior = module.apply(params, images, method="posterior")
    z = module.apply(params, images, method="encode")
    return posterior, z, module.apply(params, z, method="decode")

  posterior, z, decoded = jax.eval_shape(both, params, images)
  assert posterior.logvar.shape == z.shape == (2, 6, 10, 3)
  assert decoded.shape == (2, 12, 20, 3)
  kinds = {x.dtype for x in (posterior.mean, posterior.logvar, z, decoded)}
  assert kinds == {np.dtype("float32")}


@pytest.mark.parametrize(
  "shape, message",
  [
    ((1, 7, 8, 3), "image size 7x8 is not a multiple of 2"),
    ((1, 8, 8, 4), r"\(B, H, W, 3\), got \(1, 8, 8, 4\)"),
    ((8, 8, 3), r"\(B, H, W, 3\), got \(8, 8, 3\)"),
  ],
)
def test_images_that_do_not_fit(shape, message):
  module = KLAutoencoder(CONFIG)
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(shape))
