"""What a stage trains on, as the pipeline takes it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from psvae_jax.config import Config
from psvae_jax.data import pipeline, sources, transforms


@dataclasses.dataclass(frozen=True)
class TrainData:
  """Sources of a stage's batches.

  Attributes:
    parts: one source of flat batches, or named ones of batches with parts.
    tokenize: captions → tokens and mask; None leaves text out.
  """

  parts: pipeline.Part | Mapping[str, pipeline.Part]
  tokenize: pipeline.Tokenize | None = None


def quarantine_file(workdir: Path) -> Path:
  """Where the records that cannot be read are named."""
  return Path(workdir) / "quarantine.jsonl"


def image_part(
  config: Config,
  batch_size: int,
  image_size: int,
  workdir: Path,
  transform: transforms.Transform | None = None,
) -> pipeline.Part:
  """Images of the job's training split, augmented as the config says."""
  data = config.data
  source = sources.make_source(
    data, "train", image_size, quarantine_file(workdir)
  )
  return pipeline.Part(
    source, batch_size, image_size, data.augment, data.min_scale, transform
  )
