"""Vocabulary and value types of the embedded scenes.

Lengths and places are fractions of the image side, x to the right and y down,
so that a scene belongs to no image size; angles are radians; grey levels are
those of uint8. The comments give pixels at the default size, 48.
"""

import dataclasses

IMAGE_SIZE = 48

SPLITS = ("train", "validation", "heldout")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple")
HUES = (0.0, 30.0, 56.0, 120.0, 180.0, 228.0, 290.0)  # degrees
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
INVERSE_RELATION = (1, 0, 3, 2)

RADII = ((5.6 / 48, 6.8 / 48), (9.2 / 48, 11.0 / 48))  # by size
MAX_ANGLE = 0.3  # radians, either way
# Half the side of the smallest upright square around a shape of radius 1 at any
# angle up to MAX_ANGLE.
REACH = (1.0, 1.005, 1.13, 1.13, 1.085, 1.02)
MARGIN = 0.8 / 48  # between an object and the image's edge
GAP = 2.5 / 48  # between two objects, along the axis of their relation
# |cross-axis offset| / |offset along the relation's axis| stays below this.
MAX_SLANT = 0.5


@dataclasses.dataclass(frozen=True)
class SceneObject:
  """One object. The first three fields are what captions name.

  Attributes:
    shape: index into `SHAPES`.
    colour: index into `COLOURS`.
    size: index into `SIZES`.
    x: centre, fraction of the image side from the left.
    y: centre, fraction of the image side from the top.
    radius: nominal radius, fraction of the image side.
    angle: rotation in radians, clockwise on the screen.
    hue_offset: degrees away from the colour's own hue.
    saturation: of HSV, in [0, 1].
    value: of HSV, in [0, 1].
    stripe_depth: share of the brightness that stripes take; 0 is none.
    stripe_frequency: stripes per radius.
    stripe_angle: direction across the stripes, in the object's own frame.
    stripe_phase: radians.
  """

  shape: int
  colour: int
  size: int
  x: float
  y: float
  radius: float
  angle: float = 0.0
  hue_offset: float = 0.0
  saturation: float = 0.9
  value: float = 0.9
  stripe_depth: float = 0.0
  stripe_frequency: float = 1.0
  stripe_angle: float = 0.0
  stripe_phase: float = 0.0

  @property
  def reach(self) -> float:
    """Half the side of an upright box that surely holds the object."""
    return REACH[self.shape] * self.radius


@dataclasses.dataclass(frozen=True)
class Background:
  """What stands behind the objects; no caption names any of it.

  Attributes:
    bank: texture bank, "train" or "eval".
    texture: index of the texture in its bank.
    crop_x: place of the crop in the tile, in [0, 1).
    crop_y: same, downwards.
    flip: one of the square's 8 symmetries, as three bits.
    level: mean grey level.
    contrast: standard deviation of the texture in grey levels.
    slope_x: grey levels gained from the left edge to the right one.
    slope_y: same, from top to bottom.
    tint: factors of the red, green and blue channels.
  """

  bank: str
  texture: int
  crop_x: float = 0.0
  crop_y: float = 0.0
  flip: int = 0
  level: float = 128.0
  contrast: float = 12.0
  slope_x: float = 0.0
  slope_y: float = 0.0
  tint: tuple[float, float, float] = (1.0, 1.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Scene:
  """One or two objects on a background.

  Attributes:
    objects: the objects, in the order captions name them.
    relation: index into `RELATIONS`, of objects[0] to objects[1]; None for one
      object.
    background: everything else.
  """

  objects: tuple[SceneObject, ...]
  relation: int | None
  background: Background


def relation_of(
  x: float, y: float, other_x: float, other_y: float
) -> int | None:
  """Relation of a place to another, None where neither axis dominates."""
  dx, dy = x - other_x, y - other_y
  if abs(dx) == abs(dy):
    return None
  if abs(dx) > abs(dy):
    return 0 if dx < 0 else 1
  return 2 if dy < 0 else 3


def is_well_formed(scene: Scene) -> bool:
  """Whether objects are inside, apart, and as their fields and relation say."""
  for item in scene.objects:
    inner = MARGIN + item.reach - 1e-9
    low, high = RADII[item.size]
    if not (inner <= item.x <= 1 - inner and inner <= item.y <= 1 - inner):
      return False
    if not low - 1e-9 <= item.radius <= high + 1e-9:
      return False
  if len(scene.objects) == 1:
    return scene.relation is None
  first, second = scene.objects
  if scene.relation is None or first.colour == second.colour:
    return False
  along, across = first.x - second.x, first.y - second.y
  if scene.relation >= 2:
    along, across = across, along
  if scene.relation % 2 == 0:
    along = -along
  clear = first.reach + second.reach + GAP - 1e-9
  return along >= clear and abs(across) <= MAX_SLANT * along + 1e-9
