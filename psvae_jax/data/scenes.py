"""The embedded dataset: captioned pictures of one or two objects, by index.

A scene shows objects of shape x colour x size in a relation, on a muted texture
and with detail that no caption names (texture, light, rotation, stripes, exact
hue). Everything is a pure function of (split, index, seed): nothing is stored
or downloaded, and any index of any split costs one rendering.

Splits: "train" and "validation" differ in scenes and in background textures;
"heldout" has validation's textures and only combinations of objects that the
other two never show (see `scene_sampling`).

This file is the dataset's front door; the parts are in `scene_types`,
`scene_sampling`, `scene_render`, `captions`, `scene_edits`, `textures`.
"""

import operator

import numpy as np

from psvae_jax.data import captions, scene_render, scene_sampling
from psvae_jax.data.captions import caption, foil_caption, parse_caption
from psvae_jax.data.scene_edits import edit_triple, sample_edit
from psvae_jax.data.scene_render import object_masks, render
from psvae_jax.data.scene_sampling import (
  is_held_out,
  renew_nuisances,
  sample_scene,
)
from psvae_jax.data.scene_types import (
  COLOURS,
  HUES,
  IMAGE_SIZE,
  RELATIONS,
  SHAPES,
  SIZES,
  SPLITS,
  Scene,
  SceneObject,
)


def attributes(scene: Scene) -> dict[str, np.ndarray]:
  """What the scene contains, for probes.

  Returns:
    float32 vectors of 0 and 1. Multi-hot presence: "colour" (7,), "shape" (6,),
    "size" (2,), "object" (42,) of colour-shape pairs, colour first. One-hot:
    "count" (2,), of one object or two.
  """
  shapes = len(SHAPES)
  found = {
    "colour": np.zeros(len(COLOURS), np.float32),
    "shape": np.zeros(shapes, np.float32),
    "size": np.zeros(len(SIZES), np.float32),
    "object": np.zeros(scene_sampling.NUM_KINDS, np.float32),
    "count": np.zeros(2, np.float32),
  }
  for item in scene.objects:
    found["colour"][item.colour] = 1.0
    found["shape"][item.shape] = 1.0
    found["size"][item.size] = 1.0
    found["object"][scene_sampling.object_kind(item.colour, item.shape)] = 1.0
  found["count"][len(scene.objects) - 1] = 1.0
  return found


class _Source:
  """A length, an index check and a stable name, as grain's sources have."""

  def __init__(
    self,
    split: str,
    length: int,
    image_size: int = IMAGE_SIZE,
    seed: int = 0,
  ):
    scene_sampling.check_split(split)
    if length < 0:
      raise ValueError(f"length {length} is negative")
    self._split = split
    self._length = int(length)
    self._image_size = int(image_size)
    self._seed = int(seed)

  def __len__(self) -> int:
    return self._length

  def __repr__(self) -> str:
    return (
      f"{type(self).__name__}(split={self._split!r}, length={self._length}, "
      f"image_size={self._image_size}, seed={self._seed})"
    )

  def _checked(self, index: int) -> int:
    index = operator.index(index)
    if not 0 <= index < self._length:
      raise IndexError(f"index {index} of {self!r}")
    return index


class SceneSource(_Source):
  """Images with captions: a grain random-access source.

  Args:
    split: one of `SPLITS`.
    length: how many scenes; a longer source begins with a shorter one's.
    image_size: side in pixels.
    seed: of the dataset.
    caption_variants: half of the captions are paraphrases (see
      `captions.caption`), fixed by index; False: all are canonical.
  """

  def __init__(
    self,
    split: str,
    length: int,
    image_size: int = IMAGE_SIZE,
    seed: int = 0,
    caption_variants: bool = True,
  ):
    super().__init__(split, length, image_size, seed)
    self._caption_variants = bool(caption_variants)

  def __repr__(self) -> str:
    variants = f", caption_variants={self._caption_variants})"
    return super().__repr__()[:-1] + variants

  def scene(self, index: int) -> Scene:
    """The scene behind item `index`."""
    return sample_scene(self._split, self._checked(index), self._seed)

  def __getitem__(self, index: int) -> dict[str, np.ndarray | str | np.int64]:
    """{"image": uint8 (S, S, 3), "caption": str, "index": int64}."""
    scene = self.scene(index)
    variant = 0
    if self._caption_variants:
      key = scene_sampling.hash_key("caption", self._split, self._seed, index)
      paraphrases = captions.NUM_VARIANTS - 1
      variant = max(0, key % (2 * paraphrases) - paraphrases + 1)
    return {
      "image": scene_render.render(scene, self._image_size),
      "caption": captions.caption(scene, variant),
      "index": np.int64(index),
    }


class EditSource(_Source):
  """Instruction edits (see `edit_triple`): a grain random-access source."""

  def __getitem__(self, index: int) -> dict[str, np.ndarray | str | np.int64]:
    """`edit_triple`'s dict and "index"."""
    index = self._checked(index)
    triple = edit_triple(self._split, index, self._image_size, self._seed)
    return triple | {"index": np.int64(index)}


__all__ = [
  "COLOURS",
  "HUES",
  "IMAGE_SIZE",
  "RELATIONS",
  "SHAPES",
  "SIZES",
  "SPLITS",
  "EditSource",
  "Scene",
  "SceneObject",
  "SceneSource",
  "attributes",
  "caption",
  "edit_triple",
  "foil_caption",
  "is_held_out",
  "object_masks",
  "parse_caption",
  "render",
  "renew_nuisances",
  "sample_edit",
  "sample_scene",
]
