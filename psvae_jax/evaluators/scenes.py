"""Figures that need the scenes' ground truth: attribute probe and checker."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from psvae_jax import sharding
from psvae_jax.config import EvalConfig
from psvae_jax.data import pipeline, scene_checker
from psvae_jax.data.scenes import SceneSource, attributes
from psvae_jax.evaluators.image_metrics import MeanAccumulator
from psvae_jax.evaluators.probe import (
  ProbeExamples,
  chance_accuracy,
  probe_accuracy,
)

Pooled = Callable[[jax.Array], dict[str, jax.Array]]


class SceneProbe:
  """Linear probe of scene attributes; the same scenes for every model.

  Args:
    image_size: side of the rendered scenes.
    config: number of scenes and batch size.
  """

  def __init__(self, image_size: int, config: EvalConfig) -> None:
    self._image_size = image_size
    self._batch_size = config.batch_size
    # Probe scenes are drawn apart from the training order, by their seed.
    self._train = SceneSource("train", config.num_probe_train, image_size, 1)
    self._test = SceneSource("validation", config.num_probe_test, image_size, 1)

  def scores(self, pooled: Pooled, mesh: Mesh) -> dict[str, dict[str, float]]:
    """Fits and scores one probe for each feature `pooled` returns.

    Args:
      pooled: uint8 images (B, S, S, 3) on the mesh → name → (B, D), replicated.
      mesh: the mesh.

    Returns:
      Feature name → {"accuracy": …, "accuracy_<family>": …}.
    """
    train = self._collect(self._train, pooled, mesh)
    test = self._collect(self._test, pooled, mesh)
    return {
      name: probe_accuracy(*train[name].result(), *test[name].result())
      for name in train
    }

  def chance(self) -> float:
    """The probe's accuracy on features that are the same for every image."""
    halves = [
      {
        k: np.stack(
          [attributes(source.scene(i))[k] for i in range(len(source))]
        )
        for k in attributes(source.scene(0))
      }
      for source in (self._train, self._test)
    ]
    return chance_accuracy(*halves)["accuracy"]

  def _collect(
    self, source: SceneSource, pooled: Pooled, mesh: Mesh
  ) -> dict[str, ProbeExamples]:
    examples: dict[str, ProbeExamples] = {}
    for batch in pipeline.eval_batches(
      source,
      image_size=self._image_size,
      batch_size=self._batch_size,
      num_examples=len(source),
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    ):
      batch = sharding.put_batch(batch, mesh)
      out = jax.device_get(
        {"features": pooled(batch["image"]), **sharding.replicate(batch)}
      )
      mask = out["mask"]
      found = [attributes(source.scene(i)) for i in out["index"][mask]]
      targets = {k: np.stack([a[k] for a in found]) for k in found[0]}
      for name, features in out["features"].items():
        examples.setdefault(name, ProbeExamples()).update(
          features[mask], targets
        )
    return examples


class CheckerScore:
  """Share of images in which the checker reads what the scene says.

  Args:
    source: the scenes that the images are made from.
  """

  def __init__(self, source: SceneSource) -> None:
    self._source = source
    self._means = MeanAccumulator()

  def update(self, indices: Any, images: Any) -> None:
    """Adds uint8 images (B, S, S, 3) of the source's scenes `indices`."""
    checks = [
      scene_checker.check_scene(image, self._source.scene(int(index)))
      for index, image in zip(indices, images, strict=True)
    ]
    if checks:
      self._means.update(
        {k: np.array([c[k] for c in checks], float) for k in checks[0]}
      )

  def result(self) -> dict[str, float]:
    """`eval/checker_accuracy` (everything right) and its parts, in [0, 1]."""
    means = self._means.result()
    metrics = {"eval/checker_accuracy": means.pop("all")}
    return metrics | {f"eval/checker_{k}": v for k, v in means.items()}
