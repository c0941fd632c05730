"""Whose fault is it that a checkpoint cannot be read or written?"""

import contextlib
import errno
import re
from collections.abc import Iterator

import jax

from psvae_jax.checkpoint.files import DamagedCheckpointError
from psvae_jax.checkpoint.fit import CheckpointError

# None of them says anything about the files on the disk.
_NOT_THE_FILES = (MemoryError, jax.errors.JaxRuntimeError, CheckpointError)
# Something else than the file that was saved is in its place.
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


@contextlib.contextmanager
def reading(what: str, verified: bool) -> Iterator[None]:
  """Blames the files for any failure, unless they are known to be intact.

  Args:
    what: is read within the block; named in errors.
    verified: whether the checksums were compared.

  Raises:
    DamagedCheckpointError: the checkpoint before this one is to be tried.
    CheckpointError: the disk refuses to be read, which may pass; or the files
      are those saved, and do not fit.
  """
  try:
    yield
  except (*_NOT_THE_FILES, DamagedCheckpointError):
    raise
  except Exception as error:
    if _is_the_disk(error):
      raise CheckpointError(
        f"{what} of the checkpoint cannot be read ({short_reason(error)}). "
        "That is the disk's trouble, and the checkpoint may be sound: check "
        "the disk or mount, then run the same command again."
      ) from error
    if verified:
      raise CheckpointError(
        f"{what} of the checkpoint does not fit this job, though its files are "
        f"as they were saved: {short_reason(error)}. Was the config changed? "
        "Use the one it was written with, or another --workdir."
      ) from error
    raise DamagedCheckpointError(f"{what} cannot be read") from error


def could_not_write(error: Exception) -> bool:
  """Whether a save failed for lack of a disk, not for a fault in the program.

  TensorStore raises ValueError for everything; its text tells.
  """
  signs = ("Error writing", "Failed writing", "Input/output error")
  return (
    isinstance(error, OSError)
    or _disk_is_full(error)
    or any(sign in str(error) for sign in signs)
  )


def short_reason(error: Exception) -> str:
  """The error in a few words: TensorStore's text is a page."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  if _disk_is_full(error):
    return "No space left on device"
  text = " ".join(str(error).split())
  return text if len(text) <= 200 else text[:200] + " …"


def say(message: str) -> None:
  """One line for the user, from one process."""
  if jax.process_index() == 0:
    print(message, flush=True)


def _is_the_disk(error: Exception) -> bool:
  """Whether a read failed for another reason than a missing file."""
  if isinstance(error, OSError) and error.errno is not None:
    return error.errno not in _NOT_THERE
  # TensorStore: "… Input/output error [os_error_code='5'] …".
  found = re.search(r"os_error_code='(\d+)'", str(error))
  return found is not None and int(found[1]) not in _NOT_THERE


def _disk_is_full(error: Exception) -> bool:
  text = str(error)
  return any(
    sign in text
    for sign in ("RESOURCE_EXHAUSTED", "No space left", "quota exceeded")
  )
