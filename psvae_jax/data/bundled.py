"""Photographs that come with scikit-image's wheel: real pictures offline.

Nothing is downloaded: only files that every scikit-image wheel holds are named
here. They are few, so this source is for trying things out; every example is
one of the pictures again, and its variety is the random crop's.
"""

import functools
import importlib.util
import os
from typing import Any

import numpy as np

from psvae_jax.data import images

# split → ((file, caption), …). The second half of the stereo pair
# "motorcycle" is used nowhere: it would leak its twin into the other split.
_PICTURES = {
  "train": (
    ("astronaut.png", "an astronaut in an orange suit before a flag"),
    ("chelsea.png", "the face of a tabby cat"),
    ("hubble_deep_field.jpg", "distant galaxies on a black sky"),
    ("motorcycle_left.png", "a red motorcycle in a garage"),
    ("retina.jpg", "the retina of an eye with its blood vessels"),
  ),
  "validation": (
    ("coffee.png", "a cup of coffee on a wooden table"),
    ("ihc.png", "stained tissue under a microscope"),
    ("rocket.jpg", "a rocket on its launch pad at dusk"),
  ),
}


class BundledSource:
  """scikit-image's colour photographs.

  An element is {"image": uint8 (H, W, 3) of any size, "caption": str,
  "index": np.int64, "path": str}. Example i is picture i modulo their number.

  Attributes:
    split: "train" or "validation"; no picture is in both.
  """

  def __init__(self, split: str, *, length: int | None = None):
    """Names the pictures; they are decoded at first use and then kept.

    Args:
      split: "train" or "validation".
      length: number of examples; each picture once by default.

    Raises:
      ValueError: unknown split, or `length` below 1.
      FileNotFoundError: scikit-image or one of its pictures is missing.
    """
    if split not in _PICTURES:
      raise ValueError(
        f"Unknown split {split!r}; there are " + ", ".join(_PICTURES) + "."
      )
    if length is not None and length < 1:
      raise ValueError(f"length must be at least 1, not {length}.")
    self.split = split
    self._pictures = _PICTURES[split]
    self._length = length or len(self._pictures)
    for name, _ in self._pictures:
      _picture_path(name)

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, Any]:
    if not 0 <= index < self._length:
      raise IndexError(f"index {index} is outside [0, {self._length})")
    name, caption = self._pictures[index % len(self._pictures)]
    return {
      "image": _load_picture(name),
      "caption": caption,
      "index": np.int64(index),
      "path": name,
    }

  def __repr__(self) -> str:
    return f"BundledSource(split={self.split!r}, length={self._length})"


def _picture_path(name: str) -> str:
  # Not imported: scikit-image pulls in SciPy, and only its files are wanted.
  spec = importlib.util.find_spec("skimage")
  if spec is None or not spec.submodule_search_locations:
    raise FileNotFoundError(
      "The bundled photographs come with scikit-image, which is not "
      "installed: pip install scikit-image."
    )
  path = os.path.join(spec.submodule_search_locations[0], "data", name)
  if not os.path.isfile(path):
    raise FileNotFoundError(
      f"scikit-image is installed without its picture {path!r}. Install "
      "its wheel from the package index: pip install scikit-image."
    )
  return path


@functools.cache
def _load_picture(name: str) -> np.ndarray:
  image = images.decode_image(_picture_path(name))
  image.flags.writeable = False  # shared by every element that shows it
  return image
