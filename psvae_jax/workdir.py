"""One run a workdir: a second one is refused before it can do any harm.

The lock is the operating system's (`flock`), so a killed run leaves none. Where
the file system has no such locks, the run says so and goes on without.
"""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import shlex
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

LOCK_FILE = ".lock"
_NO_LOCKS = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK)


class WorkdirError(OSError):
  """A workdir cannot be used; the message says why and what to do."""


class WorkdirBusyError(WorkdirError):
  """Another run uses the workdir."""


@contextlib.contextmanager
def workdir_lock(workdir: Path, *, enabled: bool = True) -> Iterator[None]:
  """Holds `workdir` for this process while the block runs.

  Args:
    workdir: the job's folder; created when missing.
    enabled: False on every process but the first: nothing is touched.

  Raises:
    WorkdirBusyError: another run holds it, which is named.
    WorkdirError: it is no folder, or cannot be written to.
  """
  if not enabled:
    yield
    return
  workdir = Path(workdir)
  with _open_lock(workdir) as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise _busy(workdir) from None
    except OSError as error:
      if error.errno not in _NO_LOCKS:
        raise
      print(
        f"warning: the file system of {workdir} has no locks "
        f"({error.strerror}), so a second run there would not be noticed: "
        "start only one",
        flush=True,
      )
    _write_holder(file)
    try:
      yield
    finally:
      # The file stays: removing it would let two runs lock two files.
      file.truncate(0)


def _open_lock(workdir: Path) -> IO[bytes]:
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    # Unbuffered: text that a full disk refuses must not be tried again later.
    return (workdir / LOCK_FILE).open("ab", buffering=0)
  except OSError as error:
    if isinstance(error, (FileExistsError, NotADirectoryError)):
      why = "it, or a folder above it, is a file"
    else:
      why = error.strerror or str(error)
    raise WorkdirError(
      f"cannot write to the workdir {workdir}: {why}. Choose another --workdir."
    ) from error


def _write_holder(file: IO[bytes]) -> None:
  """Writes who holds the lock; on a full disk it is held without a name."""
  now = datetime.datetime.now().astimezone()
  holder = {
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "started": now.isoformat(sep=" ", timespec="seconds"),
    "command": shlex.join(sys.orig_argv),
  }
  with contextlib.suppress(OSError):
    file.truncate(0)
    file.write(json.dumps(holder).encode())


def _busy(workdir: Path) -> WorkdirBusyError:
  try:
    holder = json.loads((workdir / LOCK_FILE).read_text(encoding="utf-8"))
    who = (
      f"process {holder['pid']} on {holder['host']}, started "
      f"{holder['started']} as: {holder['command']}"
    )
  except (OSError, ValueError, KeyError, TypeError):
    who = "a process that has not written its name"
  return WorkdirBusyError(
    f"the workdir {workdir} is in use by another run ({who}). Wait for it, "
    "stop it, or choose another --workdir."
  )
