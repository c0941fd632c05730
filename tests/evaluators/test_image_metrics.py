"""Image metrics against torchmetrics, and means that ignore padding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psvae_jax.evaluators import comparison, image_metrics

_ssim = jax.jit(image_metrics.ssim)


def _random(seed, shape):
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def _smooth(seed, shape):
  """Slow waves, bright and dark: where float32 variances cancel."""
  rng = np.random.default_rng(seed)
  batch, height, width, channels = shape
  y, x, _ = np.mgrid[:height, :width, :1]
  waves = []
  for _ in range(batch):
    low, high, a, b = rng.uniform(size=(4, channels))
    phase = 2 * np.pi * (a * y / height + b * x / width)
    waves.append(255 * (low + (high - low) * (0.5 + 0.5 * np.sin(phase))))
  return np.round(np.stack(waves)).astype(np.uint8)


def _noisy(images, amount, seed=7):
  noise = np.random.default_rng(seed).normal(0, amount, images.shape)
  return np.clip(np.round(images + noise), 0, 255).astype(np.uint8)


def _pairs():
  """Few shapes, so that few programs are compiled."""
  texture, waves = (3, 20, 33, 3), (3, 48, 31, 3)
  flat = np.full(texture, 250, np.uint8)
  return {
    "random": (_random(0, texture), _random(1, texture)),
    "noisy": (_noisy(_random(2, texture), 9), _random(2, texture)),
    "flat": (_noisy(flat, 0.4), flat),
    "smooth": (_noisy(_smooth(3, waves), 2), _smooth(3, waves)),
    "clean": (_smooth(4, waves), _smooth(5, waves)),
    "smallest": (_random(6, (2, 11, 12, 1)), _random(7, (2, 11, 12, 1))),
  }


def _torch_pair(name, dtype):
  torch = pytest.importorskip("torch")
  return [
    torch.from_numpy(np.moveaxis(x, -1, 1).copy()).to(getattr(torch, dtype))
    for x in _pairs()[name]
  ]


def _torch_ssim(name, dtype):
  torchmetrics = pytest.importorskip("torchmetrics.functional.image")
  images, references = _torch_pair(name, dtype)
  return torchmetrics.structural_similarity_index_measure(
    images / 255,
    references / 255,
    gaussian_kernel=True,
    sigma=1.5,
    kernel_size=11,
    data_range=1.0,
    reduction="none",
  ).numpy()


@pytest.mark.parametrize("name", list(_pairs()))
def test_ssim_matches_torchmetrics(name):
  got = _ssim(*_pairs()[name])
  assert got.dtype == jnp.float32
  want = _torch_ssim(name, "float64")
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["random", "noisy", "smallest"])
def test_ssim_matches_torchmetrics_in_float32(name):
  # Textured images only: on flat ones the cancellation in its float32
  # variances puts torchmetrics itself 1e-3 away from its own float64 figure.
  got = _ssim(*_pairs()[name])
  want = _torch_ssim(name, "float32")
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", list(_pairs()))
def test_psnr_matches_torchmetrics(name):
  torchmetrics = pytest.importorskip("torchmetrics.functional.image")
  images, references = _torch_pair(name, "float64")
  want = torchmetrics.peak_signal_noise_ratio(
    images, references, data_range=255.0, reduction="none", dim=(1, 2, 3)
  )
  got = image_metrics.psnr(*_pairs()[name])
  np.testing.assert_allclose(got, want.numpy(), rtol=0, atol=1e-5)


def test_psnr_of_a_known_error():
  references = np.full((2, 8, 9, 3), 100, np.uint8)
  images = references + np.array([1, 100], np.uint8)[:, None, None, None]
  want = 20 * np.log10(255 / np.array([1, 100]))
  np.testing.assert_allclose(
    image_metrics.psnr(images, references), want, rtol=1e-6
  )
  # uint8 must not wrap around when the image is the darker one.
  np.testing.assert_allclose(
    image_metrics.psnr(references, images), want, rtol=1e-6
  )


def test_equal_images_have_the_best_figures():
  x = _pairs()["random"][0]
  np.testing.assert_array_equal(
    image_metrics.psnr(x, x), [comparison.MAX_PSNR] * 3
  )
  np.testing.assert_allclose(_ssim(x, x), 1.0, rtol=0, atol=1e-6)
  np.testing.assert_array_equal(image_metrics.gradient_sharpness(x, x), 1.0)


@pytest.mark.parametrize("name", ["psnr", "ssim", "gradient_sharpness"])
def test_floats_and_single_images_give_the_same(name):
  metric = jax.jit(getattr(image_metrics, name))
  images, references = _pairs()["noisy"]
  want = metric(images, references)
  floats = metric(images.astype(np.float32), references.astype(np.float32))
  np.testing.assert_allclose(floats, want, rtol=1e-6)
  for i in range(len(images)):
    alone = metric(images[i : i + 1], references[i : i + 1])
    np.testing.assert_allclose(alone[0], want[i], rtol=1e-6)


def test_sharpness_against_numpy_and_blur():
  images, references = _pairs()["noisy"]

  def mean_gradient(x):
    x = x.astype(np.float64)
    down = np.diff(x, axis=1)[:, :, :-1]
    right = np.diff(x, axis=2)[:, :-1]
    return np.hypot(down, right).mean((1, 2, 3))

  got = image_metrics.gradient_sharpness(images, references)
  want = mean_gradient(images) / mean_gradient(references)
  np.testing.assert_allclose(got, want, rtol=1e-5)

  x = references.astype(np.float32)
  blurred = (x[:, 1:, 1:] + x[:, :-1, :-1]) / 2
  assert (image_metrics.gradient_sharpness(blurred, x[:, 1:, 1:]) < 0.9).all()


def test_sharpness_of_flat_images_is_finite():
  flat = np.full((1, 8, 8, 3), 9, np.uint8)
  assert image_metrics.gradient_sharpness(flat, flat + 50)[0] == 1.0
  assert np.isfinite(
    image_metrics.gradient_sharpness(_random(0, (1, 8, 8, 3)), flat)
  ).all()


def test_to_uint8_rounds_and_clamps():
  levels = np.arange(256)
  x = jnp.asarray(levels / 127.5 - 1, jnp.float32)
  got = image_metrics.to_uint8(x)
  assert got.dtype == jnp.uint8
  np.testing.assert_array_equal(got, levels)
  # Four tenths of a level either way rounds back; truncation would not.
  nudge = 0.4 / 127.5
  np.testing.assert_array_equal(image_metrics.to_uint8(x + nudge), levels)
  np.testing.assert_array_equal(image_metrics.to_uint8(x - nudge), levels)
  outside = jnp.array([-1.5, -1.0, 0.0, 1.0, 1.5, jnp.inf])
  np.testing.assert_array_equal(
    image_metrics.to_uint8(outside), [0, 0, 128, 255, 255, 255]
  )


def test_bad_inputs_are_refused():
  small = _random(0, (1, 10, 32, 3))
  with pytest.raises(ValueError, match="at least 11×11"):
    image_metrics.ssim(small, small)
  with pytest.raises(ValueError, match="at least 2×2"):
    image_metrics.gradient_sharpness(small[:, :1], small[:, :1])
  with pytest.raises(ValueError, match="int32"):
    image_metrics.psnr(small.astype(np.int32), small)
  with pytest.raises(ValueError, match="uint8 already"):
    image_metrics.to_uint8(jnp.asarray(small))
  with pytest.raises(AssertionError):  # no silent broadcast
    image_metrics.psnr(small, small[..., :1])
  with pytest.raises(AssertionError):
    image_metrics.psnr(small[0], small[0])


def _accumulate(values, batch_size, pad_value):
  """Means over `values` cut into padded batches, half of them merged in."""
  accumulators = [image_metrics.MeanAccumulator() for _ in range(2)]
  count = len(next(iter(values.values())))
  for i, start in enumerate(range(0, count, batch_size)):
    real = min(batch_size, count - start)
    batch = {}
    for name, value in values.items():
      batch[name] = np.full(batch_size, pad_value, np.float32)
      batch[name][:real] = value[start : start + real]
    mask = np.arange(batch_size) < real
    accumulators[i % 2].update(
      {k: jnp.asarray(v) for k, v in batch.items()}, jnp.asarray(mask)
    )
  accumulators[0].merge(accumulators[1])
  return accumulators[0].result()


@pytest.mark.parametrize("pad_value", [1e6, np.nan])
def test_means_are_exact_for_any_batch_size(pad_value):
  rng = np.random.default_rng(0)
  values = {
    "psnr": rng.uniform(5, 60, 101).astype(np.float32),
    "ssim": rng.uniform(0.1, 1, 101).astype(np.float32),
  }
  want = {k: float(v.astype(np.float64).sum()) / 101 for k, v in values.items()}
  for batch_size in (1, 7, 32, 101, 128):
    assert _accumulate(values, batch_size, pad_value) == want


def test_accumulator_without_mask_and_its_errors():
  accumulator = image_metrics.MeanAccumulator()
  with pytest.raises(ValueError, match="no unmasked example"):
    accumulator.result()
  accumulator.update({"a": np.array([1.0, 2.0])})
  other = image_metrics.MeanAccumulator()
  other.update({"a": np.array([6.0]), "b": np.array([5.0])})
  accumulator.merge(other)
  assert accumulator.result() == {"a": 3.0, "b": 5.0}
  assert other.result() == {"a": 6.0, "b": 5.0}
  with pytest.raises(ValueError, match=r"\(B,\)"):
    accumulator.update({"a": np.ones((2, 1))})
  with pytest.raises(ValueError, match="mask"):
    accumulator.update({"a": np.ones(2)}, np.ones(3, bool))
  accumulator.update({"c": np.ones(2)}, np.zeros(2, bool))
  with pytest.raises(ValueError, match="'c'"):
    accumulator.result()
