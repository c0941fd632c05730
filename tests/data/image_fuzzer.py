"""Random mutations of image files, decoded one after the other.

    python tests/data/image_fuzzer.py --count=50000 --seed=0

Every input is fixed by (seed, number). Input n is decoded by `decode_image`,
which must return uint8 (H, W, 3) of at most `MAX_PIXELS` pixels or raise
ValueError. A crash, a hang or too much memory ends the process; `--progress`
is a file that then holds the number of the input, and `--only=n --save=FILE`
writes its bytes. At the end one JSON object is printed.
"""

import argparse
import collections
import faulthandler
import functools
import io
import json
import os
import pathlib
import resource
import struct
import sys
import time
import warnings
import zlib

import numpy as np
from PIL import Image

from psvae_jax.data import images

MAX_PIXELS = 1 << 19
SECONDS_PER_INPUT = 20
ADDRESS_SPACE = 3 << 30


def _picture(mode: str, size: tuple[int, int] = (24, 17)) -> Image.Image:
  rng = np.random.default_rng(7)
  coarse = rng.integers(0, 256, (5, 6, 4), np.uint8)
  image = Image.fromarray(coarse, "RGBA").resize(size, Image.Resampling.BICUBIC)
  if mode == "I;16":
    values = rng.integers(0, 1 << 16, size[::-1]).astype(np.uint16)
    return Image.fromarray(values)
  if mode == "PA":
    return image.quantize(16)
  return image.convert(mode)


def _save(image: Image.Image, file_format: str, **options) -> bytes:
  # Saving leaves marks on an image that mislead the next format.
  if "append_images" in options:
    others = [other.copy() for other in options["append_images"]]
    options = {**options, "append_images": others}
  buffer = io.BytesIO()
  image.copy().save(buffer, file_format, **options)
  return buffer.getvalue()


def _chunk(kind: bytes, data: bytes) -> bytes:
  crc = struct.pack(">I", zlib.crc32(kind + data))
  return struct.pack(">I", len(data)) + kind + data + crc


def _png_with(image: Image.Image, *chunks: bytes) -> bytes:
  data = _save(image, "PNG")
  return data[:33] + b"".join(chunks) + data[33:]


def _png_interlaced() -> bytes:
  """Adam7, grey; Pillow itself does not write it."""
  width, height = 13, 11
  rows = []
  starts = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4))
  starts += ((0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
  for x, y, step_x, step_y in starts:
    count = len(range(x, width, step_x))
    for row in range(y, height, step_y):
      if count:
        rows.append(b"\0" + bytes((row * 16 + i) % 256 for i in range(count)))
  header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)
  body = _chunk(b"IDAT", zlib.compress(b"".join(rows)))
  return (
    b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + body + _chunk(b"IEND", b"")
  )


@functools.cache
def seeds() -> dict[str, bytes]:
  """Small valid files of all formats, modes and ways to be odd."""
  rgb, rgba = _picture("RGB"), _picture("RGBA")
  exif = Image.Exif()
  exif[0x0112], exif[0x010E] = 6, "a picture"
  bomb = zlib.compress(bytes(1 << 20), 9)
  frames = [_picture("RGB"), Image.new("RGB", (24, 17), (9, 80, 200))]
  series = {"save_all": True, "append_images": frames[1:], "duration": 40}
  found = {
    f"jpeg {mode}": _save(_picture(mode), "JPEG")
    for mode in ("RGB", "L", "CMYK")
  }
  found |= {
    "jpeg progressive": _save(rgb, "JPEG", progressive=True, quality=60),
    "jpeg 444": _save(rgb, "JPEG", subsampling=0, optimize=True),
    "jpeg restarts": _save(rgb, "JPEG", restart_marker_blocks=1),
    "jpeg exif": _save(rgb, "JPEG", exif=exif, dpi=(72, 72), comment=b"hello"),
    "jpeg icc": _save(rgb, "JPEG", icc_profile=bytes(range(200))),
    "jpeg mpo": _save(rgb, "MPO", save_all=True, append_images=frames[1:]),
  }
  found |= {
    f"png {mode}": _save(_picture(mode), "PNG")
    for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "I;16")
  }
  found |= {
    "png interlaced": _png_interlaced(),
    "png transparent": _save(rgb, "PNG", transparency=(1, 2, 3)),
    "png exif": _save(rgb, "PNG", exif=exif),
    "png animated": _save(frames[0], "PNG", **series),
    "png iccp bomb": _png_with(rgb, _chunk(b"iCCP", b"a\0\0" + bomb)),
    "png ztxt bomb": _png_with(rgb, _chunk(b"zTXt", b"a\0\0" + bomb)),
    "png itxt": _png_with(rgb, _chunk(b"iTXt", b"a\0\1\0\0\0" + bomb)),
    "png chunks": _png_with(
      rgb,
      _chunk(b"gAMA", struct.pack(">I", 45455)),
      _chunk(b"sRGB", b"\0"),
      _chunk(b"pHYs", struct.pack(">IIB", 1, 1, 1)),
      _chunk(b"tEXt", b"Raw profile type exif\0\nexif\n4\n4d4d"),
    ),
  }
  found |= {
    "webp lossy": _save(rgb, "WEBP", quality=40),
    "webp lossless": _save(rgb, "WEBP", lossless=True),
    "webp alpha": _save(rgba, "WEBP", quality=40),
    "webp exif": _save(
      rgba, "WEBP", lossless=True, exif=exif, icc_profile=b"x"
    ),
    "webp animated": _save(frames[0], "WEBP", **series),
  }
  found |= {
    "gif": _save(_picture("P"), "GIF", transparency=3),
    "gif animated": _save(frames[0], "GIF", **series),
    "gif interlaced": _save(_picture("L"), "GIF", interlace=1),
    "bmp": _save(rgb, "BMP"),
    "bmp 1": _save(_picture("1"), "BMP"),
    "bmp P": _save(_picture("P"), "BMP"),
    "bmp RGBA": _save(rgba, "BMP"),
    "dib": _save(rgb, "DIB"),
    "tiff": _save(rgb, "TIFF"),
    "tiff 16": _save(_picture("I;16"), "TIFF"),
    "tiff RGBA": _save(rgba, "TIFF"),
    "tiff CMYK": _save(_picture("CMYK"), "TIFF"),
    "tiff exif": _save(rgb, "TIFF", exif=exif, compression="tiff_lzw"),
    "tiff pages": _save(rgb, "TIFF", save_all=True, append_images=frames[1:]),
    "tiff big": _save(rgb, "TIFF", big_tiff=True),
  }
  kinds = ("lzw", "adobe_deflate", "jpeg", "raw")
  found |= {
    f"tiff {kind}": _save(
      rgb, "TIFF", compression=kind if kind == "jpeg" else f"tiff_{kind}"
    )
    for kind in kinds
    if kind != "raw"
  }
  found["tiff group4"] = _save(_picture("1"), "TIFF", compression="group4")
  found["tiff packbits"] = _save(rgb, "TIFF", compression="packbits")
  return found


# Numbers that readers get wrong.
_EDGES = (0, 1, 2, 7, 8, 16, 127, 128, 255, 256, 4095, 32767, 32768, 65535)
_EDGES += (65536, 1 << 20, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)


def _flip(data: bytearray, rng) -> None:
  for _ in range(int(rng.choice((1, 1, 2, 4, 16)))):
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))


def _overwrite(data: bytearray, rng) -> None:
  count = int(rng.integers(1, 9))
  place = int(rng.integers(len(data)))
  values = bytes(rng.integers(0, 256, count, np.uint8))
  data[place : place + count] = values[: len(data) - place]


def _edge(data: bytearray, rng) -> None:
  """A number of 1 to 4 bytes, most often in the first hundred bytes."""
  near = rng.random() < 0.7
  place = int(rng.integers(min(len(data), 100) if near else len(data)))
  form = str(rng.choice(("<B", "<H", ">H", "<I", ">I")))
  size = struct.calcsize(form)
  value = int(rng.choice(_EDGES)) % (1 << 8 * size)
  data[place : place + size] = struct.pack(form, value)


def _truncate(data: bytearray, rng) -> None:
  del data[int(rng.integers(len(data))) :]


def _remove(data: bytearray, rng) -> None:
  place = int(rng.integers(len(data)))
  del data[place : place + int(rng.integers(1, 40))]


def _insert(data: bytearray, rng) -> None:
  place = int(rng.integers(len(data) + 1))
  count = int(rng.integers(1, 40))
  data[place:place] = bytes(rng.integers(0, 256, count, np.uint8))


def _duplicate(data: bytearray, rng) -> None:
  start = int(rng.integers(len(data)))
  part = data[start : start + int(rng.integers(1, 200))]
  place = int(rng.integers(len(data) + 1))
  data[place:place] = part * int(rng.choice((1, 1, 2, 30)))


def _splice(data: bytearray, rng) -> None:
  """The head of this file, the tail of another."""
  names = sorted(seeds())
  other = seeds()[names[rng.integers(len(names))]]
  cut = int(rng.integers(len(data)))
  data[cut:] = other[int(rng.integers(len(other))) :]


def _size_field(data: bytearray, rng) -> None:
  """Width and height where the format keeps them; a PNG's sum is mended."""
  value = rng.choice(_EDGES, 2)
  width, height = (int(v) for v in value)
  if data[:4] == b"\x89PNG" and len(data) > 33:
    data[16:24] = struct.pack(">II", width % 2**32, height % 2**32)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
  elif data[:2] == b"\xff\xd8":
    place = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2"))
    data[place + 5 : place + 9] = struct.pack(
      ">HH", height % 65536, width % 65536
    )
  elif data[:4] == b"RIFF":
    place = data.find(b"VP8X")
    if place >= 0:
      data[place + 12 : place + 18] = (width % 2**24).to_bytes(3, "little") + (
        height % 2**24
      ).to_bytes(3, "little")
    else:
      data[26:30] = struct.pack("<HH", width % 65536, height % 65536)
  elif data[:3] == b"GIF":
    data[6:10] = struct.pack("<HH", width % 65536, height % 65536)
  elif data[:2] == b"BM":
    data[18:26] = struct.pack("<II", width % 2**32, height % 2**32)
  else:
    _edge(data, rng)


def _png_chunk(data: bytearray, rng) -> None:
  """A chunk of a PNG repeated, moved, renamed, or false about its length."""
  starts, place = [], 8
  while place + 12 <= len(data):
    (length,) = struct.unpack_from(">I", data, place)
    starts.append((place, place + 12 + length))
    place += 12 + length
  if data[:4] != b"\x89PNG" or not starts:
    return _duplicate(data, rng)
  start, end = starts[rng.integers(len(starts))]
  part = data[start:end]
  choice = rng.integers(4)
  if choice == 0:
    part = part * int(rng.choice((2, 3, 50)))
  elif choice == 1:
    part[:4] = struct.pack(">I", int(rng.choice(_EDGES)))
  elif choice == 2 and len(part) > 12:
    body = bytearray(part[8:-4])
    _flip(body, rng)
    part = bytearray(_chunk(bytes(part[4:8]), bytes(body)))
  else:
    kinds = (b"IDAT", b"tRNS", b"PLTE", b"fcTL", b"fdAT", b"acTL", b"eXIf")
    part = bytearray(_chunk(kinds[rng.integers(7)], bytes(part[8:-4])))
  data[start:end] = part


def _mend(data: bytearray) -> None:
  """Makes check sums and the outermost length right again.

  Without this, readers refuse most inputs before they look inside.
  """
  if data[:4] == b"RIFF" and len(data) > 12:
    data[4:8] = struct.pack("<I", len(data) - 8)
  place = 8
  while data[:4] == b"\x89PNG" and place + 12 <= len(data):
    (length,) = struct.unpack_from(">I", data, place)
    end = place + 12 + length
    if end <= len(data):
      crc = zlib.crc32(data[place + 4 : end - 4])
      data[end - 4 : end] = struct.pack(">I", crc)
    place = end


_MUTATIONS = (
  *(_flip, _flip, _flip, _overwrite, _edge, _edge, _truncate, _remove),
  *(_insert, _duplicate, _splice, _size_field, _size_field, _png_chunk),
)


def mutant(seed: int, number: int) -> tuple[str, bytes]:
  """Name of the file that input `number` began as, and its bytes."""
  rng = np.random.default_rng([seed, number])
  names = sorted(seeds())
  # JPEG, PNG and WebP are three quarters of the inputs.
  wanted = ("jpeg", "png", "webp", "")[number % 4]
  names = [name for name in names if name.startswith(wanted)]
  name = names[rng.integers(len(names))]
  data = bytearray(seeds()[name])
  for _ in range(int(rng.choice((1, 1, 2, 3, 6)))):
    if data:
      _MUTATIONS[rng.integers(len(_MUTATIONS))](data, rng)
  if rng.random() < 0.7:
    _mend(data)
  return name, bytes(data)


def check(data: bytes) -> str:
  """Decodes one input; returns "decoded" or "refused"."""
  try:
    image = images.decode_image(data, name="input", max_pixels=MAX_PIXELS)
  except ValueError:
    return "refused"
  assert image.dtype == np.uint8 and image.ndim == 3, image.shape
  assert image.shape[2] == 3 and image.size > 0, image.shape
  assert image.shape[0] * image.shape[1] <= MAX_PIXELS, image.shape
  return "decoded"


def peak_mib() -> float:
  """Largest resident size of this process so far."""
  try:
    status = pathlib.Path("/proc/self/status").read_text()
  except OSError:
    # Counts the process that started this one, too.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  (line,) = (ln for ln in status.splitlines() if ln.startswith("VmHWM:"))
  return int(line.split()[1]) / 1024


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument("--count", type=int, default=2000)
  parser.add_argument("--start", type=int, default=0)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--only", type=int)
  parser.add_argument("--save", type=pathlib.Path)
  parser.add_argument("--progress", type=pathlib.Path)
  flags = parser.parse_args()
  if flags.only is not None:
    flags.start, flags.count = flags.only, 1
  if flags.save is not None:
    flags.save.write_bytes(mutant(flags.seed, flags.start)[1])
    return
  faulthandler.enable()
  warnings.simplefilter("ignore")
  for data in seeds().values():
    assert check(data) == "decoded"
  resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
  progress = flags.progress and os.open(
    flags.progress, os.O_WRONLY | os.O_CREAT | os.O_TRUNC
  )
  before, began = peak_mib(), time.monotonic()
  results, slowest = collections.Counter(), (0.0, -1)
  largest = before
  for number in range(flags.start, flags.start + flags.count):
    name, data = mutant(flags.seed, number)
    if progress:
      os.pwrite(progress, f"{number:12d}\n".encode(), 0)
    faulthandler.dump_traceback_later(SECONDS_PER_INPUT, exit=True)
    start = time.monotonic()
    result = check(data)
    slowest = max(slowest, (time.monotonic() - start, number))
    results[f"{name.split()[0]} {result}"] += 1
    if number % 100 == 0 and peak_mib() > largest + 20:
      largest = peak_mib()
      print(f"by {number} ({name}): {largest:.0f} MiB", file=sys.stderr)
  faulthandler.cancel_dump_traceback_later()
  totals = collections.Counter()
  for key, count in results.items():
    totals[key.split()[1]] += count
  print(
    json.dumps(
      {
        "inputs": flags.count,
        **totals,
        "by_format": dict(sorted(results.items())),
        "seconds": round(time.monotonic() - began, 1),
        "slowest_seconds": round(slowest[0], 3),
        "slowest_input": slowest[1],
        "peak_mib_before": round(before, 1),
        "peak_mib": round(peak_mib(), 1),
      }
    )
  )


if __name__ == "__main__":
  main()
