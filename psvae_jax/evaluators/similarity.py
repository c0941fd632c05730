"""Whether an image's features are those its caption lets one expect.

The miniature's encoders come without the heads that compared image and text in
their training, and a published encoder has none. So a linear map from text
features to image features is fitted to real pairs, in closed form, and a
similarity is the cosine between what it predicts and what is there, both about
the mean of real features. Pooled features know which objects there are, and
little of who stands where: the checker is the judge of that.
"""

import dataclasses

import numpy as np

# Ridge weights to choose from, in units of a standardised text feature's
# variance; from strong to weak, of equals the strongest is taken.
_L2_GRID = (1e1, 1e0, 1e-1, 1e-2, 1e-3, 1e-4)


@dataclasses.dataclass(frozen=True)
class CaptionMap:
  """Text features → image features, about the mean of real ones.

  Attributes:
    weights: (T, D), of text features as they are.
    text_mean: (T,).
    feature_mean: (D,).
    l2: the ridge weight that was chosen.
  """

  weights: np.ndarray
  text_mean: np.ndarray
  feature_mean: np.ndarray
  l2: float

  def predict(self, text: np.ndarray) -> np.ndarray:
    """Text features (N, T) → float64 (N, D), centred."""
    return (np.asarray(text, np.float64) - self.text_mean) @ self.weights

  def similarity(
    self, text: np.ndarray, features: np.ndarray
  ) -> tuple[float, float]:
    """Mean cosine of pairs, and of all texts with all other rows' images.

    Args:
      text: (N, T).
      features: (N, D) of the images, row by row.

    Returns:
      (of pairs, of what are no pairs): the second is what shuffled captions
      have in expectation, NaN for one row.
    """
    predicted = _unit(self.predict(text))
    found = _unit(np.asarray(features, np.float64) - self.feature_mean)
    pairs = np.sum(predicted * found, axis=1)
    count = len(pairs)
    others = predicted.sum(0) @ found.sum(0) - pairs.sum()
    shuffled = others / (count * (count - 1)) if count > 1 else np.nan
    return float(pairs.mean()), float(shuffled)


def fit_caption_map(text: np.ndarray, features: np.ndarray) -> CaptionMap:
  """Ridge regression from standardised text features, deterministic.

  The ridge weight is that of the grid with the least leave-one-out error,
  which has a closed form: (y − ŷ) / (1 − h), h of the hat matrix' diagonal.

  Args:
    text: (N, T).
    features: (N, D), N ≥ 2.

  Raises:
    ValueError: too few rows, or numbers that are not finite.
  """
  text = np.asarray(text, np.float64)
  features = np.asarray(features, np.float64)
  count = len(text)
  if count < 2 or len(features) != count:
    raise ValueError(
      "a caption map needs two or more pairs, got "
      f"{count} texts and {len(features)} images"
    )
  if not (np.isfinite(text).all() and np.isfinite(features).all()):
    raise ValueError("text or image features hold NaN or infinity")
  text_mean, feature_mean = text.mean(0), features.mean(0)
  spread = text.std(0)
  # Below float32 resolution a deviation is rounding noise, not a feature.
  alive = spread > 1e-7 * np.abs(text).max(0)
  scale = np.where(alive, 1.0 / np.where(alive, spread, 1.0), 0.0)
  standard = (text - text_mean) * scale
  values, basis = np.linalg.eigh(standard.T @ standard / count)
  values = np.maximum(values, 0.0)
  rotated = standard @ basis
  target = features - feature_mean
  projected = rotated.T @ target / count

  def left_out_error(l2):
    shrink = 1.0 / (values + l2)
    residual = target - rotated @ (shrink[:, None] * projected)
    leverage = (np.square(rotated) @ shrink + 1.0) / count
    return np.square(residual / np.maximum(1 - leverage, 1e-12)[:, None]).mean()

  l2 = min(_L2_GRID, key=left_out_error)
  weights = basis @ (projected / (values + l2)[:, None])
  return CaptionMap(scale[:, None] * weights, text_mean, feature_mean, l2)


def _unit(rows: np.ndarray) -> np.ndarray:
  """Rows of length 1; zeros stay."""
  return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
