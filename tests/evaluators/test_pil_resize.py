"""Pillow's bicubic on the device."""

import jax
import numpy as np
import pytest
from PIL import Image

from psvae_jax.evaluators import pil_resize


@pytest.mark.parametrize(
  "size, wanted", [((40, 33), (24, 20)), ((20, 24), (45, 30))]
)
def test_equals_pillow(size, wanted):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (3, *size, 3), np.uint8)
  images[0] = np.where(images[0] < 128, 0, 255)  # overshoots, and is clipped
  got = jax.jit(pil_resize.resize_bicubic, static_argnums=1)(images, wanted)
  want = [
    Image.fromarray(x).resize(wanted[::-1], Image.Resampling.BICUBIC)
    for x in images
  ]
  difference = np.abs(np.asarray(got) - np.stack(want))
  assert difference.max() <= 1
  assert (difference > 0).mean() < 0.005


def test_an_image_of_that_size_stays():
  images = np.arange(48, dtype=np.uint8).reshape(1, 4, 4, 3)
  got = pil_resize.resize_bicubic(images, (4, 4))
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, images)
