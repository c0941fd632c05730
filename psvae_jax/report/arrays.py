"""Arrays that a job has left for the report, read with care."""

import zipfile
import zlib
from pathlib import Path

import numpy as np


def read_arrays(path: Path, notices: list[str]) -> dict[str, np.ndarray]:
  """Arrays of an `.npz` by name.

  Args:
    path: the file.
    notices: gets a sentence if it cannot be read; then the result is {}.
  """
  try:
    with np.load(path, allow_pickle=False) as arrays:
      return {name: arrays[name] for name in arrays.files}
  except (
    OSError,
    ValueError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
  ) as error:
    where = "/".join(path.parts[-3:])
    # NumPy's own message may advise to load pickles; this project never does.
    kind = type(error).__name__
    notices.append(f"{where} is not a readable .npz of plain arrays ({kind}).")
    return {}


def is_images(array: np.ndarray | None, axes: int = 1) -> bool:
  """Whether an array holds RGB images: `axes` axes, then (H, W, 3) uint8."""
  return (
    array is not None
    and array.dtype == np.uint8
    and array.ndim == axes + 3
    and array.shape[-1] == 3
    and array.size > 0
  )
