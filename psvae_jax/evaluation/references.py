"""What Fréchet distances and the like are taken to."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from psvae_jax.evaluation import passes
from psvae_jax.evaluation.image_sets import ImageSet
from psvae_jax.evaluation.networks import Networks
from psvae_jax.evaluators.feature_networks import FeatureNetwork
from psvae_jax.evaluators.frechet import FeatureMoments
from psvae_jax.evaluators.reference_npz import ReferenceFile


@dataclasses.dataclass(frozen=True)
class Settings:
  """How an evaluation is computed.

  Attributes:
    folder: for the passes' files.
    batch_size: images at once.
    save_every: batches between two saves.
    rounding: of what autoencoders make, "round" or "truncate".
    kid_subsets, kid_subset_size, seed: of the kernel distance's subsets.
    neighbours: of precision and recall.
    label_sampling: how labels of generated images were drawn, in words.
  """

  folder: Path
  batch_size: int = 32
  save_every: int = 20
  rounding: str = "round"
  kid_subsets: int = 100
  kid_subset_size: int = 1000
  seed: int = 0
  neighbours: int = 3
  label_sampling: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Reference:
  """Statistics of a reference set.

  Attributes:
    moments: kind of features → (mean, covariance, number of images or None
      where it is not known).
    rows: kind → float32 (N, D), if there are images.
    protocol: what it is, JSON values.
    count: images that were read here, 0 for statistics of a file.
    bad: how many could not be read.
    notes: what a reader of distances to it must know.
  """

  moments: Mapping[str, tuple[np.ndarray, np.ndarray, int | None]]
  rows: Mapping[str, np.ndarray]
  protocol: Mapping[str, Any]
  count: int = 0
  bad: int = 0
  notes: tuple[str, ...] = ()


def feature_pass(
  images: ImageSet,
  networks: Networks,
  settings: Settings,
  mesh: Mesh,
  *,
  label: str,
  rows: Sequence[str] = (),
  score: bool = False,
) -> passes.Result:
  """Features of a set's own images."""
  extractor = networks.extractor(mesh)
  work = passes.Pass(
    label,
    images,
    lambda image, index: (extractor(image), {}),
    {"networks": networks.identity()},
    moments=networks.moments,
    rows=rows,
    score=score,
  )
  return run(work, settings, mesh)


def run(work: passes.Pass, settings: Settings, mesh: Mesh) -> passes.Result:
  """`passes.run` with an evaluation's settings, under its mesh."""
  with jax.set_mesh(mesh):
    return passes.run(
      work,
      settings.folder,
      mesh,
      batch_size=settings.batch_size,
      save_every=settings.save_every,
    )


def of_images(
  images: ImageSet,
  networks: Networks,
  settings: Settings,
  mesh: Mesh,
  *,
  rows: Sequence[str] = (),
) -> Reference:
  """Statistics of images that are at hand.

  Raises:
    ValueError: fewer than two of them can be read.
  """
  result = feature_pass(
    images,
    networks,
    settings,
    mesh,
    label=f"reference {images.name}",
    rows=rows,
  )
  check_count(result.count, f"the reference {images.name}")
  return Reference(
    {
      kind: moments_of(moments)
      for kind, moments in result.statistics.moments.items()
    },
    result.rows,
    {**images.describe(), "count": result.count},
    result.count,
    len(result.bad),
  )


def of_file(file: ReferenceFile, networks: Networks, size: int) -> Reference:
  """Statistics of an .npz, of the features that the networks give.

  Raises:
    ValueError: they are of features of another width, or the file says that
      they were made with other weights or another resize.
  """
  widths = {}
  for network in networks.features:
    widths |= network.widths(size)
  wanted = {
    kind: file.statistics[kind] for kind in file.statistics if kind in widths
  }
  for kind, (mean, _) in wanted.items():
    if len(mean) != widths[kind]:
      raise ValueError(
        f"{file.path} has statistics of {len(mean)} {kind} features, the "
        f"network that was given makes {widths[kind]}: they are of another "
        "network or layer and do not compare"
      )
  for network in networks.features:
    _check_made_with(file, network)
  stated = file.protocol or "not stated in the file"
  return Reference(
    {
      kind: (mean, covariance, file.count)
      for kind, (mean, covariance) in wanted.items()
    },
    {},
    {
      "data": str(file.path),
      "count": file.count or "not stated",
      "made": stated,
    },
    notes=tuple(_doubts(file, networks, size)),
  )


def _check_made_with(file: ReferenceFile, network: FeatureNetwork) -> None:
  """Compares what the file says of its network with the one that was given."""
  recorded = file.protocol.get("networks")
  recorded = recorded.get(network.name) if _is_dict(recorded) else None
  if not _is_dict(recorded):
    return
  for key, value in network.identity.items():
    if key in recorded and recorded[key] != value:
      raise ValueError(
        f"{file.path} was made with {key.replace('_', ' ')} "
        f"{recorded[key]!r}, this evaluation has {value!r}: figures of both do "
        "not compare; give the same network and resize, or write the reference "
        "anew with --write_reference"
      )


def _doubts(file: ReferenceFile, networks: Networks, size: int) -> list[str]:
  """What may keep figures from comparing, and is no mistake for certain."""
  found = []
  made = file.protocol.get("size")
  if made not in (None, size):
    found.append(
      f"the reference's images had {made} pixels a side, the evaluated ones "
      f"have {size}"
    )
  if networks.inception is not None and "networks" not in file.protocol:
    resize = networks.inception.protocol.get("inception_resize", "tf1")
    if resize != "tf1":
      found.append(
        "the reference does not say how its images were resized; ADM's were "
        f"resized as --inception_resize=tf1, here it is {resize}"
      )
  return found


def _is_dict(value: Any) -> bool:
  return isinstance(value, Mapping)


def moments_of(
  moments: FeatureMoments,
) -> tuple[np.ndarray, np.ndarray, int]:
  """(mean, covariance, count)."""
  return moments.mean, moments.covariance, moments.count


def lacks(kind: str) -> str:
  """Why a figure is left out."""
  return f"the reference has no statistics of {kind} features"


def check_count(count: int, what: str) -> None:
  """Raises ValueError where there are too few images for any distance."""
  if count < 2:
    raise ValueError(
      f"{what} has {count} readable image: distances between sets need two or "
      "more, and say little below some thousands"
    )
