"""What the training loop asks of a task, and nothing more.

A task is one thing to optimise: it names the modules it trains, holds the
pretrained arrays it needs, turns (parameters, batch) into gradients, and scores
itself on held-out data. The loop knows no model, the task knows no loop.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class EvalContext:
  """Where an evaluation runs and where it leaves its pictures.

  Attributes:
    mesh: the mesh that parameters and batches live on.
    folder: `<workdir>/<stage>`; None writes no files.
  """

  mesh: Mesh
  folder: Path | None = None


class Task(Protocol):
  """One job's objective.

  Attributes:
    name: the stage's name in the config.
    fingerprint: identifies the model that checkpoints belong to.
    multipliers: trained module → factor on its learning rate. Its keys are the
      trained modules, in order.
    bridge: (earlier stage, modules) whose EMA starts this stage, or None.
    frozen: host arrays the step reads and never changes.
    image_size: side of the images a batch carries.
  """

  name: str
  fingerprint: str
  multipliers: dict[str, float]
  bridge: tuple[str, tuple[str, ...]] | None
  frozen: Params
  image_size: int

  def init(self, rng: jax.Array, frozen: Params) -> Params:
    """Initial parameters of the trained modules; pure, traced under jit."""

  def gradients(
    self, params: Params, frozen: Params, batch: Batch, rng: jax.Array
  ) -> tuple[Params, Metrics]:
    """Gradients like `params`, and scalar metrics; pure, traced under jit."""

  def example_transform(self) -> Callable | None:
    """Per-example (element, rng) → element for the data pipeline, or None."""

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
