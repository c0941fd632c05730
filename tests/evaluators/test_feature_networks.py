"""FD-DINOv2's network: Pillow's pixels, transformers' CLS token."""

import jax
import numpy as np
import pytest
import vision_reference
from PIL import Image

from psvae_jax.evaluators import feature_networks

SIDE = 224


@pytest.fixture(name="saved", scope="module")
def _saved(tmp_path_factory):
  """transformers' model, and its folder."""
  folder = tmp_path_factory.mktemp("dinov2")
  model = vision_reference.build(
    "Dinov2Model",
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    patch_size=14,
    image_size=70,
    mlp_ratio=2,
  )
  model.save_pretrained(folder)
  return model, folder


# Smaller, larger, not square, and as they are.
@pytest.mark.parametrize("size", [(48, 48), (300, 260), (SIDE, SIDE)])
def test_dinov2_is_transformers_cls_token_of_pillow_s_pixels(saved, size):
  torch = pytest.importorskip("torch")
  model, folder = saved
  network = feature_networks.dinov2(folder)
  # Noise, and a ramp.
  pictures = vision_reference.images(2, *size, 3)
  pictures[1] = np.arange(size[1])[None, :, None] * 200 // size[1]
  resized = np.stack(
    [
      Image.fromarray(x).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
      for x in pictures
    ]
  )
  mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
  pixels = ((resized / 255.0 - mean) / std).astype(np.float32)
  with torch.no_grad():
    tokens = model(torch.from_numpy(pixels).permute(0, 3, 1, 2))
  want = tokens.last_hidden_state[:, 0].numpy()
  got = jax.jit(network.features)(network.params, pictures)
  assert set(got) == {feature_networks.DINOV2} == set(network.kinds)
  error = vision_reference.relative_error(got[feature_networks.DINOV2], want)
  assert error <= 1e-4
  # Another token, or no final norm, would be far from it.
  assert np.abs(tokens.last_hidden_state[:, 1].numpy() - want).max() > 0.1


def test_dinov2_says_what_it_is(saved):
  _, folder = saved
  network = feature_networks.dinov2(folder)
  assert network.widths(48) == {feature_networks.DINOV2: 32}
  assert network.protocol["encoder"] == str(folder)
  assert network.protocol["encoder_resize"] == "Pillow bicubic to 224 × 224"


def test_patches_must_tile_224_pixels(tmp_path):
  model = vision_reference.build(
    "Dinov2Model",
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    patch_size=12,
    image_size=24,
  )
  model.save_pretrained(tmp_path)
  with pytest.raises(ValueError, match="patches of 12 pixels.*224 × 224"):
    feature_networks.dinov2(tmp_path)
