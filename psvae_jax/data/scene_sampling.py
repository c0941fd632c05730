"""Draws scenes: a pure function of (split, index, seed).

Random numbers are a hash of the index (splitmix64) rather than a generator's
stream: any index costs the same, nothing is stateful, and the values do not
depend on numpy's version. All of a scene's choices are made in closed form, so
no draw is ever rejected.

Some combinations of what captions name are kept out of "train" and
"validation" and fill the split "heldout":
  * (size, colour, shape): 8 of 84, in scenes of one or of two objects;
  * (colour-shape, colour-shape, relation): one in ten, whichever of its two
    wordings ("A left of B", "B right of A") is used.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import numpy as np

from psvae_jax.data import scene_types, textures

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_DRAWS = 56  # more than any scene uses
_COUNTERS = np.arange(1, _DRAWS + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
_SHIFTS = tuple(np.uint64(n) for n in (30, 27, 31, 11))
_FACTORS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))

NUM_KINDS = len(scene_types.COLOURS) * len(scene_types.SHAPES)
TWO_OBJECTS = 0.6  # share of scenes with two objects


def _mix(value: int) -> int:
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
  value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
  return value ^ (value >> 31)


def hash_key(*parts: int | str) -> int:
  """A 64-bit key from whole numbers and words."""
  key = 0
  for part in parts:
    if isinstance(part, str):
      part = int.from_bytes(part.encode(), "little") % ((1 << 61) - 1)
    key = _mix((key + _GOLDEN + int(part) * 0xD1342543DE82EF95) & _MASK)
  return key


def uniforms(key: int) -> Callable[[], float]:
  """A function that returns the key's numbers in [0, 1) one after the other."""
  z = _COUNTERS + np.uint64(key)
  z ^= z >> _SHIFTS[0]
  z *= _FACTORS[0]
  z ^= z >> _SHIFTS[1]
  z *= _FACTORS[1]
  z ^= z >> _SHIFTS[2]
  return iter(((z >> _SHIFTS[3]) * 2.0**-53).tolist()).__next__


def check_split(split: str) -> None:
  """Raises ValueError unless `split` is one of `scene_types.SPLITS`."""
  if split not in scene_types.SPLITS:
    raise ValueError(
      f"unknown split {split!r}: use one of {scene_types.SPLITS}"
    )


def object_kind(colour: int, shape: int) -> int:
  """Index of a colour-shape pair, in [0, NUM_KINDS)."""
  return colour * len(scene_types.SHAPES) + shape


@functools.cache
def held_out_triples() -> tuple[tuple[int, int, int], ...]:
  """The (size, colour, shape) that only "heldout" shows: 8 of 84.

  Every colour and every shape is among them, and no colour-shape pair loses
  both sizes.
  """
  triples = [(c % 2, c, (5 * c + 3) % 6) for c in range(7)]
  return tuple(triples + [(1, 3, 4)])


@functools.cache
def _held_out_size() -> dict[int, int]:
  """Colour-shape pair -> the size it is kept out at."""
  return {object_kind(c, s): size for size, c, s in held_out_triples()}


@functools.cache
def pair_combinations(held_out: bool) -> tuple[tuple[int, int, int], ...]:
  """All (kind of A, kind of B, relation) that are, or are not, held out."""
  shapes = len(scene_types.SHAPES)
  return tuple(
    (a, b, relation)
    for a in range(NUM_KINDS)
    for b in range(NUM_KINDS)
    for relation in range(4)
    if a // shapes != b // shapes
    and _pair_is_held_out(a, b, relation) == held_out
  )


def _pair_is_held_out(a: int, b: int, relation: int) -> bool:
  if relation % 2:  # one wording for both: "right of" as "left of"
    a, b, relation = b, a, scene_types.INVERSE_RELATION[relation]
  return hash_key("held out pair", a, b, relation) % 10 == 0


def is_held_out(scene: scene_types.Scene) -> bool:
  """Whether the scene shows a combination that only "heldout" may show."""
  triples = held_out_triples()
  if any((o.size, o.colour, o.shape) in triples for o in scene.objects):
    return True
  if scene.relation is None:
    return False
  kinds = [object_kind(o.colour, o.shape) for o in scene.objects]
  return _pair_is_held_out(*kinds, scene.relation)


def sample_scene(split: str, index: int, seed: int = 0) -> scene_types.Scene:
  """The scene at `index` of `split`.

  Args:
    split: one of `SPLITS`.
    index: any whole number from 0 on; each is another scene.
    seed: another seed is another dataset with the same held-out combinations.

  Raises:
    ValueError: unknown split or negative index.
  """
  check_split(split)
  if index < 0:
    raise ValueError(f"scene index {index} is negative: count from 0")
  return scene_from_key(split, hash_key("scene", split, seed, index))


def scene_from_key(
  split: str, key: int, num_objects: int | None = None
) -> scene_types.Scene:
  """Draws a scene of `split` from a 64-bit key, of 1 or 2 objects if stated."""
  draw = uniforms(key)
  background = _draw_background(split, draw)
  pair = draw() < TWO_OBJECTS
  if num_objects is not None:
    pair = num_objects == 2
  held_out = split == "heldout"
  if pair:
    combinations = pair_combinations(held_out)
    a, b, relation = combinations[int(draw() * len(combinations))]
    sizes = (_draw_size(a, held_out, draw), _draw_size(b, held_out, draw))
    kinds = ((a, sizes[0]), (b, sizes[1]))
  else:
    relation = None
    kinds = (_draw_single(held_out, draw),)
  objects = [_draw_object(kind, size, draw) for kind, size in kinds]
  return _place(objects, relation, background, draw)


def renew_nuisances(
  scene: scene_types.Scene, split: str, key: int
) -> scene_types.Scene:
  """The same objects at the same places; all that no caption names is new."""
  draw = uniforms(key)
  background = _draw_background(split, draw)
  objects = []
  for item in scene.objects:
    fresh = _draw_object(object_kind(item.colour, item.shape), item.size, draw)
    objects.append(
      dataclasses.replace(fresh, x=item.x, y=item.y, radius=item.radius)
    )
  return scene_types.Scene(tuple(objects), scene.relation, background)


def draw_object(
  key: int, colour: int, shape: int, size: int
) -> scene_types.SceneObject:
  """An object of stated kind, in the middle; all else drawn from the key."""
  return _draw_object(object_kind(colour, shape), size, uniforms(key))


def _draw_size(kind: int, held_out: bool, draw) -> int:
  size = int(draw() * 2)
  if not held_out and _held_out_size().get(kind) == size:
    return 1 - size
  return size


def _draw_single(held_out: bool, draw) -> tuple[int, int]:
  if held_out:
    triples = held_out_triples()
    size, colour, shape = triples[int(draw() * len(triples))]
    return object_kind(colour, shape), size
  kind = int(draw() * NUM_KINDS)
  return kind, _draw_size(kind, held_out, draw)


def _draw_background(split: str, draw) -> scene_types.Background:
  bank = "train" if split == "train" else "eval"
  hue, strength = 2 * math.pi * draw(), 0.06 * draw()
  return scene_types.Background(
    bank=bank,
    texture=int(draw() * textures.BANK_SIZES[bank]),
    crop_x=draw(),
    crop_y=draw(),
    flip=int(draw() * 8),
    level=90.0 + 75.0 * draw(),
    contrast=8.0 + 10.0 * draw(),
    slope_x=30.0 * (draw() - 0.5),
    slope_y=30.0 * (draw() - 0.5),
    tint=tuple(
      1.0 + strength * math.cos(hue + third)
      for third in (0.0, 2 * math.pi / 3, 4 * math.pi / 3)
    ),
  )


def _draw_object(kind: int, size: int, draw) -> scene_types.SceneObject:
  colour, shape = divmod(kind, len(scene_types.SHAPES))
  low, high = scene_types.RADII[size]
  depth = 0.12 + 0.2 * draw()
  return scene_types.SceneObject(
    shape=shape,
    colour=colour,
    size=size,
    x=0.5,
    y=0.5,
    radius=low + (high - low) * draw(),
    angle=scene_types.MAX_ANGLE * (2.0 * draw() - 1.0),
    hue_offset=10.0 * draw() - 5.0,
    saturation=0.78 + 0.2 * draw(),
    value=0.78 + 0.2 * draw(),
    stripe_depth=depth if draw() < 0.5 else 0.0,
    stripe_frequency=0.7 + 0.6 * draw(),
    stripe_angle=math.pi * draw(),
    stripe_phase=2 * math.pi * draw(),
  )


def _place(objects, relation, background, draw) -> scene_types.Scene:
  """Gives objects their places, shrinking two large ones until they fit."""
  margin, gap = scene_types.MARGIN, scene_types.GAP
  if relation is None:
    (item,) = objects
    inner = margin + item.reach
    x, y = (inner + (1 - 2 * inner) * draw() for _ in range(2))
    placed = (dataclasses.replace(item, x=x, y=y),)
    return scene_types.Scene(placed, None, background)

  room = 1 - 2 * margin - gap - 2 * sum(o.reach for o in objects)
  if room < 0:
    # Only two large objects are ever too long, and they fit at less than the
    # smallest large radius; draw anew below the radius that just fits.
    reach = 2 * sum(scene_types.REACH[o.shape] for o in objects)
    low, most = scene_types.RADII[1][0], (1 - 2 * margin - gap) / reach
    objects = [
      dataclasses.replace(o, radius=low + (most - low) * draw())
      for o in objects
    ]
    room = 1 - 2 * margin - gap - 2 * sum(o.reach for o in objects)

  # Along the relation's axis: the order is given, the slack is split at random.
  first, second = objects if relation % 2 == 0 else objects[::-1]
  before, between = sorted((room * draw(), room * draw()))
  start = margin + first.reach + before
  distance = first.reach + second.reach + gap + (between - before)
  # Across it: anywhere inside that keeps the relation unambiguous.
  inner = margin + first.reach
  across = inner + (1 - 2 * inner) * draw()
  slant = scene_types.MAX_SLANT * distance
  inner = margin + second.reach
  low, high = max(inner, across - slant), min(1 - inner, across + slant)
  other = low + (high - low) * draw()
  places = [(start, across), (start + distance, other)]
  if relation % 2:
    places = places[::-1]
  if relation >= 2:
    places = [(y, x) for x, y in places]
  placed = tuple(
    dataclasses.replace(item, x=x, y=y)
    for item, (x, y) in zip(objects, places, strict=True)
  )
  return scene_types.Scene(placed, relation, background)
