"""The report's pictures: what went in, what each stage made of it.

A sample set is an `.npz` (see `evaluators.pictures`). "original" and
"reconstruction" are shown side by side over the stages with the error of each;
a further array of uint8 images stands under its own name, and a one-dimensional
array of text captions them. Features and latents have sections of their own.
"""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from psvae_jax.evaluators.comparison import ERROR_GAIN, error_picture, psnr
from psvae_jax.report import page
from psvae_jax.report.arrays import is_images
from psvae_jax.report.data import Run, Stage

_MAX_IMAGES = 12  # of a sample set; more would make the file heavy
_MAX_LARGE_IMAGES = 6
_IN_VIEW = 6  # the others unfold: a page for a phone as well
PIXELATED_BELOW = 128  # larger images are mostly shown reduced
_LARGEST = 256  # side at which an image stands in the page
_JPEG_QUALITY = 90

Arrays = dict[str, np.ndarray]


def images_section(run: Run) -> str:
  """Every sample set; stages with the same originals share a strip."""
  parts, reconstructions = [], False
  for name in set_names(run.stages):
    groups = same_originals(run.stages, name)
    for group in groups:
      strips, count, large = _strips(group, name)
      if strips:
        title = set_title(run, name)
        if len(groups) > 1:
          title += ", " + ", ".join(stage.title for stage in group)
        if len(strips) < count:
          title += f", {len(strips)} of {count}"
        html = page.cards(strips[:_IN_VIEW], wide=large)
        if rest := strips[_IN_VIEW:]:
          html += page.details(
            f"{len(rest)} more", page.cards(rest, wide=large)
          )
        parts.append(f"<h3>{page.text(title)}</h3>{html}")
        reconstructions |= "reconstruction" in group[0].samples[name]
    reason = next(filter(None, (_note(s, name) for s in run.stages)), "")
    if reason:
      title = set_title(run, name)
      parts.append(f"<h3>{page.text(title)}</h3>" + page.note(reason))
  if not parts:
    return ""
  lead = ""
  if reconstructions:
    lead = page.note(
      "The same images in every stage, none of them trained on; below each"
      " reconstruction its absolute error (mean of the colours, × "
      f"{ERROR_GAIN} in all; black is none), and its PSNR."
    )
  return lead + "\n".join(parts)


def set_names(stages: Sequence[Stage]) -> list[str]:
  """Names of all sample sets, the held-out images of the data first."""
  names = {name for stage in stages for name in stage.samples}
  return sorted(names, key=lambda name: (name != "validation", name))


def set_title(run: Run, name: str) -> str:
  """A sample set's name for a reader."""
  if name == "validation":
    data = run.config.get("data")
    scenes = isinstance(data, dict) and data.get("source") == "scenes"
    return "Held-out scenes" if scenes else "Held-out images"
  return name.replace("_", " ").capitalize()


def same_originals(stages: Sequence[Stage], name: str) -> list[list[Stage]]:
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


def captions(stages: Sequence[Stage], name: str, count: int) -> list[str]:
  """`count` texts: the first one-dimensional array of text, then ""."""
  found: list[str] = []
  for stage in stages:
    for array in stage.samples[name].values():
      if not found and array.ndim == 1 and array.dtype.kind == "U":
        found = [str(caption) for caption in array]
  return (found + [""] * count)[:count]


def _note(stage: Stage, name: str) -> str:
  note = stage.samples.get(name, {}).get("note")
  if note is None or note.ndim or note.dtype.kind != "U":
    return ""
  return str(note)


def _is_shown(name: str, array: np.ndarray) -> bool:
  others = name == "latent" or name.startswith("features_")
  return is_images(array) and not others


def _strips(stages: Sequence[Stage], name: str) -> tuple[list[str], int, bool]:
  """A strip an image, how many images the set has, whether they are large."""
  original, series = None, []
  for stage in stages:
    arrays = {k: v for k, v in stage.samples[name].items() if _is_shown(k, v)}
    original = arrays.pop("original", original)
    for key, images in arrays.items():
      title = stage.title if key == "reconstruction" else key.replace("_", " ")
      series.append((title, images))
  everything = [images for _, images in series]
  everything += [] if original is None else [original]
  if not everything:
    return [], 0, False
  count = min(map(len, everything))
  side = max(images.shape[1] for images in everything)
  large = side >= PIXELATED_BELOW
  shown = min(count, _MAX_LARGE_IMAGES if large else _MAX_IMAGES)
  texts = captions(stages, name, count)
  strips = [
    page.strip(
      _columns(original, series, index, texts[index]),
      pixelated=not large,
      # Beside an original there is room for the words below it.
      caption="" if original is not None else texts[index],
    )
    for index in range(shown)
  ]
  return strips, count, large


def _columns(
  original: np.ndarray | None,
  series: Sequence[tuple[str, np.ndarray]],
  index: int,
  caption: str,
) -> list[page.Column]:
  """One image: the original, then every series, each above its error."""
  columns = []
  of = f": {caption}" if caption else f" {index + 1}"
  if original is not None:
    address = data_uri(original[index])
    columns.append(
      page.Column([(address, f"original{of}")], "original", words=caption)
    )
  for title, images in series:
    cell = [(data_uri(images[index]), f"{title}{of}")]
    figure = ""
    if original is not None and images.shape == original.shape:
      pair = original[index], images[index]
      figure = f"{psnr(*pair):.1f} dB"
      address = data_uri(error_picture(*pair))
      cell.append((address, f"error of {title}, {figure}{of}"))
    columns.append(page.Column(cell, title, figure))
  return columns


def data_uri(image: np.ndarray, largest: int = _LARGEST) -> str:
  """Returns a uint8 (H, W, 3) image as a `data:` address.

  Small ones are exact (PNG). Large ones are reduced to `largest` pixels and
  compressed (JPEG): a page of them would weigh tens of megabytes.
  """
  from PIL import Image  # late: only a report with images needs it

  picture = Image.fromarray(np.ascontiguousarray(image))
  picture.thumbnail((largest, largest), Image.Resampling.BOX)
  buffer = io.BytesIO()
  if max(image.shape[:2]) < PIXELATED_BELOW:
    kind = "png"
    picture.save(buffer, format="PNG", optimize=True)
  else:
    kind = "jpeg"
    picture.save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
  data = base64.b64encode(buffer.getvalue()).decode("ascii")
  return f"data:image/{kind};base64,{data}"
