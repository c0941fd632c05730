"""Figures of a generator: are its images right, and are they like real ones?

Whether an image shows what its caption says is read by the scene checker, on
captions that training has and has not seen. Everything else asks whether the
images as a whole are like real ones, and works for any data: Fréchet and kernel
distance in the frozen encoder's feature space, similarity of caption and image,
and the distance of sample latents to real ones. Beside each figure stands what
the autoencoder alone would give (`_ceiling`: the prompts' own images, encoded
and decoded), and what says nothing (`_floor` of a similarity) or is real
(`_floor` of a distance, `_real`).

An image is drawn once and serves every figure. All hosts do the same.
"""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from psvae_jax.config import Config
from psvae_jax.evaluators import joint_accuracy, sample_pictures
from psvae_jax.evaluators import prompts as prompts_lib
from psvae_jax.evaluators.frechet import FeatureMoments, distance_between
from psvae_jax.evaluators.generative_model import GenerativeModel
from psvae_jax.evaluators.kernel_distance import kernel_distance
from psvae_jax.evaluators.manifold import LatentBank, manifold_metrics
from psvae_jax.evaluators.prompts import Prompts
from psvae_jax.evaluators.similarity import CaptionMap, fit_caption_map


class GeneratorEvaluator:
  """Scores one generator after the other on the same prompts and seeds.

  Args:
    config: the job; `data`, `eval`, `sample.steps` and `model.condition`
      are read.
    image_size: side of the images, pixels.
  """

  def __init__(self, config: Config, image_size: int) -> None:
    self._config = config
    self._image_size = image_size

  def evaluate(
    self,
    model: GenerativeModel,
    folder: Path | None = None,
    *,
    quick: bool = False,
    step: int | None = None,
    quarantine: str | os.PathLike[str] | None = None,
  ) -> dict[str, float]:
    """All figures of a generator, or what training is followed by.

    Args:
      model: the generator, with its saved sampling settings.
      folder: where pictures are written (see `sample_pictures`); None nowhere,
        as on every host but one.
      quick: only the first `eval.num_quick` prompts and what the checker reads
        in them; without scenes only the pictures.
      step: training step, in the name of a quick evaluation's pictures.
      quarantine: list of records that cannot be used; None keeps no list.

    Returns:
      Metric name → value:
        eval/joint_…: see `joint_accuracy`; groups are seen captions as they
          come, of one and of two objects, and held-out combinations. With
          `_ceiling` of the true images through the autoencoder.
        eval/frechet_distance, eval/kernel_distance (and eval/
          kernel_distance_std over its subsets): images of the first prompts
          against the reference images; `_floor` of the prompts' own images,
          `_ceiling` of those through the autoencoder. The Fréchet distance is
          biased by the number of images: only figures of one number compare.
        eval/caption_similarity, `_floor` (captions shuffled), `_ceiling`
          (the captions' own images).
        eval/manifold_distance…, eval/off_manifold_share: see `manifold`.
    """
    prompts = prompts_lib.make(self._config, self._image_size, quarantine)
    if quick:
      return self._quick(model, prompts, folder, step)
    training = self._read_training(model, prompts)
    batches = self._draw(model, prompts, len(prompts.texts))
    count = len(prompts.groups["seen"])
    drawn = _Images.collect(model, prompts, batches, count, training.bank)
    metrics = _checked(drawn, prompts)
    metrics |= self._real_metrics(model, prompts, drawn, training)
    sample_pictures.write(
      model,
      prompts,
      drawn.first,
      drawn.checks,
      folder,
      # No time grid has fewer points than steps.
      points=min(sample_pictures.POINTS, self._config.sample.steps),
    )
    return metrics

  def _quick(
    self,
    model: GenerativeModel,
    prompts: Prompts,
    folder: Path | None,
    step: int | None,
  ) -> dict[str, float]:
    pictures = sample_pictures.NUM_QUICK
    count = pictures if prompts.specs is None else self._config.eval.num_quick
    count = min(count, len(prompts.groups["seen"]))
    drawn = _Images.collect(model, prompts, self._draw(model, prompts, count))
    sample_pictures.write_progress(
      prompts, drawn.first, drawn.checks, folder, step
    )
    groups = {name: rows[rows < count] for name, rows in prompts.groups.items()}
    return _checked(drawn, dataclasses.replace(prompts, groups=groups))

  def _draw(
    self, model: GenerativeModel, prompts: Prompts, count: int
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Latents and images of the first `count` prompts, in batches."""
    size = self._config.eval.batch_size
    for start in range(0, count, size):
      rows = slice(start, min(start + size, count))
      latents = model.generate_latents(prompts.texts[rows], prompts.seeds[rows])
      yield latents, model.decode(latents)

  def _read_training(
    self, model: GenerativeModel, prompts: Prompts
  ) -> "_Training":
    """What real training images say of latents and captions."""
    latents, features, texts = [], [], []
    for images, captions in prompts.training():
      latents.append(model.encode(images))
      if prompts.captioned:
        features.append(model.features(images))
        texts.append(model.text_features(captions))
    latents = np.concatenate(latents)
    # As many outside of the bank as are compared with it.
    outside = min(len(prompts.groups["seen"]), len(latents) // 2)
    inside = len(latents) - outside
    bank = LatentBank(latents[:inside])
    captions = None
    if prompts.captioned:
      captions = fit_caption_map(
        np.concatenate(texts), np.concatenate(features)
      )
    return _Training(bank, bank.distances(latents[inside:]), captions)

  def _real_metrics(
    self,
    model: GenerativeModel,
    prompts: Prompts,
    drawn: "_Images",
    training: "_Training",
  ) -> dict[str, float]:
    """Figures that compare with real images, and the ceilings of all."""
    count = len(prompts.groups["seen"])
    originals = []

    def through_autoencoder():
      for images in prompts.originals():
        seen = count - sum(map(len, originals))
        if seen > 0:
          originals.append(model.features(images[:seen]))
        latents = model.encode(images)
        yield latents, model.decode(latents)

    decoded = _Images.collect(model, prompts, through_autoencoder(), count)
    real = np.concatenate(originals)
    metrics = _checked(decoded, prompts, "_ceiling")
    sets = {
      "": drawn.features,
      "_ceiling": decoded.features,
      "_floor": real,
    }
    reference = [model.features(images) for images in prompts.reference()]
    if sum(map(len, reference)) >= 2 <= count:
      metrics |= _distances(sets, np.concatenate(reference))
    if len(training.outside):
      metrics |= manifold_metrics(drawn.distances, training.outside)
    if training.captions is not None:
      text = model.text_features(prompts.texts[:count])
      similar = training.captions.similarity
      ours, floor = similar(text, drawn.features)
      metrics |= {
        "eval/caption_similarity": ours,
        "eval/caption_similarity_floor": floor,
        "eval/caption_similarity_ceiling": similar(text, real)[0],
      }
    return metrics


@dataclasses.dataclass(frozen=True)
class _Training:
  """Real training images.

  Attributes:
    bank: latents of most of them.
    outside: the others' distances to it.
    captions: text features → image features; None without captions.
  """

  bank: LatentBank
  outside: np.ndarray
  captions: CaptionMap | None


@dataclasses.dataclass(frozen=True)
class _Images:
  """What is kept of images that were made for prompts, in their order.

  Attributes:
    features: (count, D), of the first ones; None if none were asked for.
    distances: (count,) to the nearest real latent; None without a bank.
    checks: what the checker says, one an image; [] where nothing reads them.
    first: the first images, uint8 (n, S, S, 3).
  """

  features: np.ndarray | None
  distances: np.ndarray | None
  checks: list[dict[str, bool]]
  first: np.ndarray

  @classmethod
  def collect(
    cls,
    model: GenerativeModel,
    prompts: Prompts,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    count: int = 0,
    bank: LatentBank | None = None,
  ) -> "_Images":
    """Reads (latents, images) batch by batch; they are not held.

    Args:
      model: gives features.
      prompts: of the images.
      batches: latents and images.
      count: so many of the first images have features and distances.
      bank: what distances are taken to.
    """
    done, features, distances, checks, first = 0, [], [], [], []
    for latents, images in batches:
      if done < sample_pictures.NUM_PICTURES:
        first.append(images[: sample_pictures.NUM_PICTURES - done])
      seen = max(0, min(len(images), count - done))
      if seen:
        features.append(model.features(images[:seen]))
        if bank is not None:
          distances.append(bank.distances(latents[:seen]))
      if prompts.specs is not None:
        specs = prompts.specs[done : done + len(images)]
        checks += joint_accuracy.check(images, specs)
      done += len(images)
    return cls(
      np.concatenate(features) if features else None,
      np.concatenate(distances) if distances else None,
      checks,
      np.concatenate(first),
    )


def _checked(
  images: _Images, prompts: Prompts, suffix: str = ""
) -> dict[str, float]:
  if prompts.specs is None:
    return {}
  return joint_accuracy.joint_metrics(
    images.checks, prompts.specs, prompts.groups, suffix
  )


def _distances(
  sets: dict[str, np.ndarray], reference: Sequence[np.ndarray]
) -> dict[str, float]:
  """Fréchet and kernel distance of each set to the reference."""
  moments = FeatureMoments().update(reference)
  metrics = {}
  for suffix, features in sets.items():
    own = FeatureMoments().update(features)
    metrics[f"eval/frechet_distance{suffix}"] = distance_between(own, moments)
    mean, std = kernel_distance(features, reference)
    metrics[f"eval/kernel_distance{suffix}"] = mean
    if not suffix:
      metrics["eval/kernel_distance_std"] = std
  return metrics
