"""Image files → uint8 RGB arrays, whatever the file's mode.

Contract: `decode_image` returns a writable uint8 array (H, W, 3) in RGB, the
right way up. Transparency is composited on white, 16-bit values are scaled
(not clipped) to 8 bits, colour profiles are ignored. Of an animation or a
multi-page file the first frame is taken.
"""

import io
import os
import re
import stat

import numpy as np
from PIL import Image, UnidentifiedImageError

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

# A file is read whole before it is looked at; this holds the largest image in
# 16-bit RGBA without compression.
MAX_BYTES = 1 << 30

# A progressive JPEG has some ten scans. Each one costs a pass over all blocks
# and may be a few bytes long, so thousands of them would take an hour.
MAX_JPEG_SCANS = 500

_ORIENTATION_TAG = 0x0112
_TIFF_TILE_WIDTH, _TIFF_TILE_LENGTH = 322, 323
_TIFF_BITS_PER_SAMPLE = 258
_TIFF_PHOTOMETRIC = 262
_TIFF_WHITE_IS_ZERO = 0

# Any marker but stuffed bytes, restarts and fill.
_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")

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
    MemoryError: there is too little memory for it.
  """
  if isinstance(source, bytes):
    data, name = source, name or f"image of {len(source)} bytes"
  else:
    name = name or os.fspath(source)
    data = _read_file(source, name)
  if not data:
    raise ValueError(f"{name}: the file is empty.")

  try:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
  except MemoryError:  # says nothing about the file
    raise
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
      _refuse_hidden_work(image, data, max_pixels)
      image.load()
      orientation = _orientation(image)
      rgb = _to_rgb(image)
      if orientation in _ORIENTATIONS:
        rgb = rgb.transpose(_ORIENTATIONS[orientation])
      return np.array(rgb)
    except MemoryError:
      raise
    except Exception as error:
      raise ValueError(
        f"{name}: cannot decode the image ({_cause(error)})."
      ) from error


def _read_file(path: str | os.PathLike[str], name: str) -> bytes:
  """The bytes of a regular file of no more than `MAX_BYTES`."""
  # Without O_NONBLOCK, opening a named pipe would wait for its other end.
  flags = (
    os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
  )
  with open(os.open(path, flags), "rb") as file:
    status = os.fstat(file.fileno())
    if not stat.S_ISREG(status.st_mode):
      raise ValueError(f"{name}: not a regular file.")
    if status.st_size > MAX_BYTES:
      raise ValueError(
        f"{name}: {status.st_size} bytes exceed the limit of {MAX_BYTES} for "
        "an image file."
      )
    return file.read()


def _refuse_hidden_work(
  image: Image.Image, data: bytes, max_pixels: int
) -> None:
  """Refuses what is cheap to store and dear to decode, whatever the size."""
  if image.format == "JPEG" and _is_many_scans(data):
    raise ValueError(f"it has more than {MAX_JPEG_SCANS} scans")
  if image.format == "TIFF":
    # libtiff decodes whole tiles, however little of them the image shows.
    width = image.tag_v2.get(_TIFF_TILE_WIDTH, 1)
    length = image.tag_v2.get(_TIFF_TILE_LENGTH, 1)
    if width * length > max_pixels:
      raise ValueError(
        f"its tiles of {width} × {length} pixels exceed the limit of "
        f"{max_pixels}"
      )


def _is_many_scans(data: bytes) -> bool:
  """Whether a JPEG has more than `MAX_JPEG_SCANS` scans."""
  # Cheap, but also finds the pair in metadata and behind the image.
  if data.count(b"\xff\xda") <= MAX_JPEG_SCANS:
    return False
  scans, position = 0, 2
  while match := _JPEG_MARKER.search(data, position):
    marker, position = data[match.end() - 1], match.end()
    if marker == 0xD9:  # end of image
      break
    scans += marker == 0xDA
    if marker not in (0x01, 0xD8):  # the others carry their length
      position += max(2, int.from_bytes(data[position : position + 2], "big"))
  return scans > MAX_JPEG_SCANS


def _cause(error: Exception) -> str:
  if isinstance(error, UnidentifiedImageError):
    return "damaged, or of another format"  # Pillow names our buffer
  return str(error) or type(error).__name__


def _orientation(image: Image.Image) -> int:
  """EXIF orientation of a loaded image; 1 where there is none.

  Pillow turns TIFF files itself while loading and then drops the tag, so this
  must be read after `load`. Damaged EXIF does not make the pixels unusable.
  """
  try:
    return image.getexif().get(_ORIENTATION_TAG, 1)
  except MemoryError:
    raise
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
