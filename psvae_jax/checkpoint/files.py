"""The files of a checkpoint folder: checksums, damage, leftovers.

Orbax notices a truncated or missing file, but not a changed byte of array data:
it would resume from wrong weights without a word. So every checkpoint carries
`checksums.json`, with the size and CRC-32 of each file of its items. It is
written by the thread that saves, before the folder appears under its final
name, and training never waits for it. Checkpoints without one load unverified.
"""

import errno
import functools
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

CHECKSUMS_FILE = "checksums.json"
_DAMAGED = ".damaged"
_TEMPORARY = ".orbax-checkpoint-tmp"
_CHUNK_BYTES = 1 << 22
# Errors of a disk or a network that may pass, and the waits for it, seconds.
_PASSING = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN)
_WAITS = (0.1, 0.4, 1.5)
# Read errors of one file that have not passed; all others are the disk's.
_BROKEN_FILE = (errno.EIO, errno.EUCLEAN)
_T = TypeVar("_T")


class DamagedCheckpointError(Exception):
  """The files of one checkpoint are not what was saved; says how."""


def all_steps(folder: Path) -> list[int]:
  """Steps of the complete checkpoints in `folder`, newest first."""
  if not folder.is_dir():
    return []
  names = (child.name for child in folder.iterdir() if child.is_dir())
  return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def write_checksums(folder: Path, step: int) -> None:
  """Writes the checksums of checkpoint `step`, finished or about to be.

  Without room for them the checkpoint is good all the same, only unverified.

  Args:
    folder: where the checkpoints lie.
    step: the checkpoint.
  """
  final = folder / str(step)
  place = final if final.is_dir() else folder / f"{step}{_TEMPORARY}"
  path = place / CHECKSUMS_FILE
  temporary = place / f".{CHECKSUMS_FILE}"
  try:
    files = {
      file.relative_to(place).as_posix(): [file.stat().st_size, _crc32(file)]
      for file in _item_files(place)
    }
    with temporary.open("w", encoding="utf-8") as stream:
      json.dump(files, stream)
      stream.flush()
      os.fsync(stream.fileno())
    os.replace(temporary, path)
  except OSError:
    temporary.unlink(missing_ok=True)


def patiently(read: Callable[[], _T]) -> _T:
  """What `read` returns; it is called again where the error may pass."""
  for seconds in _WAITS:
    try:
      return read()
    except OSError as error:
      if error.errno not in _PASSING:
        raise
    time.sleep(seconds)
  return read()


def check_files(checkpoint: Path, contents: bool = True) -> bool:
  """Compares the files of one checkpoint with its checksums.

  Args:
    checkpoint: folder of one step.
    contents: read all of every file; False compares sizes.

  Returns:
    Whether there were checksums, and they were compared.

  Raises:
    DamagedCheckpointError: a file is missing, or is not the one saved.
  """
  path = checkpoint / CHECKSUMS_FILE
  if not path.exists():
    return False
  try:
    files = json.loads(patiently(path.read_bytes))
    expected = [(name, int(n), int(crc)) for name, (n, crc) in files.items()]
  except (ValueError, TypeError, AttributeError) as error:
    raise DamagedCheckpointError(f"{CHECKSUMS_FILE} is unreadable") from error
  # Sizes first: most damage shows without reading gigabytes.
  for name, size, _ in expected:
    file = checkpoint / name
    if not file.is_file():
      raise DamagedCheckpointError(f"{name} is missing")
    found = file.stat().st_size
    if found != size:
      raise DamagedCheckpointError(f"{name} has {found} bytes, saved {size}")
  if not contents:
    return False
  for name, _, crc in expected:
    try:
      intact = patiently(functools.partial(_crc32, checkpoint / name)) == crc
    except OSError as error:
      if error.errno not in _BROKEN_FILE:
        raise
      raise DamagedCheckpointError(f"{name}: {error.strerror}") from error
    if not intact:
      raise DamagedCheckpointError(f"{name} has changed since it was saved")
  return True


def set_aside(checkpoint: Path) -> Path:
  """Renames a damaged checkpoint, so that nothing takes it for a good one."""
  target = checkpoint.with_name(checkpoint.name + _DAMAGED)
  number = 1
  while target.exists():
    number += 1
    target = checkpoint.with_name(f"{checkpoint.name}{_DAMAGED}-{number}")
  checkpoint.rename(target)
  return target


def remove_partial(folder: Path) -> None:
  """Removes what saves that were killed, or failed, have left in `folder`.

  TensorStore may still be writing the other arrays of a save that has failed,
  so a folder that does not go at once is tried again for a moment.
  """
  for _ in range(10):
    partial = [
      child for child in folder.glob(f"*{_TEMPORARY}") if child.is_dir()
    ]
    if not partial:
      return
    for child in partial:
      shutil.rmtree(child, ignore_errors=True)
    if any(child.exists() for child in partial):
      time.sleep(0.1)


def _item_files(checkpoint: Path) -> list[Path]:
  """Files of the items; Orbax still edits its own beside them."""
  return sorted(
    file
    for item in checkpoint.iterdir()
    if item.is_dir()
    for file in item.rglob("*")
    if file.is_file()
  )


def _crc32(file: Path) -> int:
  value = 0
  with file.open("rb", buffering=0) as stream:
    while chunk := stream.read(_CHUNK_BYTES):
      value = zlib.crc32(chunk, value)
  return value
