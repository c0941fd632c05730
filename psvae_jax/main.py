"""Trains every stage of a job, in order. Intentionally kept short.

    python -m psvae_jax.main --config=configs/psvae.py --workdir=runs/psvae

Finished stages are skipped and an interrupted one resumes, so the same command
starts, continues and completes a job. Any field can be overridden:
`--config.psvae.train.steps=100`. Results are in WORKDIR/report.html and
WORKDIR/summary.json.
"""

import json
import os
import platform
import sys
import time
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file, e.g. configs/psvae.py or configs/psvae.py:base"
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder for checkpoints, metrics and the report."
)


def run(config, workdir: Path) -> dict:
  """Runs a job; returns its summary.

  Args:
    config: raw config, see `psvae_jax.config`.
    workdir: created if need be.

  Raises:
    ConfigError: the config cannot be run.
    CheckpointError: the workdir holds another model's checkpoints.
  """
  import jax

  from psvae_jax import config_parser, report, sharding, train, writers
  from psvae_jax.tasks import make_task
  from psvae_jax.tasks.base import EvalContext

  started = time.monotonic()
  parsed = config_parser.parse(config)
  mesh = sharding.make_mesh(parsed.mesh)
  workdir.mkdir(parents=True, exist_ok=True)
  chief = jax.process_index() == 0
  if chief:
    text = json.dumps(config.to_dict(), indent=2, default=str)
    writers.write_json_atomic(workdir / "config.json", json.loads(text))
  for stage in parsed.stages:
    task = make_task(stage, parsed, workdir)
    if train.is_finished(task, parsed, workdir):
      logging.info("%s: finished before, skipped", stage)
      continue
    with jax.set_mesh(mesh):
      frozen = sharding.put_tree(task.frozen, mesh)
      references = {}
      if stage == parsed.stages[0]:
        references = task.references(frozen, EvalContext(mesh))
    result = train.run_stage(task, parsed, mesh, workdir)
    if chief:
      writers.update_summary(
        workdir,
        {
          **references,
          stage: result.metrics,
          "wall_seconds": {stage: round(result.wall_seconds, 1)},
          "device": _device(),
          "versions": _versions(),
        },
      )
      report.write_report(workdir)
  if not chief:
    return {}
  summary = writers.read_summary(workdir)
  walls = summary.get("wall_seconds", {})
  total = sum(v for k, v in walls.items() if k != "total")
  writers.update_summary(workdir, {"wall_seconds": {"total": round(total, 1)}})
  path = report.write_report(workdir)
  logging.info("done in %.0f s: %s", time.monotonic() - started, path)
  return writers.read_summary(workdir)


def _device() -> str:
  import jax

  devices = jax.devices()
  kind = devices[0].device_kind
  if devices[0].platform == "cpu":
    kind = f"{platform.machine()} CPU, {os.cpu_count()} cores"
  return f"{len(devices)} × {kind}"


def _versions() -> dict[str, str]:
  from importlib import metadata

  names = ("jax", "flax", "optax", "orbax-checkpoint", "grain", "psvae_jax")
  found = {"python": platform.python_version()}
  for name in names:
    try:
      found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
      continue
  return found


def main(argv: list[str]) -> None:
  del argv
  # Orbax writes a page a checkpoint at INFO; --verbosity=0 shows it.
  if not any(arg.lstrip("-").startswith("verbosity") for arg in sys.argv):
    logging.set_verbosity(logging.WARNING)
  from psvae_jax.checkpoint import CheckpointError
  from psvae_jax.config import ConfigError

  if _CONFIG.value is None:
    sys.exit("--config is missing, e.g. --config=configs/psvae.py")
  workdir = _WORKDIR.value or os.path.join("runs", _CONFIG.value.stages[0])
  try:
    run(_CONFIG.value, Path(workdir))
  except (ConfigError, CheckpointError, FileNotFoundError) as error:
    sys.exit(f"error: {error}")


if __name__ == "__main__":
  app.run(main)
