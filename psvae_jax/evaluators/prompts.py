"""What a generator is asked for, and the real images it is compared with.

All of it is fixed by the config's data section: the same prompts and seeds at
every evaluation, first ones of their split.

Real images are of two kinds. Those of the validation split belong to features:
the first ones have the prompts' own captions, the others are the reference.
Those of the training split belong to latents and captions: a generator learns
the training distribution, of which scenes of the validation split have other
textures, so that nearness to the manifold is judged against what it has seen.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from psvae_jax.config import Config
from psvae_jax.data import captions, pipeline, sources
from psvae_jax.data.scene_sampling import sample_scene
from psvae_jax.data.scenes import SceneSource, render

# Held-out scenes have seeds of their own.
_HELDOUT_SEED = 1 << 24
# Scenes have no end, but a source has a length.
_SCENES = 1 << 24

Examples = tuple[np.ndarray, list[str]]


@dataclasses.dataclass(frozen=True)
class Prompts:
  """Prompts, seeds, and real images in batches.

  Attributes:
    texts: N prompts: captions, or labels of a class-conditional generator.
    seeds: int64 (N,).
    specs: what each prompt says, for the checker; None where nothing reads it.
    groups: name → rows; "seen" are the first rows of all, and are what is
      compared with real images.
    captioned: whether the prompts are captions.
    originals: batches of the images the prompts were taken from, uint8
      (B, S, S, 3), in order; of the rows "seen" at least.
    reference: further images of the validation split.
    training: images of the training split, and their captions.
  """

  texts: list[str] | list[int]
  seeds: np.ndarray
  specs: list[captions.CaptionSpec] | None
  groups: dict[str, np.ndarray]
  captioned: bool
  originals: Callable[[], Iterator[np.ndarray]]
  reference: Callable[[], Iterator[np.ndarray]]
  training: Callable[[], Iterator[Examples]]


def make(
  config: Config,
  image_size: int,
  quarantine: str | os.PathLike[str] | None = None,
) -> Prompts:
  """The prompts of a job.

  Args:
    config: `data`, `eval` and `model.condition` are read.
    image_size: side of the images, pixels.
    quarantine: list of the records that cannot be used; None keeps no list.
  """
  if config.data.source == "scenes":
    return _of_scenes(config, image_size)
  return _of_source(config, image_size, quarantine)


def _of_scenes(config: Config, image_size: int) -> Prompts:
  """Canonical captions of seen and held-out combinations.

  Groups: "seen" are validation scenes as they come; "one_object" and
  "two_object" those with so many objects, the former with further scenes up to
  `num_generated`; "heldout" are combinations that training never shows.
  """
  seed, count = config.data.seed, config.eval.num_generated
  drawn = [("validation", i) for i in range(count)]
  scenes = [sample_scene(*name, seed) for name in drawn]
  sizes = np.array([len(scene.objects) for scene in scenes])
  groups = {"seen": np.arange(count), "two_object": np.flatnonzero(sizes == 2)}
  singles = list(np.flatnonzero(sizes == 1))
  index = count
  while len(singles) < count:
    scene = sample_scene("validation", index, seed)
    if len(scene.objects) == 1:
      singles.append(len(drawn))
      drawn.append(("validation", index))
      scenes.append(scene)
    index += 1
  groups["one_object"] = np.array(singles)
  groups["heldout"] = len(drawn) + np.arange(count)
  drawn += [("heldout", i) for i in range(count)]
  scenes += [sample_scene("heldout", i, seed) for i in range(count)]

  batch = config.eval.batch_size

  def originals():
    for start in range(0, len(scenes), batch):
      part = scenes[start : start + batch]
      yield np.stack([render(scene, image_size) for scene in part])

  def read(split, first, number):
    source = SceneSource(split, _SCENES, image_size, seed, False)
    for start in range(first, first + number, batch):
      stop = min(start + batch, first + number)
      items = [source[i] for i in range(start, stop)]
      images = np.stack([item["image"] for item in items])
      yield images, [item["caption"] for item in items]

  number = config.eval.num_reference
  return Prompts(
    texts=[captions.caption(scene) for scene in scenes],
    seeds=np.array([i + _HELDOUT_SEED * (s == "heldout") for s, i in drawn]),
    specs=[captions.spec_of(scene) for scene in scenes],
    groups=groups,
    captioned=True,
    originals=originals,
    reference=lambda: (x for x, _ in read("validation", count, number)),
    training=lambda: read("train", 0, number + count),
  )


def _of_source(
  config: Config,
  image_size: int,
  quarantine: str | os.PathLike[str] | None,
) -> Prompts:
  """Captions of the validation split, or classes in turn.

  At most half of the split are prompts: the others are the reference.
  """
  validation, training = (
    sources.make_source(config.data, split, image_size, quarantine)
    for split in ("validation", "train")
  )
  num_classes = getattr(training, "num_classes", 0)
  classes = config.model.condition == "class"
  if classes:  # folders have one class after the other
    validation, training = _Shuffled(validation), _Shuffled(training)

  def read(source, first, number):
    number = min(number, len(source) - first)
    if number < 1:
      return
    for batch in pipeline.eval_batches(
      source,
      image_size=image_size,
      batch_size=config.eval.batch_size,
      num_examples=first + number,
      captions=True,
    ):
      keep = batch["mask"] & (batch["index"] >= first)
      if keep.any():
        texts = [t for t, k in zip(batch["caption"], keep, strict=True) if k]
        yield batch["image"][keep], texts

  count = min(config.eval.num_generated, max(1, len(validation) // 2))
  texts = [text for _, part in read(validation, 0, count) for text in part]
  if classes:
    texts = _in_turn(num_classes or config.model.num_classes, len(texts))
  number = config.eval.num_reference
  return Prompts(
    texts=texts,
    seeds=np.arange(len(texts)),
    specs=None,
    groups={"seen": np.arange(len(texts))},
    captioned=not classes and len(set(texts)) > 1,
    originals=lambda: (x for x, _ in read(validation, 0, count)),
    reference=lambda: (x for x, _ in read(validation, count, number)),
    training=lambda: read(training, 0, number + count),
  )


def _in_turn(num_classes: int, count: int) -> list[int]:
  """`count` labels: all equally often, or as many, evenly spaced."""
  step = max(1, num_classes // count)
  return [i * step % num_classes for i in range(count)]


class _Shuffled:
  """A source in another order, which depends on its length alone."""

  def __init__(self, source: pipeline.Source) -> None:
    self._source = source
    self._order = np.random.default_rng(0).permutation(len(source))
    self._read = getattr(source, "read", source.__getitem__)

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._source[int(self._order[index])]

  def read(self, index: int) -> dict[str, Any] | None:
    """The element; None if the source says that it is bad."""
    return self._read(int(self._order[index]))
