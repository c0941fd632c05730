"""Records that cannot be used: counted, named once in a file, limited.

`quarantine.jsonl` holds one JSON object a line and bad record: "split",
"source" (folder or data set), "index" and "path" in it, "kind" ("image" or
"caption"), "cause" and "time". Every process of a run appends to the same
file; a record that is in it already is not listed again.

Only bad records are held in memory, and at most as many as are allowed.
"""

import contextlib
import dataclasses
import datetime
import json
import logging
import math
import os
import pathlib
import threading
from collections.abc import Mapping
from typing import Any

try:
  import fcntl
except ImportError:  # Windows: one process a run
  fcntl = None

_LOGGED = 10  # records named in the log; the file names all
_EXAMPLES = 3
_MAX_CAUSE = 500


class CaptionError(ValueError):
  """A record's caption cannot be used; its image may be sound."""


class DataError(ValueError):
  """More of the data cannot be used than the config allows."""


@dataclasses.dataclass(frozen=True)
class Fault:
  """Why a record cannot be used.

  Attributes:
    kind: "image" or "caption".
    cause: one line for the user.
  """

  kind: str
  cause: str

  @classmethod
  def of(cls, error: Exception) -> "Fault":
    """What an error of a source says about the record."""
    kind = "caption" if isinstance(error, CaptionError) else "image"
    cause = " ".join((str(error) or type(error).__name__).split())
    return cls(kind, cause[:_MAX_CAUSE])


class Quarantine:
  """The bad records of one split, of which only so many are allowed.

  Safe to use from several threads. Every process of a run counts the records
  that it has read itself, so the limit is one of each host.

  Attributes:
    limit: how many there may be.
    file: where they are named; None keeps them in the log only.
  """

  def __init__(
    self,
    *,
    split: str,
    source: str,
    num_records: int,
    max_bad_share: float,
    file: str | os.PathLike[str] | None = None,
  ):
    """Starts empty: a record counts when this process finds it bad.

    Args:
      split: name of the split.
      source: name of the folder or data set.
      num_records: records of the split.
      max_bad_share: share of them that may be bad, in [0, 1).
      file: `quarantine.jsonl`, which may exist from an earlier run.
    """
    self.file = None if file is None else pathlib.Path(file)
    # The product of 0.29 and 100 lies below 29.
    self.limit = math.floor(max_bad_share * num_records + 1e-9)
    self._split, self._source = split, source
    self._num_records, self._max_bad_share = num_records, max_bad_share
    self._indices: set[int] = set()
    self._examples: list[str] = []
    self._num_logged = 0
    self._writer = None if file is None else _Writer(self.file)
    self._lock = threading.Lock()

  def __contains__(self, index: int) -> bool:
    return index in self._indices

  def __len__(self) -> int:
    return len(self._indices)

  def __getstate__(self) -> dict[str, Any]:
    return {k: v for k, v in self.__dict__.items() if k != "_lock"}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state, _lock=threading.Lock())

  def add(self, faults: Mapping[int, tuple[str, Fault]]) -> None:
    """Counts and lists records, those that are known already excepted.

    Args:
      faults: index → (path, fault).

    Raises:
      DataError: there are now more than `limit`.
    """
    with self._lock:
      new = {i: f for i, f in faults.items() if i not in self._indices}
      if not new:
        return
      self._indices.update(new)
      for path, fault in new.values():
        if len(self._examples) < _EXAMPLES:
          self._examples.append(f"{path} ({fault.cause})")
      entries = [self._entry(i, *fault) for i, fault in new.items()]
      if self._writer is not None:
        entries = self._writer.append(entries)
      self._log(entries)
      if len(self._indices) > self.limit:
        raise DataError(self._message())

  def _entry(self, index: int, path: str, fault: Fault) -> dict[str, Any]:
    now = datetime.datetime.now(datetime.UTC)
    return {
      "split": self._split,
      "source": self._source,
      "index": int(index),
      "path": path,
      "kind": fault.kind,
      "cause": fault.cause,
      "time": now.isoformat(timespec="seconds"),
    }

  def _log(self, entries: list[dict[str, Any]]) -> None:
    """Names the first few of those that no earlier process has named."""
    for entry in entries[: max(0, _LOGGED - self._num_logged)]:
      logging.warning(
        "Skipping %s of the %s split: %s",
        _printable(entry["path"]),
        self._split,
        _printable(entry["cause"]),
      )
    before, self._num_logged = self._num_logged, self._num_logged + len(entries)
    if before < _LOGGED <= self._num_logged:
      logging.warning(
        "Further bad records are %s.",
        "counted only"
        if self.file is None
        else f"named in {_printable(self.file)} only",
      )

  def _message(self) -> str:
    count, total = len(self._indices), self._num_records
    named = "" if self.file is None else f" They are named in {self.file}."
    return (
      f"{count} of the {total} records of the {self._split} split of "
      f"{self._source} cannot be used ({count / total:.3g} of them so far); "
      f"data.max_bad_share={self._max_bad_share:g} allows {self.limit}.{named} "
      "For example: " + "; ".join(self._examples) + ". Repair or remove the "
      "files (if they are there and sound: is the disk still mounted?), or "
      "allow more with --config.data.max_bad_share=SHARE."
    )


def read(file: str | os.PathLike[str]) -> list[dict[str, Any]]:
  """The entries of a `quarantine.jsonl`; none if there is no such file.

  A line that was cut off when its process was killed is left out, and a record
  that was listed twice counts once.
  """
  try:
    data = pathlib.Path(file).read_bytes()
  except OSError:
    return []
  first = {}
  for entry in _parse(data):
    first.setdefault(_key(entry), entry)
  return list(first.values())


def _parse(data: bytes) -> list[dict[str, Any]]:
  entries = []
  for line in data.splitlines():
    with contextlib.suppress(ValueError, KeyError, TypeError, OverflowError):
      entry = json.loads(line)
      _key(entry)
      entries.append(entry)
  return entries


def _printable(value: object) -> str:
  """Text that any log can hold: bytes that are not UTF-8 are written out."""
  return str(value).encode("utf-8", "backslashreplace").decode()


def _key(entry: Mapping[str, Any]) -> tuple[str, str, str, int, str]:
  """What makes two entries the same record."""
  return (
    str(entry["split"]),
    str(entry["source"]),
    str(entry["path"]),
    int(entry["index"]),
    str(entry["kind"]),
  )


class _Writer:
  """Appends entries to a file that other threads and processes append to.

  A file that cannot be written to costs the list, never the training: entries
  are kept and tried again with the next ones.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._pending: list[dict[str, Any]] = []
    self._known: set[tuple] = set()
    self._offset = 0  # up to which the file's entries are in `_known`
    self._has_warned = False

  def append(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns those of the entries that were not in the file."""
    self._pending += entries
    try:
      self._path.parent.mkdir(parents=True, exist_ok=True)
      flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
      descriptor = os.open(self._path, flags, 0o644)
      try:
        listed = self._flush(descriptor)
      finally:
        os.close(descriptor)
      return [entry for entry in entries if _key(entry) in listed]
    except OSError as error:
      if not self._has_warned:
        logging.warning(
          "Cannot write %s (%s); training goes on, bad records are counted.",
          _printable(self._path),
          _printable(error),
        )
      self._has_warned = True
      return entries

  def _flush(self, descriptor: int) -> set[tuple]:
    """Writes what is pending; returns the keys that the file lacked."""
    if fcntl is not None:
      # Some network file systems know no locks; there, a line may be torn or
      # listed twice, which readers bear.
      with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # until the file is closed
    size = os.fstat(descriptor).st_size
    ends_in_line = self._read_new(descriptor, size)
    new = {_key(entry): entry for entry in self._pending}
    new = {k: entry for k, entry in new.items() if k not in self._known}
    if new:
      lines = [json.dumps(entry) + "\n" for entry in new.values()]
      text = ("" if ends_in_line else "\n") + "".join(lines)
      data = text.encode()
      try:
        if os.write(descriptor, data) < len(data):
          raise OSError(f"no space for {len(data)} bytes")
      except OSError:
        os.ftruncate(descriptor, size)  # no half line
        raise
      size += len(data)
    self._known.update(new)
    self._pending.clear()
    self._offset = size
    return set(new)

  def _read_new(self, descriptor: int, size: int) -> bool:
    """Learns what others appended; whether the file ends with a whole line."""
    if size < self._offset:  # someone emptied it
      self._known.clear()
      self._offset = 0
    os.lseek(descriptor, self._offset, os.SEEK_SET)
    data = b""
    while chunk := os.read(descriptor, 1 << 20):
      data += chunk
    self._known.update(_key(entry) for entry in _parse(data))
    return not data or data.endswith(b"\n")
