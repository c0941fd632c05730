"""Images as CLIP was trained to see them: resized, cropped and normalised.

As transformers' CLIPImageProcessor with Pillow: the shorter side is resized to
`size` by Pillow's bicubic filter, on 8-bit levels, and a square cut out of the
middle. This is the host's work; normalising is the device's.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from psvae_jax.pretrained import files, preprocessing
from psvae_jax.pretrained.fields import Fields, show

FILES = ("preprocessor_config.json", "processor_config.json")
_MAX_SIDE = 2**16


@dataclasses.dataclass(frozen=True)
class ClipImages:
  """8-bit images of any size → squares of 8 bits, and those → floats.

  Attributes:
    size: what the shorter side is resized to.
    crop: side of the square; at most `size`.
    mean: per-channel mean, of images in [0, 1].
    std: per-channel standard deviation, of images in [0, 1].
  """

  size: int
  crop: int
  mean: tuple[float, float, float] = preprocessing.CLIP_MEAN
  std: tuple[float, float, float] = preprocessing.CLIP_STD

  def __call__(self, images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """Resizes and crops.

    Args:
      images: (B, H, W, 3) uint8, or B arrays (H, W, 3) of different sizes.

    Returns:
      (B, crop, crop, 3) uint8.

    Raises:
      ValueError: an image is not uint8 (H, W, 3).
    """
    out = np.empty((len(images), self.crop, self.crop, 3), np.uint8)
    for index, image in enumerate(images):
      out[index] = self._square(np.asarray(image), index)
    return out

  def normalize(self, pixels: jax.Array) -> jax.Array:
    """(B, crop, crop, 3) levels in [0, 255] → what the network takes."""
    pixels = jnp.asarray(pixels, jnp.float32) / 255
    return (pixels - jnp.float32(self.mean)) / jnp.float32(self.std)

  def _square(self, image: np.ndarray, index: int) -> np.ndarray:
    bad = image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8
    if bad or not image.size:
      raise ValueError(
        f"image {index} must be uint8 (H, W, 3), got {image.dtype} "
        f"{image.shape}"
      )
    height, width = image.shape[:2]
    # Rounded down, as transformers and torchvision do.
    longer = int(self.size * max(height, width) / min(height, width))
    if width <= height:
      height, width = longer, self.size
    else:
      height, width = self.size, longer
    if image.shape[:2] != (height, width):
      picture = Image.fromarray(np.ascontiguousarray(image))
      picture = picture.resize((width, height), Image.Resampling.BICUBIC)
      image = np.asarray(picture)
    top, left = (height - self.crop) // 2, (width - self.crop) // 2
    return image[top : top + self.crop, left : left + self.crop]


def read(folder: pathlib.Path, image_size: int) -> ClipImages:
  """The preprocessing of a model folder.

  Args:
    folder: with preprocessor_config.json, or processor_config.json as newer
      versions of transformers write it. Without either, CLIP's own constants.
    image_size: side of the images that the network takes.

  Raises:
    ValueError: a malformed file, or another way of preprocessing.
  """
  paths = [folder / name for name in FILES if os.path.lexists(folder / name)]
  if not paths:
    return ClipImages(image_size, image_size)
  path = paths[0]
  raw = files.read_json(path)
  if path.name == FILES[1]:
    raw = raw.get("image_processor")
    if not isinstance(raw, dict):
      raise ValueError(f"{path}: image_processor must be an object")
  Fields(raw, path).expect(
    do_resize=True,
    do_center_crop=True,
    do_rescale=True,
    do_normalize=True,
    resample=preprocessing.BICUBIC,
  )
  scale = Fields(raw, path).get("rescale_factor", float, 1 / 255)
  stated_size = raw.get("size", image_size)
  stated_crop = raw.get("crop_size", image_size)
  size = _side(stated_size, "shortest_edge")
  crop = _side(stated_crop, "height", "width")
  if abs(scale * 255 - 1) > 1e-4:
    raise ValueError(f"{path}: rescale_factor {scale} is not 1/255")
  if crop != image_size:
    raise ValueError(
      f"{path}: crop_size {show(stated_crop)} is not the {show(image_size)} "
      f"that config.json says images have, of at most {_MAX_SIDE}"
    )
  if size is None or size < crop:
    raise ValueError(
      f'{path}: size {show(stated_size)} must be a number, or "shortest_edge" '
      f"and a number, of at least crop_size {crop} and at most {_MAX_SIDE}"
    )
  return ClipImages(
    size,
    crop,
    *(
      preprocessing.statistics(raw.get(name, default), name, str(path))
      for name, default in (
        ("image_mean", preprocessing.CLIP_MEAN),
        ("image_std", preprocessing.CLIP_STD),
      )
    ),
  )


def _side(value: Any, *names: str) -> int | None:
  """A side as a number, or as an object that says it under every name."""
  if isinstance(value, dict):
    sides = [value.get(name) for name in names]
    equal = len(value) == len(names) and sides.count(sides[0]) == len(sides)
    value = sides[0] if equal else None
  return value if type(value) is int and 1 <= value <= _MAX_SIDE else None
