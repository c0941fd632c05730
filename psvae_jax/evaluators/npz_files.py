"""Arrays in .npz files: read without trust, written in one step.

Nothing is unpickled, and no header is believed before the file's size bears
it out. Large arrays are never held as a whole: `Header` says where one lies,
and `write_npz` takes batches of one.
"""

import contextlib
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

import numpy as np

_LOCAL_HEADER = 30


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
    NpzError: it is damaged, or holds Python objects.
  """
  path = Path(path)
  found = {}
  with open_archive(path) as archive:
    for info in archive.infolist():
      name = info.filename.removesuffix(".npy")
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
    with explained(path, name), archive.open(info) as file:
      version = np.lib.format.read_magic(file)
      read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
      }.get(version)
      if read is None:
        raise ValueError(f"its format version {version} is not known")
      shape, is_fortran, dtype = read(file)
      length = file.tell()
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
      raise NpzError(f"{path}: {name} is compressed in a way that is not known")
    if dtype.hasobject:
      raise NpzError(
        f"{path}: {name} holds Python objects (a pickle), which are never "
        "read; save it as a plain array of numbers"
      )
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or size != info.file_size - length:
      raise NpzError(
        f"{path}: the header of {name} states {dtype} {shape}, {size} bytes, "
        f"but there are {info.file_size - length}; the file is damaged"
      )
    offset = None
    if info.compress_type == zipfile.ZIP_STORED:
      offset = _data_offset(path, info) + length
    is_fortran = is_fortran and len(shape) > 1
    return cls(path, name, shape, dtype, is_fortran, offset, length)

  def check_images(self) -> None:
    """Raises NpzError unless this is uint8 (N, H, W, 3)."""
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
      return
    hint = ""
    if len(self.shape) == 4 and self.shape[1] == 3:
      hint = "; channels come last: numpy.transpose(x, (0, 2, 3, 1))"
    raise NpzError(
      f"{self.path}: {self.name} must hold images uint8 (N, H, W, 3), got "
      f"{self.dtype} {self.shape}{hint}"
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
  size = math.prod(header.shape) * header.dtype.itemsize
  if size > most:
    raise NpzError(
      f"{path}: {name} is {header.dtype} {header.shape}, {size} bytes, more "
      f"than the {most} that are read"
    )
  with explained(path, name), archive.open(header.member) as file:
    file.read(header.length)
    data = file.read(size)
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
  except (zipfile.BadZipFile, ValueError, EOFError) as error:
    raise NpzError(
      f"{path} is not a readable .npz ({error}); a single array (.npy) or a "
      "pickle must be saved with numpy.savez first"
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
  except (
    ValueError,
    SyntaxError,
    TypeError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
  ) as error:
    said = " ".join(str(error).split()) or type(error).__name__
    raise NpzError(f"{path}: {name} cannot be read ({said})") from error


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
