"""CLIP score: how well images and their captions agree.

The score of a pair is 100 · max(cos, 0) between CLIP's embeddings of image and
caption (Hessel et al., arXiv 2104.08718, whose own figure has a factor of 2.5
in place of 100), and that of a set is the mean. torchmetrics cuts off at zero
after the mean; both are computed, and they are equal unless a pair points
away from each other.

A score is only comparable under the same CLIP: say which with it.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from psvae_jax.pretrained.clip import Clip

# Also the number of compiled programs' rows: the last batch is filled up.
BATCH_SIZE = 64


class ClipScore:
  """Mean score over a stream of pairs.

  Sums are float64: neither batch size nor order changes the score beyond
  rounding.
  """

  def __init__(self) -> None:
    self.count = 0
    self._cut = 0.0  # Σ max(cos, 0)
    self._plain = 0.0  # Σ cos

  def update(self, image_embeds: Any, text_embeds: Any) -> "ClipScore":
    """Adds pairs; returns itself.

    Args:
      image_embeds: (B, P) of unit length.
      text_embeds: (B, P) of unit length, row by row of the same pairs.

    Raises:
      ValueError: other shapes, or embeddings that are not finite.
    """
    images, texts = jax.device_get((image_embeds, text_embeds))
    if images.ndim != 2 or images.shape != texts.shape:
      raise ValueError(
        "images and captions come in pairs, (B, P) each; got embeddings of "
        f"{images.shape} and {texts.shape}"
      )
    cosines = np.sum(images.astype(np.float64) * texts, axis=1)
    if not np.isfinite(cosines).all():
      raise ValueError("CLIP embeddings hold NaN or infinity")
    self.count += len(cosines)
    self._cut += float(np.maximum(cosines, 0).sum())
    self._plain += float(cosines.sum())
    return self

  def merge(self, other: "ClipScore") -> None:
    """Adds everything that `other` has seen; `other` is not changed."""
    self.count += other.count
    self._cut += other._cut
    self._plain += other._plain

  def over_hosts(self) -> "ClipScore":
    """The pairs of all hosts; all of them must call it."""
    if jax.process_count() == 1:
      return self
    from jax.experimental import multihost_utils

    # As bytes: a collective would cut float64 down to float32.
    packed = np.array([self.count, self._cut, self._plain]).view(np.uint8)
    total = ClipScore()
    for row in np.asarray(multihost_utils.process_allgather(packed)):
      count, cut, plain = row.view(np.float64)
      total.count += int(count)
      total._cut += float(cut)
      total._plain += float(plain)
    return total

  @property
  def score(self) -> float:
    """Mean of 100 · max(cos, 0), in [0, 100]."""
    return 100 * self._cut / self._pairs()

  @property
  def torchmetrics_score(self) -> float:
    """max(mean of 100 · cos, 0), as torchmetrics has it."""
    return max(0.0, 100 * self._plain / self._pairs())

  def _pairs(self) -> int:
    if not self.count:
      raise ValueError(
        "no pair was added to the CLIP score; is the evaluation split empty?"
      )
    return self.count


def clip_score(
  clip: Clip,
  images: np.ndarray | Sequence[np.ndarray],
  texts: Sequence[str],
  batch_size: int = BATCH_SIZE,
) -> float:
  """Mean of 100 · max(cos, 0) over pairs of images and captions.

  Args:
    clip: whose embeddings.
    images: (N, H, W, 3) uint8 of any size, or N arrays (H, W, 3).
    texts: N captions.
    batch_size: pairs at once.

  Returns:
    The score, in [0, 100].

  Raises:
    ValueError: no pairs, unequal numbers, or bad images or captions.
  """
  if len(images) != len(texts):
    raise ValueError(
      f"{len(images)} images and {len(texts)} captions are no pairs"
    )
  if batch_size < 1:
    raise ValueError(f"batch_size must be at least 1, got {batch_size}")
  score = ClipScore()
  for start in range(0, len(texts), batch_size):
    part = slice(start, start + batch_size)
    count = len(texts[part])
    # The last batch repeats its last pair: it compiles nothing of its own.
    fill = min(batch_size, len(texts)) - count
    filled = [*images[part], *[images[-1]] * fill]
    captions = [*texts[part], *[texts[-1]] * fill]
    embeds = clip.image_embeds(filled)[:count]
    score.update(embeds, clip.text_embeds(captions)[:count])
  return score.score
