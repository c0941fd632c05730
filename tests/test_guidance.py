"""Guidance of velocities against its formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psvae_jax import guidance


def _velocities(count, shape=(3, 2, 2, 5)):
  rng = np.random.default_rng(0)
  return [rng.normal(size=shape).astype(np.float32) for _ in range(count)]


def test_text_guidance_is_the_usual_formula_on_every_channel():
  null, text = _velocities(2)
  out = guidance.text_guided(null, text, 6.5)
  np.testing.assert_allclose(out, null + 6.5 * (text - null), atol=1e-5)


def test_edit_guidance_is_the_formula_of_design():
  null, image, both = _velocities(3)
  out = guidance.edit_guided(null, image, both, 1.5, 6.5)
  expected = null + 1.5 * (image - null) + 6.5 * (both - image)
  np.testing.assert_allclose(out, expected, atol=1e-5)


def test_each_example_may_have_its_own_scale():
  null, image, both = _velocities(3)
  scale = np.array([0.0, 1.0, 4.0], np.float32)
  out = guidance.text_guided(null, both, scale)
  edit = guidance.edit_guided(null, image, both, scale, scale[::-1])
  for i in range(3):
    np.testing.assert_array_equal(
      out[i], guidance.text_guided(null[i], both[i], scale[i])
    )
    np.testing.assert_array_equal(
      edit[i],
      guidance.edit_guided(null[i], image[i], both[i], scale[i], scale[2 - i]),
    )
  np.testing.assert_allclose(out[0], null[0], atol=1e-6)


def test_scale_one_is_exactly_the_conditioned_velocity():
  null, image, both = _velocities(3)
  np.testing.assert_array_equal(guidance.text_guided(null, both, 1.0), both)
  np.testing.assert_array_equal(
    guidance.edit_guided(null, image, both, 1.0, 1.0), both
  )


@pytest.mark.parametrize("t", [0.0, 0.29, 0.71, 1.0])
def test_outside_the_interval_nothing_is_guided(t):
  null, text = _velocities(2)
  guided = jax.jit(
    lambda t: guidance.text_guided(
      null, text, guidance.interval_scale(t, 6.5, 0.3, 0.7)
    )
  )
  np.testing.assert_array_equal(guided(t), text)


def test_interval_holds_its_ends_and_takes_a_time_an_example():
  t = jnp.array([0.2, 0.3, 0.5, 0.7, 0.8])
  scale = guidance.interval_scale(t, 6.5, 0.3, 0.7)
  np.testing.assert_array_equal(scale, [1, 6.5, 6.5, 6.5, 1])
  whole = guidance.interval_scale(jnp.array([0.0, 1.0]), 6.5, 0.0, 1.0)
  np.testing.assert_array_equal(whole, [6.5, 6.5])


def test_guidance_keeps_the_dtype():
  null, text = (jnp.asarray(v, jnp.bfloat16) for v in _velocities(2))
  assert guidance.text_guided(null, text, 6.5).dtype == jnp.bfloat16
