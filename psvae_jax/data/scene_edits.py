"""Instruction edits: a scene before, a scene after, and what to say.

Source and target share the background and every object that the instruction
does not name, number for number, so that their pixels are equal there.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from psvae_jax.data import captions, scene_render, scene_sampling, scene_types

EDIT_KINDS = ("recolour", "reshape", "resize", "add", "remove", "move")

_COLOURS, _SHAPES = scene_types.COLOURS, scene_types.SHAPES
_ATTEMPTS = 1000  # one in three suffices; the limit only ends an endless loop


@dataclasses.dataclass(frozen=True)
class SceneEdit:
  """One edit: `instruction` turns `source` into `target`."""

  source: scene_types.Scene
  target: scene_types.Scene
  instruction: str
  kind: str


def sample_edit(split: str, index: int, seed: int = 0) -> SceneEdit:
  """The edit at `index` of `split`; kinds are equally frequent.

  In "train" and "validation" neither side shows a held-out combination. In
  "heldout" the source (for "add" the source's one object) is held out.

  Raises:
    ValueError: unknown split or negative index.
  """
  scene_sampling.check_split(split)
  if index < 0:
    raise ValueError(f"edit index {index} is negative: count from 0")
  base = scene_sampling.hash_key("edit", split, seed, index)
  kind = EDIT_KINDS[base % len(EDIT_KINDS)]
  num_objects = {"add": 1, "remove": 2, "move": 2}.get(kind)
  # Some drawn edits would not fit in the picture or would show a combination
  # that the split must not: then the next source is tried.
  for attempt in range(_ATTEMPTS):
    key = scene_sampling.hash_key(base, attempt)
    source = scene_sampling.scene_from_key(split, key, num_objects)
    draw = scene_sampling.uniforms(scene_sampling.hash_key(key, "change"))
    proposal = _PROPOSE[kind](source, draw)
    if proposal is None:
      continue
    target, instruction = proposal
    if not scene_types.is_well_formed(target):
      continue
    if split == "heldout" or not scene_sampling.is_held_out(target):
      return SceneEdit(source, target, instruction, kind)
  raise AssertionError(f"no {kind} edit for {split} {index}")


def edit_triple(
  split: str,
  index: int,
  image_size: int = scene_types.IMAGE_SIZE,
  seed: int = 0,
) -> dict[str, np.ndarray | str]:
  """Renders the edit at `index`.

  Returns:
    source, target: uint8 (S, S, 3); instruction; caption: the target's,
    canonical; kind: one of `EDIT_KINDS`.
  """
  edit = sample_edit(split, index, seed)
  return {
    "source": scene_render.render(edit.source, image_size),
    "target": scene_render.render(edit.target, image_size),
    "instruction": edit.instruction,
    "caption": captions.caption(edit.target),
    "kind": edit.kind,
  }


def _name(item: scene_types.SceneObject) -> str:
  return f"the {_COLOURS[item.colour]} {_SHAPES[item.shape]}"


def _article(word: str) -> str:
  return "an" if word[0] in "aeiou" else "a"


def _other(draw: Callable[[], float], count: int, excluded: set[int]) -> int:
  choices = [i for i in range(count) if i not in excluded]
  return choices[int(draw() * len(choices))]


def _replace_object(scene, which, **changes) -> scene_types.Scene:
  objects = list(scene.objects)
  objects[which] = dataclasses.replace(objects[which], **changes)
  return dataclasses.replace(scene, objects=tuple(objects))


def _recolour(scene, draw):
  which = int(draw() * len(scene.objects))
  taken = {o.colour for o in scene.objects}
  colour = _other(draw, len(_COLOURS), taken)
  target = _replace_object(scene, which, colour=colour)
  return target, f"make {_name(scene.objects[which])} {_COLOURS[colour]}"


def _reshape(scene, draw):
  which = int(draw() * len(scene.objects))
  item = scene.objects[which]
  shape = _other(draw, len(_SHAPES), {item.shape})
  target = _replace_object(scene, which, shape=shape)
  new = f"{_article(_SHAPES[shape])} {_SHAPES[shape]}"
  return target, f"turn {_name(item)} into {new}"


def _resize(scene, draw):
  which = int(draw() * len(scene.objects))
  item = scene.objects[which]
  low, high = scene_types.RADII[1 - item.size]
  target = _replace_object(
    scene, which, size=1 - item.size, radius=low + (high - low) * draw()
  )
  return target, f"make {_name(item)} {scene_types.SIZES[1 - item.size]}"


def _add(scene, draw):
  (anchor,) = scene.objects
  item = scene_sampling.draw_object(
    key=int(draw() * 2**53),
    colour=_other(draw, len(_COLOURS), {anchor.colour}),
    shape=int(draw() * len(_SHAPES)),
    size=int(draw() * 2),
  )
  relation = int(draw() * 4)
  item = _place_beside(item, anchor, relation, draw)
  if item is None:
    return None
  target = scene_types.Scene((item, anchor), relation, scene.background)
  said = captions.caption(scene_types.Scene((item,), None, scene.background))
  words = scene_types.RELATIONS[relation]
  return target, f"add {said} {words} {_name(anchor)}"


def _remove(scene, draw):
  which = int(draw() * 2)
  target = scene_types.Scene(
    (scene.objects[1 - which],), None, scene.background
  )
  return target, f"remove {_name(scene.objects[which])}"


def _move(scene, draw):
  """Takes one object to another side of the other one, which stays."""
  which = int(draw() * 2)
  item, anchor = scene.objects[which], scene.objects[1 - which]
  now = scene.relation
  if which:
    now = scene_types.INVERSE_RELATION[now]
  relation = _other(draw, 4, {now})
  item = _place_beside(item, anchor, relation, draw)
  if item is None:
    return None
  target = scene_types.Scene((item, anchor), relation, scene.background)
  words = scene_types.RELATIONS[relation]
  return target, f"move {_name(item)} {words} {_name(anchor)}"


def _place_beside(item, anchor, relation, draw):
  """`item` at a random place in that relation to `anchor`; None: no room."""
  inner = scene_types.MARGIN + item.reach
  clear = item.reach + anchor.reach + scene_types.GAP
  along, across = anchor.x, anchor.y
  if relation >= 2:
    along, across = across, along
  low, high = inner, along - clear
  if relation % 2:
    low, high = along + clear, 1 - inner
  if low > high:
    return None
  place = low + (high - low) * draw()
  slant = scene_types.MAX_SLANT * abs(place - along)
  low, high = max(inner, across - slant), min(1 - inner, across + slant)
  if low > high:
    return None
  other = low + (high - low) * draw()
  x, y = (place, other) if relation < 2 else (other, place)
  return dataclasses.replace(item, x=x, y=y)


_PROPOSE = {
  "recolour": _recolour,
  "reshape": _reshape,
  "resize": _resize,
  "add": _add,
  "remove": _remove,
  "move": _move,
}
