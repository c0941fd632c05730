"""Statements about scenes: said in other words, and said nearly right.

A statement is a caption or an edit's instruction in canonical form. `reword`
keeps what it says and changes how; `foil` keeps how and changes what, by one
word or by two that change places. A text encoder that tells the one from the
other has to know which word belongs to which object, and who stands where.
`roles` says the latter of every word.
"""

import re

import numpy as np

from psvae_jax.data import captions, scene_sampling, scene_types
from psvae_jax.data.scene_edits import sample_edit

# Variants of `captions.phrase` that leave nothing out and turn nothing round.
_CAPTION_VARIANTS = (0, 1, 2, 3)
_ALONE_VARIANT = 5  # "there is …"; of two objects it would turn them round
_SHARE_WITHOUT_SIZES = 0.15
_SHARE_INSTRUCTIONS = 0.35
# Of the foils of a statement with a relation: those with the opposite one. They
# alone need to know who stands where.
_SHARE_TURNED = 0.4

# Kind of edit → its canonical instruction, then others in another order: what
# a word means must not follow from its place alone.
_INSTRUCTIONS = (
  ("turn {a} into {b}", "{b} in place of {a}"),
  ("make {a} {b}", "{b} for {a}"),
  ("remove {a}", "no more of {a}"),
  ("add {a} {relation} {b}", "{relation} {b} add {a}"),
  ("move {a} {relation} {b}", "{relation} {b} move {a}"),
)

_GROUPS = (
  scene_types.COLOURS,
  scene_types.SHAPES,
  scene_types.SIZES,
  scene_types.RELATIONS,
)
_WORD = re.compile(
  r"\b(" + "|".join(word for group in _GROUPS for word in group) + r")\b"
)

# Where the object of a word stands: as the relation's words say of the first,
# or nowhere.
ROLES = (*scene_types.RELATIONS, "alone")
_LINK = re.compile(
  r"\b("
  + "|".join(sorted(captions.RELATION_WORDS, key=len, reverse=True))
  + r")\b"
)


def _pattern(template: str) -> re.Pattern:
  relation = "|".join(scene_types.RELATIONS)
  # The object of "make" has an article, what it becomes has none.
  fields = {
    "a": r"(?P<a>(?:the|an?) (?:\w+ )?\w+ \w+)",
    "b": r"(?P<b>.+)",
    "relation": rf"(?P<relation>{relation})",
  }
  return re.compile(template.format(**fields))


_PATTERNS = tuple(_pattern(templates[0]) for templates in _INSTRUCTIONS)


def statement(split: str, index: int, seed: int = 0) -> str:
  """The canonical caption or instruction at `index` of an endless list."""
  key = scene_sampling.hash_key("statement", split, seed, index)
  draw = scene_sampling.uniforms(key)
  if draw() < _SHARE_INSTRUCTIONS:
    return sample_edit(split, index, seed).instruction
  scene = scene_sampling.sample_scene(split, index, seed)
  spec = captions.spec_of(scene)
  variant = 4 if draw() < _SHARE_WITHOUT_SIZES else 0
  return captions.phrase(spec, variant)


def reword(text: str, rng: np.random.Generator) -> str:
  """The same statement in words drawn at random, perhaps its own.

  Raises:
    ValueError: the text is neither a canonical caption nor an instruction.
  """
  spec = captions.parse_spec(text)
  if spec is not None:
    variants = _CAPTION_VARIANTS
    if len(spec.objects) == 1:
      variants = (*variants, _ALONE_VARIANT)
    elif rng.random() < 0.5:
      spec = captions.turned(spec)
    return captions.phrase(spec, int(rng.choice(variants)))
  for pattern, templates in zip(_PATTERNS, _INSTRUCTIONS, strict=True):
    match = pattern.fullmatch(text)
    if match:
      template = templates[int(rng.integers(len(templates)))]
      return template.format(**match.groupdict())
  raise ValueError(f"neither a canonical caption nor an instruction: {text!r}")


def foil(text: str, rng: np.random.Generator) -> str:
  """A statement in the same words but one or two, which says another thing.

  Args:
    text: as `statement` gives it.
    rng: decides which words, and what they become.

  Raises:
    ValueError: the text names no colour, shape, size or relation.
  """
  truth, found = meaning(text), list(_WORD.finditer(text))
  if not found:
    raise ValueError(f"nothing in {text!r} can be said wrong")
  groups = [next(g for g in _GROUPS if match[0] in g) for match in found]
  pairs = [
    (i, j)
    for j in range(len(found))
    for i in range(j)
    if groups[i] == groups[j] and found[i][0] != found[j][0]
  ]
  relations = [i for i, g in enumerate(groups) if g is scene_types.RELATIONS]
  while True:
    words = [match[0] for match in found]
    if relations and rng.random() < _SHARE_TURNED:
      (i,) = relations
      opposite = scene_types.INVERSE_RELATION[groups[i].index(words[i])]
      words[i] = groups[i][opposite]
    elif pairs and rng.random() < 0.5:
      i, j = pairs[int(rng.integers(len(pairs)))]
      words[i], words[j] = words[j], words[i]
    else:
      i = int(rng.integers(len(words)))
      others = [word for word in groups[i] if word != words[i]]
      words[i] = others[int(rng.integers(len(others)))]
    given = iter(words)
    changed = _articles(_WORD.sub(lambda _, given=given: next(given), text))
    if meaning(changed) != truth:
      return changed


def meaning(text: str) -> str:
  """Equal for canonical statements that say the same."""
  spec = captions.parse_spec(text)
  if spec is None:
    return text
  wordings = [spec, captions.turned(spec)] if len(spec.objects) == 2 else [spec]
  return min(captions.phrase(wording) for wording in wordings)


def roles(text: str) -> list[tuple[int, int, int]]:
  """Start, end and role of each colour, shape and size of a wording.

  The role is an index into `ROLES`. The anchor of a relation, which follows its
  words, has the opposite of what the other object has.
  """
  words = list(_WORD.finditer(text))
  words = [w for w in words if w[0] not in scene_types.RELATIONS]
  link = _LINK.search(text)
  if link is None:
    alone = len(ROLES) - 1
    return [(*word.span(), alone) for word in words]
  first = captions.RELATION_WORDS[link[1]]
  anchor = scene_types.INVERSE_RELATION[first]
  # "left of B move A" goes on with A after the verb.
  verb = re.compile(r"\b(?:add|move)\b").search(text, link.end())
  end = verb.start() if verb else len(text)
  return [
    (*word.span(), anchor if link.end() <= word.start() < end else first)
    for word in words
  ]


def _articles(text: str) -> str:
  """With "an" before vowels and "a" before other letters."""
  text = re.sub(r"\ba (?=[aeiou])", "an ", text)
  return re.sub(r"\ban (?=[^aeiou])", "a ", text)
