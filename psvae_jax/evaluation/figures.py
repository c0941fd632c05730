"""The figures: what they are called, what they are of, how they are written.

A figure's name says of what it is: those of reconstructions begin with r,
those of generated images with g. Both are computed by the same formula, and one
is never to be read for the other.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Figure:
  """One kind of figure.

  Attributes:
    title: its name in tables.
    definition: what it is, for the protocol.
    digits: behind the point, in tables.
    higher: whether more is better.
    spread: key of the standard deviation that is shown with it; "" without.
  """

  title: str
  definition: str
  digits: int = 3
  higher: bool = False
  spread: str = ""


_FRECHET = (
  "squared Fréchet distance between Gaussians of {features}, covariances over "
  "N − 1, in float64 by eigendecomposition"
)
_POOL = "the Inception features after pooling"
_SPATIAL = "the spatial Inception features (7 channels of 17 × 17, as ADM)"
_CLS = "the encoder's CLS tokens"
_R = "; of reconstructions against the images they are of"
_G = "; of generated images against a reference set"

FIGURES: dict[str, Figure] = {
  "psnr": Figure(
    "PSNR",
    "dB, of each 8-bit RGB image (peak 255, at most 100), then the mean",
    2,
    True,
  ),
  "ssim": Figure(
    "SSIM",
    "of each 8-bit RGB image (Gaussian window 11 × 11, σ 1.5, K1 0.01, K2 "
    "0.03, range 255, borders reflected, mean over channels), then the mean",
    4,
    True,
  ),
  "lpips": Figure(
    "LPIPS", "version 0.1, of 8-bit images as [−1, 1], then the mean", 4
  ),
  "rfid": Figure("rFID", _FRECHET.format(features=_POOL) + _R),
  "rsfid": Figure("rsFID", _FRECHET.format(features=_SPATIAL) + _R),
  "rfd_dinov2": Figure("rFD-DINOv2", _FRECHET.format(features=_CLS) + _R, 2),
  "gfid": Figure("gFID", _FRECHET.format(features=_POOL) + _G),
  "gsfid": Figure("gsFID", _FRECHET.format(features=_SPATIAL) + _G),
  "gfd_dinov2": Figure("gFD-DINOv2", _FRECHET.format(features=_CLS) + _G, 2),
  "inception_score": Figure(
    "IS",
    "mean and standard deviation over splits, softmax over the 1008 logits "
    "without bias; of generated images, without a reference",
    2,
    True,
    "inception_score_std",
  ),
  "kid": Figure(
    "KID",
    "unbiased MMD² of the Inception features after pooling, kernel "
    "(x·y / D + 1)³, mean and standard deviation over random subsets" + _G,
    5,
    False,
    "kid_std",
  ),
  "precision": Figure(
    "precision",
    "share of generated images inside a k-nearest-neighbour ball of a "
    "reference image, Inception features after pooling",
    4,
    True,
  ),
  "recall": Figure(
    "recall",
    "share of reference images inside a k-nearest-neighbour ball of a "
    "generated image, Inception features after pooling",
    4,
    True,
  ),
  "clip_score": Figure(
    "CLIP score",
    "mean of 100 · max(cos, 0) between embeddings of image and prompt",
    2,
    True,
  ),
}


@dataclasses.dataclass
class Evaluation:
  """What a command has found, ready to be shown and written.

  Attributes:
    kind: "reconstruction" or "generation".
    rows: model or set → figure → value.
    protocol: what holds for all figures, JSON values.
    of: figure → what holds for it alone.
    of_row: model or set → what holds for it alone.
    left_out: figure → why there is none.
    notes: what a reader must know.
  """

  kind: str
  protocol: dict[str, Any]
  rows: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
  of: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  of_row: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
  left_out: dict[str, str] = dataclasses.field(default_factory=dict)
  notes: list[str] = dataclasses.field(default_factory=list)

  @property
  def columns(self) -> list[str]:
    """Figures that any row has, in their usual order."""
    return [k for k in FIGURES if any(k in row for row in self.rows.values())]

  def explain(self, key: str, **details: Any) -> None:
    """Says of a figure what it is and what it was made with."""
    self.of[key] = {"definition": FIGURES[key].definition, **details}

  def note(self, text: str) -> None:
    """Adds a note once."""
    if text not in self.notes:
      self.notes.append(text)


def cell(key: str, row: Mapping[str, float]) -> str:
  """A value as a table shows it; "–" where there is none."""
  figure = FIGURES[key]
  if key not in row:
    return "–"
  text = f"{row[key]:.{figure.digits}f}"
  if figure.spread in row:
    text += f" ± {row[figure.spread]:.{figure.digits}f}"
  return text


def head(key: str) -> str:
  """A column's title, with the direction that is better."""
  figure = FIGURES[key]
  return f"{figure.title} {'↑' if figure.higher else '↓'}"


def lines(values: Mapping[str, Any], skip: Sequence[str] = ()) -> list[str]:
  """A protocol's entries as text, "name: value", in their order."""
  found = []
  for name, value in values.items():
    if name in skip or value in ("", None, [], {}):
      continue
    if isinstance(value, Mapping):
      inner = "; ".join(lines(value))
      found.append(f"{name.replace('_', ' ')}: {inner}")
    elif isinstance(value, (list, tuple)):
      found.append(f"{name.replace('_', ' ')}: {', '.join(map(str, value))}")
    else:
      found.append(f"{name.replace('_', ' ')}: {value}")
  return found
