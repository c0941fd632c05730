"""Image files → uint8 RGB arrays, whatever the file's mode.

Contract: `decode_image` returns a writable uint8 array (H, W, 3) in RGB, the
right way up. Transparency is composited on white, 16-bit values are scaled
(not clipped) to 8 bits, colour profiles are ignored. Of an animation or a
multi-page file the first frame is taken.
"""

import io
import os
import pathlib

import numpy as np
from PIL import Image

# Only formats without an external interpreter: Pillow would otherwise hand a
# PostScript file named .jpg to Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "TIFF", "GIF")

EXTENSIONS = (
  ".jpg",
  ".jpeg",
  ".png",
  ".webp",
  ".bmp",
  ".tif",
  ".tiff",
  ".gif",
)

# Where Pillow itself starts to warn: a quarter of a gigabyte in RGB.
MAX_PIXELS = 89_478_485

_ORIENTATION_TAG = 0x0112
_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262
_TIFF_WHITE_IS_ZERO = 0

_ORIENTATIONS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


def decode_image(
  source: bytes | str | os.PathLike[str],
  *,
  name: str | None = None,
  max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
  """Decodes an image file to uint8 RGB.

  Args:
    source: path of a file, or its bytes.
    name: what to call the image in errors; the path by default.
    max_pixels: images with more pixels are refused from their header, before
      any pixel is decoded.

  Returns:
    uint8 array (H, W, 3), H and W after the EXIF orientation.

  Raises:
    FileNotFoundError: no such file.
    ValueError: the file is empty, truncated, corrupt, too large, of an
      unknown format, or in a mode without a defined 8-bit range (32-bit
      integers and floats). The message names the file.
  """
  if isinstance(source, bytes):
    data, name = source, name or f"image of {len(source)} bytes"
  else:
    data, name = pathlib.Path(source).read_bytes(), name or os.fspath(source)
  if not data:
    raise ValueError(f"{name}: the file is empty.")

  try:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
  except Exception as error:  # Pillow's parsers raise many unrelated types.
    raise ValueError(
      f"{name}: not a readable image ({_cause(error)}). Known formats: "
      + ", ".join(FORMATS)
      + "."
    ) from error
  with image:
    if width * height > max_pixels:
      raise ValueError(
        f"{name}: {width} × {height} pixels exceed the limit of "
        f"{max_pixels}. Shrink the image, or raise max_pixels if it can be "
        "trusted."
      )
    try:
      image.load()
      orientation = _orientation(image)
      rgb = _to_rgb(image)
    except Exception as error:
      raise ValueError(
        f"{name}: cannot decode the image ({_cause(error)})."
      ) from error
  if orientation in _ORIENTATIONS:
    rgb = rgb.transpose(_ORIENTATIONS[orientation])
  return np.array(rgb)


def _cause(error: Exception) -> str:
  return str(error) or type(error).__name__


def _orientation(image: Image.Image) -> int:
  """EXIF orientation of a loaded image; 1 where there is none.

  Pillow turns TIFF files itself while loading and then drops the tag, so this
  must be read after `load`. Damaged EXIF does not make the pixels unusable.
  """
  try:
    return image.getexif().get(_ORIENTATION_TAG, 1)
  except Exception:
    return 1


def _to_rgb(image: Image.Image) -> Image.Image:
  """Any mode → "RGB"."""
  if image.mode.startswith("I;16"):
    return _from_16_bit(image).convert("RGB")
  if image.mode == "I" and image.format == "PNG":
    # Older Pillow versions open a 16-bit PNG so.
    return _from_16_bit(image).convert("RGB")
  if image.mode in ("I", "F"):
    kind = "float" if image.mode == "F" else "signed or 32-bit integer"
    raise ValueError(
      f"{kind} pixels have no defined range; save it with 8 or 16 bits"
    )
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    image = Image.alpha_composite(white, image)
  return image.convert("RGB")


def _from_16_bit(image: Image.Image) -> Image.Image:
  """One channel of up to 16 bits → "L", rounded: 0 → 0, maximum → 255."""
  values = np.asarray(image).astype(np.uint32)
  maximum = 65535
  transparent = image.info.get("transparency")
  if image.format == "TIFF":
    (bits, *_) = image.tag_v2.get(_TIFF_BITS_PER_SAMPLE, (16,))
    maximum = 2**bits - 1  # 12-bit microscopy files arrive unscaled
    if image.tag_v2.get(_TIFF_PHOTOMETRIC) == _TIFF_WHITE_IS_ZERO:
      values = maximum - values
  elif isinstance(transparent, int):
    values = np.where(values == transparent, maximum, values)
  scaled = (values * 255 + maximum // 2) // maximum
  return Image.fromarray(scaled.astype(np.uint8))
