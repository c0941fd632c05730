"""Reads objects back out of an image, to judge reconstructions and samples.

Backgrounds are nearly grey and objects are not, so an object is a connected
blob of chroma. Its hue gives the colour; its outline, moved and scaled to a
standard frame, is compared with outlines of every shape at many angles and
both sizes. A blob that resembles none of them has shape None: a random blob is
not right one time in six.
"""

import dataclasses
import functools
import itertools

import numpy as np
from scipy import ndimage

from psvae_jax.data import captions, scene_render, scene_types

# Chroma (largest minus smallest channel) above which a pixel is an object's.
# Tinted backgrounds stay below 30, objects' flat parts are above 90.
CHROMA_THRESHOLD = 62.0
# Blobs smaller than this share of the image are debris; the smallest object
# (a small star) covers 0.02.
MIN_AREA = 0.006
# Highest mean squared difference, over the outline's energy, to the best
# template at which a blob still has that shape.
MAX_MISMATCH = 0.08

_MAX_ASSIGNED = 6  # a picture of confetti must not cost 10,000 assignments
_FRAME = 20  # side of the standard frame in samples
_SPAN = 2.15  # half side of the standard frame in root mean square radii
_ANGLES = np.linspace(-0.36, 0.36, 10)
# Reconstructions are soft: a blurred star should meet a blurred template, not
# a circle's. Standard deviations as fractions of the image side.
_BLURS = (0.0, 1.1 / 48)
# Between the largest small radius and the smallest large one.
_SIZE_LIMIT = (scene_types.RADII[0][1] * scene_types.RADII[1][0]) ** 0.5


@dataclasses.dataclass(frozen=True)
class ReadObject:
  """A blob as read; lengths are fractions of the image side.

  Attributes:
    shape: index into `SHAPES`; None if the outline resembles none.
    colour: index into `COLOURS`.
    size: index into `SIZES`.
    x: centre, from the left.
    y: centre, from the top.
    radius: nominal radius as of `SceneObject`.
    mismatch: distance to the best template, 0 is equal.
  """

  shape: int | None
  colour: int
  size: int
  x: float
  y: float
  radius: float
  mismatch: float


def read_scene(image: np.ndarray) -> list[ReadObject]:
  """Reads all objects of an image, the largest first.

  Args:
    image: uint8 (S, S, 3), S at least 32.

  Raises:
    ValueError: not a square RGB image of uint8.
  """
  image = _checked(image)
  side = image.shape[0]
  chroma = image.max(axis=2) - image.min(axis=2)
  labels, _ = ndimage.label(chroma > CHROMA_THRESHOLD)
  # A grey image with a faint coloured cast has no objects and many labels;
  # only blobs of some area are looked at.
  areas = np.bincount(labels.ravel())
  order = np.argsort(-areas[1:]) + 1
  boxes = ndimage.find_objects(labels)
  objects = []
  for label in order:
    if areas[label] < MIN_AREA * side * side:
      break
    objects.append(_read_blob(image, chroma, labels, label, boxes[label - 1]))
  return objects


def check_scene(image: np.ndarray, scene: scene_types.Scene) -> dict[str, bool]:
  """Whether an image shows what the scene's caption says; see `check_spec`."""
  return check_spec(image, captions.spec_of(scene))


def check_caption(image: np.ndarray, text: str) -> dict[str, bool]:
  """Whether an image shows what a caption says; see `check_spec`.

  Raises:
    ValueError: the text is no caption of this dataset.
  """
  spec = captions.parse_spec(text)
  if spec is None:
    raise ValueError(
      f"not a scene caption: {text!r}; say for instance "
      "'a small red circle' or 'a large blue star left of a green ring'"
    )
  return check_spec(image, spec)


def check_spec(
  image: np.ndarray, spec: captions.CaptionSpec
) -> dict[str, bool]:
  """Compares an image with what a caption says.

  Returns:
    "count", "colour", "shape", "size", "relation", "all". Found objects are
    assigned to named ones as favourably as possible, colours first; then
    "colour", "shape" and "size" are true when every named object has it right.
    What the caption leaves open is right. With fewer objects than are named,
    everything is false; more than are named only make "count" false.
  """
  return compare(read_scene(image), spec)


def compare(
  found: list[ReadObject], spec: captions.CaptionSpec
) -> dict[str, bool]:
  """`check_spec` on objects that were already read."""
  result = {"count": len(found) == len(spec.objects)}
  best = None
  largest = found[:_MAX_ASSIGNED]
  for chosen in itertools.permutations(largest, len(spec.objects)):
    candidate = _compare_assigned(chosen, spec)
    score = (candidate["colour"], sum(candidate.values()))
    if best is None or score > best[0]:
      best = (score, candidate)
  if best is None:
    result |= dict.fromkeys(("colour", "shape", "size", "relation"), False)
  else:
    result |= best[1]
  result["all"] = all(result.values())
  return result


def _compare_assigned(found, spec) -> dict[str, bool]:
  pairs = list(zip(found, spec.objects, strict=True))
  relation = True
  if spec.relation is not None:
    first, second = found
    seen = scene_types.relation_of(first.x, first.y, second.x, second.y)
    relation = seen == spec.relation
  return {
    "colour": all(f.colour == s.colour for f, s in pairs),
    "shape": all(f.shape == s.shape for f, s in pairs),
    "size": all(s.size in (None, f.size) for f, s in pairs),
    "relation": relation,
  }


def _checked(image: np.ndarray) -> np.ndarray:
  """The image as float32, its size divided while it stays above 48 pixels."""
  image = np.asarray(image)
  if image.ndim != 3 or image.shape[2] != 3 or image.shape[0] != image.shape[1]:
    raise ValueError(f"image of shape {image.shape}: expected (S, S, 3)")
  if image.dtype != np.uint8:
    raise ValueError(
      f"image of type {image.dtype}: expected uint8, rounded from [0, 255]"
    )
  side = image.shape[0]
  factor = max(1, side // scene_types.IMAGE_SIZE)
  while side % factor:
    factor -= 1
  if factor == 1:
    return image.astype(np.float32)
  small = side // factor
  blocks = image.reshape(small, factor, small, factor, 3)
  return blocks.mean(axis=(1, 3), dtype=np.float32)


def _read_blob(image, chroma, labels, label, box) -> ReadObject:
  side = image.shape[0]
  pad = 2  # the outline's soft edge lies outside the thresholded blob
  rows, columns = (
    slice(max(s.start - pad, 0), min(s.stop + pad, side)) for s in box
  )
  pixels = image[rows, columns]
  mine = labels[rows, columns] == label
  # Hue of the most colourful half, where blur has mixed in no background.
  values = chroma[rows, columns][mine]
  core = pixels[mine][values >= np.median(values)].mean(axis=0)
  colour = _nearest_colour(core)

  # Coverage: the component of each pixel's colour along the core's, both
  # without their grey part, so that texture and light do not matter.
  direction = core - core.mean()
  coverage = pixels @ (direction / np.square(direction).sum())
  reach = ndimage.binary_dilation(mine, iterations=2)
  coverage = _sharpen(coverage) * reach
  coverage[(labels[rows, columns] > 0) & ~mine] = 0.0
  outline, x, y, spread = _standard_frame(coverage)
  shape, mismatch, scale = _best_shape(outline, spread / side, side)
  radius = spread / side * scale
  return ReadObject(
    shape=shape if mismatch <= MAX_MISMATCH else None,
    colour=colour,
    size=int(radius > _SIZE_LIMIT),
    x=(columns.start + x) / side,
    y=(rows.start + y) / side,
    radius=radius,
    mismatch=mismatch,
  )


def _nearest_colour(rgb: np.ndarray) -> int:
  """Index of the colour of nearest hue."""
  red, green, blue = rgb.tolist()
  # Hue of the hexagonal HSV model, in degrees, as the renderer uses.
  high, low = max(red, green, blue), min(red, green, blue)
  span = max(high - low, 1e-6)
  if high == red:
    hue = 60.0 * ((green - blue) / span)
  elif high == green:
    hue = 60.0 * ((blue - red) / span) + 120.0
  else:
    hue = 60.0 * ((red - green) / span) + 240.0
  gaps = [abs((hue - own + 180.0) % 360.0 - 180.0) for own in scene_types.HUES]
  return gaps.index(min(gaps))


def _sharpen(coverage: np.ndarray) -> np.ndarray:
  """Saturates inside and outside, so that stripes and noise fade."""
  return np.clip((coverage - 0.25) * (1 / 0.4), 0.0, 1.0)


def _standard_frame(coverage: np.ndarray):
  """Moves and scales an outline to a standard frame by its moments.

  Returns:
    The outline (_FRAME * _FRAME,), unit norm; its centre x, y and root mean
    square radius in pixels of the input.
  """
  total = coverage.sum()
  y_axis = np.arange(coverage.shape[0], dtype=np.float32) + np.float32(0.5)
  x_axis = np.arange(coverage.shape[1], dtype=np.float32) + np.float32(0.5)
  by_row, by_column = coverage.sum(axis=1), coverage.sum(axis=0)
  y, x = float(by_row @ y_axis / total), float(by_column @ x_axis / total)
  variance = by_row @ np.square(y_axis - y) + by_column @ np.square(x_axis - x)
  spread = max(float(variance / total) ** 0.5, 0.5)
  # Each sample is the mean over its own cell, bilinear between pixels: two
  # small matrices, one an axis, do that at any scale.
  step = 2 * _SPAN * spread / _FRAME
  down = _resampling(coverage.shape[0], y, step)
  right = _resampling(coverage.shape[1], x, step)
  outline = (down @ coverage @ right.T).ravel()
  return outline / np.linalg.norm(outline), x, y, spread


def _resampling(length: int, centre: float, step: float) -> np.ndarray:
  """(_FRAME, length) weights of a tent filter as wide as needed."""
  samples = centre + (np.arange(_FRAME) - 0.5 * (_FRAME - 1)) * step
  distance = np.abs(samples[:, None] - (np.arange(length) + 0.5))
  width = max(step, 1.0)
  return (np.maximum(0.0, 1.0 - distance / width) / width).astype(np.float32)


def _best_shape(outline, spread, side) -> tuple[int, float, float]:
  """Shape, mismatch and radius per spread of the nearest template."""
  bank, shapes, spreads, scales = _templates(side)
  # A template of another scale has another blur; it must not compete.
  eligible = np.abs(np.log(spreads / spread)) < 0.35
  if not eligible.any():  # far smaller or larger than any object
    nearest = int(np.argmin(np.abs(np.log(spreads / spread))))
    return int(shapes[nearest]), 2.0, float(scales[nearest])
  # Not BLAS: its threads cost more than this product, beside a training run.
  agreement = np.einsum("tf,f->t", bank, outline)
  agreement[~eligible] = -1.0
  best = int(np.argmax(agreement))
  # Between unit vectors |a - b|^2 = 2 - 2 a.b.
  mismatch = 2.0 - 2.0 * float(agreement[best])
  return int(shapes[best]), mismatch, float(scales[best])


@functools.cache
def _templates(side: int):
  """Outlines of every shape, angle, radius and blur, as the reader sees them.

  Returns:
    outlines (T, _FRAME * _FRAME), shapes (T,), root mean square radii as
    fractions of the image side (T,), nominal radius per such radius (T,).
  """
  radii = [
    low + (high - low) * part
    for low, high in scene_types.RADII
    for part in (0.1, 0.5, 0.9)
  ]
  places = ((0.5, 0.5), (0.5 + 0.5 / side, 0.5 + 0.25 / side))
  rows = []
  blank = scene_types.Background("train", 0)
  for shape, radius, angle in itertools.product(
    range(len(scene_types.SHAPES)), radii, _ANGLES
  ):
    for x, y in places:
      item = scene_types.SceneObject(
        shape, 0, 0, x=x, y=y, radius=radius, angle=float(angle)
      )
      scene = scene_types.Scene((item,), None, blank)
      mask = scene_render.object_masks(scene, side)[0]
      for blur in _BLURS:
        coverage = ndimage.gaussian_filter(mask, blur * side)
        outline, _, _, spread = _standard_frame(_sharpen(coverage))
        spread /= side
        rows.append((outline, shape, spread, radius / spread))
  outlines, shapes, spreads, scales = zip(*rows, strict=True)
  return (
    np.stack(outlines),
    np.array(shapes),
    np.array(spreads),
    np.array(scales),
  )
