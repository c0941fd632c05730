"""Checkpoints: model state, data position and metadata, saved as one.

A step folder appears only when it is complete (Orbax renames it into place), so
a killed process leaves the previous one as it was. `save` must be called before
the next batch is drawn: the data position then belongs to the saved state.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from psvae_jax.config import CheckpointConfig


class CheckpointError(RuntimeError):
  """A checkpoint cannot be used; the message says why and what to do."""


def _handlers() -> Any:
  """Names every item's handler: a manager that has not saved knows none."""
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  metadata = ocp.JsonCheckpointHandler()
  state = ocp.StandardCheckpointHandler()
  data = grain.checkpoint.CheckpointHandler()
  for name, args, handler in (
    ("metadata", ocp.args.JsonSave, metadata),
    ("metadata", ocp.args.JsonRestore, metadata),
    ("state", ocp.args.StandardSave, state),
    ("state", ocp.args.StandardRestore, state),
    ("state", ocp.args.PyTreeRestore, ocp.PyTreeCheckpointHandler()),
    ("data", grain.checkpoint.CheckpointSave, data),
    ("data", grain.checkpoint.CheckpointRestore, data),
  ):
    registry.add(name, args, handler)
  return registry


class Checkpointer:
  """Saves and restores one stage of a job.

  Args:
    folder: `<workdir>/<stage>/checkpoints`.
    config: interval and number kept.
    fingerprint: what the saved parameters belong to; checked on restore.
  """

  def __init__(
    self, folder: Path, config: CheckpointConfig, fingerprint: str
  ) -> None:
    self._folder = Path(folder).absolute()
    self._every_steps = config.every_steps
    self._fingerprint = fingerprint
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        max_to_keep=config.keep, step_prefix=None
      ),
      handler_registry=_handlers(),
    )

  def latest_step(self) -> int | None:
    return self._manager.latest_step()

  def due(self, step: int) -> bool:
    return step % self._every_steps == 0

  def save(
    self, step: int, state: Any, data: Any, metadata: dict[str, Any]
  ) -> None:
    """Saves `state` at `step` with the position of iterator `data`."""
    if step in self._manager.all_steps():
      return
    meta = {**metadata, "step": step, "fingerprint": self._fingerprint}
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=grain.checkpoint.CheckpointSave(data),
        metadata=ocp.args.JsonSave(meta),
      ),
      force=True,
    )

  def metadata(self, step: int) -> dict[str, Any]:
    restored = self._manager.restore(
      step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())
    )
    return restored["metadata"]

  def restore(self, abstract_state: Any, data: Any) -> tuple[Any, dict] | None:
    """Restores the newest checkpoint, or returns None if there is none.

    Args:
      abstract_state: tree of `jax.ShapeDtypeStruct` with shardings.
      data: grain iterator; its position is set in place.

    Raises:
      CheckpointError: it belongs to another model.
    """
    step = self.latest_step()
    if step is None:
      return None
    metadata = self.metadata(step)
    _check_fingerprint(metadata, self._fingerprint, self._folder)
    try:
      restored = self._manager.restore(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardRestore(abstract_state),
          data=grain.checkpoint.CheckpointRestore(data),
        ),
      )
    except ValueError as error:
      raise CheckpointError(
        f"{self._folder} does not fit this job's optimizer: was optim.name or "
        "optim.clip changed? Use the old values, or another --workdir. Orbax "
        f"says: {str(error)[:500]}"
      ) from error
    return restored["state"], metadata

  def close(self) -> None:
    """Returns when everything handed to `save` is on disk."""
    self._manager.wait_until_finished()
    self._manager.close()


def _check_fingerprint(metadata: dict, fingerprint: str, folder: Path) -> None:
  found = metadata.get("fingerprint")
  if found != fingerprint:
    raise CheckpointError(
      f"{folder} was written by another model (fingerprint {found}, this "
      f"job's is {fingerprint}): the model section, the preprocessing or the "
      "encoder's weights differ. Use another --workdir, or the config it was "
      "written with."
    )


def has_checkpoint(folder: Path) -> bool:
  """Whether `folder` holds at least one complete checkpoint."""
  folder = Path(folder)
  return folder.is_dir() and any(
    child.name.isdigit() for child in folder.iterdir()
  )


def checked_latest_step(folder: Path, fingerprint: str) -> int:
  """Newest step in `folder`, which must be of the model `fingerprint`.

  Raises:
    CheckpointError: it belongs to another model.
  """
  folder = Path(folder).absolute()
  with ocp.CheckpointManager(folder, handler_registry=_handlers()) as manager:
    step = manager.latest_step()
    meta = manager.restore(
      step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())
    )
  _check_fingerprint(meta["metadata"], fingerprint, folder)
  return step


def restore_ema(
  folder: Path,
  abstract_params: dict[str, Any],
  modules: Iterable[str],
  fingerprint: str,
) -> dict[str, Any]:
  """The bridge to a next stage: EMA parameters of `modules`, by name.

  Args:
    folder: the earlier stage's checkpoint folder.
    abstract_params: module → tree of `jax.ShapeDtypeStruct` with shardings.
    modules: which of them to take.
    fingerprint: of the model that must have written the checkpoint.

  Returns:
    module → parameters, on the shardings asked for.

  Raises:
    CheckpointError: no checkpoint, another fingerprint, or a parameter that is
      missing or of another shape.
  """
  folder = Path(folder).absolute()
  if not has_checkpoint(folder):
    raise CheckpointError(
      f"no checkpoint in {folder}: train the earlier stage first"
    )
  wanted = {name: abstract_params[name] for name in modules}
  with ocp.CheckpointManager(folder, handler_registry=_handlers()) as manager:
    step = manager.latest_step()
    meta = manager.restore(
      step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore())
    )
    _check_fingerprint(meta["metadata"], fingerprint, folder)
    saved = manager.item_metadata(step)["state"].tree["ema_params"]
    _check_shapes(wanted, saved, folder)
    item = {"ema_params": wanted}
    restored = manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.PyTreeRestore(
          item,
          # Without restore_args Orbax ignores the shardings of `item`.
          restore_args=ocp.checkpoint_utils.construct_restore_args(item),
          partial_restore=True,
        )
      ),
    )
  return restored["state"]["ema_params"]


def _flatten(tree: Any) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
    for path, leaf in leaves
  }


def _check_shapes(wanted: Any, saved: Any, folder: Path) -> None:
  shapes, found = _flatten(wanted), _flatten(saved)
  lines = []
  for name, shape in shapes.items():
    if name not in found:
      lines.append(f"{name}: missing, expected {shape}")
    elif found[name] != shape:
      lines.append(f"{name}: saved {found[name]}, expected {shape}")
  if lines:
    raise CheckpointError(
      f"{folder} does not fit this model:\n  " + "\n  ".join(lines[:20])
    )
