"""Which checkpoint is used: the newest one that is usable.

With several processes the first one decides, and the others are told: each
would see the folder at another moment, and reading gigabytes for their
checksums is work for one.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from psvae_jax.checkpoint import files
from psvae_jax.checkpoint.faults import reading
from psvae_jax.checkpoint.files import DamagedCheckpointError
from psvae_jax.checkpoint.fit import CheckpointError, check_fingerprint

METADATA_FILE = "metadata"
_T = TypeVar("_T")
_MESSAGE_BYTES = 1 << 14


def has_checkpoint(folder: Path) -> bool:
  """Whether `folder` holds at least one complete checkpoint."""
  return bool(files.all_steps(Path(folder)))


def checked_latest_step(
  folder: Path,
  fingerprint: str,
  description: Mapping[str, Any] | None = None,
) -> int:
  """Newest usable step in `folder`, which must be of the model `fingerprint`.

  Reads little: metadata, and the sizes of the other files. That steps are
  passed over is said by whatever resumes there.

  Raises:
    CheckpointError: it belongs to another model, or none is usable.
  """
  folder = Path(folder).absolute()

  def check(step: int) -> None:
    with reading("the list of files", False):
      verified = files.check_files(folder / str(step), contents=False)
    metadata = read_metadata(folder, step, verified)
    check_fingerprint(metadata, fingerprint, description, folder)

  found = _first_good(folder, check, {})
  if found is None:
    raise CheckpointError(
      f"no checkpoint in {folder}: train the earlier stage first"
    )
  return found[0]


def newest_usable(
  folder: Path, read: Callable[[int, bool], _T]
) -> tuple[int, _T, list[tuple[int, str]]] | None:
  """Tries the checkpoints of `folder`, newest first.

  Args:
    folder: where checkpoints lie.
    read: called with a step and whether its files are known to be intact;
      raises DamagedCheckpointError if the one before is to be tried.

  Returns:
    The step, what `read` returned, and the damaged (step, why) passed over;
    None if there is no checkpoint at all.

  Raises:
    CheckpointError: all are damaged, or with several processes one of them
      cannot read what the first one has chosen.
  """
  damaged: dict[int, str] = {}

  def check(step: int) -> bool:
    with reading("a file", False):
      return files.check_files(folder / str(step))

  if jax.process_count() == 1:
    found = _first_good(folder, lambda step: read(step, check(step)), damaged)
    return found and (*found, list(damaged.items()))

  def choose() -> list[Any]:
    found = _first_good(folder, check, damaged)
    return [found, list(damaged.items())]

  found, passed_over = agree(choose)
  if found is None:
    return None
  step, verified = found
  try:
    result = read(step, verified)
  except DamagedCheckpointError as error:
    raise CheckpointError(
      f"process {jax.process_index()} cannot read step {step} in {folder} "
      f"({error}). All processes need the same folder; if it is the same, move "
      f"{step} out of it, and the same command takes the step before."
    ) from error
  return step, result, [(int(bad), why) for bad, why in passed_over]


def agree(decide: Callable[[], Any]) -> Any:
  """What the first process decides, on every process.

  Args:
    decide: called on the first process only; returns what JSON can hold.

  Raises:
    CheckpointError: the first process could not; it raises its own error.
  """
  if jax.process_count() == 1:
    return decide()
  from jax.experimental import multihost_utils

  message, error = np.zeros(_MESSAGE_BYTES, np.uint8), None
  if jax.process_index() == 0:
    try:
      said = np.frombuffer(json.dumps(decide()).encode(), np.uint8)
      message[: len(said)] = said
    except Exception as caught:  # the others must not wait for ever
      error = caught
  message = np.asarray(multihost_utils.broadcast_one_to_all(message))
  if error is not None:
    raise error
  said = message.astype(np.uint8).tobytes().rstrip(b"\0")
  if not said:
    raise CheckpointError("process 0 has stopped; its own message says why")
  return json.loads(said)


def read_metadata(folder: Path, step: int, verified: bool) -> dict[str, Any]:
  """What was saved beside the state of one checkpoint."""
  path = folder / str(step) / "metadata" / METADATA_FILE
  with reading("the metadata", verified):
    metadata = json.loads(files.patiently(path.read_bytes))
    if metadata["step"] != step or "fingerprint" not in metadata:
      raise ValueError("it is of another step")
  return metadata


def list_damaged(folder: Path, damaged: list[tuple[int, str]]) -> str:
  steps = "; ".join(f"step {step}: {reason}" for step, reason in damaged)
  return f"in {folder} the checkpoint is damaged ({steps})"


def _first_good(
  folder: Path, attempt: Callable[[int], _T], damaged: dict[int, str]
) -> tuple[int, _T] | None:
  """The newest step for which `attempt` returns, and what it returns.

  The folder is listed anew for every step: another process may train there,
  adding steps and removing old ones.

  Args:
    folder: where checkpoints lie.
    attempt: called with a step, newest first.
    damaged: step → why; steps that were passed over are added.

  Raises:
    CheckpointError: all are damaged.
  """
  while True:
    step = next((s for s in files.all_steps(folder) if s not in damaged), None)
    found = None
    try:
      if step is not None:
        found = step, attempt(step)
    except DamagedCheckpointError as error:
      damaged[step] = str(error)
      continue
    except (OSError, CheckpointError):
      if (folder / str(step)).is_dir():
        raise
      damaged[step] = "removed meanwhile"
      continue
    for passed_over in list(damaged):
      if not (folder / str(passed_over)).is_dir():
        del damaged[passed_over]
    if found is None and damaged:
      raise CheckpointError(
        f"{list_damaged(folder, list(damaged.items()))}, and there is no "
        "other. Put back a copy of one of them, or move this folder away to "
        "train the stage anew."
      )
    return found
