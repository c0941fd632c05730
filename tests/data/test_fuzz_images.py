"""Damaged and hostile image bytes: an array or a ValueError, nothing else."""

import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from psvae_jax.data import images

FUZZER = pathlib.Path(__file__).with_name("image_fuzzer.py")


def fuzz(tmp_path, count: int, seed: int, timeout: float) -> dict:
  """Runs the fuzzer in a process of its own: a crash must not be ours."""
  progress = tmp_path / "progress"
  command = [sys.executable, str(FUZZER), f"--count={count}", f"--seed={seed}"]
  command.append(f"--progress={progress}")
  # Threads of numerical libraries would reserve address space.
  environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
  done = subprocess.run(
    command, env=environment, capture_output=True, text=True, timeout=timeout
  )
  assert done.returncode == 0, (
    f"seed {seed}, input {progress.read_text()}, exit {done.returncode}: "
    + done.stderr[-3000:]
  )
  result = json.loads(done.stdout)
  assert result["inputs"] == count
  assert result["decoded"] + result["refused"] == count
  # Neither are most inputs harmless, nor do they all die at the door.
  assert result["decoded"] > count // 20 and result["refused"] > count // 20
  for name in ("jpeg", "png", "webp"):
    assert result["by_format"][f"{name} decoded"] > count // 200
  # A picture of half a million pixels needs some 20 bytes a pixel.
  assert result["peak_mib"] - result["peak_mib_before"] < 100
  assert result["slowest_seconds"] < 10
  return result


def test_two_thousand_mutants(tmp_path):
  fuzz(tmp_path, 2000, seed=0, timeout=120)


@pytest.mark.slow
def test_sixty_thousand_mutants(tmp_path):
  print(fuzz(tmp_path, 60_000, seed=2, timeout=600))


@pytest.mark.parametrize("damage", ["crash", "hang", "memory", "error"])
def test_the_fuzzer_sees_what_it_looks_for(tmp_path, damage):
  """Each kind of failure, put into the decoder, ends the run."""
  broken = {
    "crash": "import os; os.abort()",
    "hang": "import time; time.sleep(60)",
    "memory": "import numpy; numpy.ones(1 << 29)",
    "error": "raise KeyError('x')",
  }[damage]
  script = tmp_path / "broken.py"
  script.write_text(
    "import sys, runpy\n"
    "from psvae_jax.data import images\n"
    "decode, calls = images.decode_image, []\n"
    "def decode_image(*args, **kwargs):\n"
    "  calls.append(1)\n"
    "  if len(calls) == 100:\n"
    f"    {broken}\n"
    "  return decode(*args, **kwargs)\n"
    "images.decode_image = decode_image\n"
    "sys.argv = sys.argv[1:]\n"
    "import importlib.util\n"
    "spec = importlib.util.spec_from_file_location('fuzzer', sys.argv[0])\n"
    "fuzzer = importlib.util.module_from_spec(spec)\n"
    "spec.loader.exec_module(fuzzer)\n"
    "fuzzer.SECONDS_PER_INPUT = 1\n"
    "fuzzer.main()\n"
  )
  progress = tmp_path / "progress"
  done = subprocess.run(
    [sys.executable, str(script), str(FUZZER)]
    + ["--count=60", f"--progress={progress}"],
    env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    capture_output=True,
    timeout=60,
  )
  assert done.returncode != 0
  assert 0 < int(progress.read_text()) < 60


# What mutation and thought have found, as bytes.


def encoded(image: Image.Image, file_format: str, **options) -> bytes:
  buffer = io.BytesIO()
  image.save(buffer, file_format, **options)
  return buffer.getvalue()


def tiff_of_one_tile(width: int, length: int) -> bytes:
  """16 × 16 pixels, cut from a tile of `width` × `length` zeros."""
  packer = zlib.compressobj(9)
  row = bytes(width * 3)
  tile = b"".join(packer.compress(row) for _ in range(length)) + packer.flush()
  tags = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 2), (277, 3)]
  tags += [(322, width), (323, length), (324, 8 + 2 + 10 * 12 + 4)]
  tags += [(325, len(tile))]
  entries = b"".join(struct.pack("<HHII", tag, 4, 1, v) for tag, v in tags)
  directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
  return b"II*\0" + struct.pack("<I", 8) + directory + tile


def test_tiff_tile_larger_than_any_image_is_refused():
  """One of 25600 × 25600 took 1.9 GB for an image of 16 × 16."""
  data = tiff_of_one_tile(256, 256)
  assert images.decode_image(data).shape == (16, 16, 3)
  with pytest.raises(ValueError, match="tiles of 256 × 256 pixels exceed"):
    images.decode_image(data, max_pixels=65535)


def jpeg_of_many_scans(scans: int) -> bytes:
  data = encoded(Image.new("L", (64, 64), 99), "JPEG", progressive=True)
  last = data.rindex(b"\xff\xda")
  return data[:-2] + data[last:-2] * scans + data[-2:]


def test_jpeg_of_thousands_of_scans_is_refused():
  """At 9000 × 9000 a scan costs 14 ms and 90 bytes: a megabyte, minutes."""
  assert images.decode_image(jpeg_of_many_scans(400)).shape == (64, 64, 3)
  with pytest.raises(ValueError, match="more than 500 scans"):
    images.decode_image(jpeg_of_many_scans(600))


def test_scans_are_not_counted_in_metadata_or_behind_the_image():
  marks = b"\xff\xda" * 600
  plain = encoded(Image.new("L", (64, 64), 99), "JPEG")
  comment = b"\xff\xfe" + struct.pack(">H", 2 + len(marks)) + marks
  data = plain[:2] + comment + plain[2:] + marks  # as a phone adds its film
  np.testing.assert_array_equal(
    images.decode_image(data), images.decode_image(plain)
  )


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt"])
def test_compressed_metadata_is_not_inflated(kind):
  """100 MB of zeros in 100 kB beside the pixels."""
  data = encoded(Image.new("RGB", (8, 8)), "PNG")
  body = b"a\0\0" + zlib.compress(bytes(100 << 20), 9)
  crc = struct.pack(">I", zlib.crc32(kind + body))
  chunk = struct.pack(">I", len(body)) + kind + body + crc
  data = data[:33] + chunk + data[33:]
  code = (
    "import sys\n"
    f"sys.path.insert(0, {str(FUZZER.parent)!r})\n"
    "import image_fuzzer\n"
    "data, before = sys.stdin.buffer.read(), image_fuzzer.peak_mib()\n"
    "image_fuzzer.check(data)\n"
    "print(image_fuzzer.peak_mib() - before)\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], input=data, check=True, capture_output=True
  )
  assert float(done.stdout) < 20


def webp_canvas(width: int, height: int) -> bytes:
  frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
  data = bytearray(
    encoded(frames[0], "WEBP", save_all=True, append_images=frames[1:])
  )
  place = data.index(b"VP8X") + 12
  data[place : place + 3] = (width - 1).to_bytes(3, "little")
  data[place + 3 : place + 6] = (height - 1).to_bytes(3, "little")
  return bytes(data)


def with_size(file_format: str, width: int, height: int) -> bytes:
  """A picture of 8 × 8 whose header says otherwise."""
  data = bytearray(encoded(Image.new("RGB", (8, 8)), file_format))
  if file_format == "PNG":
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
  elif file_format == "JPEG":
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
  elif file_format == "GIF":
    data[6:10] = struct.pack("<HH", width, height)
  else:
    data[18:26] = struct.pack("<II", width, height)
  return bytes(data)


@pytest.mark.filterwarnings("ignore:Image size")
@pytest.mark.parametrize(
  "data",
  [
    webp_canvas(1 << 14, 1 << 14),
    webp_canvas(1 << 16, (1 << 16) - 1),
    *(with_size(f, 60_000, 60_000) for f in ("PNG", "JPEG", "GIF", "BMP")),
    # Between our limit and the one where Pillow refuses by itself.
    *(with_size(f, 9500, 9500) for f in ("PNG", "JPEG", "GIF", "BMP")),
    webp_canvas(9500, 9500),
    with_size("PNG", (1 << 31) - 1, 1),
    with_size("BMP", (1 << 31) - 1, 2),
  ],
)
def test_large_size_in_a_small_file_is_refused_from_the_header(
  data, monkeypatch
):
  def refuse(*args, **kwargs):
    raise AssertionError("pixels were decoded")

  monkeypatch.setattr("PIL.ImageFile.ImageFile.load", refuse)
  with pytest.raises(ValueError, match="pixels|not a readable image"):
    images.decode_image(data)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP"])
@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_images_without_pixels_are_refused(file_format, size):
  with pytest.raises(ValueError, match="image"):
    images.decode_image(with_size(file_format, *size))
