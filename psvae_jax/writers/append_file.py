"""A file that grows by whole records, also on a disk that is full."""

import contextlib
import os
from pathlib import Path


class AppendFile:
  """Appends records; one that does not fit leaves nothing behind.

  Nothing is buffered: what `append` has returned from survives the process.

  Args:
    path: created when missing.
  """

  def __init__(self, path: Path) -> None:
    self._file = Path(path).open("ab", buffering=0)
    self._end = os.fstat(self._file.fileno()).st_size

  def append(self, record: bytes) -> None:
    """Writes all of `record`, or raises OSError and writes nothing of it."""
    try:
      # A half record that could not be removed when it failed.
      self._drop_rest()
      rest = memoryview(record)
      while rest:
        rest = rest[self._file.write(rest) :]
    except OSError:
      with contextlib.suppress(OSError):
        self._drop_rest()
      raise
    self._end += len(record)

  def close(self) -> None:
    self._file.close()

  @property
  def closed(self) -> bool:
    return self._file.closed

  def _drop_rest(self) -> None:
    if os.fstat(self._file.fileno()).st_size > self._end:
      self._file.truncate(self._end)
