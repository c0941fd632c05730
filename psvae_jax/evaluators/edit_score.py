"""Judges one edit: is it done, and is the rest as it was?

An edit succeeds when

* the checker reads in the result all that a caption of the target would say
  ("instruction done"), and
* every object of the target that the edit does not put somewhere (all but an
  added or moved one) is read near its place with its colour, shape and size.

The second holds for what the instruction does not name ("kept") and for a
recoloured, reshaped or resized object, which must stay where it is: to draw a
new picture from the target's caption is not to edit. The background's share is
the PSNR outside of the edited region, beside the success and no part of it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from psvae_jax.data import captions, scene_checker, scene_render
from psvae_jax.data.scene_checker import ReadObject
from psvae_jax.data.scene_edits import SceneEdit
from psvae_jax.data.scene_types import Scene, SceneObject
from psvae_jax.evaluators.comparison import decibels

# How far from its place an object may be read: 3 of 48 pixels.
PLACE_TOLERANCE = 3.0 / 48
# What counts as the edited region around the objects: 2 of 48 pixels.
REGION_MARGIN = 2.0 / 48


@dataclasses.dataclass(frozen=True)
class EditScore:
  """One result of one edit.

  Attributes:
    instruction: the target's caption is true of it.
    kept: the objects that the instruction does not name are there; None if
      there are none.
    placed: so are those that it changes in place.
    psnr: outside of the edited region, dB.
  """

  instruction: bool
  kept: bool | None
  placed: bool
  psnr: float

  @property
  def success(self) -> bool:
    return self.instruction and self.kept is not False and self.placed


def score_edit(
  image: np.ndarray, edit: SceneEdit, target: np.ndarray
) -> EditScore:
  """Judges one result.

  Args:
    image: uint8 (S, S, 3).
    edit: what was to be done.
    target: the true target's image, equal to the source's outside of the
      edited region.
  """
  found = scene_checker.read_scene(image)
  done = scene_checker.compare(found, captions.spec_of(edit.target))["all"]
  before = edit.source.objects
  untouched = [o for o in edit.target.objects if o in before]
  places = {(o.x, o.y) for o in before}
  changed = [
    o for o in edit.target.objects if o not in before and (o.x, o.y) in places
  ]
  outside = ~edited_region(edit, image.shape[0])
  return EditScore(
    instruction=done,
    kept=all(_is_there(o, found) for o in untouched) if untouched else None,
    placed=all(_is_there(o, found) for o in changed),
    psnr=masked_psnr(image, target, outside),
  )


def _is_there(item: SceneObject, found: Sequence[ReadObject]) -> bool:
  """Whether an object is read with its attributes, near its place."""
  return any(
    (read.colour, read.shape, read.size) == (item.colour, item.shape, item.size)
    and np.hypot(read.x - item.x, read.y - item.y) <= PLACE_TOLERANCE
    for read in found
  )


def edited_region(edit: SceneEdit, image_size: int) -> np.ndarray:
  """bool (S, S): pixels of objects that differ, before or after, and a margin.

  Outside of it source and target are equal.
  """
  region = np.zeros((image_size, image_size), bool)
  for scene, other in (
    (edit.source, edit.target),
    (edit.target, edit.source),
  ):
    region |= _differing(scene, other, image_size)
  steps = max(1, round(REGION_MARGIN * image_size))
  square = np.ones((3, 3), bool)
  return ndimage.binary_dilation(region, square, iterations=steps)


def _differing(scene: Scene, other: Scene, image_size: int) -> np.ndarray:
  masks = scene_render.object_masks(scene, image_size)
  kept = [item in other.objects for item in scene.objects]
  return (masks[~np.array(kept)] > 0).any(0)


def masked_psnr(
  image: np.ndarray, reference: np.ndarray, mask: np.ndarray
) -> float:
  """PSNR in dB over the pixels of `mask` (S, S); NaN if there are none."""
  if not mask.any():
    return float("nan")
  difference = image[mask].astype(np.float64) - reference[mask]
  return float(decibels(np.mean(np.square(difference))))
