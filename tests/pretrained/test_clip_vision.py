"""CLIP's vision half: parity with transformers, and its files."""

import numpy as np
import pytest
import vision_reference as reference

from psvae_jax.pretrained import clip_vision
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
    ((12, 20), {"hidden_act": "gelu"}),
  ],
)
def test_parity_with_transformers(tmp_path, size, options):
  model = reference.build("CLIPVisionModel", **{**FIELDS, **options})
  model.save_pretrained(tmp_path)
  loaded = load_encoder(tmp_path)
  images = reference.images(2, *size, 3)
  want = reference.features(model, images, loaded)
  assert reference.relative_error(loaded(images), want) < 1e-5


def test_cls_is_the_pooled_output(tmp_path):
  model = reference.build("CLIPVisionModel", **FIELDS)
  model.save_pretrained(tmp_path)
  loaded = load_encoder(tmp_path, output="cls")
  images = reference.images(2, 16, 16, 3)
  want = reference.run(model, images, loaded).pooler_output.numpy()
  assert reference.relative_error(loaded(images), want) < 1e-5


@pytest.mark.parametrize("kind", ["CLIPModel", "CLIPVisionModelWithProjection"])
def test_vision_half_of_larger_models(tmp_path, kind):
  transformers = reference.import_transformers()
  config = transformers.CLIPVisionConfig(**FIELDS, projection_dim=7)
  if kind == "CLIPModel":
    vision = config.to_dict()
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=vision)
  model = reference.randomise(getattr(transformers, kind)(config).eval())
  model.save_pretrained(tmp_path)
  reference.rewrite(
    tmp_path,
    # Of files that older versions of transformers wrote.
    lambda tensors: tensors.update(
      {"vision_model.embeddings.position_ids": np.arange(17)[None]}
    ),
  )
  loaded = load_encoder(tmp_path)
  images = reference.images(2, 16, 16, 3)
  want = reference.features(model.vision_model, images, loaded)
  assert reference.relative_error(loaded(images), want) < 1e-5


def test_defaults_are_those_of_transformers(tmp_path):
  transformers = reference.import_transformers()
  base = clip_vision.PUBLISHED["openai/clip-vit-base-patch32"]
  raw = transformers.CLIPVisionConfig().to_dict()
  assert clip_vision.parse_config(raw, tmp_path) == base
  raw = {"model_type": "clip", "vision_config_dict": None}
  assert clip_vision.parse_config(raw, tmp_path) == base


def test_the_older_of_two_vision_configs_counts(tmp_path):
  transformers = reference.import_transformers()
  raw = {
    "model_type": "clip",
    "text_config": {},
    "vision_config": {"hidden_size": 64, "image_size": 336},
    "vision_config_dict": {
      "hidden_size": 1024,
      "intermediate_size": 4096,
      "num_attention_heads": 16,
      "num_hidden_layers": 24,
      "patch_size": 14,
    },
  }
  got = clip_vision.parse_config(raw, tmp_path)
  assert got == clip_vision.PUBLISHED["openai/clip-vit-large-patch14"]
  theirs = transformers.CLIPConfig(**raw).vision_config.to_dict()
  assert clip_vision.parse_config(theirs, tmp_path) == got
