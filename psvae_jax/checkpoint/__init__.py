"""Checkpoints: model state, data position and metadata, saved as one.

A step folder appears only when it is complete (Orbax renames it into place), so
a killed process leaves the previous one as it was. `save` must be called before
the next batch is drawn: the data position then belongs to the saved state.

Three kinds of trouble are kept apart. A *damaged* checkpoint is passed over for
the one before it, and said so. A checkpoint of *another job* is an error at
once: an older one would not fit better. A save that *fails*, as on a full disk,
is a warning, and the next one is another attempt; older checkpoints are removed
only after a newer one is complete.
"""

import contextlib
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from psvae_jax.checkpoint import faults, files, newest
from psvae_jax.checkpoint import read as reader
from psvae_jax.checkpoint.faults import reading, say
from psvae_jax.checkpoint.fit import (
  CheckpointError,
  check_fingerprint,
  check_modules,
  check_tree,
)
from psvae_jax.checkpoint.newest import (
  agree,
  checked_latest_step,
  has_checkpoint,
)
from psvae_jax.checkpoint.read import restore_ema
from psvae_jax.config import CheckpointConfig
from psvae_jax.writers import encode_json

__all__ = [
  "CheckpointError",
  "Checkpointer",
  "agree",
  "checked_latest_step",
  "has_checkpoint",
  "restore_ema",
]


class Checkpointer:
  """Saves and restores one stage of a job.

  What earlier, killed saves have left in the folder is removed on creation, so
  only one process group may use a folder: see `psvae_jax.workdir`.

  Args:
    folder: `<workdir>/<stage>/checkpoints`.
    config: interval and number kept.
    fingerprint: what the saved parameters belong to; checked on restore.
    description: the fingerprint's readable parts, nested; saved, so that a
      mismatch can be named.
  """

  def __init__(
    self,
    folder: Path,
    config: CheckpointConfig,
    fingerprint: str,
    description: Mapping[str, Any] | None = None,
  ) -> None:
    self._folder = Path(folder).absolute()
    self._config = config
    self._fingerprint = fingerprint
    self._description = description
    self._saving: int | None = None  # handed to Orbax, outcome unknown
    self._unsaved: tuple[int, str] | None = None  # step and why, if it failed
    self._state_bytes = 0
    self._remove_partial()
    self._manager = self._open()

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def due(self, step: int) -> bool:
    return step % self._config.every_steps == 0

  def save(
    self, step: int, state: Any, data: Any, metadata: dict[str, Any]
  ) -> bool:
    """Saves `state` at `step` with the position of iterator `data`.

    Arrays are copied before it returns, files are written in the background.
    When it returns, the save before this one has ended, well or not.

    Returns:
      False if nothing could be written; a warning has been printed.
    """
    self._settle()
    if step in self._manager.all_steps():
      return True
    if self._unsaved:
      self._remove_partial()
    self._state_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    args = ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      metadata=ocp.args.JsonSave(self._metadata(step, data, metadata)),
    )
    self._saving = step
    try:
      self._manager.save(step, args=args, force=True)
    except Exception as error:
      if not faults.could_not_write(error):
        self._saving = None
        raise
      self._give_up(error)
      return False
    return True

  def poll(self) -> None:
    """Says if the save in the background has failed; never waits."""
    # With several processes asking takes a round over the network.
    if self._saving is not None and jax.process_count() == 1:
      if not self._manager.is_saving_in_progress():
        self._settle()

  def restore(self, abstract_state: Any, data: Any) -> tuple[Any, dict] | None:
    """Restores the newest usable checkpoint, or returns None if none exists.

    Damaged ones are passed over, with a line that says so, and are then renamed
    `<step>.damaged`: their steps will be saved again.

    Args:
      abstract_state: tree of `jax.ShapeDtypeStruct` with shardings.
      data: iterator with `get_state` and `set_state`; its position is set in
        place.

    Raises:
      CheckpointError: it belongs to another job, or none is usable.
    """

    def read(step: int, verified: bool) -> tuple[Any, dict]:
      metadata = newest.read_metadata(self._folder, step, verified)
      check_fingerprint(
        metadata, self._fingerprint, self._description, self._folder
      )
      with reading("the list of arrays", verified):
        saved = self._manager.item_metadata(step)["state"].tree
      check_modules(abstract_state, saved, self._folder, step)
      check_tree(
        abstract_state,
        saved,
        self._folder,
        "this job's optimizer: was optim.name or optim.clip changed? Use the "
        "old values, or another --workdir. In step "
        f"{step}:",
        dtypes=True,
      )
      with reading("the state", verified):
        state = reader.restore_item(
          self._manager, step, state=ocp.args.StandardRestore(abstract_state)
        )
      # The metadata has been read, so this is not the files' fault.
      with reading("the data position", verified=True):
        data.set_state(metadata["data"])
      return state, metadata

    found = newest.newest_usable(self._folder, read)
    if found is None:
      return None
    step, result, damaged = found
    if damaged:
      say(
        f"warning: {newest.list_damaged(self._folder, damaged)}. Resuming from "
        f"step {step}; what is damaged is kept as <step>.damaged"
      )
      if jax.process_index() == 0:
        for bad, _ in damaged:
          files.set_aside(self._folder / str(bad))
      _wait_for_others("psvae_jax/set_aside")
      self._manager.reload()
    return result

  def close(self) -> None:
    """Returns when everything handed to `save` is on disk.

    Raises:
      CheckpointError: the last save has failed.
    """
    self._settle()
    self._manager.close()
    # TensorStore may have gone on writing for a save that had failed.
    self._remove_partial()
    if self._unsaved:
      step, reason = self._unsaved
      latest = next(iter(files.all_steps(self._folder)), None)
      resumes = "starts over" if latest is None else f"resumes at step {latest}"
      raise CheckpointError(
        f"step {step} could not be saved in {self._folder} ({reason}). "
        f"{self._space()}; the same command then {resumes}."
      )

  def _open(self) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=self._config.keep,
        step_prefix=None,
        async_options=ocp.AsyncOptions(
          post_finalization_callback=self._write_checksums
        ),
      ),
      handler_registry=reader.handlers(),
    )

  def _metadata(
    self, step: int, data: Any, metadata: dict[str, Any]
  ) -> dict[str, Any]:
    # One position for all hosts, so that any number of them can resume.
    own = {
      "step": step,
      "fingerprint": self._fingerprint,
      "data": data.get_state(),
    }
    if self._description is not None:
      own["description"] = self._description
    return encode_json({**metadata, **own})

  def _write_checksums(self) -> None:
    """Called by the thread that saves, when all items are written."""
    if jax.process_index() == 0:
      files.write_checksums(self._folder, self._saving)

  def _remove_partial(self) -> None:
    if jax.process_index() == 0:
      files.remove_partial(self._folder)

  def _settle(self) -> None:
    """Waits for the save in the background and learns how it ended."""
    if self._saving is None:
      return
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      if not faults.could_not_write(error):
        raise
      self._give_up(error)
    else:
      self._saving = self._unsaved = None

  def _give_up(self, error: Exception) -> None:
    """Notes a failed save; the run goes on, with a manager that is sound."""
    step, self._saving = self._saving, None
    reason = faults.short_reason(error)
    self._unsaved = step, reason
    if jax.process_count() > 1:  # the other processes know nothing of it
      raise CheckpointError(
        f"step {step} could not be saved in {self._folder} ({reason})"
      ) from error
    # The old manager raises what is left of this error at some later save.
    with contextlib.suppress(Exception):
      self._manager.close()
    self._remove_partial()
    self._manager = self._open()
    latest = self.latest_step()
    good = "none yet" if latest is None else f"step {latest}"
    say(
      f"warning: step {step} could not be saved in {self._folder} ({reason}). "
      "The run goes on and tries again at the next checkpoint; last good one: "
      f"{good}. {self._space()}"
    )

  def _space(self) -> str:
    free = shutil.disk_usage(self._folder).free / 2**20
    return (
      f"Free about {self._state_bytes / 2**20:.0f} MiB of disk space "
      f"({free:.0f} MiB are free)"
    )


def _wait_for_others(name: str) -> None:
  if jax.process_count() > 1:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)
