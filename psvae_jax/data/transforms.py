"""Per-example image transforms: resize, crop, flip.

A transform takes (element, rng) and returns a new element; `rng` is a
`np.random.Generator`, and only it decides what is random. "image" is uint8
(H, W, 3) before and (size, size, 3) after; other entries pass through.

Resizing halves by box averaging while it can, then ends with an antialiased
bicubic: fast on large photographs, and the way ADM prepared ImageNet, to which
published Fréchet distances refer (guided-diffusion, `center_crop_arr`).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

Element = dict[str, Any]
Transform = Callable[[Element, np.random.Generator], Element]

# Resizing a strip of one by a million pixels to 256 would take 256 million; the
# centre needs no more than this.
_MAX_ASPECT = 64

AUGMENTS = ("none", "center", "crop", "crop_flip")


def make_augment(name: str, *, size: int, min_scale: float = 0.5) -> Transform:
  """The augmentation called `name` in a config.

  Args:
    name: "none" (the images have the right size already), "center"
      (`center_crop`), "crop" (`random_crop`), or "crop_flip" (`random_crop`,
      then `random_flip`). Flips make captions that say left or right wrong:
      do not choose them where captions are used.
    size: height and width of the result, pixels.
    min_scale: see `random_crop`.

  Raises:
    ValueError: unknown name, or a bad `size` or `min_scale`.
  """
  if size < 1:
    raise ValueError(f"The image size must be at least 1, not {size}.")
  if name == "none":
    return require_size(size)
  if name == "center":
    return center_crop(size)
  if name == "crop":
    return random_crop(size, min_scale)
  if name == "crop_flip":
    crop = random_crop(size, min_scale)
    return lambda element, rng: random_flip(crop(element, rng), rng)
  raise ValueError(
    f"Unknown augmentation {name!r}; there are " + ", ".join(AUGMENTS) + "."
  )


def require_size(size: int) -> Transform:
  """Passes images of `size` × `size` on; a ValueError names any other."""

  def transform(element: Element, rng: np.random.Generator | None) -> Element:
    del rng
    height, width = element["image"].shape[:2]
    if (height, width) != (size, size):
      name = element.get("path") or f"Example {element.get('index')}"
      raise ValueError(
        f"{name} is {height} × {width} pixels (height × width), but "
        f'{size} × {size} are needed. Set the augmentation to "center", '
        '"crop" or "crop_flip", or give the source the right size.'
      )
    return element

  return transform


def center_crop(size: int) -> Transform:
  """Resizes the shorter side to `size`, then crops the centre square."""

  def transform(element: Element, rng: np.random.Generator | None) -> Element:
    del rng
    height, width = element["image"].shape[:2]
    if (height, width) == (size, size):
      return element
    image = Image.fromarray(_shorten(element["image"]))
    image = _halve(image, size)
    scale = size / min(image.size)
    image = image.resize(
      (round(image.width * scale), round(image.height * scale)),
      Image.Resampling.BICUBIC,
    )
    left, top = (image.width - size) // 2, (image.height - size) // 2
    image = image.crop((left, top, left + size, top + size))
    return {**element, "image": np.array(image)}

  return transform


def random_crop(size: int, min_scale: float = 0.5) -> Transform:
  """Crops a random square and resizes it to `size` × `size`.

  The square's side is uniform in [min_scale, 1] × the image's shorter side,
  its place uniform among those inside the image.

  Raises:
    ValueError: `min_scale` outside (0, 1].
  """
  if not 0 < min_scale <= 1:
    raise ValueError(f"min_scale must lie in (0, 1], not {min_scale}.")

  def transform(element: Element, rng: np.random.Generator) -> Element:
    height, width = element["image"].shape[:2]
    scale = rng.uniform(min_scale, 1.0)
    side = max(1, round(scale * min(height, width)))
    top = rng.integers(height - side + 1)
    left = rng.integers(width - side + 1)
    square = element["image"][top : top + side, left : left + side]
    image = _halve(Image.fromarray(square), size)
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    return {**element, "image": np.array(image)}

  return transform


def random_flip(element: Element, rng: np.random.Generator) -> Element:
  """Mirrors left and right with probability one half."""
  if rng.random() < 0.5:
    return element
  return {**element, "image": np.ascontiguousarray(element["image"][:, ::-1])}


def _shorten(image: np.ndarray) -> np.ndarray:
  """Cuts the ends off a strip longer than `_MAX_ASPECT` times its width."""
  height, width = image.shape[:2]
  longest = _MAX_ASPECT * min(height, width)
  top, left = max(0, height - longest) // 2, max(0, width - longest) // 2
  return image[top : top + longest, left : left + longest]


def _halve(image: Image.Image, size: int) -> Image.Image:
  """Box-halves until the shorter side is below 2 · `size`."""
  while min(image.size) >= 2 * size:
    image = image.resize(
      (image.width // 2, image.height // 2), Image.Resampling.BOX
    )
  return image
