"""Spectral normalisation (arXiv 1802.05957), as torch.nn.utils has it.

A kernel is divided by an estimate of its largest singular value: one power
iteration from a stored vector. The vector is state without gradient, in the
collection "spectral"; a forward pass reads it, and `advance_spectral` makes
the next one, so that every forward pass of a step sees the same value.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from psvae_jax.models import layers

EPSILON = 1e-12  # least norm that a vector is divided by


def _normalize(x: jax.Array) -> jax.Array:
  return x / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(x))), EPSILON)


_product = functools.partial(
  # HIGHEST: the default product of a TPU rounds to bfloat16.
  jnp.matmul,
  precision=jax.lax.Precision.HIGHEST,
)


def _power_iteration(
  kernel: jax.Array, u: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """One iteration from `u`: (the new u, the largest singular value).

  As `torch.nn.utils.spectral_norm`: singular vectors are constants of the
  gradient. The order of a kernel's inputs does not matter to u and σ.
  """
  matrix = kernel.reshape(-1, kernel.shape[-1])  # transpose of torch's
  constant = jax.lax.stop_gradient(matrix)
  v = _normalize(_product(constant, jax.lax.stop_gradient(u)))
  u = _normalize(_product(v, constant))
  return u, jnp.sum(_product(v, matrix) * u)


def advance_spectral(params: Any, spectral: Any) -> Any:
  """The "spectral" collection after the iteration that a forward pass makes.

  Call it once a training step, with the parameters of that step's forward
  passes: all of them then see the same σ.

  Args:
    params: the discriminator's parameters.
    spectral: its vectors, nested as `params`, with "u" beside each "kernel".
  """
  kernels = traverse_util.flatten_dict(params)
  vectors = traverse_util.flatten_dict(spectral)
  return traverse_util.unflatten_dict(
    {
      path: _power_iteration(kernels[*path[:-1], "kernel"], u)[0].astype(
        u.dtype
      )
      for path, u in vectors.items()
    }
  )


class SpectralConv(nn.Module):
  """1-D circular convolution, its kernel divided by its spectral norm.

  The norm is that of one power iteration from the vector "u" of the
  collection "spectral", which a forward pass never changes; `advance_spectral`
  does. Circular means that a sequence's ends are neighbours.

  Attributes:
    features: output channels.
    kernel_size: taps, odd.
    use_bias: whether there is a bias.
    dtype: compute dtype; the spectral norm is wide.
  """

  features: int
  kernel_size: int
  use_bias: bool = True
  dtype: layers.Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """(B, N, C) → (B, N, F)."""
    shape = (self.kernel_size, x.shape[-1], self.features)
    fan_in = shape[0] * shape[1]
    # torch.nn.Conv1d's initial values: U(±1/√fan_in), kernel and bias.
    uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    kernel = self.param("kernel", uniform, shape, jnp.float32)
    u = self.variable("spectral", "u", self._draw_vector).value
    dtype = jnp.promote_types(layers.wide(self.dtype), kernel.dtype)
    kernel = kernel.astype(dtype)
    _, sigma = _power_iteration(kernel, u.astype(dtype))
    kernel = (kernel / sigma).astype(self.dtype)

    x = x.astype(self.dtype)
    if self.kernel_size > 1:
      reach = self.kernel_size // 2
      x = jnp.pad(x, ((0, 0), (reach, reach), (0, 0)), mode="wrap")
    y = jax.lax.conv_general_dilated(
      x, kernel, (1,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")
    )
    if not self.use_bias:
      return y

    def spread(rng, shape):
      bound = fan_in**-0.5
      return jax.random.uniform(rng, shape, jnp.float32, -bound, bound)

    bias = self.param("bias", spread, (self.features,))
    return y + bias.astype(self.dtype)

  def _draw_vector(self) -> jax.Array:
    rng = self.make_rng("params")
    return _normalize(jax.random.normal(rng, (self.features,), jnp.float32))
