"""DINOv3: parity with transformers, and its files."""

import numpy as np
import pytest
import vision_reference as reference

from psvae_jax.pretrained import dinov3, files
from psvae_jax.pretrained.encoder import load_encoder

FIELDS = {
  "hidden_size": 32,
  "intermediate_size": 40,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "patch_size": 4,
  "image_size": 16,
  "num_register_tokens": 2,
}
GATED = {"use_gated_mlp": True, "hidden_act": "silu"}


@pytest.mark.parametrize(
  ("size", "options"),
  [
    ((16, 16), {}),
    ((24, 12), {"num_register_tokens": 0, "key_bias": True}),
    ((8, 20), {**GATED, "query_bias": False, "value_bias": False}),
    ((16, 16), {**GATED, "rope_theta": 20.0, "layer_norm_eps": 1e-3}),
  ],
)
def test_parity_with_transformers(tmp_path, size, options):
  model = reference.build("DINOv3ViTModel", **{**FIELDS, **options})
  model.save_pretrained(tmp_path)
  loaded = load_encoder(tmp_path)
  images = reference.images(2, *size, 3)
  want = reference.features(model, images, loaded)
  assert reference.relative_error(loaded(images), want) < 1e-5


def test_cls_is_the_pooled_output(tmp_path):
  model = reference.build("DINOv3ViTModel", **FIELDS)
  model.save_pretrained(tmp_path)
  loaded = load_encoder(tmp_path, output="cls")
  images = reference.images(2, 16, 16, 3)
  want = reference.run(model, images, loaded).pooler_output.numpy()
  assert reference.relative_error(loaded(images), want) < 1e-5


def test_both_names_of_layers_are_read(tmp_path):
  """As published, and as transformers 5 calls them in memory."""
  model = reference.build("DINOv3ViTModel", **FIELDS)
  model.save_pretrained(tmp_path)
  want = load_encoder(tmp_path).fingerprint
  tensors = files.read_safetensors(tmp_path)
  names = {key.removeprefix("model."): key for key in tensors}
  assert "layer.0.attention.k_proj.weight" in names
  for prefix in ("", "model."):
    renamed = {
      (prefix if name.startswith("layer.") else "") + name: tensors[key]
      for name, key in names.items()
    }
    files.write_safetensors(tmp_path / "model.safetensors", renamed)
    assert load_encoder(tmp_path).fingerprint == want


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"mlp_bias": False}, "mlp_bias False is not True"),
    ({"query_bias": False}, "value_bias True is not False"),
    (GATED | {"hidden_act": "gelu"}, "hidden_act 'gelu' is not 'silu'"),
    ({"hidden_size": None}, "hidden_size is None"),
    ({"num_key_value_heads": 1, "num_channels": 1}, "num_channels 1"),
  ],
)
def test_config_that_is_not_supported_is_an_error(tmp_path, fields, message):
  raw = {"model_type": "dinov3_vit", **FIELDS, **fields}
  with pytest.raises(ValueError, match=message):
    dinov3.parse_config(raw, tmp_path / "config.json")


def test_published_small_is_the_default_of_transformers(tmp_path):
  transformers = reference.import_transformers()
  raw = transformers.DINOv3ViTConfig(num_register_tokens=4).to_dict()
  name = "facebook/dinov3-vits16-pretrain-lvd1689m"
  assert dinov3.parse_config(raw, tmp_path) == dinov3.PUBLISHED[name]


def test_absent_bias_is_no_parameter(tmp_path):
  model = reference.build("DINOv3ViTModel", **FIELDS)
  model.save_pretrained(tmp_path)
  attention = load_encoder(tmp_path).params["blocks"]["block"]["attention"]
  assert set(attention["key"]) == {"kernel"}
  assert set(attention["query"]) == {"kernel", "bias"}
  assert np.shape(attention["value"]["bias"]) == (2, 32)
