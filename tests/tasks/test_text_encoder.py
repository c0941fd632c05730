"""The job that makes the miniature's text encoder, and what it shipped."""

import json
import pathlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import psvae_jax
from psvae_jax import main
from psvae_jax.config import ConfigError, parser
from psvae_jax.data import captions, wordings
from psvae_jax.pretrained.text import load_text_encoder
from psvae_jax.tasks import text_encoder

SHIPPED = pathlib.Path(psvae_jax.__file__).parent / "assets" / "text_encoder"


def unit(rng, shape):
  x = rng.standard_normal(shape).astype(np.float32)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def cross_entropy(logits):
  return (np.log(np.exp(logits).sum(-1)) - np.diag(logits)).mean()


def test_loss_is_info_nce_both_ways():
  rng = np.random.default_rng(0)
  first, second, foils = unit(rng, (4, 8)), unit(rng, (4, 8)), unit(rng, (6, 8))
  meaning = jnp.arange(10)
  loss = text_encoder.paraphrase_loss(first, second, foils, 5.0, meaning)
  there = cross_entropy(5 * first @ np.concatenate([second, foils]).T)
  back = cross_entropy(5 * second @ np.concatenate([first, foils]).T)
  np.testing.assert_allclose(loss, (there + back) / 2, rtol=1e-5)


def test_what_says_the_same_is_no_negative():
  rng = np.random.default_rng(0)
  first, second, foils = unit(rng, (3, 8)), unit(rng, (3, 8)), unit(rng, (2, 8))

  def loss(meaning):
    return float(
      text_encoder.paraphrase_loss(first, second, foils, 5.0, meaning)
    )

  # 1 says what 0 says, and so does the first foil.
  got = loss(jnp.array([7, 7, 1, 7, 2]))
  rows = []
  for a, b in ((first, second), (second, first)):
    logits = np.exp(5 * a @ np.concatenate([b, foils]).T)
    kept = [[0, 2, 4], [1, 2, 4], [0, 1, 2, 3, 4]]
    rows += [
      np.log(logits[i, keys].sum() / logits[i, i])
      for i, keys in enumerate(kept)
    ]
  np.testing.assert_allclose(got, np.mean(rows), rtol=1e-5)
  assert got < loss(jnp.arange(5))


def test_role_loss_is_the_mean_over_words_that_have_one():
  logits = np.random.default_rng(0).standard_normal((2, 3, 5))
  roles = np.array([[-1, 4, 0], [2, -1, -1]])
  losses = np.log(np.exp(logits).sum(-1))
  want = [
    losses[i, j] - logits[i, j, roles[i, j]]
    for i, j in ((0, 1), (0, 2), (1, 0))
  ]
  got = text_encoder.role_loss(jnp.asarray(logits), jnp.asarray(roles))
  np.testing.assert_allclose(got, np.mean(want), rtol=1e-5)
  nobody = text_encoder.role_loss(jnp.asarray(logits), jnp.full((2, 3), -1))
  assert nobody == 0


def tiny_config():
  return ml_collections.ConfigDict(
    dict(
      stages=("text_encoder",),
      seed=0,
      data=dict(source="scenes", num_train=64, num_threads=1),
      eval=dict(batch_size=16, num_images=24, probe="none"),
      model=dict(
        text=dict(
          width=16,
          depth=1,
          num_heads=2,
          mlp_hidden=16,
          vocab_size=512,
          max_length=32,
        ),
        embed_dim=8,
      ),
      text_encoder=dict(
        train=dict(steps=2, batch_size=8, log_every=1), loss=dict(foils=2)
      ),
    )
  )


def test_job_writes_a_folder_that_loads(tmp_path):
  summary = main.run(tiny_config(), tmp_path)
  for name in ("foil_accuracy", "role_accuracy"):
    assert 0 <= summary["text_encoder"][f"eval/{name}"] <= 1
  export = tmp_path / "text_encoder" / "export"
  text = load_text_encoder(export, max_length=24)
  features, mask = text(["a small red circle"])
  assert features.shape == (1, 24, 16)
  assert 0 < int(mask.sum()) < 24
  provenance = json.loads((export / "provenance.json").read_text())
  assert provenance["metrics"] == summary["text_encoder"]


def test_batches_hold_wordings_and_foils(tmp_path):
  config = parser.parse(tiny_config())
  task = text_encoder.TextEncoderTask("text_encoder", config, tmp_path)
  part = task.train_data(tmp_path).parts
  out = part.transform(part.source[1], np.random.default_rng(0))
  assert out["tokens"].shape == out["token_mask"].shape == (4, 32)
  assert out["roles"].shape == (4, 32)
  assert out["meaning"].shape == (3,)
  assert out["meaning"][0] not in out["meaning"][1:]
  said = task.tokenizer.decode(out["tokens"])
  meanings = [
    wordings.meaning(captions.phrase(captions.parse_spec(text)))
    for text in (part.source[1]["text"], *said)
  ]
  assert meanings[0] == meanings[1] == meanings[2] not in meanings[3:]
  assert len(part.source) == 64 and "StatementSource" in repr(part.source)


def test_every_token_of_a_word_has_its_role(tmp_path):
  config = parser.parse(tiny_config())
  task = text_encoder.TextEncoderTask("text_encoder", config, tmp_path)
  transform = task.train_data(tmp_path).parts.transform
  text = "a small red circle left of a large blue ring"
  tokens, _ = task.tokenizer([text])
  roles = transform._roles(text, tokens[0])
  pieces = task.tokenizer.decode(tokens[0][:, None])
  said = {-1: "", 0: "", 1: ""}
  for piece, role in zip(pieces, roles, strict=True):
    said[int(role)] += piece
  assert said[0].split() == ["small", "red", "circle"]
  assert said[1].split() == ["large", "blue", "ring"]
  assert said[-1].split() == ["a", "left", "of", "a"]
  # Neither padding nor the end of the sequence.
  assert all(
    role == -1 for piece, role in zip(pieces, roles, strict=True) if not piece
  )


def test_a_foil_counts_where_it_is_nearer():
  near, far = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
  x = jnp.stack([jnp.stack([near, near, far]), jnp.stack([near, far, near])])
  np.testing.assert_array_equal(text_encoder._beats_foils(x), [1.0, 0.0])


@pytest.mark.parametrize(
  "change, message",
  [
    ({"data": {"source": "bundled"}}, "config.data.source must be 'scenes'"),
    (
      {"text_encoder": {"train": {"batch_size": 16, "accumulate": 2}}},
      "accumulate=2 must be 1",
    ),
  ],
)
def test_settings_it_cannot_have(tmp_path, change, message):
  config = tiny_config()
  config.update(change)
  with pytest.raises(ConfigError, match=message):
    main.run(config, tmp_path)


def test_shipped_one_knows_who_stands_where():
  text = load_text_encoder(SHIPPED, max_length=24)
  recorded = json.loads((SHIPPED / "provenance.json").read_text())
  assert recorded["metrics"]["eval/foil_accuracy"] > 0.95
  assert recorded["metrics"]["eval/role_accuracy"] > 0.99
  one = "a small red circle left of a large blue ring"
  same = "a large blue ring to the right of a small red circle"
  other = "a small red circle right of a large blue ring"
  swapped = "a small blue circle left of a large red ring"
  features, mask = text([one, same, other, swapped])
  weights = np.asarray(mask)[..., None]
  pooled = (np.asarray(features) * weights).sum(1) / weights.sum(1)
  pooled -= pooled.mean(0)
  pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
  near = pooled @ pooled[0]
  assert near[1] > max(near[2], near[3]), near


def test_shipped_tokens_are_finite_where_padded():
  text = load_text_encoder(SHIPPED, max_length=24)
  features, _ = text([""])
  assert bool(jnp.all(jnp.isfinite(jax.device_get(features))))
