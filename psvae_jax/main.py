"""Trains every stage of a job, in order. Intentionally kept short.

    python -m psvae_jax.main --config=configs/psvae.py --workdir=runs/psvae

Finished stages are skipped and an interrupted one resumes, so the same command
starts, continues and completes a job. Any field can be overridden:
`--config.psvae.train.steps=100`. Results are in WORKDIR/report.html and
WORKDIR/summary.json.
"""

import json
import os
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import app, flags, logging

from psvae_jax import cli, memory
from psvae_jax.config import Config, ConfigError
from psvae_jax.config import parser as config_parser

USAGE = """\
Usage: python -m psvae_jax.main --config=FILE[:VARIANT] [--workdir=DIR] [FLAGS]

Trains every stage of a job, in order. The same command continues an interrupted
job and skips finished stages. Results: DIR/report.html, DIR/summary.json.

  --config=FILE[:VARIANT]  the job: a Python file with get_config, or JSON such
                           as a workdir's config.json
  --config.FIELD=VALUE     any field of it, e.g. --config.psvae.train.steps=100
  --workdir=DIR            checkpoints, metrics and the report; by default
                           runs/FILE-VARIANT, e.g. runs/psvae-photos
  --print_config           print the checked config as JSON and stop; opens no
                           weights, data, device or workdir
  --verbosity=0            log everything, with tracebacks
  --help, --helpfull       this page; also the flags of the libraries

Examples:
  python -m psvae_jax.main --config=configs/psvae.py --workdir=runs/psvae
  python -m psvae_jax.main --config=configs/psvae.py:photos \\
    --config.data.root=TRAIN --config.data.eval_root=VALIDATION
  python -m psvae_jax.main --config=configs/psvae.py \\
    --config.stages=svae --config.svae.train.steps=100 --workdir=runs/short
  python -m psvae_jax.main --config=configs/psvae.py --print_config > job.json
  python -m psvae_jax.main --config=job.json --workdir=runs/again
"""

_CONFIG = flags.DEFINE_string(
  "config", None, "Config file, e.g. configs/psvae.py or one with :VARIANT."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder for checkpoints, metrics and the report."
)
_PRINT_CONFIG = flags.DEFINE_bool(
  "print_config", False, "Print the checked config as JSON and stop."
)


def run(config: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
  """Runs a job; returns its summary.

  Args:
    config: raw config, see `psvae_jax.config`.
    workdir: created if need be.

  Raises:
    ConfigError: the config cannot be run.
    CheckpointError: the workdir holds another model's checkpoints.
    WorkdirError: another run uses the workdir, or it cannot be written to.
  """
  import jax

  from psvae_jax import writers
  from psvae_jax.checkpoint import agree
  from psvae_jax.results import Results
  from psvae_jax.tasks import make_task
  from psvae_jax.workdir import workdir_lock

  parsed = config_parser.parse(config)
  mesh = _make_mesh(parsed)
  # Every stage's, so that a later one's mistake is found before any training.
  tasks = {stage: make_task(stage, parsed, workdir) for stage in parsed.stages}
  with workdir_lock(workdir, enabled=jax.process_index() == 0):
    results = Results(workdir, config_parser.with_defaults(config))
    _drop_finished(tasks, parsed, results, workdir)
    for stage in list(tasks):
      _run_stage(tasks.pop(stage), parsed, mesh, workdir, results)
    agree(results.close)
    return writers.read_summary(workdir)


def _drop_finished(
  tasks: dict[str, Any], config: Config, results: Any, workdir: Path
) -> None:
  """Removes the tasks of finished stages; checks what the others start from.

  Nothing is written before all of them are known to fit the workdir.
  """
  from psvae_jax import stages as stage_lib
  from psvae_jax import train

  for stage, task in list(tasks.items()):
    if stage_lib.is_finished(task, config, workdir):
      train.note(f"{stage}: finished before{results.other_settings(stage)}")
      del tasks[stage]
  for task in tasks.values():
    if task.bridge is not None and task.bridge.stage not in tasks:
      stage_lib.check_bridge(task, workdir)
  for task in list(tasks.values())[:1]:  # all read the same
    stage_lib.check_data(task, config, workdir)


def _run_stage(
  task: Any, config: Config, mesh: Any, workdir: Path, results: Any
) -> None:
  import jax

  from psvae_jax import sharding, train
  from psvae_jax.checkpoint import agree
  from psvae_jax.tasks.base import EvalContext

  references = {}
  if task.name == config.stages[0]:
    with jax.set_mesh(mesh):
      frozen = sharding.put_tree(task.frozen, mesh)
      references = task.references(frozen, EvalContext(mesh))
      del frozen

  def write_config() -> None:  # called once it is certain to fit the workdir
    agree(lambda: results.write_config(task.name))

  result = train.run_stage(task, config, mesh, workdir, write_config)
  agree(lambda: results.add(task.name, result, references))


def _make_mesh(config: Config) -> Any:
  """The mesh, or a ConfigError if the job does not fit this machine."""
  import jax

  from psvae_jax import sharding
  from psvae_jax.config import checks as config_checks

  config_checks.check_devices(config, len(jax.devices()))
  mesh = sharding.make_mesh(config.mesh)
  config_checks.check_shards(config, sharding.batch_shards(mesh))
  if config.compute.dtype == "float64" and not jax.config.jax_enable_x64:
    raise ConfigError(
      "config.compute.dtype='float64' needs JAX in double precision: set "
      "JAX_ENABLE_X64=1, or take 'float32'"
    )
  return mesh


def _workdir(argument: str | None, config: str) -> Path:
  """The folder to write to, which is not created yet.

  Args:
    argument: --workdir.
    config: --config; names the folder where `argument` is missing, in the same
      way as launch/local.sh.

  Raises:
    ConfigError: it cannot be one.
  """
  file, _, variant = config.partition(":")
  name = os.path.basename(file).removesuffix(".py").removesuffix(".json")
  name = re.sub(r"[^A-Za-z0-9._=-]", "-", f"{name}-{variant}".rstrip("-"))
  workdir = Path(argument or os.path.join("runs", name))
  if argument and "://" in argument:
    raise ConfigError(
      f"--workdir={argument} is an address; give a folder, e.g. one where the "
      "bucket is mounted"
    )
  existing = next(
    path
    for path in (workdir, *workdir.absolute().parents)
    if os.path.exists(path)
  )
  if not existing.is_dir():
    raise ConfigError(
      f"--workdir={workdir} cannot be created: {existing} is a file; give a "
      "folder, e.g. --workdir=runs/psvae"
    )
  if not os.access(existing, os.W_OK | os.X_OK):
    raise ConfigError(
      f"--workdir={workdir}: no permission to write to {existing}; give "
      "another folder, e.g. --workdir=runs/psvae"
    )
  return workdir


def main(argv: list[str], overrides: Mapping[str, str]) -> None:
  """Runs the job that the flags describe."""
  # Orbax writes a page a checkpoint at INFO; --verbosity=0 shows it.
  if not any(arg.lstrip("-").startswith("verbosity") for arg in sys.argv):
    logging.set_verbosity(logging.WARNING)
  try:
    if len(argv) > 1:
      raise ConfigError(
        f"unexpected argument {argv[1]!r}; a config is given as --config=FILE"
      )
    if not _CONFIG.value:
      raise ConfigError("--config is missing, e.g. --config=configs/psvae.py")
    config = config_parser.override(cli.load_config(_CONFIG.value), overrides)
    config_parser.parse(config)
    if _PRINT_CONFIG.value:
      print(json.dumps(config, indent=2, ensure_ascii=False))
      return
    workdir = _workdir(_WORKDIR.value, _CONFIG.value)
  except ConfigError as error:
    cli.fail(str(error))
  from psvae_jax.checkpoint import CheckpointError
  from psvae_jax.workdir import WorkdirError

  try:
    run(config, workdir)
  except (ConfigError, WorkdirError) as error:
    cli.fail(str(error))
  except (ValueError, OSError, FloatingPointError, CheckpointError) as error:
    logging.info(traceback.format_exc())
    cli.fail(f"{error}\n(--verbosity=0 shows where)")


def _parse_flags(argv: list[str]) -> list[str]:
  """Sets the flags that are not fields of the config; returns the rest."""
  try:
    return flags.FLAGS(argv)
  except flags.UnrecognizedFlagError as error:
    if "." in error.flagname:
      cli.fail(
        f"unknown flag --{error.flagname}; did you mean "
        f"--config.{error.flagname.removeprefix('config.')}?"
      )
    cli.fail(cli.one_line(error))
  except flags.Error as error:
    cli.fail(cli.one_line(error))


def command() -> None:
  """The command line."""
  if cli.wants_help(sys.argv[1:]):
    print(USAGE, end="")
    return
  memory.keep_freed_memory()
  try:
    argv = flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False)
  except flags.Error as error:  # a --flagfile that is not there
    cli.fail(cli.one_line(error))
  argv, overrides = cli.split_overrides(argv)
  app.run(
    lambda rest: main(rest, overrides), argv=argv, flags_parser=_parse_flags
  )


if __name__ == "__main__":
  cli.guard(command, interrupted="the same command resumes")
