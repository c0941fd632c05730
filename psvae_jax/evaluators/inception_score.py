"""Inception score: how sure and how varied a classifier finds images.

Salimans et al. (2016): exp(E KL(p(y | x) ‖ p(y))) over each of several splits
of the images, and the mean and standard deviation over splits. Probabilities
are the softmax of the FID network's logits, without its bias, over all 1008
places: so do OpenAI's evaluator and torch-fidelity.

OpenAI's evaluator cuts images into splits in the order they come in, which
must then be a random one; torch-fidelity permutes them first. With a seed,
the permutation here is torch-fidelity's.
"""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

SPLITS = 10
SHUFFLE_SEED = 2020  # torch-fidelity's


class InceptionScore:
  """Sums of probabilities and their logarithms, a split at a time.

  Which split an image is in follows from its number, so batches may come in
  any order and from several hosts.

  Args:
    count: images that there will be.
    splits: into how many parts they are cut, as equal as they can be.
    seed: of the permutation; None takes images as they are numbered.

  Raises:
    ValueError: fewer images than splits.
  """

  def __init__(
    self, count: int, splits: int = SPLITS, seed: int | None = SHUFFLE_SEED
  ) -> None:
    if not 1 <= splits <= count:
      raise ValueError(
        f"an inception score over {splits} splits needs as many images or "
        f"more, got {count}"
      )
    order = np.arange(count)
    if seed is not None:
      order = np.random.RandomState(seed).permutation(count)
    starts = np.arange(splits) * count // splits
    places = np.searchsorted(starts, np.arange(count), side="right") - 1
    self._split = np.empty(count, np.int32)
    self._split[order] = places
    self._counts = np.zeros(splits, np.int64)
    self._negative_entropy = np.zeros(splits)  # Σ p log p
    self._probabilities: np.ndarray | None = None  # Σ p, (splits, classes)

  def update(self, logits: Any, index: Any) -> None:
    """Adds logits (B, classes) of the images numbered `index` (B,)."""
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or len(logits) != len(index):
      raise ValueError(
        f"logits must be (B, classes) with B numbers, got {logits.shape} and "
        f"{np.shape(index)}"
      )
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    if self._probabilities is None:
      self._probabilities = np.zeros((len(self._counts), logits.shape[1]))
    split = self._split[np.asarray(index)]
    np.add.at(self._counts, split, 1)
    np.add.at(self._negative_entropy, split, np.sum(p * log_p, axis=1))
    np.add.at(self._probabilities, split, p)

  def merge(self, other: "InceptionScore") -> None:
    """Adds what another host has seen of the same images."""
    if not np.array_equal(self._split, other._split):
      raise ValueError("these inception scores are of different images")
    self._counts += other._counts
    self._negative_entropy += other._negative_entropy
    if other._probabilities is not None:
      own = self._probabilities
      found = other._probabilities
      self._probabilities = found.copy() if own is None else own + found

  def result(self) -> tuple[float, float]:
    """Mean and standard deviation (of the population) over splits.

    Raises:
      ValueError: a split has no image.
    """
    if not self._counts.all():
      raise ValueError(
        f"{int((self._counts == 0).sum())} of {len(self._counts)} splits of "
        "the inception score have no image; are most images unreadable?"
      )
    counts = self._counts[:, None]
    mean = self._probabilities / counts
    # A class that never has any probability adds nothing: 0 · log 0 = 0.
    log_mean = np.log(np.where(mean > 0, mean, 1.0))
    divergence = self._negative_entropy / self._counts - np.sum(
      mean * log_mean, axis=1
    )
    scores = np.exp(divergence)
    return float(scores.mean()), float(scores.std())

  def empty(self) -> "InceptionScore":
    """The same splits of the same images, with nothing added."""
    score = copy.copy(self)
    score._counts = np.zeros_like(self._counts)
    score._negative_entropy = np.zeros_like(self._negative_entropy)
    score._probabilities = None
    return score

  def to_arrays(self) -> dict[str, np.ndarray]:
    """The sums, as arrays for an .npz."""
    arrays = {"counts": self._counts, "entropy": self._negative_entropy}
    if self._probabilities is not None:
      arrays["probabilities"] = self._probabilities
    return arrays

  def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Takes over what `to_arrays` gave, of the same images."""
    self._counts = np.array(arrays["counts"], np.int64)
    self._negative_entropy = np.array(arrays["entropy"], np.float64)
    found = arrays.get("probabilities")
    self._probabilities = None if found is None else np.array(found)


def inception_score(
  logits: Any, splits: int = SPLITS, seed: int | None = SHUFFLE_SEED
) -> tuple[float, float]:
  """Mean and standard deviation for logits (N, classes) of all images."""
  score = InceptionScore(len(logits), splits, seed)
  score.update(logits, np.arange(len(logits)))
  return score.result()
