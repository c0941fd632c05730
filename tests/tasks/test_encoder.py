"""The job that makes the miniature's encoders, and what it shipped."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import psvae_jax
from psvae_jax import main
from psvae_jax.config import ConfigError, EvalConfig, MeshConfig
from psvae_jax.config import parser as config_parser
from psvae_jax.data.scene_checker import check_caption
from psvae_jax.data.scenes import SceneSource
from psvae_jax.evaluators.scenes import SceneProbe
from psvae_jax.pretrained.text import load_text_encoder
from psvae_jax.sharding import make_mesh
from psvae_jax.tasks import autoencoder, encoder

ASSETS = pathlib.Path(psvae_jax.__file__).parent / "assets"


def unit(rng, shape):
  x = jax.random.normal(rng, shape)
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def log_softmax(x):
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def test_contrastive_loss_is_clips_with_extra_negatives(rng):
  rngs = jax.random.split(rng)
  image, text = unit(rngs[0], (4, 8)), unit(rngs[1], (7, 8))
  tokens = jnp.arange(7)[:, None] + jnp.zeros((7, 3), jnp.int32)
  loss = encoder.contrastive_loss(image, text, jnp.float32(5.0), tokens)
  logits = 5.0 * np.array(image) @ np.array(text).T
  to_text = -np.diag(log_softmax(logits)).mean()
  to_image = -np.diag(log_softmax(logits[:, :4].T)).mean()
  np.testing.assert_allclose(loss, 0.5 * (to_text + to_image), rtol=1e-5)


def test_an_equal_caption_is_not_a_negative(rng):
  rngs = jax.random.split(rng)
  image, text = unit(rngs[0], (3, 8)), unit(rngs[1], (6, 8))
  different = jnp.arange(6)[:, None]
  # Image 1 has image 0's caption: neither may be the other's negative.
  equal = different.at[1].set(0)

  def gradient(tokens):
    def loss(text):
      return encoder.contrastive_loss(image[:1], text, jnp.float32(5.0), tokens)

    return jax.grad(loss)(text)

  assert bool(jnp.any(gradient(different)[1] != 0))
  assert not bool(jnp.any(gradient(equal)[1] != 0))


def test_word_loss_counts_each_word_once_and_no_special_token():
  logits = jnp.array([[9.0, -9.0, 9.0, 0.0, 2.0, -2.0]])
  tokens = jnp.array([[4, 4, 3, 1, 0, 0]])
  loss = encoder.word_loss(logits, tokens)
  expected = np.log(2.0) + np.log1p(np.exp(-2.0)) * 2
  np.testing.assert_allclose(loss, expected, rtol=1e-6)


def tiny_config():
  return ml_collections.ConfigDict(
    dict(
      stages=("encoder",),
      seed=0,
      data=dict(source="scenes", num_train=64, num_threads=1),
      eval=dict(
        batch_size=16, num_images=32, num_probe_train=64, num_probe_test=64
      ),
      model=dict(
        vision=dict(
          width=16, depth=1, num_heads=2, patch_size=16, image_size=48
        ),
        text=dict(
          width=16,
          depth=1,
          num_heads=2,
          mlp_hidden=16,
          vocab_size=512,
          max_length=24,
        ),
        embed_dim=8,
      ),
      encoder=dict(train=dict(steps=2, batch_size=8, log_every=1)),
    )
  )


def test_job_writes_folders_that_load(tmp_path):
  summary = main.run(tiny_config(), tmp_path)
  assert summary["encoder"]["eval/probe_accuracy"] > 0
  export = tmp_path / "encoder" / "export"
  vision = psvae_jax.load_encoder(export / "encoder")
  features = vision(np.zeros((2, 48, 48, 3), np.uint8))
  assert features.shape == (2, 3, 3, 16)
  text = load_text_encoder(export / "text_encoder", max_length=24)
  features, mask = text(["a small red circle"])
  assert features.shape == (1, 24, 16)
  assert 0 < int(mask.sum()) < 24
  provenance = json.loads((export / "provenance.json").read_text())
  assert provenance["metrics"] == summary["encoder"]


def test_job_needs_scenes(tmp_path):
  config = tiny_config()
  config.data = dict(source="bundled")
  with pytest.raises(ConfigError, match="config.data.source must be 'scenes'"):
    main.run(config, tmp_path)


def test_captions_fit_and_foils_are_wrong(tmp_path):
  config = config_parser.parse(tiny_config())
  task = encoder.EncoderTask("encoder", config, tmp_path)
  transform = task.example_transform()
  source = SceneSource("train", 64)
  for i in range(64):
    out = transform(source[i], np.random.default_rng(i))
    caption, foil = task.tokenizer.decode(out["tokens"])
    assert caption == source[i]["caption"]
    assert check_caption(source[i]["image"], caption)["all"]
    assert not check_caption(source[i]["image"], foil)["all"]


def test_shipped_encoder_reaches_its_recorded_figure():
  """On other scenes than those the figure was measured on."""
  provenance = json.loads((ASSETS / "provenance.json").read_text())
  recorded = provenance["metrics"]["eval/probe_accuracy"]
  vision = psvae_jax.load_encoder(autoencoder.EMBEDDED_ENCODER)
  probe = SceneProbe(
    48, EvalConfig(num_probe_train=1024, num_probe_test=512, batch_size=256)
  )
  mesh = make_mesh(MeshConfig(), jax.devices()[:1])

  def pooled(images):
    return {"features": jnp.asarray(vision(images)).mean(axis=(1, 2))}

  accuracy = probe.scores(pooled, mesh)["features"]["accuracy"]
  assert recorded > 0.95
  assert accuracy > recorded - 0.03


def test_shipped_text_encoder_tells_captions_apart():
  text = load_text_encoder(ASSETS / "text_encoder", max_length=24)
  captions = ["a small red circle", "a small red square", "a small red circle"]
  features, mask = text(captions)
  weights = mask[..., None]
  pooled = (features * weights).sum(1) / weights.sum(1)
  np.testing.assert_allclose(pooled[0], pooled[2], rtol=1e-5, atol=1e-6)
  assert float(jnp.linalg.norm(pooled[0] - pooled[1])) > 0.1
