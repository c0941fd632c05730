"""Pictures of a generator for the report, as `.npz` files.

    generated.npz         images uint8 (N, S, S, 3), captions (N,),
                          correct bool (N,)
    generated_<step>.npz  the same, fewer, over training
    guidance_grid.npz     images (G, T, n, S, S, 3), guidance (G,), steps (T,),
                          captions (n,), correct (G, T, n)
    denoising.npz         images (n, points, S, S, 3), captions (n,), times
                          (points,): estimates of the end on the way there

All are of the first prompts with their own seeds; none is picked. `correct` is
what the scene checker says, and is left out where there are no scenes.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from psvae_jax import writers
from psvae_jax.evaluators import joint_accuracy
from psvae_jax.evaluators.generative_model import GenerativeModel
from psvae_jax.evaluators.prompts import Prompts

NUM_PICTURES = 24
NUM_QUICK = 16
POINTS = 8
GUIDANCE = (1.0, 2.0, 4.0, 7.0)
STEPS = (5, 10, 25, 50)
_NUM_GRID = 3
_NUM_STRIPS = 4

Checks = Sequence[Mapping[str, bool]]


def write(
  model: GenerativeModel,
  prompts: Prompts,
  images: np.ndarray,
  checks: Checks,
  folder: Path | None,
  *,
  points: int = POINTS,
) -> None:
  """Everything a finished evaluation shows.

  Args:
    model: draws what has other settings.
    prompts: the prompts.
    images: of the first prompts, uint8 (N, S, S, 3).
    checks: what the checker says of each; [] without scenes.
    folder: None writes nothing, but takes part in what all hosts compute.
    points: pictures along the way to each image.
  """
  if folder is None and jax.process_count() == 1:
    return
  write_arrays(folder, "generated", _generated(prompts, images, checks))
  write_arrays(folder, "guidance_grid", _guidance_grid(model, prompts))
  texts = prompts.texts[:_NUM_STRIPS]
  strips, times = model.denoising(texts, prompts.seeds[:_NUM_STRIPS], points)
  write_arrays(
    folder,
    "denoising",
    {"images": strips, "captions": _text(texts), "times": np.asarray(times)},
  )


def write_progress(
  prompts: Prompts,
  images: np.ndarray,
  checks: Checks,
  folder: Path | None,
  step: int | None,
) -> None:
  """`generated_<step>.npz` of the first images; nothing without a step."""
  if step is not None:
    arrays = _generated(prompts, images[:NUM_QUICK], checks)
    write_arrays(folder, f"generated_{step}", arrays)


def write_arrays(
  folder: Path | None, name: str, arrays: Mapping[str, np.ndarray]
) -> None:
  """Writes `<name>.npz`; on a full disk the figures are had without it."""
  if folder is None:
    return
  path = folder / f"{name}.npz"
  with writers.skipped_when_full(str(path)):
    writers.write_arrays_atomic(path, arrays)


def _generated(
  prompts: Prompts, images: np.ndarray, checks: Checks
) -> dict[str, np.ndarray]:
  count = len(images)
  arrays = {"images": images, "captions": _text(prompts.texts[:count])}
  if checks:
    arrays["correct"] = np.array([c["all"] for c in checks[:count]])
  return arrays


def _guidance_grid(
  model: GenerativeModel, prompts: Prompts
) -> dict[str, np.ndarray]:
  texts, seeds = prompts.texts[:_NUM_GRID], prompts.seeds[:_NUM_GRID]
  # Guidance inside: another number of steps is another program.
  columns = [
    [
      model.generate(texts, seeds, guidance=scale, steps=steps)
      for scale in GUIDANCE
    ]
    for steps in STEPS
  ]
  images = np.swapaxes(np.array(columns), 0, 1)
  arrays = {
    "images": images,
    "guidance": np.array(GUIDANCE),
    "steps": np.array(STEPS),
    "captions": _text(texts),
  }
  if prompts.specs is not None:
    flat = images.reshape(-1, *images.shape[2:])
    specs = prompts.specs[: len(texts)]
    correct = [
      [c["all"] for c in joint_accuracy.check(row, specs)] for row in flat
    ]
    arrays["correct"] = np.array(correct).reshape(images.shape[:3])
  return arrays


def _text(texts: Sequence[str | int]) -> np.ndarray:
  return np.array(texts, dtype=np.str_)
