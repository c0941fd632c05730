"""LPIPS against the lpips package: distances and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psvae_jax.models import lpips
from psvae_jax.pretrained.lpips import load_lpips


def random_images(size, seed=0, batch=2):
  """Pairs that differ more or less."""
  rng = np.random.default_rng(seed)
  images = rng.uniform(-1, 1, (batch, *size, 3))
  amounts = np.linspace(0.5, 1.0, batch).reshape(-1, 1, 1, 1)
  others = images + amounts * rng.standard_normal(images.shape)
  return images.astype(np.float32), others.astype(np.float32)


def evaluate(module, params, images, references):
  """Distances, and the gradients of a weighted sum of them."""

  @jax.jit
  def both(params, images, references):
    def loss(images, references):
      distance = module.apply({"params": params}, images, references)
      weights = 1.0 + jnp.arange(distance.shape[0], dtype=distance.dtype)
      return jnp.sum(weights * distance), distance

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(images, references)

  gradients, distance = both(params, images, references)
  return distance, gradients


def relative_error(got, want):
  got, want = np.asarray(got), np.asarray(want)
  assert got.shape == want.shape
  return np.abs(got - want).max() / np.abs(want).max()


def torch_evaluate(model, images, references):
  torch = pytest.importorskip("torch")
  leaves = [
    torch.from_numpy(x).permute(0, 3, 1, 2).contiguous().requires_grad_()
    for x in (images, references)
  ]
  distance = model(*leaves).flatten()
  weights = 1.0 + torch.arange(len(images))
  torch.sum(weights * distance).backward()
  gradients = [leaf.grad.permute(0, 2, 3, 1).numpy() for leaf in leaves]
  return distance.detach().numpy(), gradients


@pytest.mark.parametrize(
  ("network", "size"),
  [
    ("alex", (75, 41)),
    ("vgg", (37, 45)),
    pytest.param("alex", (64, 64), marks=pytest.mark.slow),
    pytest.param("alex", (31, 256), marks=pytest.mark.slow),
    pytest.param("vgg", (64, 64), marks=pytest.mark.slow),
    pytest.param("vgg", (256, 256), marks=pytest.mark.slow),
  ],
)
def test_distance_and_gradients_equal_the_package(network, size):
  """Distances in float32, gradients in float64.

  A pooling's gradient goes to one of its values. Where two are nearly equal,
  rounding decides: the package's float32 gradient of 256 × 256 pixels is 1e-2
  away from its own in float64, and another machine chooses otherwise again.
  """
  import metric_networks

  params = metric_networks.lpips_params(network)
  model = metric_networks.torch_lpips(network, params)
  images = random_images(size)
  want, _ = torch_evaluate(model, *images)
  module = lpips.Lpips(network)
  got = jax.jit(module.apply)({"params": params}, *images)
  assert got.dtype == jnp.float32 and got.shape == (2,)
  assert want.min() > 0.01  # the comparison means something
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)

  images = [x.astype(np.float64) for x in images]
  want, want_gradients = torch_evaluate(model.double(), *images)
  with jax.enable_x64(True):
    module = lpips.Lpips(network, dtype=jnp.float64)
    got, gradients = evaluate(module, params, *images)
  assert got.dtype == np.float64
  np.testing.assert_allclose(got, want, rtol=1e-7)
  for ours, theirs in zip(gradients, want_gradients, strict=True):
    assert relative_error(ours, theirs) < 1e-6


def test_equal_and_blank_images_have_finite_gradients():
  network = load_lpips("random:alex")
  images, _ = random_images((40, 40))
  # Without biases a grey image leaves every activation at zero.
  params = jax.tree.map(lambda x: x * (x.ndim != 1), network.params)
  for i in range(5):
    params[f"head{i}"] = network.params[f"head{i}"]
  grey = np.zeros_like(images) + np.float32(lpips._SHIFT)
  for one, other in ((images, images), (grey, grey), (grey, images)):
    distance, gradients = evaluate(network.module, params, one, other)
    assert np.isfinite(distance).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients)
    if one is other:
      np.testing.assert_allclose(distance, 0, atol=1e-12)
  assert distance.min() > 0.1 and np.abs(gradients[1]).max() > 0


@pytest.mark.parametrize("value", [0.0, 1e-30])
def test_activations_whose_squares_are_zero_have_finite_gradients(value):
  x = jnp.full((1, 1, 1, 4), value)
  out, pullback = jax.vjp(lpips._unit, x)
  np.testing.assert_allclose(out, x / 1e-10, rtol=1e-6)
  assert np.isfinite(pullback(jnp.ones_like(out))[0]).all()


def test_remat_changes_memory_alone():
  network = load_lpips("random:alex")
  images = random_images((40, 36))

  def gradient(module):
    def loss(images, references):
      return jnp.sum(
        module.apply({"params": network.params}, images, references)
      )

    return jax.jit(jax.value_and_grad(loss))(*images)

  want, want_gradient = gradient(network.module)
  got, got_gradient = gradient(lpips.Lpips("alex", remat=True))
  assert relative_error(got, want) < 1e-6
  assert relative_error(got_gradient, want_gradient) < 1e-5


def test_bfloat16_stays_close():
  network = load_lpips("random:alex")
  rough = load_lpips("random:alex", dtype="bfloat16")
  images = random_images((40, 36))
  want = jax.jit(network.distance)(network.params, *images)
  got = jax.jit(rough.distance)(network.params, *images)
  assert got.dtype == jnp.float32
  assert 0 < relative_error(got, want) < 0.03


@pytest.mark.parametrize("window", [2, 3])
@pytest.mark.parametrize("size", [(8, 9), (7, 4)])
def test_pooling_and_its_gradient_equal_torch(window, size):
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(2)
  x = rng.integers(0, 3, (2, *size, 4)).astype(np.float32)  # many are equal
  leaf = torch.from_numpy(x).permute(0, 3, 1, 2).requires_grad_()
  want = torch.nn.functional.max_pool2d(leaf, window, 2)
  weight = rng.standard_normal(want.shape).astype(np.float32)
  (want * torch.from_numpy(weight)).sum().backward()
  got, pullback = jax.vjp(lambda x: lpips.max_pool(x, window), x)
  np.testing.assert_array_equal(got, want.detach().permute(0, 2, 3, 1))
  (gradient,) = pullback(jnp.asarray(weight.transpose(0, 2, 3, 1)))
  np.testing.assert_allclose(gradient, leaf.grad.permute(0, 2, 3, 1), atol=1e-6)


@pytest.mark.parametrize("network", ["vgg", "alex"])
def test_the_smallest_image_and_what_does_not_fit(network):
  side = lpips.MIN_SIDE[network]
  module = lpips.Lpips(network)

  def shape(module, *shapes):
    images = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.eval_shape(module.init_with_output, jax.random.key(0), *images)

  good = (2, side, side + 3, 3)
  out, params = shape(module, good, good)
  assert out.shape == (2,) and len(params["params"]) == 10
  small = (2, side + 3, side - 1, 3)
  with pytest.raises(ValueError, match=f"at least {side} pixels a side"):
    shape(module, small, small)
  for other in ((3, *good[1:]), (*good[:3], 1)):
    with pytest.raises(ValueError, match="as many references"):
      shape(module, good, other)
  with pytest.raises(ValueError, match="not 'squeeze'"):
    shape(lpips.Lpips("squeeze"), good, good)
