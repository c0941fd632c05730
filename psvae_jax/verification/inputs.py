"""The fixed input: pictures, texts and token ids, the same on every machine.

Pictures are the embedded data set's and scikit-image's.
"""

import dataclasses
import hashlib
from typing import Any

import numpy as np

TEXTS = ("a red circle", "two dogs on a beach, at sunset", "")
TOKENS = 32  # of a text

_ROWS, _STRIDE = 2, 7919  # of token ids: all over a vocabulary
_SCENES = 2
_PICTURES = {"train": (0, 1), "validation": (0, 2)}  # of `BundledSource`


@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
  """What a network is shown.

  Attributes:
    names: of pictures, texts or rows of tokens, for people.
    pictures: uint8 (N, S, S, 3); None of a text encoder.
    texts: likewise; None of what sees pictures only.
    tokens: int32 (N, L) ids; None of all but a language model.
  """

  names: tuple[str, ...]
  pictures: np.ndarray | None = None
  texts: tuple[str, ...] | None = None
  tokens: np.ndarray | None = None

  def describe(self) -> dict[str, Any]:
    """Names, shape and checksum."""
    digest = hashlib.sha256()
    out = {"names": list(self.names)}
    if self.pictures is not None:
      out["shape"] = list(self.pictures.shape)
      digest.update(self.pictures.tobytes())
    if self.texts is not None:
      out["texts"] = list(self.texts)
      digest.update("\n".join(self.texts).encode())
    if self.tokens is not None:
      out["shape"] = list(self.tokens.shape)
      digest.update(self.tokens.astype("<i4").tobytes())
    return {**out, "sha256": digest.hexdigest()[:16]}


def make_inputs(size: int) -> Inputs:
  """The fixed pictures at one size: scenes, then photographs.

  Args:
    size: side in pixels. Scenes are drawn at it; photographs are cropped to
      their centre square and resized by Pillow's bicubic filter.
  """
  from psvae_jax.data import bundled, scenes, transforms

  source = scenes.SceneSource("validation", _SCENES, size)
  names = [f"scene {i}" for i in range(_SCENES)]
  pictures = [source[i]["image"] for i in range(_SCENES)]
  crop = transforms.center_crop(size)
  for split, places in _PICTURES.items():
    photographs = bundled.BundledSource(split)
    for place in places:
      element = photographs[place]
      names.append(element["path"])
      pictures.append(crop(element, None)["image"])
  return Inputs(tuple(names), np.stack(pictures))


def make_tokens(vocab_size: int) -> Inputs:
  """The fixed token ids of a vocabulary."""
  ids = np.arange(_ROWS * TOKENS) * _STRIDE % vocab_size
  names = tuple(f"tokens {i}" for i in range(_ROWS))
  return Inputs(names, tokens=ids.reshape(_ROWS, TOKENS).astype(np.int32))
