"""What a generator's stage leaves for the report, read and checked.

Files of a stage's folder; images are uint8 RGB (…, S, S, 3):

    generated.npz         images (n,), captions (n,), correct (n,)
    generated_<step>.npz  the same of fewer, made at that training step from the
                          same captions and seeds
    guidance_grid.npz     images (g, s, n), guidance (g,), steps (s,),
                          captions (n,)
    denoising.npz         images (n, p), captions (n,), times (p,): estimates of
                          the end on the way there, first to last
    edits.npz             source, result, target (n,), instructions (n,),
                          correct (n,)

Captions and marks may be missing. A file of another form is left out.
"""

import dataclasses
import re
from pathlib import Path

import numpy as np

from psvae_jax.report.arrays import is_images, read_arrays

Arrays = dict[str, np.ndarray]

# Array → (kind, a letter an axis: equal letters are equal lengths).
_GENERATED = {
  "images": ("images", "n"),
  "captions": ("text", "n"),
  "correct": ("flags", "n"),
}
_FORMS = {
  "generated": _GENERATED,
  "guidance_grid": {
    "images": ("images", "gsn"),
    "guidance": ("numbers", "g"),
    "steps": ("numbers", "s"),
    "captions": ("text", "n"),
    "correct": ("flags", "gsn"),
  },
  "denoising": {
    "images": ("images", "np"),
    "times": ("numbers", "p"),
    "captions": ("text", "n"),
  },
  "edits": {
    "result": ("images", "n"),
    "source": ("images", "n"),
    "target": ("images", "n"),
    "instructions": ("text", "n"),
    "correct": ("flags", "n"),
  },
}
_KINDS = {"text": "U", "flags": "b", "numbers": "iuf"}
_OPTIONAL = ("text", "flags")
_AT_STEP = re.compile(r"generated_(\d+)\.npz")


@dataclasses.dataclass(frozen=True)
class Pictures:
  """Checked arrays by name; {} where there is no such file.

  Attributes:
    generated: of the last evaluation.
    history: as `generated`, by training step, rising.
    guidance_grid, denoising, edits: of the last evaluation.
  """

  generated: Arrays = dataclasses.field(default_factory=dict)
  history: dict[int, Arrays] = dataclasses.field(default_factory=dict)
  guidance_grid: Arrays = dataclasses.field(default_factory=dict)
  denoising: Arrays = dataclasses.field(default_factory=dict)
  edits: Arrays = dataclasses.field(default_factory=dict)

  def __bool__(self) -> bool:
    return any(getattr(self, f.name) for f in dataclasses.fields(self))


def read_pictures(folder: Path, notices: list[str]) -> Pictures:
  """Reads what there is of the files above.

  Args:
    folder: of the stage.
    notices: gets a sentence a file that is left out.
  """
  if not folder.is_dir():
    return Pictures()
  steps = {
    int(found[1]): path
    for path in folder.glob("generated_*.npz")
    if (found := _AT_STEP.fullmatch(path.name))
  }
  history = {
    step: _read(steps[step], _GENERATED, notices) for step in sorted(steps)
  }
  return Pictures(
    history={step: arrays for step, arrays in history.items() if arrays},
    **{
      name: _read(folder / f"{name}.npz", form, notices)
      for name, form in _FORMS.items()
    },
  )


def captions_of(
  arrays: Arrays, count: int, name: str = "captions"
) -> list[str]:
  """`count` texts, "" where there is none."""
  texts = [str(text) for text in arrays.get(name, ())]
  return (texts + [""] * count)[:count]


def marks_of(arrays: Arrays) -> np.ndarray:
  """Whether each picture is right, as objects: True, False or None (unknown).

  In the shape of the pictures.
  """
  images = arrays["result"] if "result" in arrays else arrays["images"]
  unknown = np.full(images.shape[:-3], None)
  return arrays["correct"].astype(object) if "correct" in arrays else unknown


def _read(
  path: Path, form: dict[str, tuple[str, str]], notices: list[str]
) -> Arrays:
  if not path.exists():
    return {}
  arrays = read_arrays(path, notices)
  if not arrays:
    return {}
  if problem := _problem(arrays, form):
    notices.append(f"{path.parent.name}/{path.name}: {problem}.")
    return {}
  return {name: arrays[name] for name in form if name in arrays}


def _problem(arrays: Arrays, form: dict[str, tuple[str, str]]) -> str:
  """What is wrong with a file's arrays; "" if nothing is."""
  lengths: dict[str, int] = {}
  for name, (kind, axes) in form.items():
    array = arrays.get(name)
    if array is None:
      if kind in _OPTIONAL:
        continue
      return f"array {name!r} is missing"
    if kind == "images":
      fits = is_images(array, len(axes))
    else:
      fits = array.dtype.kind in _KINDS[kind] and array.ndim == len(axes)
    if not fits:
      return (
        f"array {name!r}, {array.dtype} {array.shape}, does not hold {kind}"
      )
    for axis, length in zip(axes, array.shape, strict=False):
      if lengths.setdefault(axis, length) != length:
        return f"array {name!r} has {length} entries, not {lengths[axis]}"
  return ""
