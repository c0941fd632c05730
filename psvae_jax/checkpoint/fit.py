"""Does a checkpoint belong to this job? If not: in what does it differ?"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from psvae_jax.writers import encode_json

_MAX_LINES = 20


class CheckpointError(RuntimeError):
  """A checkpoint cannot be used or written; says why and what to do."""


def check_fingerprint(
  metadata: Mapping[str, Any],
  fingerprint: str,
  description: Mapping[str, Any] | None,
  folder: Path,
) -> None:
  """Compares the model that wrote a checkpoint with this job's.

  Args:
    metadata: what was saved beside the state.
    fingerprint: this job's.
    description: the readable parts of the fingerprint, nested; None if unknown.
    folder: named in the error.

  Raises:
    CheckpointError: another fingerprint; names the fields that differ where
      both sides have a description.
  """
  found = metadata.get("fingerprint")
  if found == fingerprint:
    return
  differing = _differences(metadata.get("description"), description)
  if differing:
    what = "these differ:\n  " + "\n  ".join(differing[:_MAX_LINES]) + "\n"
  else:
    what = (
      "the model section, the preprocessing or the encoder's weights differ. "
    )
  raise CheckpointError(
    f"{folder} was written by another model (fingerprint {found}, this job's "
    f"is {fingerprint}): {what}Use another --workdir, or the config it was "
    "written with."
  )


def check_tree(
  wanted: Any,
  saved: Any,
  folder: Path,
  advice: str,
  *,
  dtypes: bool = False,
) -> None:
  """Compares names and shapes of two trees of arrays.

  Args:
    wanted: what this job needs; leaves have `shape` and `dtype`.
    saved: what the checkpoint holds.
    folder: named in the error.
    advice: the end of the error: what to do.
    dtypes: compare dtypes too.

  Raises:
    CheckpointError: names the first parameters that are missing, of another
      shape, or not expected at all.
  """
  shapes, found = _flatten(wanted, dtypes), _flatten(saved, dtypes)
  other, missing, extra = [], [], []
  for name, shape in shapes.items():
    if name not in found:
      missing.append(f"{name}: missing, expected {shape}")
    elif found[name] != shape:
      other.append(f"{name}: saved {found[name]}, expected {shape}")
  for name, shape in found.items():
    if name not in shapes:
      extra.append(f"{name}: saved {shape}, not expected")
  lines = other + missing + extra
  if lines:
    hidden = len(lines) - _MAX_LINES
    shown = lines[:_MAX_LINES] + ([f"and {hidden} more"] if hidden > 0 else [])
    raise CheckpointError(
      f"{folder} does not fit {advice}\n  " + "\n  ".join(shown)
    )


def check_modules(wanted: Any, saved: Any, folder: Path, step: int) -> None:
  """Compares which modules two states train, by name.

  Args:
    wanted: this job's state; its `params` are by module.
    saved: what the checkpoint holds.
    folder: `<workdir>/<stage>/checkpoints`; named in the error.
    step: of the checkpoint.

  Raises:
    CheckpointError: one of them trains a module that the other does not.
  """
  ours, theirs = _modules(wanted), _modules(saved)
  new = ", ".join(f"`{name}`" for name in ours if name not in theirs)
  old = ", ".join(f"`{name}`" for name in theirs if name not in ours)
  said = []
  if new:
    said.append(f"this job trains {new}, the checkpoint of step {step} not")
  if old:
    said.append(f"the checkpoint of step {step} trains {old}, this job not")
  if said:
    field = "the config"
    if "`discriminator`" in new + old:
      field = f"config.{folder.parent.name}.loss.gan"
    raise CheckpointError(
      f"{folder}: {'; '.join(said)}. Was {field} changed? Use the old value, "
      "or another --workdir."
    )


def _modules(state: Any) -> list[str]:
  """Names under `params`."""
  paths = (name.split("/") for name in _flatten(state, False))
  return list(dict.fromkeys(p[1] for p in paths if p[0] == "params" and p[1:]))


def _flatten(tree: Any, dtypes: bool) -> dict[str, str]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): (
      f"{leaf.dtype} {tuple(leaf.shape)}" if dtypes else f"{tuple(leaf.shape)}"
    )
    for path, leaf in leaves
    if hasattr(leaf, "shape")
  }


def _differences(saved: Any, wanted: Any) -> list[str]:
  """One line for every field that two descriptions do not share."""
  if not isinstance(saved, Mapping) or wanted is None:
    return []
  old, new = fields(saved), fields(encode_json(wanted))
  lines = []
  for name in dict.fromkeys([*new, *old]):
    before, now = old.get(name, "nothing"), new.get(name, "nothing")
    if before != now:
      lines.append(f"{name}: saved {before}, this job {now}")
  return lines


def fields(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  """Nested mappings as one: "a.b" → value."""
  flat = {}
  for name, item in value.items():
    if isinstance(item, Mapping):
      flat.update(fields(item, f"{prefix}{name}."))
    else:
      flat[f"{prefix}{name}"] = item
  return flat
