"""Pictures with captions on one page, for people to look at.

Pillow alone: nothing here touches a device.
"""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_LEAST_SIDE = 192  # smaller pictures are enlarged to about this
_GAP = 12
_FONT_SIZE = 14
_LINE = 18
_MAX_LINES = 3
_MAX_COLUMNS = 6
_MAX_NAME = 60
_INK, _PAPER = (30, 30, 30), (255, 255, 255)


def enlarge(image: np.ndarray) -> Image.Image:
  """uint8 (S, S, 3) → a picture of at least 192 pixels, by a whole factor.

  Bicubic: on screens of high density the pixels of a 48 × 48 picture would be
  all that one sees.
  """
  picture = Image.fromarray(image)
  factor = -(-_LEAST_SIDE // image.shape[1])
  if factor <= 1:
    return picture
  size = (factor * picture.width, factor * picture.height)
  return picture.resize(size, Image.Resampling.BICUBIC)


def draw(
  images: Sequence[np.ndarray],
  captions: Sequence[str],
  columns: int | None = None,
) -> Image.Image:
  """One page: rows of pictures, each above its caption.

  Args:
    images: uint8 (S, S, 3), all of one size, at least one.
    captions: as many texts; wrapped, and cut after three lines.
    columns: pictures in a row; by default about as many as rows, at most 6.
  """
  count = len(images)
  columns = columns or min(_MAX_COLUMNS, int(np.ceil(np.sqrt(count))))
  columns = min(columns, count)
  pictures = [enlarge(image) for image in images]
  width, height = pictures[0].size
  texts = [_wrap(caption, width) for caption in captions]
  top, blocks = _GAP, []
  for start in range(0, count, columns):
    lines = max(len(text) for text in texts[start : start + columns])
    blocks.append((start, top))
    top += height + 4 + lines * _LINE + _GAP
  sheet = Image.new("RGB", (columns * (width + _GAP) + _GAP, top), _PAPER)
  pen, font = ImageDraw.Draw(sheet), _font()
  for start, top in blocks:
    for i in range(start, min(start + columns, count)):
      left = _GAP + (i - start) * (width + _GAP)
      sheet.paste(pictures[i], (left, top))
      for row, line in enumerate(texts[i]):
        place = (left, top + height + 4 + row * _LINE)
        pen.text(place, line, fill=_INK, font=font)
  return sheet


def file_names(texts: Sequence[str], folder: Path) -> list[Path]:
  """PNG files that are named after texts and overwrite nothing.

  Args:
    texts: e.g. "000 a red circle": letters, digits and dashes are left of it.
    folder: where the files will be.

  Returns:
    As many paths, all different, none of which exists.
  """
  taken, paths = set(), []
  for text in texts:
    plain = unicodedata.normalize("NFKC", text).lower()
    stem = re.sub(r"[^\w]+", "-", plain).strip("-")[:_MAX_NAME].strip("-")
    number = 1
    while True:
      suffix = "" if number == 1 else f"-{number}"
      path = folder / f"{stem or 'image'}{suffix}.png"
      if path not in taken and not path.exists():
        break
      number += 1
    taken.add(path)
    paths.append(path)
  return paths


def _font() -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
  return ImageFont.load_default(_FONT_SIZE)


def _wrap(text: str, width: int) -> list[str]:
  """Lines of at most `width` pixels; what does not fit in three is cut."""
  font, lines = _font(), [""]
  for word in text.split():
    joined = f"{lines[-1]} {word}".strip()
    if lines[-1] and font.getlength(joined) > width:
      lines.append(word)
    else:
      lines[-1] = joined
  if len(lines) > _MAX_LINES:
    lines = lines[:_MAX_LINES]
    lines[-1] += " …"
  return [_shorten(line, width, font) for line in lines]


def _shorten(line: str, width: int, font: ImageFont.ImageFont) -> str:
  """Cuts what a single long word makes too wide."""
  if font.getlength(line) <= width:
    return line
  line = line[:width]  # a letter a pixel: each cut below measures it anew
  while line and font.getlength(line + "…") > width:
    line = line[:-1]
  return line + "…"
