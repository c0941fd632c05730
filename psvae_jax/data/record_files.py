"""Files of examples as safetensors bytes, one record each, in ArrayRecord.

A file appears under its name when it is complete, and not before. ArrayRecord
checks a hash of every record that it reads, so a changed byte does not go
unnoticed; but it takes a file without its end for an empty one.
"""

import errno
import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from array_record.python import array_record_module

TEMPORARY = ".tmp"

# What a record's tensors may be, in safetensors' names.
_DTYPES = {
  "F32": np.dtype(np.float32),
  "F16": np.dtype(np.float16),
  "BF16": np.dtype(jnp.bfloat16),
  "I64": np.dtype(np.int64),
  "I32": np.dtype(np.int32),
  "U8": np.dtype(np.uint8),
  "BOOL": np.dtype(np.bool_),
}
# Latents hardly compress, and without compression reading is faster.
_WRITER_OPTIONS = "group_size:1,uncompressed"
# One record at a time, from anywhere in the file.
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_READER_BUFFER_BYTES = 32768


class RecordWriter:
  """Writes one file: under a temporary name, renamed by `close`.

  Args:
    path: the file. What a killed job has left of it is removed.

  Raises:
    OSError: here and in the methods: it cannot be written, e.g. for want of
      room.
  """

  def __init__(self, path: Path) -> None:
    self._path = path
    self._temporary = path.with_name(f".{path.name}{TEMPORARY}")
    self._temporary.unlink(missing_ok=True)
    self._temporary.touch()  # an error here says more than ArrayRecord's
    self._writer = array_record_module.ArrayRecordWriter(
      str(self._temporary), _WRITER_OPTIONS
    )

  def write(self, record: bytes) -> None:
    with _os_errors(self._temporary):
      self._writer.write(record)

  def close(self) -> None:
    """Completes the file: its content is on the disk for certain."""
    with _os_errors(self._temporary):
      self._writer.close()
    with self._temporary.open("rb") as stream:
      os.fsync(stream.fileno())
    os.replace(self._temporary, self._path)


def open_reader(path: Path) -> Any:
  """A reader of single records from anywhere in a file.

  Raises:
    RuntimeError: the file cannot be read.
  """
  return array_record_module.ArrayRecordReader(
    str(path),
    options=_READER_OPTIONS,
    file_reader_buffer_size=_READER_BUFFER_BYTES,
  )


def num_records(path: Path) -> int:
  """Records of a file; 0 or −1 if it has been cut or cannot be read."""
  try:
    reader = open_reader(path)
    count = reader.num_records()
    reader.close()
  except RuntimeError:
    return -1
  return count


def encode(element: Mapping[str, Any]) -> bytes:
  """Arrays and numbers by name → a record."""
  return safetensors.numpy.save(
    {name: np.asarray(value, order="C") for name, value in element.items()}
  )


def decode(record: bytes) -> dict[str, np.ndarray]:
  """The inverse of `encode`; the arrays are read-only.

  Raises:
    ValueError: not a record.
  """
  # The layout: length of the header, header, tensors. There are few headers
  # and many records, and reading a header costs more than all the rest.
  start = 8 + int.from_bytes(record[:8], "little")
  return {
    name: np.frombuffer(record, dtype, count, start + offset).reshape(shape)
    for name, dtype, shape, count, offset in _layout(record[8:start])
  }


@functools.lru_cache(maxsize=1024)
def _layout(header: bytes) -> list[tuple[str, np.dtype, tuple, int, int]]:
  """Name, dtype, shape, number of values and offset of a record's tensors."""
  try:
    return [
      (
        name,
        _DTYPES[tensor["dtype"]],
        tuple(tensor["shape"]),
        math.prod(tensor["shape"]),
        tensor["data_offsets"][0],
      )
      for name, tensor in json.loads(header).items()
    ]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(f"no header of safetensors: {error}") from error


@contextmanager
def _os_errors(path: Path) -> Iterator[None]:
  """ArrayRecord's RuntimeErrors as the OSErrors that they stand for."""
  try:
    yield
  except RuntimeError as error:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOENT):
      if os.strerror(number) in str(error):
        raise OSError(number, os.strerror(number), str(path)) from error
    raise OSError(errno.EIO, str(error), str(path)) from error
