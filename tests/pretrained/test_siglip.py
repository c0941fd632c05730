"""SigLIP and SigLIP2: parity with transformers, and their files."""

import numpy as np
import pytest
import vision_reference as reference

from psvae_jax.pretrained import siglip
from psvae_jax.pretrained.encoder import load_encoder

FIELDS = {
  "hidden_size": 32,
  "intermediate_size": 40,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "patch_size": 4,
  "image_size": 16,
}
TEXT = {**FIELDS, "vocab_size": 11, "max_position_embeddings": 5}


@pytest.mark.parametrize(
  ("size", "options"),
  [
    ((16, 16), {}),
    ((24, 24), {"layer_norm_eps": 1e-3}),
    ((12, 20), {"vision_use_head": False}),
    # As so400m/14 at 384: 4 whole patches of 4, and 2 pixels past them.
    ((18, 18), {"image_size": 18}),
    ((18, 8), {"image_size": 18}),
  ],
)
def test_parity_with_transformers(tmp_path, size, options):
  model = reference.build("SiglipVisionModel", **{**FIELDS, **options})
  model.save_pretrained(tmp_path)
  loaded = load_encoder(tmp_path)
  images = reference.images(2, *size, 3)
  want = reference.features(model, images, loaded)
  assert reference.relative_error(loaded(images), want) < 1e-5


def whole_model(folder):
  """A folder of both halves, and its vision half."""
  transformers = reference.import_transformers()
  config = transformers.SiglipConfig(
    text_config=TEXT, vision_config={**FIELDS, "patch_size": 8}
  )
  model = reference.randomise(transformers.SiglipModel(config).eval())
  model.save_pretrained(folder)
  return model.vision_model


def test_vision_half_of_a_whole_model(tmp_path):
  vision = whole_model(tmp_path)
  reference.rewrite(
    tmp_path,
    # Of files that older versions of transformers wrote.
    lambda tensors: tensors.update(
      {"vision_model.embeddings.position_ids": np.arange(4)[None]}
    ),
  )
  loaded = load_encoder(tmp_path)
  assert loaded.patch_size == 8
  images = reference.images(2, 16, 16, 3)
  want = reference.features(vision, images, loaded)
  assert reference.relative_error(loaded(images), want) < 1e-5


def test_names_without_the_prefix_are_read(tmp_path):
  whole_model(tmp_path)
  want = load_encoder(tmp_path).fingerprint

  def strip(tensors):
    for key in list(tensors):
      tensors[key.removeprefix("vision_model.")] = tensors.pop(key)

  reference.rewrite(tmp_path, strip)
  assert load_encoder(tmp_path).fingerprint == want


def test_a_missing_vision_tensor_is_named_as_in_the_file(tmp_path):
  whole_model(tmp_path)
  key = "vision_model.encoder.layers.0.mlp.fc1.bias"
  reference.rewrite(tmp_path, lambda tensors: tensors.pop(key))
  with pytest.raises(ValueError, match=f"missing: {key}"):
    load_encoder(tmp_path)


def test_naflex_is_refused_with_what_works(tmp_path):
  transformers = reference.import_transformers()
  for config in (transformers.Siglip2VisionConfig, transformers.Siglip2Config):
    config().save_pretrained(tmp_path)
    with pytest.raises(
      ValueError, match="NaFlex.*google/siglip2-base-patch16-224"
    ):
      load_encoder(tmp_path)


def test_there_is_no_cls():
  with pytest.raises(ValueError, match="CLS token.*SigLIP"):
    load_encoder("random:google/siglip2-base-patch16-224", output="cls")


def test_defaults_are_those_of_transformers(tmp_path):
  """Published files leave out what is a default."""
  transformers = reference.import_transformers()
  base = siglip.PUBLISHED["google/siglip-base-patch16-224"]
  raw = transformers.SiglipVisionConfig().to_dict()
  assert siglip.parse_config(raw, tmp_path) == base
  for vision in ({}, None, {"model_type": "siglip_vision_model"}):
    raw = {"model_type": "siglip", "vision_config": vision}
    assert siglip.parse_config(raw, tmp_path) == base
  large = {
    "hidden_size": 1152,
    "image_size": 384,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_hidden_layers": 27,
    "patch_size": 14,
  }
  raw = {"model_type": "siglip", "vision_config": large}
  name = "google/siglip2-so400m-patch14-384"
  assert siglip.parse_config(raw, tmp_path) == siglip.PUBLISHED[name]
  assert siglip.PUBLISHED[name].grid == 27


def test_vision_config_that_is_no_object_is_an_error(tmp_path):
  raw = {"model_type": "siglip", "vision_config": [1]}
  with pytest.raises(ValueError, match="vision_config must be a JSON object"):
    siglip.parse_config(raw, tmp_path / "config.json")
