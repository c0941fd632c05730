"""The report's pictures: what went in, what each stage made of it.

A sample set is an `.npz` with uint8 (N, H, W, 3) arrays. "original" and
"reconstruction" are shown side by side over the stages; any other such array
stands under its own name, and a one-dimensional array of text captions them.
"""

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from psvae_jax import report_page as page
from psvae_jax.report_data import Stage

_MAX_IMAGES = 12  # of a sample set; more would make the file heavy
_PIXELATED_BELOW = 128  # larger images are mostly shown reduced
_ERROR_GAIN = 4


def images_section(stages: Sequence[Stage]) -> str:
  """Every sample set; stages with the same originals share a strip."""
  parts = []
  sets = sorted({name for stage in stages for name in stage.samples})
  for name in sets:
    for group in _same_originals(stages, name):
      strips, count = _strips(group, name)
      if not strips:
        continue
      title = name.replace("_", " ").capitalize()
      if len(strips) < count:
        title += f", {len(strips)} of {count}"
      parts.append(f"<h3>{page.text(title)}</h3>" + page.cards(strips))
  if not parts:
    return ""
  reconstructions = any(
    "original" in arrays and "reconstruction" in arrays
    for stage in stages
    for arrays in stage.samples.values()
  )
  lead = ""
  if reconstructions:
    lead = page.note(
      "The same held-out images in every stage, with the PSNR of each. Error:"
      f" absolute difference to the original, × {_ERROR_GAIN}."
    )
  return lead + "\n".join(parts)


def _same_originals(stages: Sequence[Stage], name: str) -> list[list[Stage]]:
  """Groups the stages that have set `name` by its originals."""
  groups: dict[Any, list[Stage]] = {}
  for stage in stages:
    if name in stage.samples:
      original = stage.samples[name].get("original")
      key: Any = stage.name
      if original is not None:
        key = (original.shape, original.tobytes())
      groups.setdefault(key, []).append(stage)
  return list(groups.values())


def _strips(stages: Sequence[Stage], name: str) -> tuple[list[str], int]:
  """Returns a strip an image, and how many images the set has."""
  original, columns = None, []
  for stage in stages:
    arrays = {k: v for k, v in stage.samples[name].items() if _is_images(v)}
    original = arrays.pop("original", original)
    for key, images in arrays.items():
      title = stage.title if key == "reconstruction" else key.replace("_", " ")
      columns.append((title, images))
  counts = [len(images) for _, images in columns]
  counts += [] if original is None else [len(original)]
  if not counts:
    return [], 0
  captions = _captions(stages, name)
  strips = []
  for index in range(min(min(counts), _MAX_IMAGES)):
    cells = []
    if original is not None:
      cells.append((png_data_uri(original[index]), "original", ""))
    for title, images in columns:
      psnr = ""
      if original is not None and images.shape == original.shape:
        value = image_psnr(original[index], images[index])
        psnr = f"{value:.1f} dB"
      cells.append((png_data_uri(images[index]), title, psnr))
    if original is not None and columns:
      last = columns[-1][1]
      if last.shape == original.shape:
        error = absolute_error(original[index], last[index], _ERROR_GAIN)
        cells.append((png_data_uri(error), "error", f"× {_ERROR_GAIN}"))
    height = (columns[0][1] if columns else original).shape[1]
    strips.append(
      page.strip(
        cells,
        caption=captions[index] if index < len(captions) else "",
        pixelated=height < _PIXELATED_BELOW,
      )
    )
  return strips, min(counts)


def _is_images(array: np.ndarray) -> bool:
  return array.dtype == np.uint8 and array.ndim == 4 and array.shape[-1] == 3


def _captions(stages: Sequence[Stage], name: str) -> list[str]:
  """One-dimensional arrays of text label the images."""
  for stage in stages:
    for array in stage.samples[name].values():
      if array.ndim == 1 and array.dtype.kind == "U":
        return [str(caption) for caption in array]
  return []


def png_data_uri(image: np.ndarray) -> str:
  """Returns a uint8 (H, W, 3) image as a `data:` address."""
  from PIL import Image  # late: only a report with images needs it

  buffer = io.BytesIO()
  Image.fromarray(np.ascontiguousarray(image)).save(
    buffer, format="PNG", optimize=True
  )
  data = base64.b64encode(buffer.getvalue()).decode("ascii")
  return f"data:image/png;base64,{data}"


def absolute_error(
  original: np.ndarray, reconstruction: np.ndarray, gain: int = 4
) -> np.ndarray:
  """Returns |difference| × gain of uint8 images as uint8, clipped at 255."""
  error = np.abs(original.astype(np.int32) - reconstruction.astype(np.int32))
  return np.clip(gain * error, 0, 255).astype(np.uint8)


def image_psnr(original: np.ndarray, reconstruction: np.ndarray) -> float:
  """Returns the PSNR in dB of one uint8 image; infinite if identical."""
  difference = original.astype(np.float64) - reconstruction.astype(np.float64)
  mse = float(np.mean(np.square(difference)))
  return 10 * math.log10(255**2 / mse) if mse else math.inf
