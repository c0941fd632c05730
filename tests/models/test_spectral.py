"""Spectral normalisation against torch.nn.utils.spectral_norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from psvae_jax.models.spectral import SpectralConv, advance_spectral


def _variables(conv, shape, seed=0):
  x = jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
  variables = jax.jit(conv.init)(jax.random.key(seed), x)
  variables["params"] = tiny.randomise(variables["params"], seed)
  return x, variables["params"], variables["spectral"]


@pytest.mark.parametrize(("kernel_size", "features"), [(5, 7), (1, 1)])
def test_values_gradients_and_vectors_follow_torch(kernel_size, features):
  torch = pytest.importorskip("torch")
  conv = SpectralConv(features, kernel_size)
  x, params, spectral = _variables(conv, (2, 9, 6))

  reference = torch.nn.Conv1d(
    6,
    features,
    kernel_size,
    padding=kernel_size // 2,
    padding_mode="circular",
  )
  with torch.no_grad():
    kernel = params["kernel"].transpose(2, 1, 0)
    reference.weight.copy_(torch.from_numpy(kernel.copy()))
    reference.bias.copy_(torch.from_numpy(params["bias"]))
  torch.nn.utils.spectral_norm(reference)
  reference.weight_u.copy_(torch.from_numpy(np.array(spectral["u"])))
  optimizer = torch.optim.SGD(reference.parameters(), lr=0.3)
  inputs = torch.from_numpy(np.array(x)).permute(0, 2, 1)

  @jax.jit
  def step(params, spectral):
    def loss(params):
      out = conv.apply({"params": params, "spectral": spectral}, x)
      return jnp.mean(jnp.sin(out)), out

    grads, out = jax.grad(loss, has_aux=True)(params)
    moved = jax.tree.map(lambda p, g: p - 0.3 * g, params, grads)
    return moved, advance_spectral(params, spectral), grads, out

  def equal(got, want):
    np.testing.assert_allclose(got, want.detach().numpy(), rtol=0, atol=1e-5)

  for _ in range(5):
    params, spectral, grads, out = step(params, spectral)
    optimizer.zero_grad()
    want = reference(inputs)
    want.sin().mean().backward()
    optimizer.step()
    equal(out, want.permute(0, 2, 1))
    equal(spectral["u"], reference.weight_u)
    equal(grads["kernel"], reference.weight_orig.grad.permute(2, 1, 0))
    equal(grads["bias"], reference.bias.grad)
  assert np.abs(grads["bias"]).max() > 1e-2


def test_repeated_iterations_find_the_largest_singular_value():
  conv = SpectralConv(8, 3, use_bias=False)
  x, params, spectral = _variables(conv, (1, 7, 5))
  for _ in range(100):
    spectral = advance_spectral(params, spectral)
  matrix = np.asarray(params["kernel"]).reshape(15, 8)
  sigma = np.linalg.svd(matrix, compute_uv=False)[0]
  out = conv.apply({"params": params, "spectral": spectral}, x)
  plain = {"params": {"kernel": params["kernel"] / sigma}}
  rows = np.pad(x, ((0, 0), (1, 1), (0, 0)), mode="wrap")[0]
  windows = np.stack([rows[i : i + 3].reshape(-1) for i in range(7)])
  want = windows @ plain["params"]["kernel"].reshape(15, 8)
  np.testing.assert_allclose(out[0], want, atol=1e-5)


def test_rolled_tokens_give_rolled_outputs():
  conv = SpectralConv(4, 5)
  x, params, spectral = _variables(conv, (2, 8, 3))

  def apply(x):
    return conv.apply({"params": params, "spectral": spectral}, x)

  rolled = apply(jnp.roll(x, 3, axis=1))
  np.testing.assert_allclose(rolled, jnp.roll(apply(x), 3, axis=1), atol=1e-6)


def test_a_forward_pass_leaves_the_vector():
  conv = SpectralConv(4, 1)
  x, params, spectral = _variables(conv, (2, 8, 3))
  variables = {"params": params, "spectral": spectral}
  _, after = conv.apply(variables, x, mutable=["spectral"])
  np.testing.assert_array_equal(after["spectral"]["u"], spectral["u"])
  moved = advance_spectral(params, spectral)
  assert np.abs(moved["u"] - spectral["u"]).max() > 1e-3
  np.testing.assert_allclose(jnp.linalg.norm(moved["u"]), 1.0, rtol=1e-6)


def test_initial_values_are_torchs():
  conv = SpectralConv(64, 9)
  variables = conv.init(jax.random.key(0), jnp.zeros((1, 9, 32)))
  bound = (9 * 32) ** -0.5
  for name in ("kernel", "bias"):
    values = np.asarray(variables["params"][name])
    assert bound * 0.9 < np.abs(values).max() <= bound, name
  assert variables["params"]["kernel"].dtype == jnp.float32


def test_double_precision_is_double_throughout():
  with jax.enable_x64(True):
    conv = SpectralConv(4, 3, dtype=jnp.float64)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 6, 3))
    kernel, u = rng.normal(size=(3, 3, 4)), rng.normal(size=4)
    params = {"kernel": kernel, "bias": np.zeros(4)}
    out = conv.apply({"params": params, "spectral": {"u": u}}, x)
    matrix = kernel.reshape(9, 4)
    v = matrix @ u / np.linalg.norm(matrix @ u)
    sigma = np.linalg.norm(v @ matrix)
    want = x[0, [5, 0, 1]].reshape(-1) @ matrix / sigma
    assert out.dtype == jnp.float64
    np.testing.assert_allclose(out[0, 0], want, rtol=1e-12)
