"""What a reconstruction got wrong, in decibels and as a picture.

NumPy alone: a report is written beside a job that holds the device.
"""

from typing import Any

import numpy as np

# Two equal images would have an infinite PSNR, and one such image would hide
# every other in an average. At 256×256×3 the smallest error there is, one
# level in one value, has 101 dB.
MAX_PSNR = 100.0
# An error picture shows errors so many times larger.
ERROR_GAIN = 4

_LEVELS = 255.0
_HEAT = (
  (0, 0, 0),
  (120, 28, 50),
  (226, 92, 36),
  (250, 184, 92),
  (255, 255, 255),
)


def decibels(mse: Any, xp: Any = np) -> Any:
  """Mean squared error in levels² → PSNR in dB, at most `MAX_PSNR`.

  Args:
    mse: array of any shape, not negative; the peak is 255.
    xp: the array's library, `numpy` or `jax.numpy`.

  Returns:
    Array of the same shape.
  """
  floor = _LEVELS**2 * 10.0 ** (-MAX_PSNR / 10)
  ratio = _LEVELS**2 / xp.maximum(mse, floor)
  return xp.minimum(10.0 * xp.log10(ratio), MAX_PSNR)  # log10 may round above


def psnr(images: np.ndarray, references: np.ndarray) -> np.ndarray:
  """Peak signal-to-noise ratio of each image, as `image_metrics.psnr`.

  Args:
    images: uint8 (..., H, W, C).
    references: the same shape.

  Returns:
    float64 (...,), dB.
  """
  difference = images.astype(np.float64) - references
  return decibels(np.mean(np.square(difference), axis=(-3, -2, -1)))


def error_picture(original: np.ndarray, made: np.ndarray) -> np.ndarray:
  """Mean |difference| of the colours × `ERROR_GAIN`, as heat.

  Args:
    original: uint8 (..., H, W, 3).
    made: the same shape.

  Returns:
    uint8 (..., H, W, 3), black where there is no error.
  """
  error = np.abs(original.astype(np.float64) - made).mean(-1)
  return heat(np.round(np.clip(ERROR_GAIN * error, 0, 255)).astype(np.uint8))


def heat(levels: np.ndarray) -> np.ndarray:
  """uint8 (...) → uint8 (..., 3), from black over red and orange to white.

  Lightness rises with the level throughout, so it reads without colours too.
  """
  anchors = np.array(_HEAT, float)
  places = np.linspace(0, 255, len(anchors))
  colors = [np.interp(levels, places, anchors[:, c]) for c in range(3)]
  return np.round(np.stack(colors, -1)).astype(np.uint8)
