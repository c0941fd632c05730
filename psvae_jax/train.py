"""THE loop. It knows no model: restore, save, batch, step, log, evaluate."""

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from psvae_jax import checkpoint as ckpt
from psvae_jax import guard as guard_lib
from psvae_jax import sharding, train_state
from psvae_jax import stages as stage_lib
from psvae_jax.config import Config
from psvae_jax.config.checks import check_shards
from psvae_jax.optim import make_optimizer
from psvae_jax.progress import Progress
from psvae_jax.tasks.base import EvalContext, Task
from psvae_jax.tasks.data import quarantine_file
from psvae_jax.train_state import TrainState
from psvae_jax.writers import MetricWriter, disk_is_full


@dataclasses.dataclass(frozen=True)
class StageResult:
  """What a finished stage reports.

  Attributes:
    metrics: figures of the EMA parameters.
    wall_seconds: time spent in the stage, added up over restarts.
    state: the final state, on the mesh.
    missing: what a full disk has kept from being written, and why; "" if
      nothing. Another start of the job writes it.
  """

  metrics: dict[str, float]
  wall_seconds: float
  state: TrainState
  missing: str = ""


def make_train_step(
  task: Task, tx: optax.GradientTransformationExtraArgs, ema: float
):
  """Builds `train_step(state, frozen, batch, rng) -> (state, metrics, flags)`.

  A step whose losses and gradients are not all finite leaves the state as it
  was, but for the step counter; `flags` says which (`guard.check`).
  """

  def train_step(state, frozen, batch, rng):
    # Nothing random is saved: the stream of a step follows from its number.
    rng = jax.random.fold_in(rng, state.step)
    grads, model_state, metrics = task.gradients(state, frozen, batch, rng)
    new_state, updates = train_state.apply_gradients(
      state, grads, model_state, tx, ema
    )
    for name in grads:
      metrics[f"grad_norm/{name}"] = optax.global_norm(grads[name])
      metrics[f"update_norm/{name}"] = optax.global_norm(updates[name])
    metrics = {f"train/{k}": v for k, v in metrics.items()}
    finite, flags = guard_lib.check(metrics)
    return train_state.skip(state, new_state, finite), metrics, flags

  return train_step


def note(message: str) -> None:
  """One line for the user, from one process."""
  if jax.process_index() == 0:
    print(message, flush=True)


def run_stage(
  task: Task,
  config: Config,
  mesh: Mesh,
  workdir: Path,
  on_start: Callable[[], None] = lambda: None,
) -> StageResult:
  """Trains one stage to its end, resuming what is in `workdir`.

  Args:
    task: what to optimise.
    config: the job.
    mesh: where arrays live.
    workdir: folder of the whole experiment.
    on_start: called once it is certain that the job fits what is in `workdir`,
      before the first step; not called when no step is left.

  Returns:
    Final figures, and the state.

  Raises:
    NonFiniteError: too many steps in a row were skipped.
    CheckpointError: the workdir holds another model's checkpoints.
  """
  check_shards(config, sharding.batch_shards(mesh))
  started = time.monotonic()
  task.prepare(Path(workdir))
  with jax.set_mesh(mesh):
    run = _Run(task, config, mesh, Path(workdir), started)
    with run.writer, run.progress:
      if run.step < run.settings.steps:
        on_start()
      run.train()
      return run.finish()


def _indices(batch: Any) -> np.ndarray | None:
  """Which examples a host's batch holds; of its parts, one after another."""
  if "index" in batch:
    return batch["index"]
  parts = [batch[k] for k in sorted(batch) if isinstance(batch[k], Mapping)]
  found = [part["index"] for part in parts if "index" in part]
  return np.concatenate(found) if found else None


class _Run:
  """One stage in progress: everything `train` and `finish` share."""

  def __init__(
    self,
    task: Task,
    config: Config,
    mesh: Mesh,
    workdir: Path,
    started: float,
  ) -> None:
    """Builds or restores the state, the data position and the jitted step."""
    self.started = started
    self.task, self.config, self.mesh, self.workdir = (
      task,
      config,
      mesh,
      workdir,
    )
    section = config.sections[task.name]
    self.settings = section.train
    folder, chief = workdir / task.name, jax.process_index() == 0
    self.frozen = sharding.put_tree(task.frozen, mesh)
    tx = make_optimizer(task.modules, self.settings.steps)
    # Streams by name: stage, then what the stage draws for.
    root = jax.random.fold_in(
      jax.random.key(config.seed), stage_lib.index(task.name)
    )
    init_rng, rng = jax.random.split(root)
    self.rng = jax.device_put(rng, sharding.replicated(mesh))
    self.iterator = stage_lib.make_train_iterator(
      task, config, task.name, workdir
    )
    self.checkpointer = ckpt.Checkpointer(
      stage_lib.checkpoints(workdir, task.name),
      config.checkpoint,
      task.fingerprint,
      description=task.description,
    )
    restored = self.checkpointer.restore(
      stage_lib.abstract_state(task, tx, self.frozen, mesh), self.iterator
    )
    self.step, self.spent, skipped = 0, 0.0, 0
    if restored is None:
      self.state = stage_lib.init_state(
        task, tx, self.frozen, mesh, init_rng, workdir
      )
    else:
      self.state, metadata = restored
      self.step, self.spent = metadata["step"], metadata["wall_seconds"]
      skipped = metadata.get("skipped_steps", 0)
      note(f"{task.name}: resumed at step {self.step} of {self.settings.steps}")
    replicated = sharding.replicated(mesh)
    self.train_step = jax.jit(
      make_train_step(task, tx, self.settings.ema),
      donate_argnums=0,
      out_shardings=(
        jax.tree.map(lambda x: x.sharding, self.state),
        replicated,
        replicated,
      ),
    )
    self.context = EvalContext(
      mesh, folder if chief else None, quarantine_file(workdir)
    )
    self.writer = MetricWriter(folder, start_step=self.step, enabled=chief)
    self.guard = guard_lib.Guard(
      folder if chief else None, config.guard.max_skipped, skipped, self.step
    )
    self.progress = Progress(
      task.name,
      self.settings.steps,
      start=self.step,
      images_per_step=self.settings.batch_size,
      enabled=chief,
    )
    self.pending = None  # (step, metrics on the device) of a line to be written

  def wall_seconds(self) -> float:
    return self.spent + time.monotonic() - self.started

  def train(self) -> None:
    """Steps to the end; every line of metrics is read one step late."""
    steps, every = self.settings.steps, self.config.eval.every_steps
    while True:
      # ORDER MATTERS: save → next(batch) → step. A batch drawn before the
      # save would be lost on resume.
      last = self.step >= steps
      if last or (self.step and self.checkpointer.due(self.step)):
        # A line of metrics must not be younger than its checkpoint.
        self._log()
        self._watch(keep=0)
        self._save()
      if last:
        return
      batch = next(self.iterator)
      examples = _indices(batch)
      batch = sharding.put_batch(batch, self.mesh)
      with jax.transfer_guard("disallow"):
        self.state, metrics, flags = self.train_step(
          self.state, self.frozen, batch, self.rng
        )
      self.step += 1
      self.checkpointer.poll()
      self.guard.record(self.step, flags, metrics, examples)
      # The step just dispatched runs while the one before it is read.
      self._log()
      self._watch(keep=1)
      if self.step % self.settings.log_every == 0 or self.step == steps:
        self.pending = (self.step, metrics)
      self.progress.advance(self.step)
      if every and self.step % every == 0 and self.step < steps:
        self._log()
        with self.progress.paused("evaluating"):
          self.writer.write(self.step, self._evaluate())

  def finish(self) -> StageResult:
    """Figures of the trained stage, and what it leaves for later ones."""
    self.checkpointer.close()
    with self.progress.paused("evaluating"):
      metrics = self._evaluate()
      metrics["train/skipped_steps"] = float(self.guard.total)
      self.writer.write(self.step, metrics)
      missing = self._export(metrics)
    return StageResult(metrics, self.wall_seconds(), self.state, missing)

  def _export(self, metrics: dict[str, float]) -> str:
    """Writes what the stage leaves; returns why a full disk prevented it."""
    if jax.process_index() == 0:
      try:
        self.task.export(self.state.ema_params, metrics, self.workdir)
      except OSError as error:
        if not disk_is_full(error):
          raise
        return str(error)
    return ""

  def _evaluate(self) -> dict[str, float]:
    context = dataclasses.replace(self.context, step=self.step)
    return self.task.evaluate(self.state.ema_params, self.frozen, context)

  def _save(self) -> None:
    self.checkpointer.save(
      self.step,
      self.state,
      self.iterator,
      {
        "wall_seconds": self.wall_seconds(),
        "skipped_steps": self.guard.total,
      },
    )

  def _watch(self, keep: int) -> None:
    """Names skipped steps; saves and stops where too many came in a row."""
    self._name_skipped(keep)
    error = self.guard.error()
    if error is None:
      return
    self._name_skipped(keep=0)  # the step in flight
    self._save()
    try:
      self.checkpointer.close()
    except ckpt.CheckpointError as failed:
      raise guard_lib.NonFiniteError(f"{error} And {failed}") from failed
    raise guard_lib.NonFiniteError(
      f"{error} The state is saved at step {self.step}: the same command goes "
      "on from there."
    )

  def _name_skipped(self, keep: int) -> None:
    for skipped in self.guard.flush(keep):
      note(f"{self.task.name}: skipped {skipped.describe()}")

  def _log(self) -> None:
    """Writes the metrics of an earlier step."""
    if self.pending is None:
      return
    step, metrics = self.pending
    self.pending = None
    values = {
      k: float(np.asarray(v)) for k, v in jax.device_get(metrics).items()
    }
    values["train/skipped_steps"] = self.guard.total
    rate = self.progress.images_per_second
    if np.isfinite(rate):  # not before the second step
      values["perf/images_per_second"] = rate
    self.writer.write(step, values)
    self.progress.show(values)
