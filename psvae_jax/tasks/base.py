"""What the training loop asks of a task, and nothing more.

A task is one thing to optimise: it names the modules it trains, holds the
pretrained arrays it needs, turns (parameters, batch) into gradients, and scores
itself on held-out data. The loop knows no model, the task knows no loop.
"""

import dataclasses
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from psvae_jax.optim import TrainedModule
from psvae_jax.tasks.data import TrainData
from psvae_jax.train_state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class EvalContext:
  """Where an evaluation runs and where it leaves its pictures.

  Attributes:
    mesh: the mesh that parameters and batches live on.
    folder: `<workdir>/<stage>`; None writes no pictures.
    quarantine: `<workdir>/quarantine.jsonl`, the same on every host, since it
      decides which records there are; None keeps no list.
    step: steps done.
  """

  mesh: Mesh
  folder: Path | None = None
  quarantine: Path | None = None
  step: int | None = None


@dataclasses.dataclass(frozen=True)
class Bridge:
  """What a stage takes over from an earlier one, by name.

  Attributes:
    stage: the earlier stage.
    averaged: modules that start from its moving averages.
    trained: modules without an average, which start from its parameters if the
      earlier stage had them.
  """

  stage: str
  averaged: tuple[str, ...]
  trained: tuple[str, ...] = ()


class Task(Protocol):
  """One job's objective.

  Attributes:
    name: the stage's name in the config.
    fingerprint: identifies the model that checkpoints belong to.
    description: the readable parts that the fingerprint is made of.
    modules: trained module → how it is trained, in order.
    bridge: what starts this stage, or None.
    frozen: host arrays the step reads and never changes.
    image_size: side of the images a batch carries.
  """

  name: str
  fingerprint: str
  description: dict[str, Any]
  modules: dict[str, TrainedModule]
  bridge: Bridge | None
  frozen: Params
  image_size: int

  def prepare(self, workdir: Path) -> None:
    """What must be there before the first step, and takes time to make.

    Called once, when the stage begins or goes on, on every host by itself and
    outside of any mesh; may add to `frozen`.
    """

  def init(self, rng: jax.Array, frozen: Params) -> tuple[Params, Params]:
    """Initial `params` and `model_state` of a `TrainState`; pure, jitted."""

  def settle(self, params: Params, model_state: Params) -> Params:
    """`model_state` for parameters that it was not made with; pure, jitted."""

  def gradients(
    self, state: TrainState, frozen: Params, batch: Batch, rng: jax.Array
  ) -> tuple[Params, Params, Metrics]:
    """Gradients like `state.params`, the new `model_state`, and metrics.

    Pure, traced under jit. All gradients are of the parameters in `state`, so
    that no module's update sees another's of the same step. Metrics are
    scalars and include "loss".
    """

  def train_data(self, workdir: Path) -> TrainData:
    """What the batches of `gradients` are made of."""

  def evaluate(
    self, params: Params, frozen: Params, context: EvalContext
  ) -> dict[str, float]:
    """Figures of the EMA parameters on held-out data."""

  def references(
    self, frozen: Params, context: EvalContext
  ) -> dict[str, dict[str, float]]:
    """Summary entries that do not depend on training (floors, ceilings)."""

  def export(
    self, params: Params, metrics: dict[str, float], workdir: Path
  ) -> None:
    """Writes what a finished stage leaves beside its checkpoints."""
