"""Masks of pairs, and attention under them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psvae_jax.models import layers, masked_attention


def test_transfusion_mask_by_hand():
  """Two text tokens, padding, an image of two, one more text token."""
  segments = jnp.array([[0, 0, -1, 1, 1, 0]])
  mask = masked_attention.transfusion_mask(segments)
  assert mask.shape == (1, 1, 6, 6) and mask.dtype == bool
  expected = [
    "x.....",
    "xx....",
    "xx....",  # padding: looks at what it likes, is not looked at
    "xx.xx.",
    "xx.xx.",
    "xx.xxx",
  ]
  rows = ["".join(".x"[int(seen)] for seen in row) for row in mask[0, 0]]
  assert rows == expected


def test_images_do_not_see_each_other_backwards():
  segments = masked_attention.segment_ids(np.ones((1, 1), bool), 2, 2)
  mask = masked_attention.transfusion_mask(segments)[0, 0]
  np.testing.assert_array_equal(segments, [[0, 1, 1, 2, 2]])
  assert mask[1:3, 1:3].all() and mask[3:, :].all()
  assert not mask[1:3, 3:].any()


def test_text_alone_is_causal():
  segments = masked_attention.segment_ids(np.ones((2, 5), bool))
  np.testing.assert_array_equal(
    masked_attention.transfusion_mask(segments),
    np.broadcast_to(masked_attention.causal_mask(5), (2, 1, 5, 5)),
  )


def test_positions_leave_padding_out():
  segments = jnp.array([[-1, 0, 0, -1, 1, 1], [0, -1, -1, -1, 1, 1]])
  np.testing.assert_array_equal(
    masked_attention.sequence_positions(segments),
    [[0, 0, 1, 1, 2, 3], [0, 0, 0, 0, 1, 2]],
  )


def random(*shape):
  rng = np.random.default_rng(sum(shape))
  return jnp.asarray(rng.standard_normal(shape, np.float32))


def test_query_heads_share_keys_in_order():
  query, key, value = random(2, 5, 6, 4), random(2, 7, 2, 4), random(2, 7, 2, 4)
  out = masked_attention.attend(query, key, value)
  repeated = (jnp.repeat(x, 3, axis=2) for x in (key, value))
  np.testing.assert_allclose(out, layers.attend(query, *repeated), atol=1e-6)


def test_no_row_of_a_mask_gives_nan():
  """In neither direction, though a row sees nothing at all."""
  query, key, value = random(1, 3, 2, 4), random(1, 3, 1, 4), random(1, 3, 1, 4)
  mask = jnp.array([[[[True, False, False], [False] * 3, [True] * 3]]])

  def total(query, key, value):
    out = masked_attention.attend(query, key, value, mask)
    return jnp.sum(jnp.square(out)), out

  gradient = jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))
  (_, out), gradients = gradient(query, key, value)
  for x in (out, *gradients):
    assert np.isfinite(x).all()
  np.testing.assert_allclose(out[0, 0], np.tile(value[0, 0], (2, 1)), atol=1e-6)
  mean = value[0].mean(0)
  np.testing.assert_allclose(out[0, 1], np.tile(mean, (2, 1)), atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_softmax_is_wide_and_the_result_is_not(dtype):
  """Logits 64 and 64.25 are one number in bfloat16: heads would be equal."""
  query = jnp.full((1, 1, 1, 4), 8.0, dtype)
  key = jnp.array([[[[4.0] * 4], [[4.0] * 3 + [4.0625]]]], dtype)
  value = jnp.array([[[[0.0] * 4], [[1.0] * 4]]], dtype)
  out = masked_attention.attend(query, key, value)
  assert out.dtype == dtype
  assert float(out[0, 0, 0, 0]) == pytest.approx(1 / (1 + np.exp(-0.25)), 3e-3)
