"""Grey background textures of the embedded scenes, in two disjoint banks.

Every scene stands on a crop of a texture tile. The "train" bank and the "eval"
bank share no tile: seeds differ, Voronoi cells exist only in "train", soft
blobs only in "eval", and each photograph belongs to one bank. So a figure
measured on "eval" backgrounds is a figure on unseen backgrounds.

Procedural families are sums of analytic functions of a unit tile, hence look
the same at every image size. Photographs are scikit-image's bundled pictures,
read from the installed wheel; nothing is downloaded.
"""

import functools
import importlib.util
import pathlib

import numpy as np
from PIL import Image
from scipy import ndimage

BANKS = ("train", "eval")
BANK_SIZES = {"train": 192, "eval": 64}
FAMILIES = {
  "train": ("noise", "grating", "photo", "cells"),
  "eval": ("noise", "grating", "photo", "blobs"),
}
PHOTOS = {
  "train": (
    "camera.png",
    "astronaut.png",
    "chelsea.png",
    "coins.png",
    "brick.png",
    "grass.png",
    "motorcycle_left.png",
  ),
  "eval": ("coffee.png", "gravel.png", "rocket.jpg", "ihc.png"),
}

# One standard deviation of a texture in int8 steps: +-3 sigma fits, and a step
# is below half a grey level at the contrasts that scenes use.
STEPS_PER_STD = 40.0

# Side, in pixels, that a photograph's crop is reduced to before it is enlarged
# to the tile: keeps its detail as coarse as the procedural families'.
_PHOTO_DETAIL = 44


def texture_family(bank: str, index: int) -> str:
  """Returns the family of texture `index` of `bank`."""
  _check(bank, index)
  return FAMILIES[bank][index % len(FAMILIES[bank])]


@functools.lru_cache(maxsize=sum(BANK_SIZES.values()))
def texture_tile(bank: str, index: int, image_size: int) -> np.ndarray:
  """One texture, two images wide and high so that crops of it differ.

  Args:
    bank: "train" or "eval".
    index: which texture, in [0, BANK_SIZES[bank]).
    image_size: side S, in pixels, of the images it is for.

  Returns:
    Read-only int8 (2S, 2S): mean 0, standard deviation `STEPS_PER_STD`, clipped
    at three standard deviations.

  Raises:
    ValueError: unknown bank or index.
    FileNotFoundError: scikit-image's pictures are not installed.
  """
  family = texture_family(bank, index)
  rng = np.random.default_rng([20251217, BANKS.index(bank), index])
  side = 2 * image_size
  if family == "photo":
    names = PHOTOS[bank]
    name = names[(index // len(FAMILIES[bank])) % len(names)]
    tile = _photo(rng, side, name)
  else:
    tile = _PROCEDURAL[family](rng, side)
  tile = (tile - tile.mean()) / tile.std()
  tile = np.rint(np.clip(tile, -3.0, 3.0) * STEPS_PER_STD).astype(np.int8)
  tile.flags.writeable = False
  return tile


def _check(bank: str, index: int) -> None:
  if bank not in BANKS:
    raise ValueError(f"unknown texture bank {bank!r}: use one of {BANKS}")
  if not 0 <= index < BANK_SIZES[bank]:
    raise ValueError(
      f"texture {index} of bank {bank!r}: there are {BANK_SIZES[bank]}"
    )


def _axis(side: int) -> np.ndarray:
  return ((np.arange(side) + 0.5) / side).astype(np.float32)


def _waves(rng, side, low, high, count) -> np.ndarray:
  """Sum of plane waves of `low` to `high` cycles a tile, amplitude ~ 1/f."""
  frequency = np.exp(rng.uniform(np.log(low), np.log(high), count))
  angle = rng.uniform(0.0, 2 * np.pi, count)
  phase = rng.uniform(0.0, 2 * np.pi, count)
  axis = _axis(side)[:, None]
  along_x = 2 * np.pi * axis * (frequency * np.cos(angle)) + phase
  along_y = 2 * np.pi * axis * (frequency * np.sin(angle))
  # cos(a + b) = cos a cos b - sin a sin b turns the sum into two products.
  weight = 1.0 / frequency
  return (np.cos(along_y) * weight) @ np.cos(along_x).T - (
    np.sin(along_y) * weight
  ) @ np.sin(along_x).T


def _noise(rng, side) -> np.ndarray:
  low = rng.uniform(2.0, 4.0)
  return _waves(rng, side, low, low * rng.uniform(1.5, 3.0), 96)


def _grating(rng, side) -> np.ndarray:
  axis = _axis(side)
  frequency, angle = rng.uniform(4.0, 10.0), rng.uniform(0.0, np.pi)
  warp = _waves(rng, side, 1.0, 2.5, 12)
  warp *= rng.uniform(0.0, 1.0) / warp.std()
  phase = (
    2
    * np.pi
    * frequency
    * (axis * np.cos(angle) + axis[:, None] * np.sin(angle))
    + warp
  )
  hardness = rng.uniform(0.5, 2.5)
  return np.tanh(hardness * np.sin(phase)) + 0.5 * _unit(
    _waves(rng, side, 2.0, 4.0, 32)
  )


def _cells(rng, side) -> np.ndarray:
  count = int(rng.integers(24, 64))
  points = rng.uniform(-0.1, 1.1, (count, 2)).astype(np.float32)
  level = rng.uniform(-1.0, 1.0, count).astype(np.float32)
  softness = count * rng.uniform(6.0, 20.0)
  axis = _axis(side)
  dx = np.square(axis[:, None] - points[:, 0])
  dy = np.square(axis[:, None] - points[:, 1])
  rows = []
  for row in dy:  # a row at a time bounds the memory of large tiles
    distance = dx + row
    distance -= distance.min(axis=1, keepdims=True)
    weight = np.exp(-softness * distance)
    rows.append((weight @ level) / weight.sum(axis=1))
  return np.stack(rows)


def _blobs(rng, side) -> np.ndarray:
  count = int(rng.integers(30, 90))
  centre = rng.uniform(-0.05, 1.05, (2, count))
  width = rng.uniform(0.03, 0.08, (2, count))
  sign = rng.choice([-1.0, 1.0], count) * rng.uniform(0.5, 1.0, count)
  axis = _axis(side)[:, None]
  along_x = np.exp(-0.5 * np.square((axis - centre[0]) / width[0]))
  along_y = np.exp(-0.5 * np.square((axis - centre[1]) / width[1]))
  return (along_y * sign) @ along_x.T


def _photo(rng, side, name) -> np.ndarray:
  photo = _grey_photo(name)
  # Flat crops (sky, wall) would be stretched noise: the liveliest of six.
  crops = []
  for _ in range(6):
    height, width = photo.shape
    size = int(rng.integers(140, min(height, width, 300) + 1))
    top = int(rng.integers(0, height - size + 1))
    left = int(rng.integers(0, width - size + 1))
    crops.append(photo[top : top + size, left : left + size])
  crop = Image.fromarray(max(crops, key=np.std))
  crop = crop.resize((_PHOTO_DETAIL, _PHOTO_DETAIL), Image.Resampling.BOX)
  crop = np.asarray(crop.resize((side, side), Image.Resampling.BICUBIC))
  # Large-scale light is the scene's own gradient; the tile keeps the texture.
  return crop - 0.6 * ndimage.gaussian_filter(crop, 0.15 * side)


@functools.cache
def _grey_photo(name: str) -> np.ndarray:
  spec = importlib.util.find_spec("skimage")
  folder = pathlib.Path(spec.origin).parent / "data" if spec else None
  if folder is None or not (folder / name).is_file():
    raise FileNotFoundError(
      f"{name} of scikit-image's bundled pictures is missing "
      f"({folder or 'scikit-image is not installed'}): "
      "pip install --force-reinstall scikit-image"
    )
  with Image.open(folder / name) as image:
    return np.asarray(image.convert("RGB").convert("L"), np.float32)


def _unit(values: np.ndarray) -> np.ndarray:
  return values / values.std()


_PROCEDURAL = {
  "noise": _noise,
  "grating": _grating,
  "cells": _cells,
  "blobs": _blobs,
}
