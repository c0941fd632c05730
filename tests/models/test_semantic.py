"""SemanticEncoder, SemanticDecoder and the weights they inherit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psvae_jax.models import layers
from psvae_jax.models.semantic import (
  SemanticDecoder,
  SemanticEncoder,
  last_blocks,
)

BLOCK = layers.BlockConfig(width=16, num_heads=2, mlp_hidden=24)
CHANNELS = 6


def _params(module, x, seed=7):
  """Random parameters, none at its initial value; nothing is compiled."""
  shapes = jax.eval_shape(module.init, jax.random.key(0), x)["params"]
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    assert leaf.dtype == jnp.float32, path
    noise = rng.normal(size=leaf.shape)
    if path[-1].key == "kernel":
      value = noise / np.sqrt(leaf.shape[-2])
    else:
      value = 0.2 * noise + (path[-1].key == "scale")
    return jnp.asarray(value, jnp.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def _apply(module, params, x):
  return jax.jit(module.apply)({"params": params}, x)


def _build(module, shape, seed=7):
  x = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
  return _params(module, x, seed), x


def _encoder(**kwargs):
  return SemanticEncoder(
    block=BLOCK, channels=CHANNELS, mlp_hidden=20, **kwargs
  )


def _decoder(**kwargs):
  return SemanticDecoder(block=BLOCK, mlp_hidden=20, **kwargs)


def _dense(x, params):
  return x @ params["kernel"] + params["bias"]


def _gelu(x):
  return jax.nn.gelu(x, approximate=False)


def _standardised(x):
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(
    x.var(-1, keepdims=True) + BLOCK.layer_norm_eps
  )


def _run_blocks(params, x, depth):
  stack = layers.BlockStack(BLOCK, depth)
  batch, height, width, dim = x.shape
  y = _apply(stack, params, x.reshape(batch, height * width, dim))
  return y.reshape(x.shape)


def test_encoder_is_blocks_then_norm_then_mlp():
  params, tokens = _build(_encoder(), (2, 3, 4, BLOCK.width))
  posterior = _apply(_encoder(), params, tokens)

  x = _run_blocks(params["blocks"], tokens, depth=3)
  norm = params["norm"]["norm"]
  x = _standardised(x) * norm["scale"] + norm["bias"]
  moments = _dense(_gelu(_dense(x, params["fc1"])), params["fc2"])
  assert posterior.mean.shape == (2, 3, 4, CHANNELS)
  np.testing.assert_allclose(posterior.mean, moments[..., :CHANNELS], atol=2e-5)
  np.testing.assert_allclose(
    posterior.logvar, moments[..., CHANNELS:], atol=2e-5
  )


@pytest.mark.parametrize("final_norm", ["affine", "affine_free"])
def test_decoder_is_mlp_then_positions_then_blocks_then_norm(final_norm):
  decoder = _decoder(final_norm=final_norm)
  params, z = _build(decoder, (2, 3, 4, CHANNELS))
  features = _apply(decoder, params, z)

  x = _dense(_gelu(_dense(z, params["fc1"])), params["fc2"])
  # The MLP reads no position: what differs for equal z is the code alone.
  x = x + _position_code(3, 4, BLOCK.width)
  x = _standardised(_run_blocks(params["blocks"], x, depth=3))
  if final_norm == "affine":
    norm = params["norm"]["norm"]
    x = x * norm["scale"] + norm["bias"]
  else:
    assert "norm" not in params
  assert features.dtype == jnp.float32
  np.testing.assert_allclose(features, x, atol=2e-5)


def _position_code(height, width, dim):
  omega = 1 / 10000 ** (np.arange(dim // 4) / (dim // 4))
  rows, columns = np.mgrid[:height, :width]
  rows, columns = rows[..., None] * omega, columns[..., None] * omega
  return np.concatenate(
    [np.sin(rows), np.cos(rows), np.sin(columns), np.cos(columns)], -1
  )


def test_decoder_knows_where_a_token_is():
  decoder = _decoder()
  params, z = _build(decoder, (1, 3, 3, CHANNELS))
  features = _apply(decoder, params, jnp.broadcast_to(z[:, :1, :1], z.shape))
  tokens = np.asarray(features).reshape(9, -1)
  distance = np.linalg.norm(tokens[:, None] - tokens[None], axis=-1)
  assert distance[~np.eye(9, dtype=bool)].min() > 1e-2


def test_bfloat16_compute_keeps_float32_parameters_and_outputs():
  encoder, decoder = _encoder(dtype=jnp.bfloat16), _decoder(dtype=jnp.bfloat16)
  params, tokens = _build(encoder, (2, 2, 2, BLOCK.width))
  posterior = _apply(encoder, params, tokens)
  exact = _apply(_encoder(), params, tokens)
  assert posterior.mean.dtype == posterior.logvar.dtype == jnp.float32
  np.testing.assert_allclose(posterior.mean, exact.mean, atol=0.2)

  params, z = _build(decoder, (2, 2, 2, CHANNELS))
  assert _apply(decoder, params, z).dtype == jnp.float32


def test_remat_and_unroll_change_neither_values_nor_gradients():
  plain, other = _encoder(), _encoder(remat=True, unroll=3)
  params, tokens = _build(plain, (2, 2, 3, BLOCK.width))
  assert jax.tree.structure(params) == jax.tree.structure(
    _params(other, tokens)
  )

  def gradient(module):
    def loss(params):
      return jnp.sum(jnp.sin(_apply(module, params, tokens).mean))

    return jax.jit(jax.grad(loss))(params)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    gradient(plain),
    gradient(other),
  )


def test_encoder_refuses_tokens_of_another_width():
  with pytest.raises(ValueError, match="width 16"):
    _encoder().init(jax.random.key(0), jnp.zeros((1, 2, 2, 8)))


def test_decoder_refuses_an_unknown_final_norm():
  with pytest.raises(ValueError, match="affine_free"):
    _decoder(final_norm="rms").init(
      jax.random.key(0), jnp.zeros((1, 2, 2, CHANNELS))
    )


def test_last_blocks_continue_where_the_encoder_was_cut():
  stack = layers.BlockStack(BLOCK, 5)
  params, x = _build(stack, (2, 6, BLOCK.width))
  tail = last_blocks(params, 3)
  head = jax.tree.map(lambda leaf: leaf[:2], params)
  x2 = _apply(layers.BlockStack(BLOCK, 2), head, x)
  resumed = _apply(layers.BlockStack(BLOCK, 3), tail, x2)
  np.testing.assert_allclose(resumed, _apply(stack, params, x), atol=1e-5)


@pytest.mark.parametrize("module", [_encoder(), _decoder()])
def test_last_blocks_fit_both_semantic_modules(module):
  stack, _ = _build(layers.BlockStack(BLOCK, 5), (2, 6, BLOCK.width))
  width = BLOCK.width if isinstance(module, SemanticEncoder) else CHANNELS
  params, _ = _build(module, (1, 2, 2, width))
  tail = last_blocks(stack, 3, expected=params["blocks"])
  assert jax.tree.map(jnp.shape, tail) == jax.tree.map(
    jnp.shape, params["blocks"]
  )


def test_last_blocks_name_what_does_not_fit():
  stack, _ = _build(layers.BlockStack(BLOCK, 4), (1, 2, BLOCK.width))
  with pytest.raises(ValueError, match="last 5 of an encoder's 4"):
    last_blocks(stack, 5)
  with pytest.raises(ValueError, match="last 0"):
    last_blocks(stack, 0)

  wider = dataclasses.replace(BLOCK, mlp_hidden=32)
  target, _ = _build(layers.BlockStack(wider, 3), (1, 2, BLOCK.width))
  with pytest.raises(
    ValueError,
    match=r"mlp/fc1/kernel: encoder \(3, 16, 24\), module \(3, 16, 32\)",
  ):
    last_blocks(stack, 3, expected=target)

  gated = dataclasses.replace(BLOCK, swiglu=True)
  target, _ = _build(layers.BlockStack(gated, 3), (1, 2, BLOCK.width))
  with pytest.raises(ValueError, match="mlp/gate/kernel: encoder absent"):
    last_blocks(stack, 3, expected=target)

  ragged = {**stack, "extra": jnp.zeros((2, 3))}
  with pytest.raises(ValueError, match=r"leading sizes \[2, 4\]"):
    last_blocks(ragged, 1)


def test_rotary_blocks_turn_by_place():
  """Blocks of a DINOv3 stand on the grid of its tokens, without a prefix."""
  block = dataclasses.replace(BLOCK, rotary_base=100.0)
  module = SemanticEncoder(block=block, channels=CHANNELS, mlp_hidden=20)
  params, x = _build(module, (1, 2, 3, 16))
  got = _apply(module, params, x).mean
  plain = _apply(_encoder(), params, x).mean
  assert np.abs(got - plain).max() > 1e-3
  # Tokens of another shape of grid stand elsewhere.
  other = _apply(module, params, x.reshape(1, 3, 2, 16)).mean
  assert np.abs(got - other.reshape(got.shape)).max() > 1e-3
  decoder = SemanticDecoder(block=block, mlp_hidden=20)
  params, z = _build(decoder, (1, 2, 3, CHANNELS))
  f = _apply(decoder, params, z)
  assert np.abs(f - _apply(_decoder(), params, z)).max() > 1e-3
