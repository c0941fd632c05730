"""Posterior and position code of the latent grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psvae_jax.models.latent import DiagonalGaussian, sincos_positions


def test_moments_are_mean_then_log_variance_and_clamped():
  moments = jnp.asarray([[1.0, 2.0, -31.0, 21.0]], jnp.bfloat16)
  posterior = DiagonalGaussian.from_moments(moments)
  np.testing.assert_array_equal(posterior.mean, [[1.0, 2.0]])
  np.testing.assert_array_equal(posterior.logvar, [[-30.0, 20.0]])
  assert posterior.mean.dtype == posterior.logvar.dtype == jnp.float32
  np.testing.assert_array_equal(posterior.mode(), posterior.mean)


def test_posterior_equals_diffusers():
  """Beyond the clamps too: a log-variance of deviation 20."""
  torch = pytest.importorskip("torch")
  pytest.importorskip("torchvision_ops")  # before diffusers imports it
  vae = pytest.importorskip("diffusers.models.autoencoders.vae")
  rng = np.random.default_rng(0)
  moments = 20 * rng.standard_normal((2, 3, 4, 10), np.float32)
  noise = rng.standard_normal((2, 3, 4, 5), np.float32)
  theirs = vae.DiagonalGaussianDistribution(
    torch.from_numpy(moments.transpose(0, 3, 1, 2).copy())
  )
  draw = theirs.mean + theirs.std * torch.from_numpy(
    noise.transpose(0, 3, 1, 2).copy()
  )
  ours = DiagonalGaussian.from_moments(jnp.asarray(moments))
  for found, expected in (
    (ours.mean, theirs.mean),
    (ours.logvar, theirs.logvar),
    (ours.mode(), theirs.mode()),
    (ours.at(noise), draw),
  ):
    expected = expected.numpy().transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_odd_channel_count_is_an_error():
  with pytest.raises(ValueError, match=r"\(2, 3\)"):
    DiagonalGaussian.from_moments(jnp.zeros((2, 3)))


def test_sample_has_the_stated_mean_and_deviation():
  count = 40_000
  mean = jnp.asarray([-1.0, 0.0, 2.0])
  std = jnp.asarray([0.1, 1.0, 3.0])
  posterior = DiagonalGaussian(
    mean=jnp.broadcast_to(mean, (count, 3)),
    logvar=jnp.broadcast_to(2 * jnp.log(std), (count, 3)),
  )
  draw = jax.jit(lambda p, rng: p.sample(rng))
  z = draw(posterior, jax.random.key(0))
  # Five standard errors of the mean, and of the standard deviation.
  np.testing.assert_array_less(abs(z.mean(0) - mean) / std, 5 / np.sqrt(count))
  np.testing.assert_array_less(abs(z.std(0) / std - 1), 5 / np.sqrt(2 * count))
  np.testing.assert_array_equal(z, draw(posterior, jax.random.key(0)))
  assert not np.array_equal(z, draw(posterior, jax.random.key(1)))


def test_sample_is_differentiable_in_both_moments():
  def total(mean, logvar):
    posterior = DiagonalGaussian(mean=mean, logvar=logvar)
    return posterior.sample(jax.random.key(3)).sum()

  mean, logvar = jnp.zeros((4,)), jnp.full((4,), 0.5)
  grad_mean, grad_logvar = jax.grad(total, argnums=(0, 1))(mean, logvar)
  noise = jax.random.normal(jax.random.key(3), (4,))
  np.testing.assert_allclose(grad_mean, np.ones(4))
  np.testing.assert_allclose(grad_logvar, 0.5 * np.exp(0.25) * noise, rtol=1e-5)


def test_positions_match_the_formula_element_by_element():
  height, width, dim = 3, 5, 16
  code = sincos_positions(height, width, dim)
  assert code.shape == (height, width, dim)
  quarter = dim // 4
  for row in range(height):
    for column in range(width):
      expected = []
      for position in (row, column):
        angles = [position / 10000 ** (i / quarter) for i in range(quarter)]
        expected += [np.sin(a) for a in angles] + [np.cos(a) for a in angles]
      np.testing.assert_allclose(code[row, column], expected, atol=1e-6)


def test_positions_need_a_width_divisible_by_four():
  with pytest.raises(ValueError, match="multiple of 4, got 18"):
    sincos_positions(2, 2, 18)
