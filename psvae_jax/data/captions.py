"""What scenes are called: captions, their parser, and hard negatives.

A `CaptionSpec` is what a caption says, whatever its wording; None stands for
what it leaves open.
"""

import dataclasses
import re
from typing import Any

import numpy as np

from psvae_jax.data import scene_types

NUM_VARIANTS = 6

_PARAPHRASED_RELATIONS = (
  "to the left of",
  "to the right of",
  "over",
  "under",
)
# What stands between two objects → index of the relation.
RELATION_WORDS = {
  word: relation
  for words in (scene_types.RELATIONS, _PARAPHRASED_RELATIONS)
  for relation, word in enumerate(words)
}
_PICTURE = "a picture of "


@dataclasses.dataclass(frozen=True)
class ObjectSpec:
  """What a caption says of an object; indices into the vocabularies."""

  size: int | None
  colour: int
  shape: int


@dataclasses.dataclass(frozen=True)
class CaptionSpec:
  """What a caption says: objects, and the relation of the first to the second.

  Two objects may stand without a relation.
  """

  objects: tuple[ObjectSpec, ...]
  relation: int | None = None


def spec_of(scene: scene_types.Scene) -> CaptionSpec:
  """All that a caption could say of the scene."""
  objects = tuple(ObjectSpec(o.size, o.colour, o.shape) for o in scene.objects)
  return CaptionSpec(objects, scene.relation)


def caption(scene: scene_types.Scene, variant: int = 0) -> str:
  """Describes a scene.

  Args:
    scene: the scene.
    variant: 0 is canonical ("a small red circle", "a large blue star left of
      a small green ring"). 1 drops articles; 2 puts sizes behind; 3 uses other
      words; 4 leaves sizes out; 5 names two objects in the other order (and is
      "there is a small red circle" for one).

  Raises:
    ValueError: no such variant.
  """
  return phrase(spec_of(scene), variant)


def phrase(spec: CaptionSpec, variant: int = 0) -> str:
  """`caption` of a spec; a size it leaves open is left out."""
  if not 0 <= variant < NUM_VARIANTS:
    raise ValueError(f"caption variant {variant}: there are {NUM_VARIANTS}")
  if variant == 4:
    objects = tuple(
      dataclasses.replace(item, size=None) for item in spec.objects
    )
    spec = dataclasses.replace(spec, objects=objects)
  if variant == 5:
    if len(spec.objects) == 1:
      return "there is " + _noun_phrase(spec.objects[0], 0)
    spec = turned(spec)
  words = _PARAPHRASED_RELATIONS if variant == 3 else scene_types.RELATIONS
  link = "and" if spec.relation is None else words[spec.relation]
  names = [_noun_phrase(item, variant) for item in spec.objects]
  text = f" {link} ".join(names)
  return _PICTURE + text if variant == 3 else text


def turned(spec: CaptionSpec) -> CaptionSpec:
  """The same statement with the two objects named in the other order."""
  relation = spec.relation
  if relation is not None:
    relation = scene_types.INVERSE_RELATION[relation]
  return CaptionSpec(spec.objects[::-1], relation)


def _noun_phrase(item: ObjectSpec, variant: int) -> str:
  words = [scene_types.COLOURS[item.colour], scene_types.SHAPES[item.shape]]
  size = None if item.size is None else scene_types.SIZES[item.size]
  if size and variant != 2:
    words.insert(0, size)
  text = " ".join(words)
  if variant != 1:
    text = ("an " if text[0] in "aeiou" else "a ") + text
  if size and variant == 2:
    text += ", " + size
  return text


def _build_patterns() -> tuple[re.Pattern, re.Pattern]:
  either = "|".join
  noun = re.compile(
    rf"(?:(?:an?|the) )?(?:({either(scene_types.SIZES)}) )?"
    rf"({either(scene_types.COLOURS)}) ({either(scene_types.SHAPES)})"
    rf"(?:, ({either(scene_types.SIZES)}),?)?"
  )
  link = re.compile(" (?:is )?(" + either(("and", *RELATION_WORDS)) + ") ")
  return noun, link


_NOUN, _LINK = _build_patterns()


def parse_caption(text: str) -> dict[str, Any] | None:
  """`parse_spec` as plain data, for code that knows no `CaptionSpec`.

  Returns:
    {"objects": ({"size", "colour", "shape"}, ...), "relation"} of indices, None
    where the caption says nothing; None for text that is no caption.
  """
  spec = parse_spec(text)
  return None if spec is None else dataclasses.asdict(spec)


def parse_spec(text: str) -> CaptionSpec | None:
  """Reads a caption in any of the wordings of `caption`; None for other text.

  Case, a final full stop and doubled blanks do not matter.
  """
  text = " ".join(text.lower().split()).rstrip(".")
  for opening in (_PICTURE, "there is "):
    text = text.removeprefix(opening)
  parts = _LINK.split(text)
  if len(parts) not in (1, 3):
    return None
  objects = []
  for part in parts[::2]:
    match = _NOUN.fullmatch(part)
    if match is None or (match[1] and match[4]):
      return None
    size = match[1] or match[4]
    objects.append(
      ObjectSpec(
        None if size is None else scene_types.SIZES.index(size),
        scene_types.COLOURS.index(match[2]),
        scene_types.SHAPES.index(match[3]),
      )
    )
  relation = RELATION_WORDS.get(parts[1]) if len(parts) == 3 else None
  return CaptionSpec(tuple(objects), relation)


def describes(spec: CaptionSpec, scene: scene_types.Scene) -> bool:
  """Whether all that the spec says is true of the scene."""
  truth = spec_of(scene)
  if len(spec.objects) != len(truth.objects):
    return False
  wordings = [truth] if len(truth.objects) == 1 else [truth, turned(truth)]
  return any(_agrees(spec, wording) for wording in wordings)


def _agrees(spec: CaptionSpec, truth: CaptionSpec) -> bool:
  if spec.relation is not None and spec.relation != truth.relation:
    return False
  return all(
    (said.colour, said.shape) == (true.colour, true.shape)
    and said.size in (None, true.size)
    for said, true in zip(spec.objects, truth.objects, strict=True)
  )


def foil_caption(scene: scene_types.Scene, rng: np.random.Generator) -> str:
  """A caption in canonical form that is nearly right, and wrong.

  One attribute or the relation is changed, or the two objects swap their
  colours, shapes, sizes or places.
  """
  truth = spec_of(scene)
  pair = len(truth.objects) == 2
  changes = ["colour", "shape", "size"]
  if pair:
    changes += ["relation", "swap colour", "swap shape", "swap size", "turn"]
  for change in rng.permutation(changes):
    foil = _change(truth, str(change), rng)
    if not describes(foil, scene):
      return phrase(foil)
  raise AssertionError("unreachable: changing a colour is always wrong")


def _change(spec: CaptionSpec, change: str, rng) -> CaptionSpec:
  if change == "relation":
    relation = (spec.relation + int(rng.integers(1, 4))) % 4
    return dataclasses.replace(spec, relation=relation)
  if change == "turn":  # the other order without the other relation
    return dataclasses.replace(spec, objects=spec.objects[::-1])
  if change.startswith("swap "):
    name = change.removeprefix("swap ")
    first, second = spec.objects
    swapped = (
      dataclasses.replace(first, **{name: getattr(second, name)}),
      dataclasses.replace(second, **{name: getattr(first, name)}),
    )
    return dataclasses.replace(spec, objects=swapped)
  counts = {
    "colour": len(scene_types.COLOURS),
    "shape": len(scene_types.SHAPES),
    "size": len(scene_types.SIZES),
  }
  objects = list(spec.objects)
  which = int(rng.integers(len(objects)))
  old = getattr(objects[which], change)
  new = (old + int(rng.integers(1, counts[change]))) % counts[change]
  objects[which] = dataclasses.replace(objects[which], **{change: new})
  return dataclasses.replace(spec, objects=tuple(objects))
