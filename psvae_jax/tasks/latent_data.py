"""A generator's data: examples as latents and text, cached or not.

"t2i" examples are captioned images, "edit" examples are an image, an
instruction and its result. Both are read from a cache of latents and text
features, or as images and tokens that the training step encodes. The order is
the same, and so are the examples.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from psvae_jax import cache, latent_stats
from psvae_jax.config import Config
from psvae_jax.data import pipeline, sources
from psvae_jax.data.cached import CachedSource
from psvae_jax.data.views import EditExamples, ViewedSource
from psvae_jax.latent_stats import LatentStats
from psvae_jax.pretrained.text import TextEncoder
from psvae_jax.psvae import PSVAE
from psvae_jax.tasks.data import quarantine_file

STATS_FILE = "latent_stats.json"


class LatentData:
  """The examples of one generator job.

  Args:
    config: the job.
    workdir: folder of the experiment.
    autoencoder: what the latents are of.
    text_encoder: encodes text; None for classes.
    encode: uint8 (B, S, S, 3) → μ (B, h, w, C), B being `eval.batch_size`.
  """

  def __init__(
    self,
    config: Config,
    workdir: Path,
    autoencoder: PSVAE,
    text_encoder: TextEncoder | None,
    encode: cache.EncodeImages,
  ) -> None:
    self._config = config
    self._workdir = Path(workdir)
    self._autoencoder = autoencoder
    self._text_encoder = text_encoder
    self._encode = encode
    self._cached: dict[str, CachedSource] = {}

  @property
  def tokenize(self) -> pipeline.Tokenize | None:
    return self._text_encoder and self._text_encoder.tokenizer

  def examples(self, part: str, split: str) -> pipeline.Source:
    """Images with captions, or edits, of one split."""
    settings = (
      self._config.data,
      split,
      self._autoencoder.output_size,
      quarantine_file(self._workdir),
    )
    if part == "edit":
      return EditExamples(sources.make_edit_source(*settings))
    return sources.make_source(*settings)

  def part(self, part: str, batch_size: int) -> pipeline.Part:
    """The training examples of one part of a batch."""
    if self._config.cache.enabled:
      return pipeline.Part(self._cached_source(part), batch_size)
    data = self._config.data
    return pipeline.Part(
      self.examples(part, "train"),
      batch_size,
      self._autoencoder.output_size,
      data.augment,
      data.min_scale,
    )

  def held_out(self, part: str, count: int) -> Iterator[pipeline.Batch]:
    """This host's parts of the first `count` validation examples.

    As the training step takes them before they are encoded, with "mask".
    """
    source = self.examples(part, "validation")
    source = ViewedSource(
      source,
      image_size=self._autoencoder.output_size,
      augment="none" if self._config.data.augment == "none" else "center",
      num_examples=min(count, len(source)),
    )
    size, hosts = self._config.eval.batch_size, jax.process_count()
    share = size // hosts
    for start in range(0, len(source), size):
      first = start + jax.process_index() * share
      places = np.arange(first, first + share)
      rows = [source[min(place, len(source) - 1)] for place in places]
      batch = {
        name: np.stack([row[name] for row in rows])
        for name, value in rows[0].items()
        if not isinstance(value, str)
      }
      # Another record takes a bad one's place, as the last one does a missing.
      batch["mask"] = batch["index"] == places
      if self.tokenize is not None:
        batch["tokens"], batch["token_mask"] = self.tokenize(
          [row["caption"] for row in rows]
        )
      yield batch

  def prepare(self, parts: Sequence[str]) -> LatentStats:
    """Writes the caches that are missing; returns the latents' statistics.

    Raises:
      ValueError: the workdir's statistics are of another autoencoder, or a
        cache is of something else.
      OSError: the disk is full; the same command goes on from there.
    """
    path = self._workdir / STATS_FILE
    known = None
    if path.is_file():
      known = LatentStats.load(path, self._autoencoder.latent_fingerprint)
    if self._config.cache.enabled:
      for part in parts:
        self._cached_source(part)
    if known is not None:
      self._check_stats(known, path)
      return known
    stats = self._measure_stats()
    if jax.process_index() == 0:
      stats.save(path)
    _barrier("latent_stats")
    return stats

  def _check_stats(self, known: LatentStats, path: Path) -> None:
    """A stage keeps the statistics it began with; of other data is an error.

    The stages after `t2i` see its latents as it did, whatever their own data.
    """
    if self._config.stages[0] != "t2i":
      return
    wanted = self._viewed("t2i", augmented=False).description
    if known.data and known.data != wanted:
      raise ValueError(
        f"{path} has the latents' statistics of other training data "
        f"({known.data}) than the config's ({wanted}); take another workdir, "
        "or delete the file, and with it what was trained on it"
      )

  def _measure_stats(self) -> LatentStats:
    """Of the training images, as they are without augmentation."""
    count = self._config.cache.num_stats
    plain = self._viewed("t2i", augmented=False)
    if "t2i" in self._cached:  # its first records are the plain views
      return latent_stats.measure(
        self._cached["t2i"],
        fingerprint=self._autoencoder.latent_fingerprint,
        count=min(count or plain.num_examples, plain.num_examples),
        data=plain.description,
      )
    return cache.measure_stats(
      plain,
      self._encoders(),
      dtype=self._config.cache.dtype,
      count=count,
      batch_size=self._config.eval.batch_size,
      **self._reading(),
    )

  def _cached_source(self, part: str) -> CachedSource:
    if part not in self._cached:
      config = self._config.cache
      root = Path(config.root or self._workdir / "cache") / part
      self._cached[part] = cache.write_cache(
        root,
        self._viewed(part),
        self._encoders(),
        dtype=config.dtype,
        shard_size=config.shard_size,
        batch_size=self._config.eval.batch_size,
        barrier=lambda: _barrier(f"cache {part}"),
        **self._reading(),
      )
    return self._cached[part]

  def _viewed(self, part: str, augmented: bool = True) -> ViewedSource:
    """The training examples that are cached."""
    data, config = self._config.data, self._config.cache
    examples = self.examples(part, "train")
    augment = data.augment
    if not augmented and augment != "none":
      augment = "center"
    return ViewedSource(
      examples,
      image_size=self._autoencoder.output_size,
      augment=augment,
      min_scale=data.min_scale,
      seed=data.seed,
      views=config.views if augmented else 1,
      num_examples=min(config.num_examples or len(examples), len(examples)),
    )

  def _reading(self) -> dict[str, int]:
    return dict(
      num_threads=self._config.data.num_threads,
      prefetch=self._config.data.prefetch,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )

  def _encoders(self) -> cache.Encoders:
    """What turns examples into records."""
    encoders = cache.Encoders(
      self._encode, self._autoencoder.latent_fingerprint
    )
    text = self._text_encoder
    if text is None:
      return encoders
    keep_features = self._config.cache.text

    def encode_text(captions: Sequence[str]) -> tuple[Any, Any, Any]:
      tokens, mask = text.tokenize(captions)
      features = text(captions)[0] if keep_features else None
      return tokens, mask, features

    return dataclasses.replace(
      encoders,
      text=encode_text,
      tokenizer=text.tokenizer.fingerprint,
      text_length=text.max_length,
      text_encoder=text.fingerprint if keep_features else "",
    )


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)
