"""Keeps a failed save or restore from printing hundreds of lines.

Orbax logs the same failure from each of its threads with a traceback, and
TensorStore prints one more for every array, as the event loop that waited for
it is gone, and asyncio one for every task that failed beside the first. All of
it also arrives as one exception, which `checkpoint` puts in one line.
"""

import functools
import logging
import sys

from absl import logging as absl_logging


class _NoOrbaxTracebacks(logging.Filter):
  """Passes all but Orbax's errors, which come with --verbosity=0."""

  def filter(self, record: logging.LogRecord) -> bool:
    return (
      record.levelno < logging.ERROR
      or "orbax" not in record.pathname
      or absl_logging.get_verbosity() >= absl_logging.INFO
    )


class _NoOrbaxTasks(logging.Filter):
  """Passes all but asyncio's lines about tasks of Orbax that failed.

  TensorStore's futures, whose lines do not name it, fail by the disk's errors.
  """

  def filter(self, record: logging.LogRecord) -> bool:
    text = record.getMessage()
    error = record.exc_info[1] if record.exc_info else None
    return (
      "exception was never retrieved" not in text
      or not ("orbax" in text or isinstance(error, OSError))
      or absl_logging.get_verbosity() >= absl_logging.INFO
    )


@functools.cache
def silence() -> None:
  """Installs the filters, once a process."""
  absl_logging.get_absl_logger().addFilter(_NoOrbaxTracebacks())
  logging.getLogger("asyncio").addFilter(_NoOrbaxTasks())
  before = sys.unraisablehook

  def hook(unraisable) -> None:
    error = unraisable.exc_value
    lost_loop = isinstance(error, RuntimeError) and "Event loop is closed" in (
      str(error)
    )
    if not lost_loop:
      before(unraisable)

  sys.unraisablehook = hook
