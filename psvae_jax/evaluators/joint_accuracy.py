"""Whether generated scenes show what their captions say, by the checker."""

from collections.abc import Mapping, Sequence

import numpy as np

from psvae_jax.data.captions import CaptionSpec
from psvae_jax.data.scene_checker import check_spec

PARTS = ("count", "colour", "shape", "size", "relation")
# Groups of which all parts are told, and not only whether all are right.
_IN_PARTS = ("seen", "heldout")
_SUFFIX = {"seen": ""}  # others: "_" and the group's name


def check(
  images: np.ndarray, specs: Sequence[CaptionSpec]
) -> list[dict[str, bool]]:
  """`scene_checker.check_spec` of images uint8 (N, S, S, 3), one by one."""
  return [check_spec(i, s) for i, s in zip(images, specs, strict=True)]


def joint_metrics(
  checks: Sequence[Mapping[str, bool]],
  specs: Sequence[CaptionSpec],
  groups: Mapping[str, np.ndarray],
  suffix: str = "",
) -> dict[str, float]:
  """Shares of images in which everything, or one part, is right.

  Args:
    checks: from `check`, one an image.
    specs: what each image should show.
    groups: name → rows; empty ones are left out.
    suffix: at the end of every name.

  Returns:
    `eval/joint_accuracy` of the group "seen" and `eval/joint_accuracy_<group>`
    of others, in [0, 1]. For "seen" and "heldout" also `eval/joint_<part>`
    (…_heldout), each part by itself; the relation only over captions that name
    one.
  """
  metrics = {}
  for group, rows in groups.items():
    if not len(rows):
      continue
    end = _SUFFIX.get(group, f"_{group}") + suffix
    metrics[f"eval/joint_accuracy{end}"] = _share(checks, "all", rows)
    for part in PARTS if group in _IN_PARTS else ():
      asked = [
        row
        for row in rows
        if part != "relation" or specs[row].relation is not None
      ]
      if asked:
        metrics[f"eval/joint_{part}{end}"] = _share(checks, part, asked)
  return metrics


def _share(checks, part, rows) -> float:
  return float(np.mean([checks[row][part] for row in rows]))
