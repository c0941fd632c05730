"""Figures of instruction edits on validation scenes; pictures of any.

What a success is says `edit_score`. Beside every figure stand that of the
source unchanged (`_copy`), of a picture drawn from the target's caption
(`_regenerate`), and of the true target through the autoencoder (`_ceiling`).
"""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from psvae_jax.config import Config
from psvae_jax.data import captions, scene_render, sources
from psvae_jax.data.scene_edits import EDIT_KINDS, SceneEdit, sample_edit
from psvae_jax.data.views import EditExamples, ViewedSource
from psvae_jax.evaluators import sample_pictures
from psvae_jax.evaluators.edit_score import EditScore, score_edit
from psvae_jax.evaluators.generative_model import GenerativeModel

_NUM_QUICK = 48
_NUM_PICTURES = 12
_EDIT_SEED = 1 << 25  # apart from the seeds of prompts


class EditEvaluator:
  """Scores one generator after the other on the same edits and seeds.

  Args:
    config: the job; `data.seed` and `eval` are read.
    image_size: side of the images, pixels.
  """

  def __init__(self, config: Config, image_size: int) -> None:
    self._config = config
    self._image_size = image_size

  def evaluate(
    self,
    model: GenerativeModel,
    folder: Path | None = None,
    *,
    quick: bool = False,
    quarantine: str | os.PathLike[str] | None = None,
  ) -> dict[str, float]:
    """All figures of a generator's edits; for other data than scenes, none.

    Those of `data.edits` are only shown: no program can tell whether an
    instruction is done in a photograph.

    Args:
      model: the generator, with its saved sampling settings.
      folder: where `edits.npz` is written ("source", "result", "target" uint8
        (n, S, S, 3), "instructions", "correct", of scenes alone: the first
        edits of the split); None nowhere, as on every host but one.
      quick: fewer edits, and nothing beside them.
      quarantine: list of records that cannot be used; None keeps no list.

    Returns:
      Metric name → value, the first three also with `_copy`, `_regenerate` and
      `_ceiling` at the end:
        eval/edit_success: see `edit_score`;
        eval/edit_instruction: only that the instruction is done;
        eval/edit_kept: of edits of scenes with an object that the instruction
          does not name, the share in which it is read near its place;
        eval/preservation_psnr: dB outside of the edited region, the mean over
          edits of each one's PSNR; 100 where nothing changed;
        eval/edit_success_<kind>: by kind.
    """
    if self._config.data.source != "scenes":
      self._show(model, folder, quarantine)
      return {}
    count = self._config.eval.num_edits
    count = min(count, _NUM_QUICK) if quick else count
    seed = self._config.data.seed
    edits = [sample_edit("validation", i, seed) for i in range(count)]
    seeds = _EDIT_SEED + np.arange(count)
    size = self._config.eval.batch_size
    scores: dict[str, list[EditScore]] = {}
    pictures = []
    for start in range(0, count, size):
      part = edits[start : start + size]
      made = self._make(model, part, seeds[start : start + size], quick)
      for name, images in made.results.items():
        scores.setdefault(name, []).extend(
          score_edit(image, edit, target)
          for image, edit, target in zip(images, part, made.target, strict=True)
        )
      if start < _NUM_PICTURES:
        pictures.append((made.source, made.results[""], made.target))
    metrics = {}
    for name, of_result in scores.items():
      metrics |= _metrics(of_result, name)
    metrics |= _by_kind(edits, scores[""])
    self._write(folder, edits, scores[""], pictures)
    return metrics

  def _show(
    self,
    model: GenerativeModel,
    folder: Path | None,
    quarantine: str | os.PathLike[str] | None,
  ) -> None:
    """Writes the pictures of edits that cannot be scored."""
    data, size = self._config.data, self._image_size
    examples = EditExamples(
      sources.make_edit_source(data, "validation", size, quarantine)
    )
    viewed = ViewedSource(
      examples,
      image_size=size,
      augment="none" if data.augment == "none" else "center",
      num_examples=min(_NUM_PICTURES, len(examples)),
    )
    elements = [viewed[i] for i in range(len(viewed))]
    # Another one stands where a record is bad.
    elements = [e for i, e in enumerate(elements) if e["index"] == i]
    if not elements:
      return
    source = np.stack([element["source"] for element in elements])
    instructions = [element["caption"] for element in elements]
    seeds = _EDIT_SEED + np.arange(len(elements))
    sample_pictures.write_arrays(
      folder,
      "edits",
      {
        "source": source,
        "result": model.edit(source, instructions, seeds),
        "target": np.stack([element["image"] for element in elements]),
        "instructions": np.array(instructions),
      },
    )

  def _make(
    self,
    model: GenerativeModel,
    edits: Sequence[SceneEdit],
    seeds: np.ndarray,
    quick: bool,
  ) -> "_Made":
    source, target = (
      np.stack([scene_render.render(s, self._image_size) for s in scenes])
      for scenes in ([e.source for e in edits], [e.target for e in edits])
    )
    instructions = [edit.instruction for edit in edits]
    results = {"": model.edit(source, instructions, seeds)}
    if not quick:
      texts = [captions.caption(edit.target) for edit in edits]
      results |= {
        "_copy": source,
        "_regenerate": model.generate(texts, seeds),
        "_ceiling": model.decode(model.encode(target)),
      }
    return _Made(source, target, results)

  def _write(self, folder, edits, scores, pictures) -> None:
    source, result, target = (
      np.concatenate(images)[:_NUM_PICTURES]
      for images in zip(*pictures, strict=True)
    )
    sample_pictures.write_arrays(
      folder,
      "edits",
      {
        "source": source,
        "result": result,
        "target": target,
        "instructions": np.array([e.instruction for e in edits[: len(source)]]),
        "correct": np.array([s.success for s in scores[: len(source)]]),
      },
    )


@dataclasses.dataclass(frozen=True)
class _Made:
  """Images of a batch of edits, uint8 (B, S, S, 3); results by suffix."""

  source: np.ndarray
  target: np.ndarray
  results: dict[str, np.ndarray]


def _metrics(scores: Sequence[EditScore], suffix: str) -> dict[str, float]:
  metrics = {
    "edit_success": np.mean([s.success for s in scores]),
    "edit_instruction": np.mean([s.instruction for s in scores]),
    "preservation_psnr": np.nanmean([s.psnr for s in scores]),
  }
  kept = [s.kept for s in scores if s.kept is not None]
  if kept:
    metrics["edit_kept"] = np.mean(kept)
  return {f"eval/{k}{suffix}": float(v) for k, v in metrics.items()}


def _by_kind(
  edits: Sequence[SceneEdit], scores: Sequence[EditScore]
) -> dict[str, float]:
  metrics = {}
  for kind in EDIT_KINDS:
    found = [
      s.success for e, s in zip(edits, scores, strict=True) if e.kind == kind
    ]
    if found:
      metrics[f"eval/edit_success_{kind}"] = float(np.mean(found))
  return metrics
