"""Gradients of a small PatchGAN: native convolutions against matrix products.

    python -m psvae_jax.benchmarks.convolution

Prints the median seconds of each, standing free and under `lax.cond`, where
XLA's compiler for CPUs leaves its fast path, and the ratio native / matmul.
"""

import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from psvae_jax.models.convolution import KINDS
from psvae_jax.models.discriminator import PatchDiscriminator

_RUNS = 5


def seconds(function: Callable, *args: jax.Array) -> float:
  """Median time of a jitted call, compilation left out."""
  jax.block_until_ready(function(*args))
  times = []
  for _ in range(_RUNS):
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def measure(kind: str) -> tuple[float, float]:
  """Seconds of parameters' and images' gradients: free, under a condition."""
  module = PatchDiscriminator(channels=32, num_layers=2, convolution=kind)
  images = jax.random.normal(jax.random.key(0), (32, 48, 48, 3))
  params = module.init(jax.random.key(1), images)

  def loss(params, images):
    return jnp.mean(jnp.square(module.apply(params, images)))

  gradients = jax.grad(loss, argnums=(0, 1))

  @jax.jit
  def conditional(wanted, params, images):
    def nothing(params, images):
      return jax.tree.map(jnp.zeros_like, (params, images))

    return jax.lax.cond(wanted, gradients, nothing, params, images)

  free = seconds(jax.jit(gradients), params, images)
  return free, seconds(conditional, jnp.bool_(True), params, images)


def main() -> None:
  """Prints both kinds, and their ratio."""
  found = {kind: measure(kind) for kind in KINDS}
  for i, place in enumerate(("free", "under lax.cond")):
    native, matmul = (found[kind][i] for kind in KINDS)
    print(
      f"{place}: native {native:.3f} s, matmul {matmul:.3f} s, "
      f"ratio {native / matmul:.1f}"
    )


if __name__ == "__main__":
  main()
