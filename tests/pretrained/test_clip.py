"""CLIP whole: parity with transformers, and strict loading."""

import json

import clip_reference
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from psvae_jax.models import clip_text as models_clip_text
from psvae_jax.models import vit
from psvae_jax.pretrained import clip, clip_text, clip_vision

torch, transformers = clip_reference.torch, clip_reference.transformers

CAPTIONS = ["a cat", "", "12 Dogs"]


def save(folder, model):
  model.save_pretrained(folder)
  clip_reference.processor().save_pretrained(folder)
  return folder


def random_images(*sizes):
  rng = np.random.default_rng(0)
  return [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]


IMAGES = random_images((24, 24), (40, 31), (17, 50), (64, 64))


@pytest.mark.parametrize("activation, end", [("quick_gelu", 2), ("gelu", 513)])
def test_same_embeddings_as_transformers(tmp_path, activation, end):
  model = clip_reference.clip(
    dict(eos_token_id=end, hidden_act=activation), dict(hidden_act=activation)
  )
  batch = clip_reference.processor()(
    text=CAPTIONS, images=IMAGES, padding=True, return_tensors="pt"
  )
  with torch.no_grad():
    expected = model(**batch)
  network = clip.load_clip(save(tmp_path, model))
  images, texts = network.image_embeds(IMAGES), network.text_embeds(CAPTIONS)
  for ours, theirs in (
    (images, expected.image_embeds),
    (texts, expected.text_embeds),
  ):
    assert ours.dtype == jnp.float32 and ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=0)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
  logits = network.logit_scale * images @ texts.T
  np.testing.assert_allclose(
    logits, expected.logits_per_image, atol=1e-4 * network.logit_scale, rtol=0
  )
  assert np.ptp(logits) > 0.1 * network.logit_scale
  assert (network.image_size, network.width) == (24, 10)


def test_features_before_their_length_is_taken(tmp_path):
  """Parity of the projections themselves."""
  model = clip_reference.clip()
  network = clip.load_clip(save(tmp_path, model))
  pixels = network.images.normalize(network.images(IMAGES))
  with torch.no_grad():
    theirs = model.get_image_features(
      torch.tensor(np.asarray(pixels)).permute(0, 3, 1, 2)
    ).pooler_output.numpy()
  apply = jax.jit(network.vision.apply)
  cls = apply({"params": network.params["vision"]}, pixels)
  ours = cls @ network.params["visual_projection"]["kernel"]
  np.testing.assert_allclose(ours, theirs, atol=1e-4, rtol=1e-5)


@pytest.fixture(scope="module", name="saved")
def _saved(tmp_path_factory):
  return save(tmp_path_factory.mktemp("clip"), clip_reference.clip())


@pytest.fixture
def folder(tmp_path, saved):
  for path in saved.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  return tmp_path


def test_pure_functions_are_the_methods(saved):
  network = clip.load_clip(saved)
  np.testing.assert_array_equal(
    network.embed_pixels(network.params, network.images(IMAGES)),
    network.image_embeds(IMAGES),
  )
  np.testing.assert_array_equal(
    network.embed_tokens(network.params, network.tokenize(CAPTIONS)),
    network.text_embeds(CAPTIONS),
  )


def test_low_precision(saved):
  exact = clip.load_clip(saved)
  rough = clip.load_clip(saved, dtype=jnp.bfloat16)
  assert rough.fingerprint == exact.fingerprint
  for ours, want in (
    (rough.image_embeds(IMAGES), exact.image_embeds(IMAGES)),
    (rough.text_embeds(CAPTIONS), exact.text_embeds(CAPTIONS)),
  ):
    assert ours.dtype == jnp.float32
    assert (np.sum(np.asarray(ours) * want, axis=1) > 0.99).all()
    assert np.abs(ours - want).max() > 1e-5


def edit_json(folder, name, **values):
  path = folder / name
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(folder, edit):
  path = folder / "model.safetensors"
  tensors = safetensors.numpy.load_file(path)
  edit(tensors)
  safetensors.numpy.save_file(tensors, path)


def test_fingerprint_changes_with_what_changes_embeddings(folder):
  seen = {clip.load_clip(folder).fingerprint}
  settings = json.loads((folder / "processor_config.json").read_text())
  settings["image_processor"]["size"] = {"shortest_edge": 25}
  edit_json(folder, "processor_config.json", **settings)
  seen.add(clip.load_clip(folder).fingerprint)
  raw = json.loads((folder / "config.json").read_text())
  raw["vision_config"]["layer_norm_eps"] = 1e-4
  edit_json(folder, "config.json", **raw)
  seen.add(clip.load_clip(folder).fingerprint)
  edit_tensors(folder, lambda t: t.update(logit_scale=np.ones((), np.float32)))
  assert clip.load_clip(folder).fingerprint in seen
  edit_tensors(
    folder,
    lambda t: t.update(
      {"visual_projection.weight": t["visual_projection.weight"] * 2}
    ),
  )
  seen.add(clip.load_clip(folder).fingerprint)
  assert len(seen) == 4


def test_strict_tensors(folder):
  def edit(tensors):
    del tensors["vision_model.pre_layrnorm.bias"]
    tensors["text_model.extra"] = np.zeros(1, np.float32)
    tensors["visual_projection.weight"] = np.zeros((9, 24), np.float32)
    # Older files hold these.
    tensors["vision_model.embeddings.position_ids"] = np.arange(10)[None]
    tensors["text_model.embeddings.position_ids"] = np.arange(12)[None]

  edit_tensors(folder, edit)
  with pytest.raises(ValueError) as error:
    clip.load_clip(folder)
  message = str(error.value)
  assert "missing: vision_model.pre_layrnorm.bias" in message
  assert "unexpected: text_model.extra" in message and "_ids" not in message
  assert "visual_projection.weight (file (9, 24), model (10, 24))" in message
  edit_tensors(folder, lambda tensors: tensors.pop("logit_scale"))
  with pytest.raises(ValueError, match="no logit_scale"):
    clip.load_clip(folder)


def test_half_a_clip_is_not_enough(folder):
  edit_json(folder, "config.json", model_type="clip_text_model")
  with pytest.raises(ValueError, match="both halves") as error:
    clip.load_clip(folder)
  assert str(folder) in str(error.value)


def test_missing_files(folder, tmp_path):
  with pytest.raises(FileNotFoundError, match="nowhere"):
    clip.load_clip(tmp_path / "nowhere")
  (folder / "tokenizer.json").unlink()
  with pytest.raises(FileNotFoundError, match="neither tokenizer.json nor"):
    clip.load_clip(folder)


def test_untrained(monkeypatch, tmp_path):
  small = dict(width=24, depth=1, num_heads=2, patch_size=8, image_size=24)
  monkeypatch.setattr(
    clip_vision,
    "PUBLISHED",
    {"openai/clip-test": vit.ViTConfig(**small, layerscale_init=None)},
  )
  text = models_clip_text.ClipTextConfig(
    514, 16, 24, 1, 2, 12, eos_token_id=2, projection_dim=10
  )
  monkeypatch.setattr(clip_text, "PUBLISHED", {"openai/clip-test": text})
  network = clip.load_clip("random:openai/clip-test")
  again = clip.load_clip("random:openai/clip-test")
  assert network.fingerprint == again.fingerprint
  assert network.logit_scale == pytest.approx(1 / 0.07, rel=1e-3)
  embeds = network.image_embeds(IMAGES)
  assert embeds.shape == (4, 10)
  assert np.abs(embeds[0] - embeds[1]).max() > 0.01
  with pytest.raises(ValueError, match="no tokenizer"):
    network.text_embeds(CAPTIONS)
  clip_reference.tokenizer().save_pretrained(tmp_path)
  network = clip.load_clip("random:openai/clip-test", tokenizer=tmp_path)
  assert network.text_embeds(CAPTIONS).shape == (3, 10)
  with pytest.raises(ValueError, match="mean 'openai/clip-test'"):
    clip.load_clip("random:openai/clip-tset")


@pytest.mark.parametrize(
  "name, count",  # as transformers counts CLIPModel, less the logit scale
  [
    ("openai/clip-vit-base-patch32", 151_277_312),
    ("openai/clip-vit-large-patch14", 427_616_512),
  ],
)
def test_published_sizes(name, count):
  shapes = clip._param_shapes(
    *clip._modules(*clip._published(f"random:{name}"), jnp.float32)
  )
  assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
