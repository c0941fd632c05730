"""Steps whose loss or gradient is not finite are skipped, counted and named.

On the device, `check` turns a step's figures into one vector of flags, and the
step keeps its old state where one of them is down. On the host, `Guard` reads
those vectors a step late, so that the device never waits for it, writes the
skipped ones to `skipped_steps.jsonl` and says when too many came in a row.
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.writers import cut_back
from psvae_jax.writers.append_file import AppendFile

SKIPPED_FILE = "skipped_steps.jsonl"

_GRADIENT = "grad_norm/"
_MAX_EXAMPLES = 256  # named in a line of the file


class NonFiniteError(FloatingPointError):
  """Too many steps in a row were skipped; the message says where it began."""


def checked(metrics: Iterable[str]) -> list[str]:
  """Names of the figures that decide, sorted: all but the updates' norms.

  Those would need every update while the old state is still alive: twice the
  memory of the optimizer's part of a step.
  """
  return sorted(name for name in metrics if "update_norm/" not in name)


def check(metrics: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Flags of a step, inside jit.

  Args:
    metrics: scalars of the step, the norms of all gradients among them.

  Returns:
    Whether all that are `checked` are finite (scalar), and which are: (n,) bool
    in their order.
  """
  flags = jnp.stack([jnp.isfinite(metrics[name]) for name in checked(metrics)])
  return jnp.all(flags), flags


@dataclasses.dataclass(frozen=True)
class SkippedStep:
  """One skipped step.

  Attributes:
    step: 1-based number of the step.
    batch: 0-based number of the batch in the stage's data stream.
    bad: names of the metrics that were not finite.
    examples: indices of the batch's examples on this host.
  """

  step: int
  batch: int
  bad: tuple[str, ...]
  examples: tuple[int, ...]

  @property
  def modules(self) -> tuple[str, ...]:
    """Modules whose gradient was not finite."""
    names = (name.removeprefix("train/") for name in self.bad)
    return tuple(
      name.removeprefix(_GRADIENT)
      for name in names
      if name.startswith(_GRADIENT)
    )

  def describe(self) -> str:
    losses = [
      name.removeprefix("train/")
      for name in self.bad
      if name.startswith("train/loss")
    ]
    parts = []
    if losses:
      parts.append(", ".join(losses))
    if self.modules:
      parts.append("the gradient of " + ", ".join(self.modules))
    what = " and ".join(parts) or ", ".join(self.bad)
    return f"step {self.step} (batch {self.batch}): not finite: {what}"


class Guard:
  """Reads the flags of the steps and remembers the skipped ones.

  Args:
    folder: `<workdir>/<stage>`, for `skipped_steps.jsonl`; None writes nothing.
    max_skipped: steps in a row that may be skipped.
    total: steps skipped before, in a run that resumes.
    start_step: the step it resumes at; later lines of the file are cut.

  Attributes:
    total: steps skipped so far.
  """

  def __init__(
    self,
    folder: Path | None,
    max_skipped: int,
    total: int = 0,
    start_step: int = 0,
  ) -> None:
    self._path = None if folder is None else Path(folder) / SKIPPED_FILE
    if self._path is not None and self._path.exists():
      cut_back(self._path, start_step)
    self._max_skipped = max_skipped
    self._waiting: list[tuple[int, Any, Sequence[str], Any]] = []
    self._first: SkippedStep | None = None  # of the row that goes on
    self._length = 0
    self._error: NonFiniteError | None = None
    self.total = total

  def record(
    self,
    step: int,
    flags: jax.Array,
    metrics: Iterable[str],
    examples: np.ndarray | None,
  ) -> None:
    """Takes the flags of a dispatched step; reads nothing yet.

    Args:
      step: 1-based number of the step.
      flags: second result of `check`, on the device.
      metrics: names of the step's figures.
      examples: (b,) indices of this host's examples, or None.
    """
    self._waiting.append((step, flags, checked(metrics), examples))

  def flush(self, keep: int = 0) -> list[SkippedStep]:
    """Reads the flags that wait, but for the newest `keep`.

    Returns:
      The newly found skipped steps, written to the file.
    """
    count = len(self._waiting) - keep
    if count <= 0:
      return []
    taken, self._waiting = self._waiting[:count], self._waiting[count:]
    found = []
    all_flags = jax.device_get([flags for _, flags, _, _ in taken])
    for (step, _, names, examples), flags in zip(taken, all_flags, strict=True):
      if np.all(flags):
        self._length = 0
        continue
      bad = tuple(n for n, ok in zip(names, flags, strict=True) if not ok)
      indices = () if examples is None else tuple(int(i) for i in examples)
      found.append(SkippedStep(step, step - 1, bad, indices[:_MAX_EXAMPLES]))
      self._extend(found[-1])
    self.total += len(found)
    self._write(found)
    return found

  def error(self) -> NonFiniteError | None:
    """The reason to stop, once a row was long enough."""
    return self._error

  def _extend(self, skipped: SkippedStep) -> None:
    """Counts the row; a later good step does not undo that it was too long."""
    if not self._length:
      self._first = skipped
    self._length += 1
    if self._length == self._max_skipped and self._error is None:
      self._error = NonFiniteError(
        f"{self._max_skipped} steps in a row were skipped, beginning at "
        f"{self._first.describe()}. None of them has changed a parameter; "
        f"{SKIPPED_FILE} names their examples. Look at those, lower the "
        "learning rate, or raise config.guard.max_skipped."
      )

  def _write(self, found: list[SkippedStep]) -> None:
    """One line a step; a full disk must not end a run that can go on."""
    if self._path is None or not found:
      return
    with contextlib.suppress(OSError):
      self._path.parent.mkdir(parents=True, exist_ok=True)
      file = AppendFile(self._path)
      for step in found:
        record = {
          "step": step.step,
          "batch": step.batch,
          "not_finite": step.bad,
          "modules": step.modules,
          "examples": step.examples,
        }
        file.append(json.dumps(record).encode() + b"\n")
      file.close()
