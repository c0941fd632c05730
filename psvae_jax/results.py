"""What a job leaves beside checkpoints and metrics: configs, summary, report.

A stage is trained when its results are to be written, so a disk that is full
then, or a fault in the report, must not end the job: it is a warning, tried
again, and what is missing in the end is the job's error. A stage whose figures
are not in the summary counts as unfinished: the next start evaluates it again.
"""

import contextlib
import json
import os
import platform
import traceback
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from absl import logging

from psvae_jax import cli, report, writers
from psvae_jax.checkpoint.fit import fields
from psvae_jax.train import StageResult, note

CONFIG_FILE = "config.json"  # of the last job, and in a stage's folder its own
_MAX_SETTINGS = 5


class Results:
  """The files of one job; what writes is for the first process alone.

  Args:
    workdir: the job's folder.
    config: the resolved raw config.
  """

  def __init__(self, workdir: Path, config: Mapping[str, Any]) -> None:
    self._workdir = Path(workdir)
    self._config = config
    self._pending: dict[str, Any] = {}
    self._problems: dict[str, str] = {}  # stage → why it is not in the summary

  def other_settings(self, stage: str) -> str:
    """Ends "finished before": what this job would do otherwise, if anything."""
    path = self._workdir / stage / CONFIG_FILE
    try:
      old = fields(json.loads(path.read_text(encoding="utf-8"))[stage])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
      return ", skipped"  # nothing to compare with
    new = fields(writers.encode_json(self._config[stage]))
    found = [
      f"{name}: {old[name]}, asked for {value}"
      for name, value in new.items()
      if name in old and old[name] != value
    ]
    if not found:
      return ", skipped"
    hidden = len(found) - _MAX_SETTINGS
    shown = found[:_MAX_SETTINGS] + [f"{hidden} more"] * (hidden > 0)
    return (
      f" with other settings ({'; '.join(shown)}), skipped; --workdir=OTHER "
      "trains anew"
    )

  def write_config(self, stage: str) -> None:
    """Called when the stage begins to train, or goes on."""
    for folder in (self._workdir / stage, self._workdir):
      writers.write_json_atomic(folder / CONFIG_FILE, self._config)

  def add(
    self, stage: str, result: StageResult, references: Mapping[str, Any]
  ) -> None:
    """Writes a stage's figures and those that could not be written before.

    Args:
      stage: its name.
      result: what its training returned.
      references: further sections of the summary.
    """
    walls = writers.read_summary(self._workdir).get("wall_seconds", {})
    walls |= self._pending.get("wall_seconds", {})
    walls[stage] = round(result.wall_seconds, 1)
    walls["total"] = round(sum(v for k, v in walls.items() if k != "total"))
    self._pending |= {
      **references,
      "wall_seconds": walls,
      "device": _device(),
      "versions": _versions(),
    }
    if result.missing:
      self._warn(stage, result.missing)
    else:
      self._pending[stage] = result.metrics
    try:
      self._write_summary()
    except OSError as error:
      self._warn(stage, str(error))
    self._write_report()

  def close(self) -> None:
    """Tries a last time, and writes the report.

    Raises:
      OSError: figures are missing; says why and what to do.
    """
    with contextlib.suppress(OSError):
      self._write_summary()
    if path := self._write_report():
      note(f"report: {path}")
    if self._problems:
      whys = "; ".join(f"{k}: {why}" for k, why in self._problems.items())
      raise OSError(
        f"{self._workdir / writers.SUMMARY_FILE} lacks the figures of "
        f"{whys}. Training is done and saved: free disk space, and the same "
        "command evaluates again and writes the rest"
      )

  def _write_summary(self) -> None:
    if self._pending:
      writers.update_summary(self._workdir, self._pending)
      for stage in self._pending:
        self._problems.pop(stage, None)
      self._pending = {}

  def _write_report(self) -> Path | None:
    """Made of what is saved, so that it can be written at any time."""
    try:
      return report.write_report(self._workdir)
    except Exception as error:
      logging.info(traceback.format_exc())
      note(
        f"warning: the report could not be written "
        f"({cli.one_line(error)}). This writes it later: python -m "
        f"psvae_jax.report {self._workdir}"
      )
      return None

  def _warn(self, stage: str, why: str) -> None:
    if stage in self._problems:  # said before
      return
    self._problems[stage] = why
    note(
      f"warning: the results of {stage} could not be written ({why}). The job "
      "goes on and tries again later"
    )


def _device() -> str:
  devices = jax.devices()
  kind = devices[0].device_kind
  if devices[0].platform == "cpu":
    kind = f"{platform.machine()} CPU, {os.cpu_count()} cores"
  return f"{len(devices)} × {kind}"


def _versions() -> dict[str, str]:
  names = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "psvae_jax")
  found = {"python": platform.python_version()}
  for name in names:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  return found
