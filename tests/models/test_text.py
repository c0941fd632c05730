"""T5 encoder against the `transformers` model, and on its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import vision_reference

from psvae_jax.models import text

CONFIG = text.T5Config(
  vocab_size=37,
  d_model=24,
  d_kv=5,
  d_ff=40,
  num_layers=3,
  num_heads=4,
  feed_forward_proj="gated-gelu",
)


def random_params(config, scale=1.0):
  """Every parameter random: norm scales near 1, the rest about T5's sizes."""
  tokens = jnp.zeros((1, 4), jnp.int32)
  shapes = jax.eval_shape(
    text.T5Encoder(config).init, jax.random.key(0), tokens, tokens == 0
  )
  rng = np.random.default_rng(0)

  def randomise(path, leaf):
    noise = rng.standard_normal(leaf.shape).astype(np.float32)
    names = [key.key for key in path]
    if "scale" in names:
      return 1 + 0.3 * noise
    if "embedding" in names:
      return noise
    fan = leaf.shape[-2] * (config.d_kv if "query" in names else 1)
    return scale * noise / np.float32(np.sqrt(fan))

  return jax.tree_util.tree_map_with_path(randomise, shapes["params"])


def batch(lengths, padded, vocab_size=37, seed=1):
  """Random tokens (B, padded), each row real up to its length."""
  rng = np.random.default_rng(seed)
  tokens = rng.integers(0, vocab_size, (len(lengths), padded), np.int32)
  mask = np.arange(padded)[None] < np.asarray(lengths)[:, None]
  return np.where(mask, tokens, 0), mask


def apply(config, params, tokens, mask, **options):
  module = text.T5Encoder(config, **options)
  return np.asarray(jax.jit(module.apply)({"params": params}, tokens, mask))


def torch_encoder(config, params):
  """The reference model holding `params`, mapped by hand."""
  torch = pytest.importorskip("torch")
  transformers = vision_reference.import_transformers()
  model = transformers.T5EncoderModel(
    transformers.T5Config(
      vocab_size=config.vocab_size,
      d_model=config.d_model,
      d_kv=config.d_kv,
      d_ff=config.d_ff,
      num_layers=config.num_layers,
      num_heads=config.num_heads,
      relative_attention_num_buckets=config.relative_attention_num_buckets,
      relative_attention_max_distance=(config.relative_attention_max_distance),
      feed_forward_proj=config.feed_forward_proj,
      layer_norm_epsilon=config.layer_norm_eps,
    )
  ).eval()

  def copy(target, value):
    value = np.array(value)
    assert target.weight.shape == value.shape
    target.weight.data = torch.from_numpy(value)

  copy(model.shared, params["embed"]["embedding"])
  copy(model.encoder.final_layer_norm, params["final_norm"]["scale"])
  blocks = params["blocks"]["block"]
  for index, block in enumerate(model.encoder.block):
    attend, feed = block.layer
    heads, dense = attend.SelfAttention, feed.DenseReluDense
    copy(attend.layer_norm, blocks["norm1"]["scale"][index])
    copy(feed.layer_norm, blocks["norm2"]["scale"][index])
    targets = {
      ("attention", "query"): heads.q,
      ("attention", "key"): heads.k,
      ("attention", "value"): heads.v,
      ("attention", "out"): heads.o,
      ("mlp", "fc1"): dense.wi_1 if config.gated else dense.wi,
      ("mlp", "fc2"): dense.wo,
    }
    if config.gated:
      targets["mlp", "gate"] = dense.wi_0
    for (module, name), target in targets.items():
      copy(target, blocks[module][name]["kernel"][index].T)
  first = model.encoder.block[0].layer[0].SelfAttention
  copy(first.relative_attention_bias, params["relative_bias"]["embedding"])
  return torch, model


@pytest.mark.parametrize("projection", ["gated-gelu", "relu", "gated-silu"])
@pytest.mark.parametrize("lengths,padded", [((9, 4, 1), 9), ((150, 131), 150)])
def test_matches_transformers(projection, lengths, padded):
  config = dataclasses.replace(CONFIG, feed_forward_proj=projection)
  params = random_params(config)
  tokens, mask = batch(lengths, padded)
  torch, model = torch_encoder(config, params)
  with torch.no_grad():
    expected = model(
      torch.from_numpy(tokens).long(), torch.from_numpy(mask).long()
    ).last_hidden_state.numpy()
  features = apply(config, params, tokens, mask)
  assert features.dtype == np.float32
  assert np.std(expected[mask]) > 0.5
  np.testing.assert_allclose(features[mask], expected[mask], atol=1e-5, rtol=0)


def test_gradients_match_transformers():
  params = random_params(CONFIG)
  tokens, mask = batch((7, 12), 12)
  weight = np.random.default_rng(2).standard_normal((2, 12, 24))
  weight = (weight * mask[..., None]).astype(np.float32)
  torch, model = torch_encoder(CONFIG, params)
  output = model(torch.from_numpy(tokens).long(), torch.from_numpy(mask).long())
  (output.last_hidden_state * torch.from_numpy(weight)).sum().backward()

  def loss(params):
    features = text.T5Encoder(CONFIG, remat=True).apply(
      {"params": params}, tokens, mask
    )
    return jnp.sum(features * weight)

  grads = jax.jit(jax.grad(loss))(params)
  encoder = model.encoder
  heads = encoder.block[0].layer[0].SelfAttention
  feed = encoder.block[2].layer[1].DenseReluDense
  blocks = grads["blocks"]["block"]
  for ours, theirs in (
    (grads["relative_bias"]["embedding"], heads.relative_attention_bias),
    (grads["embed"]["embedding"], model.shared),
    (grads["final_norm"]["scale"], encoder.final_layer_norm),
    (blocks["attention"]["query"]["kernel"][0].T, heads.q),
    (blocks["mlp"]["gate"]["kernel"][2].T, feed.wi_0),
  ):
    theirs = theirs.weight.grad.numpy()
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    assert error < 1e-5


@pytest.mark.parametrize("buckets,distance", [(32, 128), (8, 16), (64, 256)])
def test_buckets_match_transformers(buckets, distance):
  torch = pytest.importorskip("torch")
  vision_reference.import_transformers()
  modeling = pytest.importorskip("transformers.models.t5.modeling_t5")
  position = torch.arange(400)
  expected = modeling.T5Attention._relative_position_bucket(
    position[None] - position[:, None], True, buckets, distance
  )
  ours = text.relative_position_buckets(400, buckets, distance)
  assert ours.dtype == np.int32
  np.testing.assert_array_equal(ours, expected.numpy())


def test_buckets_of_a_small_table():
  # 8 buckets: 0, 1 exact; 2 up to √(2·16) = 5.7, then 3; after the query: + 4.
  row = text.relative_position_buckets(12, 8, 16)[0]
  assert row.tolist() == [0, 5, 6, 6, 6, 6, 7, 7, 7, 7, 7, 7]
  column = text.relative_position_buckets(12, 8, 16)[:, 0]
  assert column.tolist() == [0, 1, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3]


def test_padding_does_not_change_real_positions():
  params = random_params(CONFIG)
  tokens, mask = batch((6, 3), 6)
  wide_tokens = np.concatenate([tokens, np.full((2, 5), 7, np.int32)], axis=1)
  wide_mask = np.concatenate([mask, np.zeros((2, 5), bool)], axis=1)
  features = apply(CONFIG, params, tokens, mask)
  wide = apply(CONFIG, params, wide_tokens, wide_mask)
  assert np.isfinite(wide).all()
  np.testing.assert_allclose(wide[:, :6][mask], features[mask], atol=1e-5)


def test_a_row_without_tokens_is_finite():
  tokens, mask = batch((4, 0), 4)
  assert np.isfinite(apply(CONFIG, random_params(CONFIG), tokens, mask)).all()


def test_unroll_and_remat_change_no_value():
  params = random_params(CONFIG)
  tokens, mask = batch((6, 3), 6)
  expected = apply(CONFIG, params, tokens, mask)
  for options in ({"unroll": 3}, {"remat": True}, {"remat": True, "unroll": 2}):
    features = apply(CONFIG, params, tokens, mask, **options)
    np.testing.assert_allclose(features, expected, atol=1e-6, rtol=0)


def test_bfloat16_keeps_a_float32_residual_stream():
  # A stream of about 300, where bfloat16's spacing is 2, and branches of about
  # 1: a stream kept in bfloat16 would be wrong by about 1.
  params = random_params(CONFIG)
  params["embed"]["embedding"] = 300 + params["embed"]["embedding"]
  tokens, mask = batch((6, 3), 6)

  def stream(dtype):
    features, captured = text.T5Encoder(CONFIG, dtype=dtype).apply(
      {"params": params},
      tokens,
      mask,
      capture_intermediates=lambda module, _: module.name == "blocks",
      mutable="intermediates",
    )
    assert features.dtype == dtype
    (stream,) = captured["intermediates"]["blocks"]["__call__"]
    return stream

  exact, low = stream(jnp.float32), stream(jnp.bfloat16)
  embedded = params["embed"]["embedding"][tokens]
  assert np.std((exact - embedded)[mask]) > 1
  assert low.dtype == jnp.float32
  np.testing.assert_allclose(low[mask], exact[mask], atol=0.15, rtol=0)


def test_bfloat16_is_finite_with_large_weights():
  # The XXL model's own trouble: activations far beyond float16's 65504.
  params = random_params(CONFIG, scale=100.0)
  tokens, mask = batch((6, 3), 6)

  def loss(params):
    module = text.T5Encoder(CONFIG, dtype=jnp.bfloat16)
    features = module.apply({"params": params}, tokens, mask)
    return jnp.mean(jnp.square(features.astype(jnp.float32))), features

  grads, features = jax.jit(jax.grad(loss, has_aux=True))(params)
  assert features.dtype == jnp.bfloat16
  for leaf in jax.tree.leaves((grads, features)):
    assert np.isfinite(np.asarray(leaf, np.float32)).all()


def test_initial_features_have_unit_scale():
  tokens, mask = batch((30, 30), 30)
  module = text.T5Encoder(dataclasses.replace(CONFIG, num_layers=6))
  params = jax.jit(module.init)(jax.random.key(0), tokens, mask)["params"]
  query = params["blocks"]["block"]["attention"]["query"]["kernel"]
  assert query.shape == (6, 24, 20)
  assert np.std(query) == pytest.approx((24 * 5) ** -0.5, rel=0.05)
  features = jax.jit(module.apply)({"params": params}, tokens, mask)
  assert np.std(features) == pytest.approx(1.0, abs=0.05)


def test_xxl_has_the_published_size():
  config = text.T5Config(
    d_model=4096,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
  )
  tokens = jnp.zeros((1, 4), jnp.int32)
  shapes = jax.eval_shape(
    text.T5Encoder(config).init, jax.random.key(0), tokens, tokens == 0
  )
  sizes = [leaf.size for leaf in jax.tree.leaves(shapes)]
  assert sum(sizes) == 4_762_310_656


@pytest.mark.parametrize(
  "field,value",
  [
    ("feed_forward_proj", "gated-sine"),
    ("relative_attention_num_buckets", 30),
    ("relative_attention_max_distance", 8),
  ],
)
def test_config_errors_name_the_field(field, value):
  with pytest.raises(ValueError, match=f"{field}.*{value}"):
    dataclasses.replace(CONFIG, **{field: value})


def test_shape_errors():
  tokens, mask = batch((6, 3), 6)
  with pytest.raises(ValueError, match=r"\(2, 6\) and \(2, 5\)"):
    text.T5Encoder(CONFIG).init(jax.random.key(0), tokens, mask[:, :5])
