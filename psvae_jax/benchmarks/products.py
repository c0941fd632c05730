"""A DiT block's Dense layer: native float32 against mixed products.

    python -m psvae_jax.benchmarks.products

Prints the median milliseconds of the forward product and of the layer's
gradients, in float32, in flax's bfloat16 and mixed, and the ratio to float32.
"""

import statistics
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from psvae_jax import memory
from psvae_jax.models import products

_RUNS = 20
_TOKENS, _WIDTH, _HIDDEN = 3328, 192, 512  # the miniature's, a batch of 64

KINDS = {
  "float32": dict(dtype=jnp.float32),
  "bfloat16": dict(dtype=jnp.bfloat16),
  "mixed": dict(dtype=jnp.float32, dot_general=products.mixed),
}


def milliseconds(function: Callable, *args: jax.Array) -> float:
  """Median time of a jitted call, compilation left out."""
  jax.block_until_ready(function(*args))
  times = []
  for _ in range(_RUNS):
    start = time.perf_counter()
    jax.block_until_ready(function(*args))
    times.append(time.perf_counter() - start)
  return 1e3 * statistics.median(times)


def measure(kind: str) -> tuple[float, float]:
  """Forward, and gradients of kernel and inputs."""
  layer = nn.Dense(_HIDDEN, use_bias=False, **KINDS[kind])
  x = jax.random.normal(jax.random.key(0), (_TOKENS, _WIDTH))
  params = layer.init(jax.random.key(1), x)
  cotangent = jax.random.normal(jax.random.key(2), (_TOKENS, _HIDDEN))

  def loss(params, x):
    return jnp.sum(layer.apply(params, x) * cotangent)

  forward = milliseconds(jax.jit(layer.apply), params, x)
  return forward, milliseconds(jax.jit(jax.grad(loss, (0, 1))), params, x)


def main() -> None:
  """Prints all kinds."""
  memory.keep_freed_memory()
  found = {kind: measure(kind) for kind in KINDS}
  for i, what in enumerate(("forward", "gradients")):
    base = found["float32"][i]
    shown = ", ".join(
      f"{kind} {times[i]:.2f} ms ({base / times[i]:.1f}×)"
      for kind, times in found.items()
    )
    print(f"{what}: {shown}")


if __name__ == "__main__":
  main()
