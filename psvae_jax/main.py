"""Trains every stage of a job, in order. Intentionally kept short.

    python -m psvae_jax.main --config=configs/psvae.py --workdir=runs/psvae

Finished stages are skipped and an interrupted one resumes, so the same command
starts, continues and completes a job. Any field can be overridden:
`--config.psvae.train.steps=100`. Results are in WORKDIR/report.html and
WORKDIR/summary.json.
"""

import os
import platform
import sys
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  "config",
  None,
  "Config file, e.g. configs/psvae.py or configs/psvae.py:photos",
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

  parsed = config_parser.parse(config)
  mesh = sharding.make_mesh(parsed.mesh)
  for field, size in config_parser.batch_sizes(parsed).items():
    sharding.check_batch(size, mesh, field)
  chief = jax.process_index() == 0
  for stage in parsed.stages:
    task = make_task(stage, parsed, workdir)
    finished = train.is_finished(task, parsed, workdir)  # or another model's
    train.check_data(task, parsed)
    if chief and stage == parsed.stages[0]:
      resolved = config_parser.with_defaults(config)
      writers.write_json_atomic(workdir / "config.json", resolved)
    if finished:
      train.note(f"{stage}: finished before, skipped")
      continue
    references = {}
    if stage == parsed.stages[0]:
      with jax.set_mesh(mesh):
        frozen = sharding.put_tree(task.frozen, mesh)
        references = task.references(frozen, EvalContext(mesh))
        del frozen
    result = train.run_stage(task, parsed, mesh, workdir)
    if chief:
      walls = writers.read_summary(workdir).get("wall_seconds", {})
      walls[stage] = round(result.wall_seconds, 1)
      walls["total"] = round(sum(v for k, v in walls.items() if k != "total"))
      writers.update_summary(
        workdir,
        {
          **references,
          stage: result.metrics,
          "wall_seconds": walls,
          "device": _device(),
          "versions": _versions(),
        },
      )
      report.write_report(workdir)
  if chief:
    train.note(f"report: {report.write_report(workdir)}")
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

  config = _CONFIG.value
  if config is None:
    sys.exit("error: --config is missing, e.g. --config=configs/psvae.py")
  try:
    stages = config.get("stages", ())  # a file that is missing fails here
  except OSError as error:
    sys.exit(f"error: {' '.join(str(error).split())}")
  workdir = _WORKDIR.value or os.path.join("runs", "-".join(stages))
  try:
    run(config, Path(workdir))
  except (ValueError, OSError, FloatingPointError, CheckpointError) as error:
    logging.info(traceback.format_exc())
    sys.exit(f"error: {error}\n(--verbosity=0 shows where)")


def _parse_flags(argv: list[str]) -> list[str]:
  """Flags → their values; a mistake in a config is one line, not a page."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    # config_flags puts the traceback of the config file into its message.
    message = str(error).strip().splitlines()[-1].strip()
    sys.exit(f"error: in the flags or the config file: {message}")
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    sys.exit(f"error: in the flags or the config file: {error}")


if __name__ == "__main__":
  app.run(main, flags_parser=_parse_flags)
