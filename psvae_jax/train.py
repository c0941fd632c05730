"""THE loop. It knows no model: restore, save, batch, step, log, evaluate."""

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from psvae_jax import checkpoint as ckpt
from psvae_jax import sharding, train_state
from psvae_jax.config import STAGES, Config
from psvae_jax.data import pipeline, sources
from psvae_jax.optim import make_optimizer
from psvae_jax.progress import Progress
from psvae_jax.tasks.base import EvalContext, Task
from psvae_jax.train_state import TrainState
from psvae_jax.writers import MetricWriter, read_summary


@dataclasses.dataclass(frozen=True)
class StageResult:
  """What a finished stage reports.

  Attributes:
    metrics: figures of the EMA parameters.
    wall_seconds: time spent in the stage, added up over restarts.
    state: the final state, on the mesh.
  """

  metrics: dict[str, float]
  wall_seconds: float
  state: TrainState


def make_train_step(task: Task, tx: optax.GradientTransformation, ema: float):
  """Builds `train_step(state, frozen, batch, rng) -> (state, metrics)`."""

  def train_step(state, frozen, batch, rng):
    # Nothing random is saved: the stream of a step follows from its number.
    rng = jax.random.fold_in(rng, state.step)
    grads, metrics = task.gradients(state.params, frozen, batch, rng)
    new_state, updates = train_state.apply_gradients(state, grads, tx, ema)
    for name in grads:
      metrics[f"grad_norm/{name}"] = optax.global_norm(grads[name])
      metrics[f"update_norm/{name}"] = optax.global_norm(updates[name])
    return new_state, {f"train/{k}": v for k, v in metrics.items()}

  return train_step


def init_state(
  task: Task,
  tx: optax.GradientTransformation,
  frozen: Any,
  mesh: Mesh,
  rng: jax.Array,
  workdir: Path,
) -> TrainState:
  """Fresh state of a stage, created sharded, bridged from the stage before."""
  abstract = jax.eval_shape(task.init, rng, frozen)
  shardings = sharding.infer_sharding(abstract, mesh)
  params = jax.jit(task.init, out_shardings=shardings)(rng, frozen)
  if task.bridge is not None:
    earlier, modules = task.bridge
    wanted = jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
      abstract,
      shardings,
    )
    restored = ckpt.restore_ema(
      workdir / earlier / "checkpoints", wanted, modules, task.fingerprint
    )
    params = {**params, **restored}

  def create(params):
    return train_state.create(params, tx)

  out = sharding.infer_sharding(jax.eval_shape(create, params), mesh)
  # Not donated: jit would hand `params` through and alias it with the EMA.
  return jax.jit(create, out_shardings=out)(params)


def abstract_state(
  task: Task, tx: optax.GradientTransformation, frozen: Any, mesh: Mesh
) -> TrainState:
  """Shapes, dtypes and shardings of a state: the target of a restore."""

  def create(rng, frozen):
    return train_state.create(task.init(rng, frozen), tx)

  shapes = jax.eval_shape(create, jax.random.key(0), frozen)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.infer_sharding(shapes, mesh),
  )


def note(message: str) -> None:
  """One line for the user, from one process."""
  if jax.process_index() == 0:
    print(message, flush=True)


def make_train_iterator(task: Task, config: Config, stage: str) -> Any:
  """This host's part of the training batches of `stage`, checkpointable."""
  section = config.sections[stage]
  return pipeline.train_iterator(
    sources.make_source(config.data, "train", task.image_size),
    image_size=task.image_size,
    batch_size=section.train.batch_size,
    # Stages see different orders of the same data, whichever are run.
    seed=config.data.seed + 1009 * _stage_index(stage),
    augment=config.data.augment,
    min_scale=config.data.min_scale,
    num_threads=config.data.num_threads,
    prefetch=config.data.prefetch,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    transform=task.example_transform(),
  )


def check_data(task: Task, config: Config) -> None:
  """Opens both splits, so that a wrong folder fails before any training.

  Raises:
    FileNotFoundError: a folder is missing or empty.
    ValueError: a split has no images.
  """
  for split in ("train", "validation"):
    sources.make_source(config.data, split, task.image_size)


def _stage_index(stage: str) -> int:
  return list(STAGES).index(stage)


def is_finished(task: Task, config: Config, workdir: Path) -> bool:
  """Whether a stage has its last checkpoint and its figures.

  Raises:
    CheckpointError: the workdir holds another model's checkpoints.
  """
  folder = workdir / task.name / "checkpoints"
  if not ckpt.has_checkpoint(folder):
    return False
  step = ckpt.checked_latest_step(folder, task.fingerprint)
  finished = step >= config.sections[task.name].train.steps
  return finished and task.name in read_summary(workdir)


def run_stage(
  task: Task, config: Config, mesh: Mesh, workdir: Path
) -> StageResult:
  """Trains one stage to its end, resuming what is in `workdir`.

  Args:
    task: what to optimise.
    config: the job.
    mesh: where arrays live.
    workdir: folder of the whole experiment.

  Returns:
    Final figures, and the state.

  Raises:
    FloatingPointError: the loss is not finite.
    CheckpointError: the workdir holds another model's checkpoints.
  """
  started = time.monotonic()
  section = config.sections[task.name]
  steps, batch_size = section.train.steps, section.train.batch_size
  sharding.check_batch(batch_size, mesh, f"{task.name}.train.batch_size")
  folder = workdir / task.name
  with jax.set_mesh(mesh):
    frozen = sharding.put_tree(task.frozen, mesh)
    tx = make_optimizer(section.optim, steps, task.multipliers)
    # Streams by name: stage, then what the stage draws for.
    root = jax.random.fold_in(
      jax.random.key(config.seed), _stage_index(task.name)
    )
    init_rng, rng = jax.random.split(root)
    rng = jax.device_put(rng, sharding.replicated(mesh))
    iterator = make_train_iterator(task, config, task.name)
    checkpointer = ckpt.Checkpointer(
      folder / "checkpoints", config.checkpoint, task.fingerprint
    )
    restored = checkpointer.restore(
      abstract_state(task, tx, frozen, mesh), iterator
    )
    step, spent = 0, 0.0
    if restored is None:
      state = init_state(task, tx, frozen, mesh, init_rng, workdir)
    else:
      state, metadata = restored
      step, spent = metadata["step"], metadata["wall_seconds"]
      note(f"{task.name}: resumed at step {step} of {steps}")

    def wall_seconds():
      return spent + time.monotonic() - started

    train_step = jax.jit(
      make_train_step(task, tx, section.train.ema),
      donate_argnums=0,
      out_shardings=(
        jax.tree.map(lambda x: x.sharding, state),
        sharding.replicated(mesh),
      ),
    )
    context = EvalContext(mesh, folder if jax.process_index() == 0 else None)
    writer = MetricWriter(
      folder, start_step=step, enabled=jax.process_index() == 0
    )
    latest = pending = None
    with (
      writer,
      Progress(
        task.name,
        steps,
        start=step,
        images_per_step=batch_size,
        enabled=jax.process_index() == 0,
      ) as progress,
    ):
      while True:
        # ORDER MATTERS: save → next(batch) → step. A batch drawn before the
        # save would be lost on resume.
        last = step >= steps
        if last or (step and checkpointer.due(step)):
          # A line of metrics must not be younger than its checkpoint, and a
          # diverged state must not push out the good ones.
          pending = _log(pending, writer, progress)
          _check_finite(latest)
          checkpointer.save(
            step, state, iterator, {"wall_seconds": wall_seconds()}
          )
        if last:
          break
        batch = sharding.put_batch(next(iterator), mesh)
        with jax.transfer_guard("disallow"):
          state, metrics = train_step(state, frozen, batch, rng)
        step += 1
        # The step just dispatched runs while the one before it is read.
        pending = _log(pending, writer, progress)
        latest = (step, metrics)
        if step % section.train.log_every == 0 or step == steps:
          pending = latest
        progress.advance(step)
        every = config.eval.every_steps
        if every and step % every == 0 and step < steps:
          pending = _log(pending, writer, progress)
          with progress.paused():
            writer.write(step, task.evaluate(state.ema_params, frozen, context))
      checkpointer.close()
      with progress.paused():
        metrics = task.evaluate(state.ema_params, frozen, context)
        writer.write(step, metrics)
        if jax.process_index() == 0:
          task.export(state.ema_params, metrics, workdir)
  return StageResult(metrics, wall_seconds(), state)


def _values(metrics: Any) -> dict[str, float]:
  return {k: float(np.asarray(v)) for k, v in jax.device_get(metrics).items()}


def _check_finite(latest: Any) -> None:
  """Raises FloatingPointError if a step's loss, gradient or update is not."""
  if latest is None:
    return
  step, metrics = latest
  values = _values(metrics)
  bad = sorted(k for k, v in values.items() if not np.isfinite(v))
  if bad:
    raise FloatingPointError(
      f"training diverged: at step {step} these are not finite: "
      f"{', '.join(bad)}. The last checkpoint is from before it; lower the "
      "learning rate, or look for bad images."
    )


def _log(pending: Any, writer: MetricWriter, progress: Progress) -> None:
  """Writes the metrics of an earlier step; stops a run that has diverged."""
  if pending is None:
    return None
  step, metrics = pending
  values = _values(metrics)
  writer.write(
    step, {**values, "perf/images_per_second": progress.images_per_second}
  )
  progress.show(values)
  _check_finite(pending)
  return None
