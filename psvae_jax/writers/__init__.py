"""What a job writes about itself: metrics, events and the summary.

Contract of the files:

* `<stage>/metrics.jsonl`: one JSON object a line, `"step"` first, then metrics
  under slash-separated names. On resume it is cut back to the restored step, so
  an interrupted run leaves the same lines as an uninterrupted one.
* `<stage>/tensorboard/`: the same scalars as TensorBoard events.
* `summary.json`: final figures, one object a stage, merged over jobs.
* `<stage>/config.json`: the resolved config the stage was trained with, and
  `config.json` that of the last job which trained.

JSON has no NaN or infinity. They are written as the strings "NaN", "Infinity"
and "-Infinity" (the convention of protobuf's JSON mapping, understood by
`float()` in Python and `Number()` in JavaScript), and `read_metrics` and
`read_summary` turn them back into floats. Whole files are replaced atomically:
a reader, or a restart after a kill, sees the old file or the new one. On a full
disk a line of metrics is lost, whole, and the run goes on.
"""

import contextlib
import errno
import json
import math
import numbers
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from psvae_jax.writers.append_file import AppendFile
from psvae_jax.writers.events import EventFile

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
TENSORBOARD_DIR = "tensorboard"

_NON_FINITE = {
  "NaN": math.nan,
  "Infinity": math.inf,
  "-Infinity": -math.inf,
}


def encode_json(value: Any) -> Any:
  """Returns `value` as plain JSON types; non-finite floats become strings.

  Args:
    value: nested mappings, lists and tuples of strings, bools, None, paths and
      numbers (Python's, NumPy's, or anything else with `item()` or `tolist()`).

  Raises:
    TypeError: a value of another type, named.
  """
  if value is None or isinstance(value, (str, bool)):
    return value
  if isinstance(value, Mapping):
    return {str(name): encode_json(item) for name, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [encode_json(item) for item in value]
  if hasattr(value, "tolist"):  # NumPy scalars and arrays
    return encode_json(value.tolist())
  if isinstance(value, numbers.Integral):
    return int(value)
  if isinstance(value, numbers.Real):
    value = float(value)
    if math.isfinite(value):
      return value
    return "NaN" if math.isnan(value) else _signed_infinity(value)
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  raise TypeError(f"cannot write {type(value).__name__} {value!r} as JSON")


def decode_json(value: Any) -> Any:
  """Inverse of `encode_json` for the non-finite numbers."""
  if isinstance(value, str):
    return _NON_FINITE.get(value, value)
  if isinstance(value, dict):
    return {name: decode_json(item) for name, item in value.items()}
  if isinstance(value, list):
    return [decode_json(item) for item in value]
  return value


def write_text_atomic(path: Path, text: str) -> None:
  """Replaces `path` by `text` in one step, durable when it returns."""
  with _atomic_file(path) as file:
    file.write(text)


def write_json_atomic(path: Path, value: Any) -> None:
  """Replaces `path` by `value` as indented JSON (see `encode_json`)."""
  text = json.dumps(
    encode_json(value), indent=2, ensure_ascii=False, allow_nan=False
  )
  write_text_atomic(path, text + "\n")


def write_arrays_atomic(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
  """Replaces `path` by a compressed .npz of `arrays`."""
  with _atomic_file(path, binary=True) as file:
    np.savez_compressed(file, **arrays)


def disk_is_full(error: OSError) -> bool:
  return error.errno in (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def skipped_when_full(what: str) -> Iterator[None]:
  """Leaves the block with a warning if the disk is full: `what` is not written.

  For what a run can do without. Other errors pass.
  """
  try:
    yield
  except OSError as error:
    if not disk_is_full(error):
      raise
    print(
      f"warning: {what} could not be written ({error.strerror}). The run goes "
      "on without it",
      flush=True,
    )


def read_summary(workdir: Path) -> dict[str, Any]:
  """Returns the contents of `summary.json`; {} when there is none yet.

  Raises:
    ValueError: the file is not a JSON object.
  """
  path = Path(workdir) / SUMMARY_FILE
  if not path.exists():
    return {}
  try:
    value = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(
      f"{path} is not valid JSON ({error}). Repair it or move it away; it is"
      " written anew from the stages that run from now on."
    ) from error
  if not isinstance(value, dict):
    raise ValueError(
      f"{path} holds a {type(value).__name__}, not an object. Move it away."
    )
  return decode_json(value)


def update_summary(workdir: Path, updates: Mapping[str, Any]) -> dict[str, Any]:
  """Merges `updates` into `summary.json` and returns the result.

  Objects merge key by key at every depth, so a stage adds figures without
  touching another stage's; any other value replaces what was there.

  Args:
    workdir: the job's folder; created when missing.
    updates: e.g. `{"svae": {"eval/psnr": 21.3}, "device": "TPU v5e"}`.

  Raises:
    ValueError: the present file cannot be read; it is left as it is.
  """
  merged = _merge(read_summary(workdir), updates)
  write_json_atomic(Path(workdir) / SUMMARY_FILE, merged)
  return merged


def read_metrics(path: Path) -> list[dict[str, Any]]:
  """Returns the lines of a `metrics.jsonl`, in file order.

  Lines that are not complete (the last one of a killed or a running process)
  are left out. Non-finite numbers come back as floats. A missing file is an
  empty list.
  """
  path = Path(path)
  if not path.exists():
    return []
  with path.open(encoding="utf-8", errors="replace") as file:
    records = (_parse_line(line) for line in file)
    return [decode_json(record) for record in records if record is not None]


class MetricWriter:
  """Appends scalars of one stage to `metrics.jsonl` and TensorBoard.

  Every line is written when `write` returns, so a killed process loses at most
  the line it was writing. Values are host floats: the caller fetches them from
  the device when it suits the loop.

  A line that cannot be written, as on a full disk, is dropped. The first one
  prints a warning; figures are not worth a run.
  """

  def __init__(
    self, stage_dir: Path, *, start_step: int = 0, enabled: bool = True
  ):
    """Opens the files of one stage, cut back to where the run continues.

    Args:
      stage_dir: `<workdir>/<stage>`; created when missing.
      start_step: the restored step; later lines are cut. 0 means that nothing
        was restored, and the history starts anew.
      enabled: False on every process but the first: nothing is touched.
    """
    self._lines: AppendFile | None = None
    self._warned = False
    if not enabled:
      return
    stage_dir = Path(stage_dir)
    stage_dir.mkdir(parents=True, exist_ok=True)
    path = stage_dir / METRICS_FILE
    if path.exists():
      cut_back(path, start_step)
    self._lines = AppendFile(path)
    events_dir = stage_dir / TENSORBOARD_DIR
    has_history = events_dir.exists() and any(events_dir.iterdir())
    # TensorBoard hides the steps >= purge_step of the earlier files.
    purge_step = start_step + 1 if start_step else 0
    self._events = EventFile(events_dir, purge_step if has_history else None)
    self._folder = stage_dir

  def write(self, step: int, metrics: Mapping[str, float]) -> None:
    """Records `metrics` of `step`.

    Args:
      step: training step the figures belong to.
      metrics: host scalars by slash-separated name.

    Raises:
      ValueError: a metric is called "step", or the writer is closed.
    """
    if self._lines is None:
      return
    if self._lines.closed:
      raise ValueError("this MetricWriter is closed; open a new one to write.")
    if "step" in metrics:
      raise ValueError(
        'a metric may not be called "step": the name is taken by the step of'
        " the line."
      )
    step = int(step)
    values = {name: float(value) for name, value in metrics.items()}
    record = encode_json({"step": step, **values})
    line = json.dumps(record, ensure_ascii=False, allow_nan=False)
    try:
      self._lines.append(f"{line}\n".encode())
      self._events.write(step, values)
    except OSError as error:
      self._warn(step, error)

  def close(self) -> None:
    """Closes the files; harmless when called again."""
    if self._lines is not None and not self._lines.closed:
      self._lines.close()
      self._events.close()

  def _warn(self, step: int, error: OSError) -> None:
    if not self._warned:
      self._warned = True
      print(
        f"warning: the metrics of step {step} could not be written to "
        f"{self._folder} ({error.strerror or error}). The run goes on; lines "
        "are left out until they can be written again",
        flush=True,
      )

  def __enter__(self) -> "MetricWriter":
    return self

  def __exit__(self, *exc_info) -> None:
    self.close()


def cut_back(path: Path, start_step: int) -> None:
  """Drops the lines of a `metrics.jsonl` after `start_step`, atomically.

  Incomplete lines go too. `start_step` 0 drops all lines: nothing was restored,
  so an evaluation before the first step will be written again as well.
  """
  with (
    _atomic_file(path) as target,
    path.open(encoding="utf-8", errors="replace") as source,
  ):
    for line in source:
      record = _parse_line(line)
      if record is not None and 0 < start_step >= record["step"]:
        target.write(line.rstrip("\n") + "\n")


def _parse_line(line: str) -> dict[str, Any] | None:
  """Returns the object of one line, or None if the line is incomplete."""
  try:
    record = json.loads(line)
  except ValueError:
    return None
  if isinstance(record, dict) and isinstance(record.get("step"), int):
    return record
  return None


def _signed_infinity(value: float) -> str:
  return "Infinity" if value > 0 else "-Infinity"


def _merge(
  old: Mapping[str, Any], updates: Mapping[str, Any]
) -> dict[str, Any]:
  merged = dict(old)
  for name, value in updates.items():
    name = str(name)
    both = isinstance(value, Mapping) and isinstance(merged.get(name), Mapping)
    merged[name] = _merge(merged[name], value) if both else value
  return merged


@contextlib.contextmanager
def _atomic_file(path: Path, binary: bool = False) -> Iterator[IO[Any]]:
  """Opens a file that becomes `path` only if the block ends without error."""
  path = Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
  try:
    opened = (
      temporary.open("wb") if binary else temporary.open("w", encoding="utf-8")
    )
    with opened as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  except BaseException as error:
    temporary.unlink(missing_ok=True)
    if isinstance(error, OSError) and error.errno and not error.filename:
      # A write that fails does not say of which file.
      raise OSError(error.errno, error.strerror, str(path)) from error
    raise
  # The rename itself is durable once the folder's entry is on disk.
  folder = os.open(path.parent, os.O_RDONLY)
  try:
    os.fsync(folder)
  finally:
    os.close(folder)
