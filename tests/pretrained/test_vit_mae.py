"""ViT-MAE: parity with transformers, and its files."""

import jax
import numpy as np
import pytest
import vision_reference as reference

from psvae_jax.models import vit
from psvae_jax.pretrained import vit_mae
from psvae_jax.pretrained.encoder import load_encoder

FIELDS = {
  "hidden_size": 32,
  "intermediate_size": 40,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "patch_size": 4,
  "image_size": 16,
  "decoder_num_attention_heads": 2,
  "decoder_hidden_size": 8,
  "decoder_num_hidden_layers": 1,
  "decoder_intermediate_size": 8,
}


@pytest.mark.parametrize(
  ("size", "options"),
  [
    ((16, 16), {}),
    ((24, 24), {"qkv_bias": False}),
    ((12, 20), {"hidden_act": "relu", "layer_norm_eps": 1e-3}),
  ],
)
def test_parity_with_transformers(tmp_path, size, options):
  model = reference.build("ViTMAEModel", **{**FIELDS, **options})
  model.save_pretrained(tmp_path)
  loaded = load_encoder(tmp_path)
  images = reference.images(2, *size, 3)
  want = reference.features(model, images, loaded)
  assert reference.relative_error(loaded(images), want) < 1e-5


def test_encoder_of_the_pretrained_model(tmp_path):
  model = reference.build("ViTMAEForPreTraining", **FIELDS)
  model.save_pretrained(tmp_path)
  loaded = load_encoder(tmp_path)
  images = reference.images(2, 16, 16, 3)
  want = reference.features(model.vit, images, loaded)
  assert reference.relative_error(loaded(images), want) < 1e-5


def test_cls_is_the_first_token(tmp_path):
  model = reference.build("ViTMAEModel", **FIELDS, mask_ratio=0.0)
  model.save_pretrained(tmp_path)
  loaded = load_encoder(tmp_path, output="cls")
  images = reference.images(2, 16, 16, 3)
  want = reference.run(model, images, loaded).last_hidden_state[:, 0].numpy()
  assert reference.relative_error(loaded(images), want) < 1e-5


def test_untrained_positions_are_maes():
  """Its code puts the column first, whatever its variables are called."""
  config = vit.ViTConfig(
    width=8,
    depth=1,
    num_heads=2,
    patch_size=4,
    image_size=20,
    positions="fixed",
  )
  for numpy in (np, jax.numpy):
    got = np.asarray(vit.sincos_embedding(config, numpy))
    assert got.shape == (1, 26, 8) and got.dtype == np.float32
    assert not np.any(got[0, 0])
    for row, column in ((0, 0), (0, 3), (2, 0), (4, 1)):
      want = []
      for place in (column, row):
        angles = [place, place / 100.0]
        want += [*np.sin(angles), *np.cos(angles)]
      np.testing.assert_allclose(got[0, 1 + 5 * row + column], want, atol=1e-6)


def test_published_base_is_the_default_of_transformers(tmp_path):
  transformers = reference.import_transformers()
  raw = transformers.ViTMAEConfig().to_dict()
  base = vit_mae.PUBLISHED["facebook/vit-mae-base"]
  assert vit_mae.parse_config(raw, tmp_path) == base
