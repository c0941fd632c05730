"""Scalars as TensorBoard event files, without a thread of their own.

tensorboardX's writer hands events to a thread over a short queue. If the thread
dies, as it does on a full disk, the queue fills up and the next scalar waits
for ever. Its event format is used here, its writer is not.
"""

import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from psvae_jax.writers.append_file import AppendFile


class EventFile:
  """One event file in `folder`, new for every start of a job.

  Args:
    folder: created when missing.
    purge_step: TensorBoard then hides the steps from this one on in the earlier
      files of the folder; None hides nothing.
  """

  def __init__(self, folder: Path, purge_step: int | None = None) -> None:
    from tensorboardX.proto import event_pb2  # late: readers do not need it

    self._event = event_pb2.Event
    folder.mkdir(parents=True, exist_ok=True)
    # TensorBoard reads files by name; restarts may follow within a second.
    now = time.time_ns()
    name = f"events.out.tfevents.{now // 10**9}.{socket.gethostname()}.{now}"
    self._file = AppendFile(folder / name)
    start = [self._event(wall_time=time.time(), file_version="brain.Event:2")]
    if purge_step is not None:
      log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
      start.append(
        self._event(wall_time=time.time(), step=purge_step, session_log=log)
      )
    self._start = b"".join(_record(event) for event in start)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Records scalars; raises OSError, and writes nothing, if it cannot."""
    event = self._event(wall_time=time.time(), step=step)
    for name, value in values.items():
      event.summary.value.add(tag=name, simple_value=value)
    # The first record counts only with what must come before it.
    self._file.append(self._start + _record(event))
    self._start = b""

  def close(self) -> None:
    self._file.close()


def _record(event) -> bytes:
  """TFRecord: length, its checksum, data, the data's checksum."""
  from tensorboardX.record_writer import masked_crc32c

  data = event.SerializeToString()
  size = struct.pack("<Q", len(data))
  return b"".join(
    (
      size,
      struct.pack("<I", masked_crc32c(size)),
      data,
      struct.pack("<I", masked_crc32c(data)),
    )
  )
