"""The generator's own objective on held-out data, at fixed times and noise.

The training loss is noisy: every batch draws its times. Here every example
meets the same noise at the same times in every evaluation, so that two
evaluations, or two runs, compare.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from psvae_jax import flow, sharding
from psvae_jax.evaluators.image_metrics import MeanAccumulator

TIMES = (0.1, 0.3, 0.5, 0.7, 0.9)

Examples = dict[str, Any]
# (params, frozen, part of a batch) → {"latent", "condition", "source"…}
Encode = Callable[[Any, Any], Examples]
Velocity = Callable[[Any, jax.Array, jax.Array, Examples], jax.Array]


class FlowLoss:
  """Mean squared error of the velocity by time.

  Args:
    encode: (frozen, batch on the mesh) → examples with "latent" (B, h, w, C).
    velocity: (params, x_t, t, examples) → v.
  """

  def __init__(self, encode: Encode, velocity: Velocity) -> None:
    self._encode, self._velocity = encode, velocity
    self._errors = jax.jit(self._trace)

  def _trace(
    self, params: Any, frozen: Any, batch: Any
  ) -> dict[str, jax.Array]:
    """Errors (B,) by time."""
    examples = self._encode(frozen, batch)
    latent = examples["latent"]

    def draw(index):
      key = jax.random.fold_in(jax.random.key(0), index)
      return jax.random.normal(key, latent.shape[1:], latent.dtype)

    noise = jax.vmap(draw)(batch["index"].astype(jnp.int32))
    target = flow.velocity(latent, noise)
    errors = {}
    for time in TIMES:
      t = jnp.full(latent.shape[:1], time, latent.dtype)
      x_t = flow.interpolate(latent, noise, t)
      v = self._velocity(params, x_t, t, examples)
      errors[f"loss_t{time:g}"] = jnp.mean(jnp.square(v - target), (1, 2, 3))
    errors["loss"] = sum(errors.values()) / len(TIMES)
    return errors

  def __call__(
    self, params: Any, frozen: Any, batches: Any, mesh: Any
  ) -> dict[str, float]:
    """`eval/loss` over all times, and `eval/loss_t0.1`, …

    Args:
      params: the DiT's.
      frozen: the task's, on the mesh.
      batches: this host's parts of batches with "index" and "mask".
      mesh: where they go.
    """
    means = MeanAccumulator()
    for batch in batches:
      batch = sharding.put_batch(batch, mesh)
      errors = self._errors(params, frozen, batch)
      out = sharding.replicate({**errors, "mask": batch["mask"]})
      mask = out.pop("mask")
      means.update(out, mask)
    return {f"eval/{name}": x for name, x in means.result().items()}
