"""The bridge: parameters of one stage's checkpoint for the next.

Nothing here changes a folder, so a stage may be read while it is trained.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from psvae_jax.checkpoint.faults import reading, say
from psvae_jax.checkpoint.fit import (
  CheckpointError,
  check_fingerprint,
  check_tree,
)
from psvae_jax.checkpoint.newest import (
  METADATA_FILE,
  list_damaged,
  newest_usable,
  read_metadata,
)
from psvae_jax.checkpoint.noise import silence


def handlers() -> Any:
  """Names every item's handler: a manager that has not saved knows none."""
  silence()
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  state = ocp.StandardCheckpointHandler()
  for name, args, handler in (
    ("metadata", ocp.args.JsonSave, ocp.JsonCheckpointHandler(METADATA_FILE)),
    ("state", ocp.args.StandardSave, state),
    ("state", ocp.args.StandardRestore, state),
    ("state", ocp.args.PyTreeRestore, ocp.PyTreeCheckpointHandler()),
  ):
    registry.add(name, args, handler)
  return registry


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
  missing = f"no checkpoint in {folder}: train the earlier stage first"
  if not folder.is_dir():
    raise CheckpointError(missing)
  modules, raw_modules = tuple(modules), tuple(raw_modules)
  with _open_to_read(folder) as manager:

    def read(step: int, verified: bool) -> dict[str, Any]:
      metadata = read_metadata(folder, step, verified)
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

    found = newest_usable(folder, read)
  if found is None:
    raise CheckpointError(missing)
  step, result, damaged = found
  if damaged:
    say(f"warning: {list_damaged(folder, damaged)}. Taking step {step} instead")
  return result


def _open_to_read(folder: Path) -> ocp.CheckpointManager:
  return ocp.CheckpointManager(
    folder,
    options=ocp.CheckpointManagerOptions(create=False),
    handler_registry=handlers(),
  )


def restore_item(manager: ocp.CheckpointManager, step: int, **item: Any) -> Any:
  """Restores the one item that is named."""
  (name,) = item
  return manager.restore(step, args=ocp.args.Composite(**item))[name]
