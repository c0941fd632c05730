"""Steps whose loss or gradient is not finite are skipped, counted and named.

On the device, `check` turns a step's metrics into one vector of flags, and the
step keeps its old state where one of them is down. On the host, `Guard` reads
those vectors some steps later, so that no step waits for it, writes the skipped
ones to `skipped_steps.jsonl` and says when too many came in a row.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.writers import cut_back

SKIPPED_FILE = "skipped_steps.jsonl"

_GRADIENT = "grad_norm/"
_MAX_EXAMPLES = 256  # named in a line of the file


class NonFiniteError(FloatingPointError):
  """Too many steps in a row were not finite; the message says where it began.

  The state before the first of them is what the run holds and has saved.
  """


def check(metrics: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
  """Flags of a step, inside jit.

  Args:
    metrics: scalars of the step, gradient and update norms included.

  Returns:
    Whether all are finite (scalar), and which are: (n,) bool in the order of
    the sorted names.
  """
  flags = jnp.stack([jnp.isfinite(metrics[name]) for name in sorted(metrics)])
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
    self._file = None if folder is None else Path(folder) / SKIPPED_FILE
    if self._file is not None and self._file.exists():
      cut_back(self._file, start_step)
    self._max_skipped = max_skipped
    self._waiting: list[tuple[int, Any, Sequence[str], Any]] = []
    self._row: list[SkippedStep] = []  # the last steps, if all were skipped
    self.total = total

  def record(
    self,
    step: int,
    flags: jax.Array,
    names: Sequence[str],
    examples: np.ndarray | None,
  ) -> None:
    """Takes the flags of a dispatched step; reads nothing yet.

    Args:
      step: 1-based number of the step.
      flags: second result of `check`, on the device.
      names: sorted names of the metrics.
      examples: (b,) indices of this host's examples, or None.
    """
    self._waiting.append((step, flags, names, examples))

  def due(self) -> bool:
    """Whether enough steps wait for a row of skipped ones to be complete."""
    return len(self._waiting) > self._max_skipped

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
        self._row = []
        continue
      bad = tuple(n for n, ok in zip(names, flags, strict=True) if not ok)
      indices = () if examples is None else tuple(int(i) for i in examples)
      found.append(SkippedStep(step, step - 1, bad, indices[:_MAX_EXAMPLES]))
      self._row.append(found[-1])
      self._row = self._row[: self._max_skipped + 1]  # its beginning is enough
    self.total += len(found)
    self._write(found)
    return found

  def error(self) -> NonFiniteError | None:
    """The reason to stop, if the last steps were all skipped."""
    if len(self._row) < self._max_skipped:
      return None
    first = self._row[0]
    return NonFiniteError(
      f"{self._max_skipped} steps in a row were skipped, beginning at "
      f"{first.describe()}. The parameters are those before it, and are saved. "
      f"{SKIPPED_FILE} names the examples. Look at those, lower the learning "
      "rate, or raise config.guard.max_skipped; the same command goes on from "
      "here."
    )

  def _write(self, found: list[SkippedStep]) -> None:
    if self._file is None or not found:
      return
    lines = [
      json.dumps(
        {
          "step": step.step,
          "batch": step.batch,
          "not_finite": step.bad,
          "modules": step.modules,
          "examples": step.examples,
        }
      )
      for step in found
    ]
    try:
      self._file.parent.mkdir(parents=True, exist_ok=True)
      with self._file.open("a", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")
    except OSError:  # a full disk must not end a run that can go on
      return
