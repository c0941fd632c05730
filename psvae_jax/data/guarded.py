"""A source in which bad records are skipped, without moving any other.

A record that cannot be used is replaced by another of the same source. Which
one depends on the bad record's index alone (and on which records are bad), so
the stream of examples is the same for any number of threads and hosts, and
after a restart; every other position holds what it would hold anyway. The
candidates are spread over the whole source, so that a damaged folder is not
replaced by many copies of its neighbour.
"""

import errno
import hashlib
import itertools
import math
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from psvae_jax.data import quarantine

# Errors of a file system that may be gone a moment later, and how long to
# wait for that, seconds.
_TRANSIENT = frozenset(
  (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY)
)
_WAITS = (0.1, 1.0)
# Of the machine, not of a record.
_MACHINE = frozenset((errno.EMFILE, errno.ENFILE, errno.ENOMEM))
# Bytes, more than decoding the largest image that is allowed can need.
_ROOM = 4 << 30

_MIN_PATIENCE = 8
_FALSE_ALARM = 1e-9


class FallibleSource(Protocol):
  """Random access to records, some of which may be bad.

  Reading a bad record raises ValueError (`quarantine.CaptionError` for its
  caption) or OSError. MemoryError, and OSError for want of memory or file
  handles, are the machine's. Elements hold their own "index".

  Attributes:
    name: the folder or data set, for the user.
    faults: index → fault of the records that are known to be bad already.
  """

  name: str
  faults: dict[int, quarantine.Fault]

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> dict[str, Any]: ...

  def path(self, index: int) -> str:
    """What to call one record."""
    ...

  def is_available(self) -> bool:
    """Whether the data as a whole are there, e.g. their folder."""
    ...


class GuardedSource:
  """A source whose bad records are replaced and put in quarantine.

  Elements are those of the source; "index" and "path" tell which record they
  are.

  Attributes:
    source: the source itself.
    quarantine: the bad records met so far.
  """

  def __init__(
    self,
    source: FallibleSource,
    *,
    split: str,
    max_bad_share: float,
    file: Any = None,
  ):
    """Counts the records that are known to be bad; no image is read.

    Args:
      source: the source.
      split: name of the split.
      max_bad_share: share of its records that may be bad, in [0, 1).
      file: `quarantine.jsonl`; None counts and logs only.

    Raises:
      quarantine.DataError: too many records are known to be bad.
    """
    self.source = source
    self.quarantine = quarantine.Quarantine(
      split=split,
      source=source.name,
      num_records=len(source),
      max_bad_share=max_bad_share,
      file=file,
    )
    # So many bad records at random are next to impossible while the share
    # holds.
    self._patience = _MIN_PATIENCE
    if max_bad_share > 0:
      enough = math.log(_FALSE_ALARM) / math.log(max_bad_share)
      self._patience = max(_MIN_PATIENCE, math.ceil(enough))
    self.quarantine.add(
      {i: (source.path(i), fault) for i, fault in source.faults.items()}
    )

  def __len__(self) -> int:
    return len(self.source)

  def __repr__(self) -> str:
    return f"GuardedSource({self.source!r})"

  @property
  def num_classes(self) -> int:
    """Classes of the records, 0 without; their "label" is one of them."""
    return getattr(self.source, "num_classes", 0)

  def path(self, index: int) -> str:
    """What to call one record."""
    return self.source.path(index)

  def __getitem__(self, index: int) -> dict[str, Any]:
    """The record, or its replacement if it is bad.

    Raises:
      IndexError: there is no such record.
      quarantine.DataError: more records are bad than allowed, or the data are
        gone.
      MemoryError, OSError: the machine lacks memory or file handles; no
        record is to blame.
    """
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} is outside [0, {len(self)})")
    found: dict[int, tuple[str, quarantine.Fault]] = {}
    for candidate in self._candidates(index):
      if candidate in self.quarantine or candidate in found:
        continue
      try:
        element = self._read(candidate)
      except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno in _MACHINE:
          raise
        fault = quarantine.Fault.of(error)
        found[candidate] = (self.source.path(candidate), fault)
        self._check(found)
      else:
        self.quarantine.add(found)
        return element
    raise quarantine.DataError(f"{self.source.name}: no record can be used.")

  def read(self, index: int) -> dict[str, Any] | None:
    """The record; None if it is bad. Errors as `__getitem__`."""
    if index in self.quarantine:
      return None
    # A bad record's replacement is read for one reason: it tells a bad record
    # from a disk that is gone.
    element = self[index]
    return element if int(element["index"]) == index else None

  def _candidates(self, index: int) -> Iterator[int]:
    """The record itself, then others at random, in the end all of them."""
    yield index
    count = len(self)
    for attempt in range(2 * self._patience):
      digest = hashlib.blake2b(f"{index}:{attempt}".encode(), digest_size=8)
      yield int.from_bytes(digest.digest(), "little") % count
    yield from itertools.chain(range(index + 1, count), range(index))

  def _read(self, index: int) -> dict[str, Any]:
    for wait in _WAITS:
      try:
        return self.source[index]
      except OSError as error:
        if error.errno not in _TRANSIENT:
          raise
      except MemoryError:
        pass  # other threads may give some back
      time.sleep(wait)
    try:
      return self.source[index]
    except MemoryError as error:
      raise self._without_memory(index) from error

  def _without_memory(self, index: int) -> Exception:
    """The machine's fault, or a record's that asks for more than it may."""
    path = self.source.path(index)
    try:
      np.empty(_ROOM, np.uint8)  # reserved only, never written to
    except MemoryError:
      return MemoryError(
        f"Reading {path} of {self.source.name} failed for want of memory. "
        "Give the job more, or lower data.num_threads and data.prefetch."
      )
    return ValueError(
      f"{path}: decoding it needs more than {_ROOM >> 30} GiB of memory."
    )

  def _check(self, found: dict[int, tuple[str, quarantine.Fault]]) -> None:
    """Stops a search that cannot end well.

    What was found is not put in quarantine where the data as a whole are
    gone: those records are not bad.
    """
    _, (path, fault) = next(iter(found.items()))
    if not self.source.is_available():
      raise quarantine.DataError(
        f"{self.source.name} is not there any more: the disk or its mount "
        f"is gone. Reading {path} failed ({fault.cause}). Bring it back and "
        "start the same command again."
      )
    if len(self.quarantine) + len(found) > self.quarantine.limit:
      self.quarantine.add(found)  # raises, unless another thread knew them
    if len(found) >= self._patience:
      raise quarantine.DataError(
        f"{len(found)} records of {self.source.name}, taken at random, could "
        f"not be read, one after the other; the first was {path} "
        f"({fault.cause}). The disk or its mount is probably gone, or the "
        "whole data set is damaged. Bring it back and start the same command "
        "again."
      )
