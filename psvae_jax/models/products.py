"""Matrix products of bfloat16 operands that leave float32.

`mixed` rounds both operands of a Dense layer to bfloat16, forwards and
backwards, and keeps the float32 in which the units that multiply add up.
Everything between two products stays float32, where flax's `dtype=bfloat16`
would round every activation. CPUs with AMX multiply bfloat16 several times as
fast as float32, but only into float32 (psvae_jax.benchmarks.products).
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

KINDS = ("native", "mixed")

DotGeneral = Callable[..., jax.Array]


def dot_general(kind: str) -> DotGeneral | None:
  """What `flax.linen.Dense` takes as `dot_general`; None is its own.

  Args:
    kind: one of `KINDS`.
  """
  return mixed if kind == "mixed" else None


def mixed(
  lhs: jax.Array,
  rhs: jax.Array,
  dimension_numbers: Any,
  precision: Any = None,
  preferred_element_type: Any = None,
) -> jax.Array:
  """`jax.lax.dot_general` of a Dense layer: (…, K) · (K, N) → float32 (…, N).

  Raises:
    ValueError: another contraction.
  """
  del precision, preferred_element_type
  last = lhs.ndim - 1
  if dimension_numbers != (((last,), (0,)), ((), ())) or rhs.ndim != 2:
    raise ValueError(
      "mixed products are those of Dense layers, (…, K) · (K, N); got "
      f"dimension_numbers {dimension_numbers}"
    )
  out = _product(lhs.reshape(-1, lhs.shape[-1]), rhs)
  return out.reshape(*lhs.shape[:-1], rhs.shape[-1])


@jax.custom_vjp
def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
  return _forward(x, kernel)[0]


def _forward(x: jax.Array, kernel: jax.Array):
  # Empty arrays carry the dtypes that the gradients must have.
  dtypes = jnp.zeros((0,), x.dtype), jnp.zeros((0,), kernel.dtype)
  x, kernel = x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)
  return _contract(x, kernel, 1, 0), (x, kernel, *dtypes)


def _backward(residuals, cotangent: jax.Array):
  x, kernel, x_dtype, kernel_dtype = residuals
  cotangent = cotangent.astype(jnp.bfloat16)
  x_grad = _contract(cotangent, kernel, 1, 1)
  kernel_grad = _contract(x, cotangent, 0, 0)
  return x_grad.astype(x_dtype.dtype), kernel_grad.astype(kernel_dtype.dtype)


_product.defvjp(_forward, _backward)


def _contract(
  lhs: jax.Array, rhs: jax.Array, lhs_axis: int, rhs_axis: int
) -> jax.Array:
  """Matrix product of bfloat16 matrices over one axis of each, in float32."""

  def default(lhs, rhs):
    return _dot(lhs, rhs, lhs_axis, rhs_axis)

  def cpu(lhs, rhs):
    if not cpu_multiplies_bfloat16():
      # The same numbers: a product of two bfloat16 is exact in float32.
      lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
      return _dot(lhs, rhs, lhs_axis, rhs_axis)
    if lhs_axis == 0:
      # AMX is used only where the contracted axis of the left operand lies
      # last in memory, and a plain transpose would be folded away.
      lhs = with_layout_constraint(lhs.T, Layout((0, 1)))
      return _dot(lhs, rhs, 1, rhs_axis)
    return _dot(lhs, rhs, lhs_axis, rhs_axis)

  return jax.lax.platform_dependent(lhs, rhs, cpu=cpu, default=default)


def _dot(
  lhs: jax.Array, rhs: jax.Array, lhs_axis: int, rhs_axis: int
) -> jax.Array:
  return jax.lax.dot_general(
    lhs,
    rhs,
    (((lhs_axis,), (rhs_axis,)), ((), ())),
    preferred_element_type=jnp.float32,
  )


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
  """Whether this machine's CPU has AMX for bfloat16, as Linux says.

  Without it XLA has no product of bfloat16 that leaves float32.
  """
  try:
    return "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
  except OSError:
    return False
