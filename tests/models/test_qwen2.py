"""Qwen2.5's decoder: who sees whom, precision, and bad arguments."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psvae_jax.models import masked_attention, qwen2

CONFIG = qwen2.Qwen2Config(
  vocab_size=11,
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=2,
  num_attention_heads=6,
  num_key_value_heads=2,
  rope_theta=1e4,
)
TEXT, IMAGE = 5, 4


@pytest.fixture(scope="module")
def params():
  embeddings = jnp.zeros((1, 2, CONFIG.hidden_size))
  shapes = jax.eval_shape(
    qwen2.Qwen2(CONFIG, token_embedding=True).init,
    jax.random.key(0),
    embeddings,
  )["params"]
  ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), shapes)
  ones = tiny.randomise(ones)  # norm scales about 1, the rest too large
  return jax.tree_util.tree_map_with_path(
    lambda path, x: x if path[-1].key == "scale" else x - 1, ones
  )


def random(*shape, seed=0):
  rng = np.random.default_rng(seed)
  return rng.standard_normal(shape, np.float32)


@functools.cache
def apply(module):
  return jax.jit(lambda params, *args: module.apply({"params": params}, *args))


def run(params, embeddings, segments, module=None, positions=None):
  """Features under the segments' mask, one program whatever they are."""
  if positions is None:
    positions = masked_attention.sequence_positions(segments)
  params = {key: value for key, value in params.items() if key != "embed"}
  mask = masked_attention.transfusion_mask(segments)
  program = apply(module or qwen2.Qwen2(CONFIG))
  return np.asarray(program(params, embeddings, mask, positions))


def segments_of(text_mask):
  """Text, padded, and then one image."""
  return masked_attention.segment_ids(np.asarray(text_mask), IMAGE)


PLAIN = np.ones((2, TEXT), bool)
PADDED = np.array([[True] * 3 + [False] * 2, [False] * 2 + [True] * 3])


def changed(before, after):
  """Whether each token's features differ: (B, N) of float → (N,) bool."""
  return np.abs(after - before).max(axis=(0, 2)) > 1e-6


@pytest.mark.parametrize("token", range(TEXT + IMAGE))
def test_a_token_changes_itself_and_those_who_see_it(params, token):
  """Text is causal; an image sees the text, and all of itself."""
  embeddings = random(2, TEXT + IMAGE, CONFIG.hidden_size)
  segments = segments_of(PLAIN)
  before = run(params, embeddings, segments)
  embeddings[:, token] += random(2, CONFIG.hidden_size, seed=1)
  after = run(params, embeddings, segments)
  first = min(token, TEXT)  # of an image's token, the image's first
  expected = np.arange(TEXT + IMAGE) >= first
  np.testing.assert_array_equal(changed(before, after), expected)
  np.testing.assert_array_equal(before[:, :first], after[:, :first])


def test_padding_is_seen_by_nobody(params):
  embeddings = random(2, TEXT + IMAGE, CONFIG.hidden_size)
  segments = np.asarray(segments_of(PADDED))
  before = run(params, embeddings, segments)
  real = segments != masked_attention.PADDING
  embeddings[~real] += 1.0
  after = run(params, embeddings, segments)
  assert np.isfinite(before).all() and np.isfinite(after).all()
  np.testing.assert_array_equal(before[real], after[real])


def test_where_padding_stands_does_not_matter(params):
  """One text, padded after and before: the image is the same."""
  text, image = (random(n, CONFIG.hidden_size, seed=n) for n in (3, IMAGE))
  embeddings = np.zeros((2, TEXT + IMAGE, CONFIG.hidden_size), np.float32)
  embeddings[:, TEXT:] = image
  embeddings[:, :TEXT][PADDED] = np.tile(text, (2, 1))
  features = run(params, embeddings, segments_of(PADDED))[:, TEXT:]
  np.testing.assert_allclose(features[0], features[1], atol=1e-5)


def test_what_is_left_out_is_causal_from_zero(params):
  embeddings = random(2, TEXT + IMAGE, CONFIG.hidden_size)
  text = np.zeros((2, TEXT + IMAGE), np.int32)
  module = qwen2.Qwen2(CONFIG, token_embedding=True)
  implicit = apply(module)(params, embeddings)
  np.testing.assert_allclose(implicit, run(params, embeddings, text), atol=1e-6)


def test_only_differences_of_positions_matter(params):
  embeddings = random(2, TEXT + IMAGE, CONFIG.hidden_size)
  places = np.tile(np.arange(TEXT + IMAGE, dtype=np.int32), (2, 1))
  first, shifted, stretched = (
    run(params, embeddings, segments_of(PLAIN), positions=positions)
    for positions in (places, places + 50, places * 2)
  )
  np.testing.assert_allclose(shifted, first, atol=1e-4)
  assert np.abs(stretched - first).max() > 1e-2


def test_remat_and_unroll_change_nothing(params):
  embeddings = random(2, TEXT + IMAGE, CONFIG.hidden_size)
  segments = segments_of(PADDED)
  want = run(params, embeddings, segments)
  module = qwen2.Qwen2(CONFIG, remat=True, unroll=2)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def loss(params):
    features = module.apply(
      {"params": params},
      embeddings,
      masked_attention.transfusion_mask(segments),
      masked_attention.sequence_positions(segments),
    )
    return jnp.mean(jnp.square(features)), features

  (_, got), gradients = loss({k: params[k] for k in params if k != "embed"})
  np.testing.assert_allclose(got, want, atol=1e-5)
  for gradient in jax.tree.leaves(gradients):
    assert np.isfinite(gradient).all()


def test_bfloat16_is_close_and_its_features_are_float32(params):
  embeddings = random(2, TEXT + IMAGE, CONFIG.hidden_size)
  segments = np.asarray(segments_of(PADDED))
  exact = run(params, embeddings, segments)
  module = qwen2.Qwen2(CONFIG, dtype=jnp.bfloat16)
  rough = run(params, embeddings, segments, module)
  assert rough.dtype == np.float32 and np.isfinite(rough).all()
  real = segments != masked_attention.PADDING
  assert np.std((rough - exact)[real]) < 0.03 * np.std(exact[real])


def test_token_embeddings(params):
  module = qwen2.Qwen2(CONFIG, token_embedding=True)
  tokens = np.array([[3, 0, 10]])
  embedded = module.apply({"params": params}, tokens, method="embed_tokens")
  np.testing.assert_array_equal(embedded, params["embed"]["embedding"][tokens])
  with pytest.raises(ValueError, match="no token_embedding"):
    qwen2.Qwen2(CONFIG).apply({"params": {}}, tokens, method="embed_tokens")


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(embeddings=np.zeros((1, 3, 23))), r"\(batch, length, 24\), got"),
    (dict(mask=np.zeros((1, 1, 3, 3))), "mask must be boolean.*float64"),
    (dict(mask=np.ones((1, 3, 3), bool)), r"bool \(1, 3, 3\)"),
    (dict(mask=np.ones((1, 1, 3, 4), bool)), r"bool \(1, 1, 3, 4\)"),
    (dict(positions=np.zeros((1, 3))), "positions must be integers.*float64"),
    (dict(positions=np.arange(3)), r"int64 \(3,\)"),
  ],
)
def test_bad_arguments(changes, message):
  arguments = dict(embeddings=np.zeros((1, 3, 24))) | changes
  with pytest.raises(ValueError, match=message):
    qwen2.Qwen2(CONFIG).apply({"params": {}}, **arguments)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(num_key_value_heads=4), "6 is not a multiple of"),
    (dict(num_attention_heads=8), "8 heads of an even width"),
    (dict(hidden_size=0), "hidden_size 0 is not in"),
    (dict(vocab_size=2**30), "vocab_size 1073741824 is not in"),
    (dict(rope_theta=0.0), "rope_theta 0.0 is not positive"),
  ],
)
def test_bad_configs(changes, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(CONFIG, **changes)
