"""Resampling against PyTorch's and TensorFlow 1's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psvae_jax.models import resize

SIZES = [
  ((256, 256), (224, 224)),
  ((48, 48), (40, 40)),
  ((5, 9), (13, 4)),
  ((4, 4), (8, 8)),
  ((1, 3), (2, 3)),
]


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("size", "out"), SIZES)
def test_equals_torch(size, out, antialias):
  torch = pytest.importorskip("torch")
  images = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3))
  images = images.astype(np.float32)
  want = torch.nn.functional.interpolate(
    torch.from_numpy(images).permute(0, 3, 1, 2),
    size=out,
    mode="bicubic",
    align_corners=False,
    antialias=antialias,
  )
  want = want.permute(0, 2, 3, 1).numpy()
  got = resize.resize_bicubic(images, out, antialias=antialias)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("size", "out"), SIZES)
def test_bilinear_equals_torch(size, out):
  torch = pytest.importorskip("torch")
  images = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3))
  images = images.astype(np.float32)
  want = torch.nn.functional.interpolate(
    torch.from_numpy(images).permute(0, 3, 1, 2),
    size=out,
    mode="bilinear",
    align_corners=False,
  )
  got = resize.resize_bilinear(images, out)
  want = want.permute(0, 2, 3, 1).numpy()
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_gradient_equals_torch():
  torch = pytest.importorskip("torch")
  rng = np.random.default_rng(1)
  image = rng.normal(size=(1, 12, 10, 2)).astype(np.float32)
  weight = rng.normal(size=(1, 7, 9, 2)).astype(np.float32)
  got = jax.grad(lambda x: jnp.sum(resize.resize_bicubic(x, (7, 9)) * weight))(
    image
  )
  leaf = torch.from_numpy(image).permute(0, 3, 1, 2).requires_grad_()
  out = torch.nn.functional.interpolate(leaf, size=(7, 9), mode="bicubic")
  (out * torch.from_numpy(weight).permute(0, 3, 1, 2)).sum().backward()
  want = leaf.grad.permute(0, 2, 3, 1).numpy()
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("antialias", [False, True])
def test_matrix_keeps_constants_and_is_identity_at_equal_size(antialias):
  matrix = resize.bicubic_matrix(48, 40, antialias)
  assert matrix.shape == (40, 48) and matrix.dtype == np.float64
  np.testing.assert_allclose(matrix.sum(1), 1, atol=1e-14)
  same = resize.bicubic_matrix(9, 9, antialias)
  np.testing.assert_allclose(same, np.eye(9), atol=1e-15)


def test_leading_axes_and_dtype():
  image = jnp.ones((2, 3, 8, 6, 4), jnp.bfloat16)
  out = resize.resize_bicubic(image, (4, 9))
  assert out.shape == (2, 3, 4, 9, 4) and out.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.asarray(out, np.float32), 1)


def test_bad_input_is_named():
  with pytest.raises(ValueError, match="uint8"):
    resize.resize_bicubic(np.zeros((1, 8, 8, 3), np.uint8), (4, 4))
  with pytest.raises(ValueError, match="8 to 0"):
    resize.resize_bicubic(np.zeros((8, 8, 3), np.float32), (0, 4))
  with pytest.raises(ValueError, match="8 to 0"):
    resize.resize_bilinear(np.zeros((8, 8, 3), np.float32), (0, 4))


@pytest.mark.parametrize(("size", "out"), [*SIZES, ((64, 48), (299, 299))])
def test_bilinear_of_tensorflow_1_equals_torch_fidelity(size, out):
  torch = pytest.importorskip("torch")
  compat = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
  images = np.random.default_rng(0).uniform(0, 255, (2, *size, 3))
  images = images.astype(np.float32)
  want = compat.interpolate_bilinear_2d_like_tensorflow1x(
    torch.from_numpy(images).permute(0, 3, 1, 2), size=out, align_corners=False
  )
  got = resize.resize_bilinear_tf1(images, out)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(
    got, want.permute(0, 2, 3, 1).numpy(), rtol=0, atol=1e-4
  )


def test_bilinear_of_tensorflow_1_starts_at_the_corner():
  matrix = resize.bilinear_tf1_matrix(2, 4)
  want = [[1, 0], [0.5, 0.5], [0, 1], [0, 1]]
  np.testing.assert_array_equal(matrix, want)
  with pytest.raises(ValueError, match="axis of 0 to 4"):
    resize.bilinear_tf1_matrix(0, 4)
