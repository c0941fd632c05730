"""What figures need of a set of images, added up batch by batch.

Sums are float64 on the host. They do not depend on how images were cut into
batches or over hosts beyond float64 rounding (≤ 1e-12 of a figure), and what
was saved goes on bit by bit. Memory does not grow with the number of images.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from psvae_jax.evaluators.frechet import FeatureMoments
from psvae_jax.evaluators.image_metrics import MeanAccumulator
from psvae_jax.evaluators.inception_score import InceptionScore

LOGITS = "logits"


class FeatureStatistics:
  """Moments of features, sums for the inception score, means of figures.

  Args:
    moments: kinds of features to take moments of, e.g. "pool", "spatial".
    score: of the images to come; None without.

  Attributes:
    count: images so far.
    moments: kind of features → their moments.
    means: figures that every image has one of.
    score: as given.
  """

  def __init__(
    self, moments: Sequence[str] = (), score: InceptionScore | None = None
  ) -> None:
    self.count = 0
    self.moments = {name: FeatureMoments() for name in moments}
    self.means = MeanAccumulator()
    self.score = score

  def update(
    self,
    features: Mapping[str, Any],
    figures: Mapping[str, Any],
    index: Any,
    mask: Any | None = None,
  ) -> None:
    """Adds one batch.

    Args:
      features: kind → (B, D), all of `moments` and "logits" for the score;
        others are not looked at.
      figures: name → (B,).
      index: (B,) number of each image, for the score.
      mask: (B,), False for rows that are padding; None counts all.

    Raises:
      ValueError: a shape that is not as above or as before.
    """
    features, figures, index, mask = jax.device_get(
      (dict(features), dict(figures), index, mask)
    )
    index = np.asarray(index)
    keep = np.ones(len(index), bool) if mask is None else np.asarray(mask, bool)
    if not keep.any():
      return
    for name, moments in self.moments.items():
      moments.update(np.asarray(features[name])[keep])
    if self.score is not None:
      self.score.update(np.asarray(features[LOGITS])[keep], index[keep])
    if figures:
      self.means.update(figures, keep)
    self.count += int(keep.sum())

  def merge(self, other: "FeatureStatistics") -> None:
    """Adds what another host, or another part, has seen."""
    if set(self.moments) != set(other.moments) or (self.score is None) != (
      other.score is None
    ):
      raise ValueError(
        f"cannot merge statistics of {sorted(self.moments)} and "
        f"{sorted(other.moments)}, with and without an inception score"
      )
    self.count += other.count
    for name, moments in self.moments.items():
      moments.merge(other.moments[name])
    self.means.merge(other.means)
    if self.score is not None:
      self.score.merge(other.score)

  def over_hosts(self) -> "FeatureStatistics":
    """The statistics of all hosts' images, the same on each.

    All of them must call it, with sums of the same kinds; this object is not
    changed.
    """
    if jax.process_count() == 1:
      return self
    total = self._empty()
    for packed in _gather(_pack(self.to_arrays())):
      with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        other = self._empty()
        other.restore(dict(arrays))
      total.merge(other)
    return total

  def _empty(self) -> "FeatureStatistics":
    score = None if self.score is None else self.score.empty()
    return FeatureStatistics(tuple(self.moments), score)

  def to_arrays(self) -> dict[str, np.ndarray]:
    """Everything, bit by bit, as arrays for an .npz."""
    arrays = {"count": np.int64(self.count)}
    for kind, moments in self.moments.items():
      for name, array in moments.to_arrays().items():
        arrays[f"moments/{kind}/{name}"] = array
    for name, (total, count) in self.means.totals().items():
      arrays[f"means/{name}"] = np.array([total, count], np.float64)
    if self.score is not None:
      for name, array in self.score.to_arrays().items():
        arrays[f"score/{name}"] = array
    return arrays

  def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Takes over what `to_arrays` gave, of the same images.

    Raises:
      KeyError: it lacks something.
    """
    for kind in self.moments:
      self.moments[kind] = FeatureMoments.from_arrays(
        _inside(arrays, f"moments/{kind}/")
      )
    totals = _inside(arrays, "means/")
    self.means = MeanAccumulator.from_totals(
      {name: (float(t), int(c)) for name, (t, c) in totals.items()}
    )
    if self.score is not None:
      self.score.restore(_inside(arrays, "score/"))
    self.count = int(arrays["count"])


def _pack(arrays: Mapping[str, np.ndarray]) -> bytes:
  file = io.BytesIO()
  np.savez(file, **arrays)
  return file.getvalue()


def _gather(data: bytes) -> list[bytes]:
  """What each host gives, in their order.

  As bytes: a collective would round float64 down to float32.
  """
  from jax.experimental import multihost_utils

  own = np.frombuffer(data, np.uint8)
  # An int64 would be cut to int32; a host's sums are below 2 GiB.
  sizes = multihost_utils.process_allgather(np.int32(len(own)))
  padded = np.zeros(int(np.max(sizes)), np.uint8)
  padded[: len(own)] = own
  everyone = np.asarray(multihost_utils.process_allgather(padded))
  return [
    row[:size].tobytes() for row, size in zip(everyone, sizes, strict=True)
  ]


def _inside(
  arrays: Mapping[str, np.ndarray], prefix: str
) -> dict[str, np.ndarray]:
  return {
    name.removeprefix(prefix): array
    for name, array in arrays.items()
    if name.startswith(prefix)
  }
