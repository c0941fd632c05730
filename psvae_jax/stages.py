"""A stage outside its loop: first state, data, can it start, is it done."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from psvae_jax import checkpoint as ckpt
from psvae_jax import sharding, train_state
from psvae_jax.config import STAGES, Config, GeneratorModel
from psvae_jax.data import pipeline, sources
from psvae_jax.tasks.base import Task
from psvae_jax.tasks.data import quarantine_file
from psvae_jax.train_state import TrainState
from psvae_jax.writers import read_summary


def init_state(
  task: Task,
  tx: optax.GradientTransformationExtraArgs,
  frozen: Any,
  mesh: Mesh,
  rng: jax.Array,
  workdir: Path,
) -> TrainState:
  """Fresh state of a stage, created sharded, bridged from the stage before."""
  abstract = jax.eval_shape(task.init, rng, frozen)
  shardings = sharding.infer_sharding(abstract, mesh)
  params, model_state = jax.jit(task.init, out_shardings=shardings)(rng, frozen)
  if task.bridge is not None:
    wanted = jax.tree.map(
      lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
      abstract[0],
      shardings[0],
    )
    restored = ckpt.restore_ema(
      checkpoints(workdir, task.bridge.stage),
      wanted,
      task.bridge.averaged,
      task.fingerprint,
      raw_modules=task.bridge.trained,
      description=task.description,
    )
    params = {**params, **restored}
  settle = jax.jit(task.settle, out_shardings=shardings[1])
  model_state = settle(params, model_state)

  def create(params, model_state):
    return train_state.create(params, model_state, tx, task.modules)

  shapes = jax.eval_shape(create, params, model_state)
  out = sharding.infer_sharding(shapes, mesh)
  # Not donated: jit would hand `params` through and alias it with the EMA.
  return jax.jit(create, out_shardings=out)(params, model_state)


def abstract_state(
  task: Task,
  tx: optax.GradientTransformationExtraArgs,
  frozen: Any,
  mesh: Mesh,
) -> TrainState:
  """Shapes, dtypes and shardings of a state: the target of a restore."""

  def create(rng, frozen):
    return train_state.create(*task.init(rng, frozen), tx, task.modules)

  shapes = jax.eval_shape(create, jax.random.key(0), frozen)
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    shapes,
    sharding.infer_sharding(shapes, mesh),
  )


def make_train_iterator(
  task: Task, config: Config, stage: str, workdir: Path
) -> Any:
  """This host's part of the training batches of `stage`, checkpointable."""
  data = task.train_data(workdir)
  shared = dict(
    # Stages see different orders of the same data, whichever are run.
    seed=config.data.seed + 1009 * index(stage),
    num_threads=config.data.num_threads,
    prefetch=config.data.prefetch,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    tokenize=data.tokenize,
  )
  if not isinstance(data.parts, pipeline.Part):
    return pipeline.joint_train_iterator(data.parts, **shared)
  part = data.parts
  fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
  return pipeline.train_iterator(**fields, **shared)


def check_data(task: Task, config: Config, workdir: Path) -> None:
  """Opens both splits, so that a wrong folder fails before any training.

  Raises:
    FileNotFoundError: a folder is missing or empty.
    ValueError: a split has no images, or not the classes that are wanted.
  """
  model, settings = config.model, (task.image_size, quarantine_file(workdir))
  for split in sources.SPLITS:
    source = sources.make_source(config.data, split, *settings)
    if isinstance(model, GeneratorModel) and model.condition == "class":
      sources.check_classes(source, model.num_classes)
    if "edit" in config.stages:
      sources.make_edit_source(config.data, split, *settings)


def index(stage: str) -> int:
  return list(STAGES).index(stage)


def is_finished(task: Task, config: Config, workdir: Path) -> bool:
  """Whether a stage has its last checkpoint and its figures.

  Raises:
    CheckpointError: the workdir holds another model's checkpoints.
  """

  def decide() -> bool:
    if not ckpt.has_checkpoint(checkpoints(workdir, task.name)):
      return False
    step = _latest_step(task, workdir, task.name)
    finished = step >= config.sections[task.name].train.steps
    return finished and task.name in read_summary(workdir)

  return ckpt.agree(decide)


def check_bridge(task: Task, workdir: Path) -> None:
  """Checks that a stage with a bridge, unless begun, finds what it needs.

  Raises:
    CheckpointError: the earlier stage has no checkpoint, or another model's.
  """

  def check() -> None:
    begun = ckpt.has_checkpoint(checkpoints(workdir, task.name))
    if not begun:
      _latest_step(task, workdir, task.bridge.stage)

  ckpt.agree(check)


def checkpoints(workdir: Path, stage: str) -> Path:
  return workdir / stage / "checkpoints"


def _latest_step(task: Task, workdir: Path, stage: str) -> int:
  return ckpt.checked_latest_step(
    checkpoints(workdir, stage), task.fingerprint, task.description
  )
