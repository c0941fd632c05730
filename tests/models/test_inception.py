"""The FID network against pytorch-fid's and torch-fidelity's."""

import jax
import numpy as np
import pytest

from psvae_jax.models import inception
from psvae_jax.pretrained.inception import load_inception, prepare

POOLED = ("64", "192", "768", "2048")
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def network():
  return load_inception("random:inception")


@pytest.fixture(scope="module")
def compiled(network):
  """Features of prepared images; one compilation for this file."""

  @jax.jit
  def apply(params, images):
    return network.module.apply({"params": params}, images)

  params = jax.device_put(network.params)
  return lambda images: apply(params, images)


def random_images(*size, batch=2):
  """Smooth and noisy, over the whole range."""
  rng = np.random.default_rng(3)
  coarse = rng.uniform(0, 255, (batch, 4, 4, 3))
  rows, columns = (np.arange(n) * 4 // n for n in size)
  images = coarse[:, rows][:, :, columns] + 40 * rng.standard_normal(
    (batch, *size, 3)
  )
  return np.clip(images, 0, 255).astype(np.uint8)


def check(got, want):
  """Absolute errors, of features that are about one."""
  for name, value in want.items():
    ours, value = np.asarray(got[name]), value.detach().numpy()
    assert ours.dtype == np.float32 and ours.shape == value.shape
    assert 0.05 < value.std() < 20, name  # the comparison means something
    np.testing.assert_allclose(
      ours, value, rtol=0, atol=TOLERANCE, err_msg=name
    )


def torch_fidelity_features(params, images):
  import metric_networks

  torch = metric_networks.torch
  model = metric_networks.fidelity_inception(params)
  seen = []
  model.Mixed_6d.branch1x1.register_forward_hook(
    lambda _, __, output: seen.append(output)
  )
  tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
  outputs = model(tensor)
  spatial = seen[0][:, :7].permute(0, 2, 3, 1).reshape(len(images), -1)
  *pooled, logits = outputs
  return {
    **dict(zip(POOLED, pooled, strict=True)),
    "logits": logits,
    "spatial": spatial,
  }


def pytorch_fid_features(params, images):
  import metric_networks

  torch = metric_networks.torch
  model = metric_networks.fid_inception(params)
  tensor = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
  with torch.no_grad():
    outputs = model(tensor)
  return {
    name: output.mean((2, 3))
    for name, output in zip(POOLED, outputs, strict=True)
  }


REFERENCES = {"tf1": torch_fidelity_features, "torch": pytorch_fid_features}


@pytest.mark.parametrize("resize", ["tf1", "torch"])
def test_features_equal_the_package_of_each_resize(network, compiled, resize):
  images = random_images(72, 96)
  got = compiled(prepare(images, resize))
  assert tuple(sorted(got)) == tuple(sorted(inception.FEATURES))
  check(got, REFERENCES[resize](network.params, images))
  other = compiled(prepare(images, {"tf1": "torch", "torch": "tf1"}[resize]))
  assert np.abs(other["2048"] - got["2048"]).max() > 10 * TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("resize", ["tf1", "torch"])
@pytest.mark.parametrize("size", [(299, 299), (256, 256), (512, 300), (32, 32)])
def test_features_of_other_sizes(network, size, resize):
  images = random_images(*size, batch=3)
  features = jax.jit(network.features, static_argnames="resize")
  got = features(network.params, images, resize=resize)
  check(got, REFERENCES[resize](network.params, images))


def test_another_size_is_an_error(network):
  images = jax.ShapeDtypeStruct((2, 256, 256, 3), "float32")
  with pytest.raises(ValueError, match="299, 299"):
    jax.eval_shape(network.module.apply, {"params": network.params}, images)


@pytest.mark.parametrize("resize", ["tf1", "torch"])
def test_images_of_the_own_size_keep_their_pixels(resize):
  images = np.zeros((1, 299, 299, 3), np.uint8)
  images[0, 0, 0] = 255
  out = np.asarray(prepare(images, resize))
  low, high = {"tf1": (-1, 127 / 128), "torch": (-1, 1)}[resize]
  assert out.min() == low and out.max() == high
  assert (out > low).sum() == 3
  with pytest.raises(ValueError, match="no resize 'tf'; did you mean 'tf1'"):
    prepare(images, "tf")
