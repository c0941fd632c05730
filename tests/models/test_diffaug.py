"""DiffAug against a PyTorch transcription given the same draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psvae_jax import sharding
from psvae_jax.config import MeshConfig
from psvae_jax.models import diffaug

ALL = diffaug.OPERATIONS
RAE = ("translation", "color")


def _images(batch=6, side=20, seed=0):
  rng = np.random.default_rng(seed)
  return rng.uniform(-1, 1, (batch, side, side, 3)).astype(np.float32)


def _draws(batch=6, side=20, operations=ALL, seed=0):
  return diffaug.draw(jax.random.key(seed), batch, side, operations)


def _torch_augment(torch, x, draws, operations):
  """The published augmentations, (B, 3, S, S), from numbers given."""
  draws = {name: torch.from_numpy(np.array(v)) for name, v in draws.items()}
  batch, _, height, width = x.shape

  def grid(rows, columns):
    axes = (torch.arange(n) for n in (batch, rows, columns))
    return torch.meshgrid(*axes, indexing="ij")

  for name in operations:
    if name == "color":
      x = x + draws["brightness"].view(-1, 1, 1, 1)
      mean = x.mean(1, keepdim=True)
      x = (x - mean) * draws["saturation"].view(-1, 1, 1, 1) + mean
      mean = x.mean((1, 2, 3), keepdim=True)
      x = (x - mean) * draws["contrast"].view(-1, 1, 1, 1) + mean
    elif name == "translation":
      image, row, column = grid(height, width)
      row = row + draws["translation"][:, 0].view(-1, 1, 1) + 1
      column = column + draws["translation"][:, 1].view(-1, 1, 1) + 1
      row, column = row.clamp(0, height + 1), column.clamp(0, width + 1)
      padded = torch.nn.functional.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)
      x = padded[image, row, column].permute(0, 3, 1, 2)
    else:
      rows, columns = int(height * 0.5 + 0.5), int(width * 0.5 + 0.5)
      image, row, column = grid(rows, columns)
      row = row + draws["cutout"][:, 0].view(-1, 1, 1) - rows // 2
      column = column + draws["cutout"][:, 1].view(-1, 1, 1) - columns // 2
      mask = torch.ones(batch, height, width)
      mask[image, row.clamp(0, height - 1), column.clamp(0, width - 1)] = 0
      x = x * mask[:, None]
  return x


@pytest.mark.parametrize(
  ("operations", "side"),
  [
    (("color",), 20),
    (("translation",), 20),
    (("cutout",), 20),
    (("cutout",), 17),
    (RAE, 17),
    (ALL, 20),
  ],
)
def test_values_and_gradients_equal_torch(operations, side):
  torch = pytest.importorskip("torch")
  images, draws = _images(side=side), _draws(side=side, operations=operations)
  leaf = torch.from_numpy(images).permute(0, 3, 1, 2).requires_grad_()
  want = _torch_augment(torch, leaf, draws, operations)
  want.sin().sum().backward()

  @jax.jit
  def augment(images):
    out = diffaug.augment(images, draws, operations)
    return jnp.sum(jnp.sin(out)), out

  grad, got = jax.grad(augment, has_aux=True)(images)
  assert np.abs(got - images).max() > 0.1
  close = np.testing.assert_allclose
  close(got, want.permute(0, 2, 3, 1).detach(), rtol=0, atol=1e-5)
  close(grad, leaf.grad.permute(0, 2, 3, 1), rtol=0, atol=1e-5)


def test_draws_cover_their_ranges_and_no_more():
  draws = {name: np.array(x) for name, x in _draws(4096, 16).items()}
  for name, low, high in (
    ("brightness", -0.5, 0.5),
    ("saturation", 0.0, 2.0),
    ("contrast", 0.5, 1.5),
  ):
    assert draws[name].shape == (4096,)
    assert low <= draws[name].min() < low + 0.01, name
    assert high - 0.01 < draws[name].max() < high, name
  for name, low, high in (("translation", -2, 2), ("cutout", 0, 16)):
    assert draws[name].shape == (4096, 2)
    for axis in draws[name].T:
      assert set(axis) == set(range(low, high + 1)), name
    assert abs(np.corrcoef(draws[name].T)[0, 1]) < 0.05
  odd = np.array(_draws(4096, 17)["cutout"])  # a square of 9 pixels
  assert (odd.min(), odd.max()) == (0, 16)


def test_an_operation_s_draws_do_not_depend_on_the_others():
  every = _draws(operations=ALL)
  for operation in ALL:
    for name, value in _draws(operations=(operation,)).items():
      np.testing.assert_array_equal(value, every[name])


def test_a_part_of_the_batch_is_augmented_as_in_the_whole():
  images, draws = _images(), _draws()
  whole = diffaug.augment(images, draws, ALL)
  part = jax.tree.map(lambda x: x[2:4], draws)
  np.testing.assert_allclose(
    diffaug.augment(images[2:4], part, ALL), whole[2:4], atol=1e-6
  )


def test_eight_devices_agree_and_do_not_talk():
  images, draws = _images(8, 16), _draws(8, 16)

  @jax.jit
  def gradient(images, draws):
    def loss(images):
      return jnp.sum(jnp.sin(diffaug.augment(images, draws, ALL)))

    return jax.grad(loss)(images)

  want = gradient(images, draws)
  mesh = sharding.make_mesh(MeshConfig(data=8))
  arguments = jax.device_put((images, draws), sharding.batch_sharding(mesh))
  np.testing.assert_allclose(gradient(*arguments), want, atol=1e-6)
  text = gradient.lower(*arguments).compile().as_text()
  for collective in ("all-gather", "all-reduce", "all-to-all", "permute"):
    assert f"{collective}(" not in text, collective


def test_no_operations_change_nothing():
  images = _images()
  assert diffaug.draw(jax.random.key(0), 6, 20, ()) == {}
  assert diffaug.augment(images, {}, ()) is images


def test_bad_operations_are_named():
  with pytest.raises(ValueError, match="'colour'; did you mean 'color'"):
    _draws(operations=("colour",))
  with pytest.raises(ValueError, match="'cutout' is given twice"):
    diffaug.augment(_images(), _draws(), ("cutout", "color", "cutout"))
