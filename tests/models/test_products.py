"""Mixed products: rounded operands, float32 results, the layer's gradients."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psvae_jax.models import products


def rounded(x):
  return np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64)


def inputs(seed=0):
  rng = np.random.default_rng(seed)
  x = rng.standard_normal((2, 5, 12)).astype(np.float32)
  kernel = rng.standard_normal((12, 7)).astype(np.float32)
  cotangent = rng.standard_normal((2, 5, 7)).astype(np.float32)
  return x, kernel, cotangent


@pytest.mark.parametrize("amx", [True, False])
def test_equals_float64_products_of_rounded_operands(monkeypatch, amx):
  if amx and not products.cpu_multiplies_bfloat16():
    pytest.skip("this CPU has no AMX")
  monkeypatch.setattr(products, "cpu_multiplies_bfloat16", lambda: amx)
  x, kernel, cotangent = inputs()
  dense = nn.Dense(7, use_bias=False, dot_general=products.mixed)
  apply = jax.jit(lambda x, k: dense.apply({"params": {"kernel": k}}, x))
  out, pull = jax.vjp(apply, x, kernel)
  x_grad, kernel_grad = pull(jnp.asarray(cotangent))
  assert {a.dtype for a in (out, x_grad, kernel_grad)} == {jnp.dtype("float32")}
  close = dict(rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(out, rounded(x) @ rounded(kernel), **close)
  np.testing.assert_allclose(
    x_grad, rounded(cotangent) @ rounded(kernel).T, **close
  )
  np.testing.assert_allclose(
    kernel_grad,
    np.einsum("bnk,bnm->km", rounded(x), rounded(cotangent)),
    **close,
  )


def test_native_is_flax_own():
  assert products.dot_general("native") is None
  assert products.dot_general("mixed") is products.mixed


def test_other_contractions_are_refused():
  x, kernel, _ = inputs()
  with pytest.raises(ValueError, match="Dense layers"):
    products.mixed(x, kernel, (((0,), (0,)), ((), ())))


def test_gradients_under_scan_and_remat():
  """As a stack of blocks uses it."""
  x, _, _ = inputs()
  kernels = np.random.default_rng(1).standard_normal((3, 12, 12))
  kernels = jnp.asarray(kernels / 12**0.5, jnp.float32)  # as a layer begins

  def loss(kernels, dot):
    def body(x, kernel):
      y = dot(x, kernel, (((2,), (0,)), ((), ())))
      return jnp.tanh(y), None

    out, _ = jax.lax.scan(jax.checkpoint(body), jnp.asarray(x), kernels)
    return jnp.mean(jnp.square(out))

  mixed, plain = (
    jax.jit(jax.grad(loss), static_argnums=1)(kernels, dot)
    for dot in (products.mixed, jax.lax.dot_general)
  )
  error = np.linalg.norm(mixed - plain) / np.linalg.norm(plain)
  assert 0 < error < 0.02, error


def test_generator_block_uses_them():
  from psvae_jax.models.dit_block import DiTBlock, block_config

  x = jnp.asarray(inputs()[0][:, :, :8])
  out = {}
  for kind in products.KINDS:
    block = DiTBlock(block_config(8, 2, 2.0, kind), clean=2)
    args = (x, jnp.ones((2, 2, 8)), jnp.zeros((5, 2)))
    params = tiny.randomise(block.init(jax.random.key(0), *args))
    out[kind] = np.asarray(block.apply(params, *args))
  difference = np.abs(out["mixed"] - out["native"]).max()
  assert 1e-5 < difference < 0.1, difference
