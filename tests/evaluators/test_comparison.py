"""PSNR and error pictures without a device."""

import math
import subprocess
import sys

import numpy as np
import pytest

from psvae_jax.evaluators import comparison, image_metrics


def test_psnr_is_the_evaluators():
  draw = np.random.default_rng(0).integers
  images = draw(0, 256, (4, 6, 5, 3), np.uint8)
  references = draw(0, 256, (4, 6, 5, 3), np.uint8)
  references[3] = images[3]
  found = comparison.psnr(images, references)
  expected = image_metrics.psnr(images, references)
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  assert found[3] == comparison.MAX_PSNR
  assert comparison.psnr(images[0], references[0]) == found[0]


def test_psnr_by_hand():
  a, b = (np.full((2, 2, 3), level, np.uint8) for level in (10, 30))
  assert comparison.psnr(a, b) == pytest.approx(20 * math.log10(255 / 20))


def test_error_picture_is_the_heat_of_the_mean_error():
  a = np.zeros((1, 4, 3), np.uint8)
  b = np.array([[(0, 0, 0), (20, 40, 60), (200,) * 3, (1, 0, 0)]], np.uint8)
  levels = np.array([[0, 160, 255, 1]], np.uint8)  # × 4, clipped, rounded
  expected = comparison.heat(levels)
  np.testing.assert_array_equal(comparison.error_picture(a, b), expected)
  np.testing.assert_array_equal(comparison.error_picture(b, a), expected)


def test_heat_rises_from_black_to_white():
  colors = comparison.heat(np.arange(256, dtype=np.uint8))
  assert (np.diff(colors.sum(-1, dtype=int)) >= 0).all()
  assert not colors[0].any() and (colors[255] == 255).all()


def test_a_report_needs_no_jax():
  code = "import sys, psvae_jax.report; assert 'jax' not in sys.modules"
  subprocess.run([sys.executable, "-c", code], check=True)
