"""Reading checkpoints: the newest one that is usable, and the bridge.

Nothing here changes a folder, so a stage may be read while it is trained.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import grain
import jax
import orbax.checkpoint as ocp

from psvae_jax.checkpoint import files
from psvae_jax.checkpoint.files import DamagedCheckpointError
from psvae_jax.checkpoint.fit import (
  CheckpointError,
  check_fingerprint,
  check_tree,
)
from psvae_jax.checkpoint.noise import silence

_T = TypeVar("_T")
# None of them says anything about the files on the disk.
NOT_THE_FILES = (MemoryError, PermissionError, jax.errors.JaxRuntimeError)


def handlers() -> Any:
  """Names every item's handler: a manager that has not saved knows none."""
  silence()
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


def has_checkpoint(folder: Path) -> bool:
  """Whether `folder` holds at least one complete checkpoint."""
  return bool(files.all_steps(Path(folder)))


def checked_latest_step(
  folder: Path,
  fingerprint: str,
  description: Mapping[str, Any] | None = None,
) -> int:
  """Newest usable step in `folder`, which must be of the model `fingerprint`.

  Only reads. That steps are passed over is said by whatever resumes there.

  Raises:
    CheckpointError: it belongs to another model, or none is usable.
  """
  folder = Path(folder).absolute()
  with _open_to_read(folder) as manager:

    def read(step: int, verified: bool) -> None:
      del verified
      metadata = read_metadata(manager, step)
      check_fingerprint(metadata, fingerprint, description, folder)

    return newest_usable(folder, read)[0]


def restore_ema(
  folder: Path,
  abstract_params: dict[str, Any],
  modules: Iterable[str],
  fingerprint: str,
  raw_modules: Iterable[str] = (),
  description: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
  """The bridge to a next stage: saved parameters of some modules, by name.

  Only reads: a damaged checkpoint is passed over, not moved.

  Args:
    folder: the earlier stage's checkpoint folder.
    abstract_params: module → tree of `jax.ShapeDtypeStruct` with shardings.
    modules: which of them to take from the EMA.
    fingerprint: of the model that must have written the checkpoint.
    raw_modules: which to take from the parameters themselves, as they have no
      EMA. One that the earlier stage did not have is left out of the result.
    description: the fingerprint's readable parts.

  Returns:
    module → parameters, on the shardings asked for.

  Raises:
    CheckpointError: no usable checkpoint, another fingerprint, or a parameter
      that is missing, not expected, or of another shape.
  """
  folder = Path(folder).absolute()
  if not has_checkpoint(folder):
    raise CheckpointError(
      f"no checkpoint in {folder}: train the earlier stage first"
    )
  modules, raw_modules = tuple(modules), tuple(raw_modules)
  with _open_to_read(folder) as manager:

    def read(step: int, verified: bool) -> dict[str, Any]:
      metadata = read_metadata(manager, step)
      check_fingerprint(metadata, fingerprint, description, folder)
      with reading("the list of arrays", verified):
        saved = manager.item_metadata(step)["state"].tree
        params, ema = saved["params"], saved["ema_params"]
      raw = [name for name in raw_modules if name in params]
      wanted = {
        "ema_params": {name: abstract_params[name] for name in modules},
        "params": {name: abstract_params[name] for name in raw},
      }
      found = {
        "ema_params": {name: ema[name] for name in modules if name in ema},
        "params": {name: params[name] for name in raw},
      }
      check_tree(wanted, found, folder, f"this model. In step {step}:")
      item = {name: tree for name, tree in wanted.items() if tree}
      with reading("the parameters", verified):
        state = restore_item(
          manager,
          step,
          state=ocp.args.PyTreeRestore(
            item,
            # Without restore_args Orbax ignores the shardings of `item`.
            restore_args=ocp.checkpoint_utils.construct_restore_args(item),
            partial_restore=True,
          ),
        )
      return {**state.get("ema_params", {}), **state.get("params", {})}

    step, result, damaged = newest_usable(folder, read)
  if damaged:
    say(f"warning: {list_damaged(folder, damaged)}. Taking step {step} instead")
  return result


def _open_to_read(folder: Path) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(
    folder,
    options=ocp.CheckpointManagerOptions(create=False),
    handler_registry=handlers(),
  )


def newest_usable(
  folder: Path, read: Callable[[int, bool], _T]
) -> tuple[int, _T, list[tuple[int, str]]]:
  """Tries the checkpoints of `folder`, newest first.

  Args:
    folder: where at least one checkpoint lies.
    read: called with a step and whether its files are known to be intact;
      raises DamagedCheckpointError if the one before is to be tried.

  Returns:
    The step, what `read` returned, and the damaged (step, why) passed over.

  Raises:
    CheckpointError: all are damaged.
  """
  damaged = []
  for step in files.all_steps(folder):
    try:
      verified = files.check_files(folder / str(step))
      return step, read(step, verified), damaged
    except DamagedCheckpointError as error:
      damaged.append((step, str(error)))
  raise CheckpointError(
    f"{list_damaged(folder, damaged)}, and there is no other. Put back a copy "
    "of one of them, or move this folder away to train the stage anew."
  )


@contextlib.contextmanager
def reading(what: str, verified: bool) -> Iterator[None]:
  """Blames the files for any failure, unless they are known to be intact."""
  try:
    yield
  except NOT_THE_FILES:
    raise
  except Exception as error:
    if verified:
      raise CheckpointError(
        f"{what} of the checkpoint does not fit this job, though its files are "
        f"as they were saved: {short_reason(error)}. Was the config changed? "
        "Use the one it was written with, or another --workdir."
      ) from error
    raise DamagedCheckpointError(f"{what} cannot be read") from error


def read_metadata(manager: ocp.CheckpointManager, step: int) -> dict[str, Any]:
  with reading("the metadata", verified=False):
    metadata = restore_item(manager, step, metadata=ocp.args.JsonRestore())
    if metadata["step"] != step or "fingerprint" not in metadata:
      raise ValueError
  return metadata


def restore_item(manager: ocp.CheckpointManager, step: int, **item: Any) -> Any:
  """Restores the one item that is named."""
  (name,) = item
  return manager.restore(step, args=ocp.args.Composite(**item))[name]


def list_damaged(folder: Path, damaged: list[tuple[int, str]]) -> str:
  steps = "; ".join(f"step {step}: {reason}" for step, reason in damaged)
  return f"in {folder} the checkpoint is damaged ({steps})"


def say(message: str) -> None:
  """One line for the user, from one process."""
  if jax.process_index() == 0:
    print(message, flush=True)


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


def _disk_is_full(error: Exception) -> bool:
  text = str(error)
  return any(
    sign in text
    for sign in ("RESOURCE_EXHAUSTED", "No space left", "quota exceeded")
  )


def short_reason(error: Exception) -> str:
  """The error in a few words: TensorStore's text is a page."""
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  if _disk_is_full(error):
    return "No space left on device"
  text = " ".join(str(error).split())
  return text if len(text) <= 200 else text[:200] + " …"
