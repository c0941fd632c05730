"""A fixed set of real photographs, whatever a job was trained on.

Three pictures are few, so each is shown whole (its centre square) and then in
closer squares of half its side. None of them is ever trained on.
"""

import numpy as np

from psvae_jax.data import bundled, transforms
from psvae_jax.evaluators.pictures import Samples

# Centres of the closer squares, as shares of height and width.
_CENTRES = ((0.5, 0.5), (0.3, 0.35), (0.65, 0.7))


def load(size: int, count: int) -> Samples:
  """The first `count` (at most 12) squares, at `size` × `size` pixels.

  Raises:
    FileNotFoundError: scikit-image or one of its pictures is missing.
  """
  source = bundled.BundledSource("validation")
  resize = transforms.center_crop(size)
  images, captions = [], []
  for centre in (None, *_CENTRES):
    for index in range(len(source)):
      element = source[index]
      picture, caption = element["image"], element["caption"]
      if centre is not None:
        picture, caption = _closer(picture, *centre), f"{caption}, closer"
      images.append(resize({"image": picture}, None)["image"])
      captions.append(caption)
  return Samples(np.stack(images[:count]), captions[:count])


def _closer(image: np.ndarray, down: float, right: float) -> np.ndarray:
  """The square of half the shorter side around a point, inside the image."""
  height, width = image.shape[:2]
  side = max(1, min(height, width) // 2)
  top = min(max(round(down * height) - side // 2, 0), height - side)
  left = min(max(round(right * width) - side // 2, 0), width - side)
  return image[top : top + side, left : left + side]
