"""Arrays in .npz files: read without trust, written in one step.

Nothing is unpickled, and no header is believed before the file's size bears
it out. A compressed array may still be a thousand times its file: whoever reads
one says how much it may be. Large arrays are never held as a whole: `Header`
says where one lies, and `write_npz` takes batches of one.
"""

import contextlib
import io
import math
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np

MAX_SIDE = 1 << 13  # of an image, pixels; one takes 192 MiB

_LOCAL_HEADER = 30
_MAX_HEADER = 1 << 14  # of an array, bytes; numpy itself parses 10 000
_MAX_AXES = 32
_MAX_AXIS = 1 << 48
# Bytes out of one of the file: deflate makes 258 of two bits at best.
_RATIOS = {zipfile.ZIP_STORED: 1, zipfile.ZIP_DEFLATED: 258 * 4}
_SAID = 200  # characters of a library's message or of a type


class NpzError(ValueError):
  """An .npz cannot be used; the message names file and array."""


def write_npz(
  path: str | os.PathLike,
  arrays: Mapping[str, np.ndarray],
  streams: Mapping[str, tuple[tuple[int, ...], Iterable[np.ndarray]]] | None = (
    None
  ),
) -> None:
  """Writes an uncompressed .npz, whole or not at all.

  Args:
    path: the file, replaced in one step.
    arrays: name → array, of no Python objects.
    streams: name → (shape, batches along the first axis), uint8: arrays that
      need not fit in memory.

  Raises:
    ValueError: an array of Python objects, or batches of another shape.
  """
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "wb") as file:
      with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, array in arrays.items():
          with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(
              member, np.asanyarray(array), allow_pickle=False
            )
        for name, (shape, batches) in (streams or {}).items():
          with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
            _write_stream(member, shape, batches)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException as error:
    temporary.unlink(missing_ok=True)
    if isinstance(error, OSError) and error.errno and not error.filename:
      raise OSError(error.errno, error.strerror, str(path)) from error
    raise


def read_npz(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """All arrays of an .npz that `write_npz` wrote.

  Raises:
    NpzError: it is damaged, compressed, or holds Python objects.
  """
  path = Path(path)
  found = {}
  with open_archive(path) as archive:
    for info in archive.infolist():
      name = info.filename.removesuffix(".npy")
      if info.compress_type != zipfile.ZIP_STORED:
        raise NpzError(f"{path}: {name} is compressed; it is not ours")
      found[name] = read_array(path, archive, name, info.file_size)
  return found


class Header:
  """Where an array of an archive is, and its shape, without its values.

  Attributes:
    path: the archive.
    name: the array.
    member: its name in the archive.
    shape, dtype: of the array.
    is_fortran: stored column by column.
    offset: of the values in the file, bytes; None if they are compressed.
    length: of what precedes the values in the member, bytes.
    size: of the values, bytes.
  """

  def __init__(
    self,
    path: Path,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    is_fortran: bool,
    offset: int | None,
    length: int,
  ) -> None:
    self.path, self.name, self.shape, self.dtype = path, name, shape, dtype
    self.is_fortran = is_fortran
    self.offset, self.length = offset, length
    self.member = f"{name}.npy"
    self.size = math.prod(shape) * dtype.itemsize

  def __str__(self) -> str:
    return f"{_cut(self.dtype)} {self.shape}"

  @classmethod
  def read(cls, path: Path, archive: zipfile.ZipFile, name: str) -> "Header":
    """Reads and checks the header of one array.

    Raises:
      NpzError: there is no such array, it holds Python objects, or its size is
        not what the header says.
    """
    try:
      info = archive.getinfo(f"{name}.npy")
    except KeyError:
      raise NpzError(
        f"{path} has no array {name!r}; it has {_list_members(archive)}"
      ) from None
    ratio = _RATIOS.get(info.compress_type)
    if ratio is None:
      raise NpzError(f"{path}: {name} is compressed in a way that is not known")
    if (
      info.compress_size > path.stat().st_size
      or info.file_size > ratio * info.compress_size
    ):
      raise NpzError(
        f"{path}: {name} has {info.file_size} bytes, more than the file can "
        "hold; it is damaged"
      )
    with explained(path, name), archive.open(info) as file:
      # numpy reads as much as a header says of itself.
      start = io.BytesIO(file.read(_MAX_HEADER))
      version = np.lib.format.read_magic(start)
      read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
      }.get(version)
      if read is None:
        raise ValueError(f"its format version {version} is not known")
      shape, is_fortran, dtype = read(start)
      length = start.tell()
    if len(shape) > _MAX_AXES or not all(0 <= n <= _MAX_AXIS for n in shape):
      raise NpzError(f"{path}: the header of {name} states no possible shape")
    if dtype.hasobject:
      raise NpzError(
        f"{path}: {name} holds Python objects (a pickle), which are never "
        "read; save it as a plain array of numbers"
      )
    offset = None
    if info.compress_type == zipfile.ZIP_STORED:
      offset = _data_offset(path, info) + length
    is_fortran = is_fortran and len(shape) > 1
    header = cls(path, name, shape, dtype, is_fortran, offset, length)
    if header.size != info.file_size - length:
      raise NpzError(
        f"{path}: the header of {name} states {header}, {header.size} bytes, "
        f"but there are {info.file_size - length}; the file is damaged"
      )
    return header

  def check_size(self, most: int) -> None:
    """Raises NpzError if this is more than so many bytes."""
    if self.size > most:
      raise NpzError(
        f"{self.path}: {self.name} is {self}, {self.size} bytes, more than the "
        f"{most} that are read"
      )

  def check_images(self) -> None:
    """Raises NpzError unless this is uint8 (N, H, W, 3), H and W in bounds."""
    if self.is_fortran:
      raise NpzError(
        f"{self.path}: {self.name} is stored column by column; save it again "
        "with numpy.ascontiguousarray"
      )
    if (
      self.dtype == np.uint8
      and len(self.shape) == 4
      and self.shape[-1] == 3
      and min(self.shape) > 0
    ):
      if max(self.shape[1:3]) > MAX_SIDE:
        raise NpzError(
          f"{self.path}: the images of {self.name} are {self.shape[1]} × "
          f"{self.shape[2]}, {self}; a side may have {MAX_SIDE} pixels at most"
        )
      return
    hint = ""
    if len(self.shape) == 4 and self.shape[1] == 3:
      hint = "; channels come last: numpy.transpose(x, (0, 2, 3, 1))"
    raise NpzError(
      f"{self.path}: {self.name} must hold images uint8 (N, H, W, 3), got "
      f"{self}{hint}"
    )

  def memory_map(self) -> np.ndarray | None:
    """The values, read as they are used; None if they are compressed."""
    if self.offset is None:
      return None
    with explained(self.path, self.name):
      return np.memmap(
        self.path, self.dtype, "r", offset=self.offset, shape=self.shape
      )


def read_array(
  path: Path, archive: zipfile.ZipFile, name: str, most: int
) -> np.ndarray:
  """One array as a whole, of at most so many bytes."""
  header = Header.read(path, archive, name)
  header.check_size(most)
  with explained(path, name), archive.open(header.member) as file:
    file.read(header.length)
    data = file.read(header.size)
    # Copies: what frombuffer gives cannot be written to.
    values = np.frombuffer(data, header.dtype)
    if header.is_fortran:
      return values.reshape(header.shape[::-1]).T.copy()
    return values.reshape(header.shape).copy()


def _write_stream(
  member: IO[bytes], shape: tuple[int, ...], batches: Iterable[np.ndarray]
) -> None:
  header = {"descr": "|u1", "fortran_order": False, "shape": shape}
  np.lib.format.write_array_header_1_0(member, header)
  written = 0
  for batch in batches:
    if batch.dtype != np.uint8 or batch.shape[1:] != shape[1:]:
      raise ValueError(
        f"images of uint8 {shape} were announced, a batch is {batch.dtype} "
        f"{batch.shape}"
      )
    member.write(np.ascontiguousarray(batch).tobytes())
    written += len(batch)
  if written != shape[0]:
    raise ValueError(f"{shape[0]} images were announced, there were {written}")


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[zipfile.ZipFile]:
  """An open archive; what is none, or damaged, is a NpzError."""
  try:
    archive = zipfile.ZipFile(path)
  except Exception as error:  # the library has no common error class
    if getattr(error, "filename", None):
      raise  # of the system, and it names the file
    raise NpzError(
      f"{path} is not a readable .npz ({_cut(error)}); a single array (.npy) "
      "or a pickle must be saved with numpy.savez first"
    ) from error
  with archive:
    yield archive


@contextlib.contextmanager
def explained(path: Path, name: str) -> Iterator[None]:
  """Errors of readers, which have many types, as one that names the array."""
  try:
    yield
  except NpzError:
    raise
  except Exception as error:  # the libraries have no common error class
    if getattr(error, "filename", None):
      raise  # of the system, and it names the file
    said = _cut(error) or type(error).__name__
    raise NpzError(f"{path}: {name} cannot be read ({said})") from error


def _cut(value: object) -> str:
  """What an error quotes of a file: one line of a bearable length."""
  text = " ".join(str(value).split())
  return text if len(text) <= _SAID else f"{text[:_SAID]}…"


def _list_members(archive: zipfile.ZipFile) -> str:
  names = sorted(name.removesuffix(".npy") for name in archive.namelist())
  return ", ".join(names[:20]) or "no arrays"


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
  """Where a stored member begins in the file (APPNOTE.TXT 4.3.7)."""
  with open(path, "rb") as file:
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
  if len(header) < _LOCAL_HEADER or not header.startswith(b"PK\x03\x04"):
    raise NpzError(f"{path} is damaged: {info.filename} has no header")
  name, extra = struct.unpack("<HH", header[26:30])
  return info.header_offset + _LOCAL_HEADER + name + extra
