"""Convolutions as matrix products against the native ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psvae_jax.models import convolution

CASES = [
  dict(kernel_size=(3, 3), padding=1),
  dict(kernel_size=(4, 4), strides=2, padding=1),
  dict(kernel_size=(4, 4), strides=1, padding=1),
  dict(kernel_size=(3, 2), strides=(2, 3), padding="SAME"),
  dict(kernel_size=(1, 1), padding="VALID"),
]


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_equal_the_native_ones(case):
  x = jax.random.normal(jax.random.key(0), (2, 9, 8, 5))
  native = nn.Conv(6, **case)
  product = native.clone(conv_general_dilated=convolution.convolve)
  params = native.init(jax.random.key(1), x)

  def run(module):
    def loss(params, x):
      y = module.apply(params, x)
      return jnp.sum(jnp.sin(y)), y

    grads, y = jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)
    return y, grads

  for a, b in zip(
    jax.tree.leaves(run(native)), jax.tree.leaves(run(product)), strict=True
  ):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_kinds():
  assert convolution.convolution("native") is None
  assert convolution.convolution("matmul") is convolution.convolve
  with pytest.raises(ValueError, match="fft"):
    convolution.convolution("fft")


@pytest.mark.parametrize(
  "case", [dict(kernel_dilation=2), dict(feature_group_count=5)]
)
def test_what_it_cannot_do_is_an_error(case):
  x = jnp.zeros((1, 8, 8, 5))
  conv = nn.Conv(5, (3, 3), conv_general_dilated=convolution.convolve, **case)
  with pytest.raises(ValueError, match="no dilation, no groups"):
    jax.eval_shape(conv.init, jax.random.key(0), x)
