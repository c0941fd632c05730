"""RAE; its parity is in tests/pretrained/test_autoencoder_rae."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psvae_jax.models import layers, vit
from psvae_jax.models.rae_autoencoder import RAE, RAEConfig, positions

CONFIG = RAEConfig(
  encoder=vit.ViTConfig(16, 1, 2, patch_size=4, image_size=8),
  input_size=12,
  decoder=layers.BlockConfig(8, 2, 16, layerscale_init=None),
  decoder_depth=1,
  decoder_patch_size=2,
  mean=(0.4, 0.5, 0.6),
  std=(0.2, 0.2, 0.2),
)


# The 16 of RAE's own code, and grids that are smaller and larger.
@pytest.mark.parametrize("grid, dim", [(16, 24), (5, 8), (32, 12)])
def test_positions_equal_diffusers(grid, dim):
  embeddings = pytest.importorskip("diffusers.models.embeddings")
  expected = embeddings.get_2d_sincos_pos_embed(dim, grid).numpy()
  np.testing.assert_allclose(
    positions(grid, dim).reshape(grid * grid, dim), expected, atol=1e-6
  )


def test_sizes():
  assert (CONFIG.grid, CONFIG.output_size) == (3, 6)


def test_latents_must_be_square():
  with pytest.raises(ValueError, match="square, got 3x2"):
    z = jnp.zeros((1, 3, 2, 16))
    RAE(CONFIG).init(jax.random.key(0), z, method="decode")
