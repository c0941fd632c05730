"""Blocks of LDM's autoencoders that no parity test sees alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.models import conv_blocks


class _Halve(nn.Module):
  @nn.compact
  def __call__(self, x):
    return conv_blocks.halve(x, jnp.float32, "native", "conv")


class _Norm(nn.Module):
  @nn.compact
  def __call__(self, x):
    return conv_blocks.group_norm(x, "norm", 8)


def test_halving_pads_below_and_to_the_right():
  """A window of ones counts the pixels that it sees."""
  x = jnp.ones((1, 4, 6, 1))
  params = {"conv": {"kernel": jnp.ones((3, 3, 1, 1)), "bias": jnp.zeros(1)}}
  seen = _Halve().apply({"params": params}, x)[0, :, :, 0]
  np.testing.assert_array_equal(seen, [[9, 9, 6], [6, 6, 4]])


def test_doubling_repeats_pixels():
  x = jnp.arange(4.0).reshape(1, 2, 2, 1)
  doubled = conv_blocks.nearest_double(x)[0, :, :, 0]
  wanted = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
  np.testing.assert_array_equal(doubled, wanted)


def test_groups_that_do_not_divide_are_fewer():
  """12 channels in 8 groups: 4 groups of 3, each of mean 0, deviation 1."""
  x = jax.random.normal(jax.random.key(0), (1, 5, 5, 12)) * 3 + 1
  params = {"norm": {"scale": jnp.ones(12), "bias": jnp.zeros(12)}}
  y = _Norm().apply({"params": params}, x).reshape(25, 4, 3)
  np.testing.assert_allclose(y.mean(axis=(0, 2)), 0, atol=1e-5)
  np.testing.assert_allclose(y.std(axis=(0, 2)), 1, atol=1e-4)
