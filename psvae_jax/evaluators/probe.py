"""Linear probe: how much of a scene can be read linearly off an encoder.

Features are patch tokens averaged over positions. Targets are families of
yes-or-no labels ("is a red circle present?"): family name → multi-hot (N, K).
One ridge regression with a free intercept predicts every label; a score above
the label's threshold means yes.

The figure of a label is its balanced accuracy, (true positive rate + true
negative rate) / 2, since most labels are rare and always saying no would be
right most of the time. Whatever ignores the image scores 0.5 in expectation, a
constant answer scores 0.5 exactly: that is the floor (`chance_accuracy`). A
family's figure is the mean over its labels, "accuracy" the mean over families.

Every model goes through the same rules, and none of them is random:
  * features are standardised by the training half's mean and deviation, so that
    the scale of a feature space neither helps nor hurts;
  * the ridge weight comes from `L2_GRID` by balanced accuracy on every tenth
    training example, fitted on the others; the probe is then fitted on all;
  * a threshold is the midpoint between the mean scores of a label's positive
    and negative training examples, each scored by a fit without it (the closed
    form of leave-one-out). Scores of the fit itself are too far apart when
    features outnumber examples, which misplaces the threshold of rare labels.

All arithmetic is float64 on the host.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Targets = Mapping[str, np.ndarray]

# From strong to weak: of equally good weights the strongest is taken. In units
# of a standardised feature's variance.
L2_GRID = (1e1, 1e0, 1e-1, 1e-2, 1e-3, 1e-4)
_HOLDOUT_EVERY = 10


class LinearProbe(NamedTuple):
  """A fitted probe: label k is read as present where score > threshold.

  Attributes:
    weights: (D, K), for features as they are (not standardised).
    bias: (K,).
    thresholds: (K,); infinite where training had no positive or no negative.
  """

  weights: np.ndarray
  bias: np.ndarray
  thresholds: np.ndarray

  def scores(self, features: np.ndarray) -> np.ndarray:
    """(N, D) → (N, K)."""
    return np.asarray(features, np.float64) @ self.weights + self.bias

  def predict(self, features: np.ndarray) -> np.ndarray:
    """(N, D) → bool (N, K)."""
    return self.scores(features) > self.thresholds


class ProbeExamples:
  """Collects the features and targets of unmasked examples over batches."""

  def __init__(self) -> None:
    self._features: list[np.ndarray] = []
    self._targets: list[dict[str, np.ndarray]] = []

  def update(
    self,
    features: Any,
    targets: Mapping[str, Any],
    mask: Any | None = None,
  ) -> None:
    """Adds one batch.

    Args:
      features: (B, D), e.g. from `mean_pool`.
      targets: family → (B, K) multi-hot.
      mask: (B,), true for real examples; None if all are.
    """
    features, targets, mask = jax.device_get((features, dict(targets), mask))
    keep = slice(None) if mask is None else np.asarray(mask).astype(bool)
    self._features.append(np.asarray(features, np.float32)[keep])
    self._targets.append({k: np.asarray(v)[keep] for k, v in targets.items()})

  def result(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Features (N, D) and targets (N, K) of all examples, in order.

    Raises:
      ValueError: if nothing was added.
    """
    if not self._features:
      raise ValueError("no batch was added; is the evaluation split empty?")
    families = self._targets[0]
    return np.concatenate(self._features), {
      family: np.concatenate([batch[family] for batch in self._targets])
      for family in families
    }


def mean_pool(tokens: jax.Array) -> jax.Array:
  """Mean over positions: tokens (B, h, w, D) or (B, N, D) → float32 (B, D)."""
  positions = tuple(range(1, tokens.ndim - 1))
  return jnp.mean(tokens.astype(jnp.float32), axis=positions)


def fit_ridge(
  features: np.ndarray, targets: np.ndarray, l2: float
) -> LinearProbe:
  """Ridge regression of all labels at once, in closed form.

  Minimises mean over examples of ‖x·w + b − y‖² plus l2·‖w‖², where x is the
  standardised feature; b is not penalised.

  Args:
    features: (N, D).
    targets: (N, K) multi-hot.
    l2: ridge weight, > 0.

  Returns:
    The probe, with thresholds.

  Raises:
    ValueError: if a shape or value does not fit.
  """
  return _solve(_decompose(features), _multi_hot(targets, "targets"), l2)


def probe_accuracy(
  train_features: np.ndarray,
  train_targets: Targets,
  test_features: np.ndarray,
  test_targets: Targets,
  l2: float | None = None,
) -> dict[str, float]:
  """Fits the probe on the training half and scores it on the test half.

  Labels that the test half never or always shows have no balanced accuracy and
  are left out; so is a family of which no label remains.

  Args:
    train_features: (N, D).
    train_targets: family → (N, K) multi-hot.
    test_features: (M, D).
    test_targets: the same families, (M, K).
    l2: ridge weight; None chooses one from `L2_GRID`.

  Returns:
    {"accuracy": mean over families, "accuracy_<family>": …, "l2": the ridge
    weight}; accuracies in [0, 1], chance at 0.5.

  Raises:
    ValueError: if shapes, families or values do not fit, or if no label of the
      test half can be scored.
  """
  train, sizes = _concatenate(train_targets, len(train_features), "train")
  test, test_sizes = _concatenate(test_targets, len(test_features), "test")
  if sizes != test_sizes:
    raise ValueError(
      "train and test targets differ in families or labels: "
      f"{sizes} against {test_sizes}"
    )
  if np.shape(train_features)[1:] != np.shape(test_features)[1:]:
    raise ValueError(
      "train and test features differ in width: "
      f"{np.shape(train_features)} against {np.shape(test_features)}"
    )
  if l2 is None:
    l2 = _choose_l2(np.asarray(train_features), train, sizes)
  probe = _solve(_decompose(train_features), train, l2)
  families = _family_accuracies(probe.predict(test_features), test, sizes)
  if not families:
    raise ValueError(
      f"none of the labels {sizes} is both present in some and absent from "
      f"other examples of the {len(test)} of the test half; use more of them"
    )
  result = {"accuracy": float(np.mean(list(families.values())))}
  result |= {f"accuracy_{family}": v for family, v in families.items()}
  return result | {"l2": l2}


def chance_accuracy(
  train_targets: Targets, test_targets: Targets
) -> dict[str, float]:
  """The floor: the same probe on features that are the same for every image.

  Returns:
    As `probe_accuracy`; each accuracy is 0.5.
  """
  halves = [
    np.zeros((len(next(iter(targets.values()))), 1))
    for targets in (train_targets, test_targets)
  ]
  return probe_accuracy(halves[0], train_targets, halves[1], test_targets)


class _Decomposition(NamedTuple):
  """Standardised features in the eigenbasis of their covariance.

  Attributes:
    mean: (D,).
    scale: (D,), reciprocal standard deviation; 0 for constant features.
    rotated: (N, D), standardised features times `basis`.
    basis: (D, D), eigenvectors in columns.
    eigenvalues: (D,), ≥ 0.
  """

  mean: np.ndarray
  scale: np.ndarray
  rotated: np.ndarray
  basis: np.ndarray
  eigenvalues: np.ndarray


def _decompose(features: np.ndarray) -> _Decomposition:
  features = np.asarray(features, np.float64)
  if features.ndim != 2 or len(features) < 2:
    raise ValueError(
      "a probe needs features of shape (N, D) with at least two examples, "
      f"got {features.shape}"
    )
  if not np.isfinite(features).all():
    raise ValueError("features hold NaN or infinity; did training diverge?")
  mean, std = features.mean(0), features.std(0)
  # Below float32 resolution a deviation is rounding noise, not a feature.
  alive = std > 1e-7 * np.abs(features).max(0)
  scale = np.where(alive, 1.0 / np.where(alive, std, 1.0), 0.0)
  standard = (features - mean) * scale
  covariance = standard.T @ standard / len(standard)
  eigenvalues, basis = np.linalg.eigh(covariance)
  return _Decomposition(
    mean, scale, standard @ basis, basis, np.maximum(eigenvalues, 0.0)
  )


def _solve(
  features: _Decomposition, targets: np.ndarray, l2: float
) -> LinearProbe:
  """The ridge solution, and thresholds from leave-one-out scores."""
  rotated = features.rotated
  count = len(rotated)
  if len(targets) != count:
    raise ValueError(f"{count} examples of features, {len(targets)} of targets")
  if not l2 > 0:
    raise ValueError(f"l2 must be positive, got {l2}")
  intercept = targets.mean(0)
  shrink = 1.0 / (features.eigenvalues + l2)
  coefficients = shrink[:, None] * (rotated.T @ (targets - intercept) / count)
  weights = features.scale[:, None] * (features.basis @ coefficients)

  # Leave-one-out: ŷ₋ᵢ = (ŷᵢ − hᵢ yᵢ) / (1 − hᵢ), h the diagonal of the hat
  # matrix, the intercept's 1/N included.
  fitted = rotated @ coefficients + intercept
  leverage = ((rotated**2 @ shrink + 1.0) / count)[:, None]
  left_out = (fitted - leverage * targets) / np.maximum(1.0 - leverage, 1e-12)
  positives = targets.sum(0)
  negatives = count - positives
  usable = (positives > 0) & (negatives > 0)
  midpoint = 0.5 * (
    (left_out * targets).sum(0) / np.maximum(positives, 1)
    + (left_out * (1.0 - targets)).sum(0) / np.maximum(negatives, 1)
  )
  return LinearProbe(
    weights=weights,
    bias=intercept - features.mean @ weights,
    thresholds=np.where(usable, midpoint, np.inf),
  )


def _choose_l2(
  features: np.ndarray, targets: np.ndarray, sizes: Mapping[str, int]
) -> float:
  """The weight of `L2_GRID` that does best on every tenth example."""
  held_out = np.arange(len(features)) % _HOLDOUT_EVERY == 0
  if (~held_out).sum() < 2:
    raise ValueError(
      f"{len(features)} training examples are too few to choose l2; use more "
      "of them, or pass l2"
    )
  decomposition = _decompose(features[~held_out])
  best_l2, best = L2_GRID[0], -np.inf
  for l2 in L2_GRID:
    probe = _solve(decomposition, targets[~held_out], l2)
    predictions = probe.predict(features[held_out])
    families = _family_accuracies(predictions, targets[held_out], sizes)
    accuracy = np.mean(list(families.values())) if families else -np.inf
    if accuracy > best:
      best_l2, best = l2, accuracy
  return best_l2


def _family_accuracies(
  predictions: np.ndarray, targets: np.ndarray, sizes: Mapping[str, int]
) -> dict[str, float]:
  """Mean balanced accuracy of each family that has a label to score.

  Args:
    predictions: bool (N, ΣK).
    targets: 0 or 1, (N, ΣK).
    sizes: family → K, in the order of the columns.
  """
  positives = targets.sum(0)
  negatives = len(targets) - positives
  hits = (predictions * targets).sum(0) / np.maximum(positives, 1)
  rejections = (~predictions * (1.0 - targets)).sum(0)
  rejections = rejections / np.maximum(negatives, 1)
  balanced = 0.5 * (hits + rejections)
  scorable = (positives > 0) & (negatives > 0)
  result, start = {}, 0
  for family, size in sizes.items():
    columns = slice(start, start + size)
    start += size
    if scorable[columns].any():
      result[family] = float(balanced[columns][scorable[columns]].mean())
  return result


def _concatenate(
  targets: Targets, count: int, half: str
) -> tuple[np.ndarray, dict[str, int]]:
  """All families side by side, by name: (N, ΣK), and family → K."""
  if not targets:
    raise ValueError(f"the {half} targets name no family")
  arrays = {
    family: _multi_hot(targets[family], f"{half} targets {family!r}")
    for family in sorted(targets)
  }
  for family, array in arrays.items():
    if len(array) != count:
      raise ValueError(
        f"{half} targets {family!r} have {len(array)} examples, the features "
        f"{count}"
      )
  sizes = {family: array.shape[1] for family, array in arrays.items()}
  return np.concatenate(list(arrays.values()), axis=1), sizes


def _multi_hot(targets: np.ndarray, name: str) -> np.ndarray:
  """Checks that `targets` is (N, K) of zeros and ones; returns float64."""
  targets = np.asarray(targets, np.float64)
  if targets.ndim != 2 or not np.isin(targets, (0.0, 1.0)).all():
    raise ValueError(
      f"{name} must be an (N, K) array of zeros and ones, got shape "
      f"{targets.shape}"
    )
  return targets
