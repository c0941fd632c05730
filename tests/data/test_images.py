"""Every file mode against known pixels; broken files against their errors."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from psvae_jax.data import images

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255,) * 3


def encoded(image: Image.Image, file_format: str = "PNG", **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, file_format, **options)
  return buffer.getvalue()


def png_16_bit(values: np.ndarray, transparent: int | None = None) -> bytes:
  """A greyscale PNG of 16 bits, written by hand: Pillow's part is to read."""

  def chunk(kind: bytes, data: bytes) -> bytes:
    crc = struct.pack(">I", zlib.crc32(kind + data))
    return struct.pack(">I", len(data)) + kind + data + crc

  height, width = values.shape
  rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
  header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
  parts = [b"\x89PNG\r\n\x1a\n", chunk(b"IHDR", header)]
  if transparent is not None:
    parts.append(chunk(b"tRNS", struct.pack(">H", transparent)))
  return b"".join(
    [*parts, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b"")]
  )


def tiff_grey(
  values: np.ndarray, bits: int, white_is_zero: bool = False
) -> bytes:
  """A one-strip little-endian TIFF of 16-bit words or packed 12-bit values."""
  if bits == 12:
    first, second = values.reshape(-1, 2).T.astype(np.uint32)
    packed = np.stack(
      [first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=1
    )
    data = packed.astype(np.uint8).tobytes()
  else:
    data = values.astype("<u2").tobytes()
  height, width = values.shape
  tags = [
    (256, width),
    (257, height),
    (258, bits),
    (259, 1),
    (262, 0 if white_is_zero else 1),
    (273, 8 + 2 + 9 * 12 + 4),
    (277, 1),
    (278, height),
    (279, len(data)),
  ]
  entries = b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in tags)
  directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
  return b"II*\0" + struct.pack("<I", 8) + directory + data


def test_rgb_keeps_its_pixels_from_path_and_from_bytes(tmp_path):
  pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
  path = tmp_path / "a.png"
  path.write_bytes(encoded(Image.fromarray(pixels)))
  for source in (path, str(path), path.read_bytes()):
    decoded = images.decode_image(source)
    assert decoded.dtype == np.uint8 and decoded.flags.writeable
    np.testing.assert_array_equal(decoded, pixels)


@pytest.mark.parametrize(
  "file_format, options",
  [("WEBP", {"lossless": True}), ("BMP", {}), ("TIFF", {}), ("PNG", {})],
)
def test_lossless_formats(file_format, options):
  pixels = np.random.default_rng(1).integers(0, 256, (4, 6, 3), np.uint8)
  data = encoded(Image.fromarray(pixels), file_format, **options)
  np.testing.assert_array_equal(images.decode_image(data), pixels)


def test_jpeg_is_close():
  pixels = np.full((16, 16, 3), (200, 80, 40), np.uint8)
  data = encoded(Image.fromarray(pixels), "JPEG", quality=95)
  difference = images.decode_image(data).astype(int) - pixels
  assert np.abs(difference).max() <= 3


def test_greyscale_and_one_bit():
  grey = np.array([[0, 7, 255]], np.uint8)
  decoded = images.decode_image(encoded(Image.fromarray(grey)))
  np.testing.assert_array_equal(decoded, np.repeat(grey[..., None], 3, 2))
  bits = Image.fromarray(np.array([[0, 255, 255, 0]], np.uint8)).convert("1")
  decoded = images.decode_image(encoded(bits))
  np.testing.assert_array_equal(decoded[0, :, 0], [0, 255, 255, 0])


@pytest.mark.parametrize(
  "mode, pixel, expected",
  [
    ("RGBA", (255, 0, 0, 255), RED),
    ("RGBA", (255, 0, 0, 0), WHITE),
    ("RGBA", (255, 0, 0, 128), (255, 127, 127)),
    ("LA", (0, 255), (0, 0, 0)),
    ("LA", (0, 51), (204, 204, 204)),
  ],
)
def test_alpha_is_composited_on_white(mode, pixel, expected):
  decoded = images.decode_image(encoded(Image.new(mode, (2, 3), pixel)))
  assert decoded.shape == (3, 2, 3)
  np.testing.assert_array_equal(decoded, np.broadcast_to(expected, (3, 2, 3)))


@pytest.mark.parametrize("file_format", ["PNG", "GIF"])
def test_palette_with_a_transparent_entry(file_format):
  image = Image.new("P", (3, 1))
  image.putpalette([*RED, *GREEN, *BLUE] + [0] * (253 * 3))
  for x in range(3):
    image.putpixel((x, 0), x)
  decoded = images.decode_image(encoded(image, file_format, transparency=1))
  np.testing.assert_array_equal(decoded, [[RED, WHITE, BLUE]])


def test_transparent_colour_of_a_plain_rgb_png():
  image = Image.fromarray(np.array([[RED, GREEN]], np.uint8))
  decoded = images.decode_image(encoded(image, transparency=GREEN))
  np.testing.assert_array_equal(decoded, [[RED, WHITE]])


def test_cmyk():
  cmyk = np.array([[[0, 255, 255, 0], [0, 0, 0, 255]]], np.uint8)
  image = Image.fromarray(cmyk, "CMYK")
  decoded = images.decode_image(encoded(image, "TIFF"))
  np.testing.assert_array_equal(decoded, [[RED, (0, 0, 0)]])
  # Photoshop's CMYK JPEGs are stored inverted, as Pillow's own are.
  flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
  decoded = images.decode_image(encoded(flat, "JPEG", quality=95))
  assert np.abs(decoded.astype(int) - RED).max() <= 3


@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bit_is_scaled_not_clipped(kind):
  values = np.array([[0, 128, 129, 257, 32768, 65278, 65407, 65535]])
  data = png_16_bit(values) if kind == "png" else tiff_grey(values, 16)
  expected = np.rint(values / 257)
  assert expected.tolist() == [[0, 0, 1, 1, 128, 254, 255, 255]]
  decoded = images.decode_image(data)
  for channel in range(3):
    np.testing.assert_array_equal(decoded[..., channel], expected)


def test_16_bit_transparency_and_white_is_zero():
  values = np.array([[0, 25700, 65535]])
  decoded = images.decode_image(png_16_bit(values, transparent=25700))
  assert decoded[0, :, 0].tolist() == [0, 255, 255]
  decoded = images.decode_image(tiff_grey(values, 16, white_is_zero=True))
  assert decoded[0, :, 0].tolist() == [255, 155, 0]


def test_12_bit_tiff_fills_the_range():
  values = np.array([[0, 1365, 2730, 4095]])
  decoded = images.decode_image(tiff_grey(values, 12))
  assert decoded[0, :, 0].tolist() == [0, 85, 170, 255]


@pytest.mark.parametrize("mode", ["F", "I"])
def test_modes_without_a_range_are_refused(mode, tmp_path):
  path = tmp_path / "depth.tiff"
  path.write_bytes(encoded(Image.new(mode, (2, 2), 1), "TIFF"))
  with pytest.raises(ValueError, match="depth.tiff.*no defined range"):
    images.decode_image(path)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "WEBP", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation, file_format):
  # Four quadrants of 16 pixels: the grey levels survive JPEG's blocks.
  upright = np.kron(np.array([[20, 90], [160, 230]]), np.ones((16, 32)))
  upright = upright.astype(np.uint8)
  # How a camera held so stores the upright scene (EXIF 2.3, 4.6.4).
  stored = {
    1: upright,
    2: upright[:, ::-1],
    3: upright[::-1, ::-1],
    4: upright[::-1],
    5: upright.T,
    6: np.rot90(upright, 1),
    7: upright[::-1, ::-1].T,
    8: np.rot90(upright, -1),
  }[orientation]
  exif = Image.Exif()
  exif[0x0112] = orientation
  options = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}}
  data = encoded(
    Image.fromarray(np.ascontiguousarray(stored)).convert("RGB"),
    file_format,
    exif=exif,
    **options.get(file_format, {}),
  )
  decoded = images.decode_image(data)
  assert decoded.shape == (32, 64, 3)
  difference = np.abs(decoded[..., 0].astype(int) - upright)
  assert difference.max() <= (3 if file_format == "JPEG" else 0)


def test_damaged_exif_does_not_spoil_the_image():
  data = encoded(Image.new("RGB", (4, 4), RED), exif=b"Exif\0\0MM\0*\xff\xff")
  np.testing.assert_array_equal(images.decode_image(data)[0, 0], RED)


def test_first_frame_of_an_animation():
  frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
  data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
  np.testing.assert_array_equal(images.decode_image(data)[0, 0], RED)


def test_too_many_pixels_are_refused_before_decoding(tmp_path, monkeypatch):
  path = tmp_path / "bomb.png"
  path.write_bytes(encoded(Image.new("1", (300, 200))))
  assert images.decode_image(path, max_pixels=60_000).shape == (200, 300, 3)

  def refuse(*args, **kwargs):
    raise AssertionError("pixels were decoded")

  monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
  with pytest.raises(ValueError, match=r"bomb\.png: 300 × 200 .* 59999"):
    images.decode_image(path, max_pixels=59_999)


def test_huge_header_is_a_value_error():
  data = bytearray(encoded(Image.new("L", (1, 1))))
  header = data.index(b"IHDR")
  data[header + 4 : header + 12] = struct.pack(">II", 10**5, 10**5)
  crc = zlib.crc32(data[header : header + 17])
  data[header + 17 : header + 21] = struct.pack(">I", crc)
  with pytest.raises(ValueError, match="pixels"):
    images.decode_image(bytes(data))


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize(
  "file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]
)
@pytest.mark.parametrize("keep", [0.02, 0.6])
def test_truncated_file(tmp_path, file_format, keep):
  pixels = np.random.default_rng(2).integers(0, 256, (40, 40, 3), np.uint8)
  data = encoded(Image.fromarray(pixels), file_format)
  path = tmp_path / "cut.img"
  path.write_bytes(data[: int(len(data) * keep)])
  with pytest.raises(ValueError, match=r"cut\.img: .*image \(.+\)"):
    images.decode_image(path)


@pytest.mark.parametrize("where", ["open", "Image.load", "Image.getexif"])
def test_want_of_memory_is_no_damage(monkeypatch, where):
  def fail(*args, **kwargs):
    raise MemoryError

  data = encoded(Image.new("RGB", (4, 4)))
  monkeypatch.setattr(f"PIL.Image.{where}", fail)
  if where == "Image.load":
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
  if where == "Image.getexif":
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.getexif", fail)
  with pytest.raises(MemoryError):
    images.decode_image(data)


def test_empty_unknown_and_missing_files(tmp_path):
  empty, text = tmp_path / "empty.jpg", tmp_path / "page.jpg"
  empty.write_bytes(b"")
  text.write_text("<html>404 not found</html>")
  with pytest.raises(ValueError, match=r"empty\.jpg: the file is empty"):
    images.decode_image(empty)
  with pytest.raises(ValueError, match=r"page\.jpg: not a readable image"):
    images.decode_image(text)
  with pytest.raises(FileNotFoundError, match=r"none\.jpg"):
    images.decode_image(tmp_path / "none.jpg")
  with pytest.raises(ValueError, match="upload 3: the file is empty"):
    images.decode_image(b"", name="upload 3")


def test_postscript_is_not_run():
  with pytest.raises(ValueError, match="not a readable image"):
    images.decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
