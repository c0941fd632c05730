"""The safetensors format, read without trusting the file.

    8 bytes   length N of the header, little-endian
    N bytes   JSON: name → {"dtype", "shape", "data_offsets": [begin, end]}, and
              "__metadata__", strings by name
    the rest  the tensors' bytes, one after another, without gaps

The header is checked whole, against itself and the file's real size, before
anything is allocated for a tensor: memory is bounded by what the file really
holds, and nothing in it is ever executed.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

# Room for fifty thousand tensors; what Python makes of it stays below 200 MiB.
MAX_HEADER = 8 * 2**20

_DTYPES = {
  "BOOL": np.bool_,
  "U8": np.uint8,
  "I8": np.int8,
  "U16": np.uint16,
  "I16": np.int16,
  "U32": np.uint32,
  "I32": np.int32,
  "U64": np.uint64,
  "I64": np.int64,
  "F16": np.float16,
  "BF16": jnp.bfloat16,
  "F32": np.float32,
  "F64": np.float64,
  "F8_E4M3": jnp.float8_e4m3fn,
  "F8_E5M2": jnp.float8_e5m2,
}
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_AXES = 32  # numpy's own limit is 64, before version 2 it was 32
_MAX_NAME = 512
# What people put in place of weights, by its first bytes.
_OTHERS = (
  (b"PK\x03\x04", "it is a zip archive, as torch.save writes: never opened"),
  (b"\x80", "it is a pickle, which is never opened"),
  (b"version https://git-lfs", "it is a Git LFS pointer: run `git lfs pull`"),
  (b"<", "it is a web page"),
)


class _Malformed(Exception):
  """Why a file cannot be read; the caller knows its name."""


@dataclasses.dataclass(frozen=True)
class Entry:
  """One tensor of a header.

  Attributes:
    dtype: numpy's, or of JAX's extension types.
    shape: its axes.
    begin, end: its bytes, counted from the end of the header.
  """

  dtype: np.dtype
  shape: tuple[int, ...]
  begin: int
  end: int


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """Reads every tensor of a file, as it is stored.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it is a folder, truncated, malformed or lies about itself; one
      line that names the file and the reason.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    raise ValueError(f"{path} is a folder; it must be a safetensors file")
  if not path.is_file():  # nor a pipe or device, which could block
    raise FileNotFoundError(
      f"{path} is missing or no regular file; download the folder again"
    )
  try:
    with open(path, "rb") as file:
      entries, start = _read_header(file, os.fstat(file.fileno()).st_size)
      return {
        name: _read_tensor(file, start, entry)
        for name, entry in sorted(entries.items(), key=lambda x: x[1].begin)
      }
  except _Malformed as error:
    raise ValueError(
      f"{path} is truncated or not a safetensors file ({error}); download or "
      "copy it again"
    ) from error


def _read_header(file: BinaryIO, size: int) -> tuple[dict[str, Entry], int]:
  """(name → entry, where the data begin), all checked against each other."""
  first = file.read(8)
  if len(first) < 8:
    raise _Malformed(f"it has {size} bytes")
  length = int.from_bytes(first, "little")
  if length > min(MAX_HEADER, size - 8):
    file.seek(0)
    beginning = file.read(32)
    for magic, reason in _OTHERS:
      if beginning.startswith(magic):
        raise _Malformed(reason)
    raise _Malformed(
      f"its header claims {length:,} bytes; the file has {size:,}, and a "
      f"header at most {MAX_HEADER:,}"
    )
  raw = _parse_json(file.read(length))
  _check_metadata(raw.pop("__metadata__", {}))
  entries = {name: _entry(name, value) for name, value in raw.items()}
  _check_places(entries, size - 8 - length)
  return entries, 8 + length


def _parse_json(text: bytes) -> dict[str, Any]:
  def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
      raise _Malformed("its header names something twice")
    return found

  try:
    raw = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
  except (ValueError, RecursionError) as error:
    raise _Malformed("its header is not JSON") from error
  if not isinstance(raw, dict):
    raise _Malformed("its header is no JSON object")
  return raw


def _check_metadata(metadata: Any) -> None:
  if not isinstance(metadata, Mapping) or not all(
    isinstance(value, str) for value in metadata.values()
  ):
    raise _Malformed("__metadata__ of its header does not map text to text")


def _entry(name: str, raw: Any) -> Entry:
  """One tensor's row of the header, checked by itself."""
  if len(name) > _MAX_NAME or not name.isprintable():
    raise _Malformed("a tensor's name is too long or not printable")
  if not isinstance(raw, dict) or set(raw) != _FIELDS:
    raise _Malformed(f"{name!r} of its header has not {sorted(_FIELDS)}")
  kind, shape, offsets = (raw[k] for k in ("dtype", "shape", "data_offsets"))
  if not isinstance(kind, str) or kind not in _DTYPES:
    raise _Malformed(f"{name!r} has the unknown dtype {str(kind)[:40]!r}")
  if not _are_counts(shape) or len(shape) > _MAX_AXES:
    raise _Malformed(f"{name!r} has an impossible shape")
  if not _are_counts(offsets) or len(offsets) != 2:
    raise _Malformed(f"{name!r} has impossible offsets")
  dtype = np.dtype(_DTYPES[kind])
  # An empty tensor too: numpy counts the other axes in 64 bits.
  if math.prod(max(axis, 1) for axis in shape) * dtype.itemsize >= 2**62:
    raise _Malformed(f"{name!r} has an impossible shape")
  begin, end = offsets
  if math.prod(shape) * dtype.itemsize != end - begin:
    raise _Malformed(f"offsets of {name!r} do not fit its shape and dtype")
  return Entry(dtype, tuple(shape), begin, end)


def _are_counts(values: Any) -> bool:
  return isinstance(values, list) and all(
    type(value) is int and value >= 0 for value in values
  )


def _check_places(entries: Mapping[str, Entry], size: int) -> None:
  """The tensors lie one after another and fill the data of `size` bytes."""
  ordered = sorted(entries.items(), key=lambda x: (x[1].begin, x[1].end))
  place = 0
  for name, entry in ordered:
    if entry.begin != place:
      how = "overlaps another" if entry.begin < place else "comes after a gap"
      raise _Malformed(f"{name!r} {how}")
    place = entry.end
  if place != size:
    raise _Malformed(f"its tensors take {place:,} bytes, it has {size:,}")


def _read_tensor(file: BinaryIO, start: int, entry: Entry) -> np.ndarray:
  data = np.empty(entry.end - entry.begin, np.uint8)
  file.seek(start + entry.begin)
  if file.readinto(data) != data.size:
    raise _Malformed("it became shorter while it was read")
  return data.view(entry.dtype).reshape(entry.shape)
