"""Matrix products of bfloat16 operands that leave float32.

`mixed` rounds both operands of a Dense layer to bfloat16, forwards and
backwards, and keeps the float32 in which the units that multiply add up.
Everything between two products stays float32, where flax's `dtype=bfloat16`
would round every activation. CPUs with AMX multiply bfloat16 several times as
fast as float32, but only into float32 (psvae_jax.benchmarks.products).
"""

from collections.abc import Callable
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
  kernel_grad = jax.lax.platform_dependent(
    x, cotangent, cpu=_transposed_first, default=_over_rows
  )
  return x_grad.astype(x_dtype.dtype), kernel_grad.astype(kernel_dtype.dtype)


_product.defvjp(_forward, _backward)


def _over_rows(x: jax.Array, cotangent: jax.Array) -> jax.Array:
  return _contract(x, cotangent, 0, 0)


def _transposed_first(x: jax.Array, cotangent: jax.Array) -> jax.Array:
  """`_over_rows` for XLA's CPU compiler.

  It multiplies with AMX only where the contracted axis of the left operand lies
  last in memory, and folds a plain transpose into the product.
  """
  return _contract(with_layout_constraint(x.T, Layout((0, 1))), cotangent, 1, 0)


def _contract(
  lhs: jax.Array, rhs: jax.Array, lhs_axis: int, rhs_axis: int
) -> jax.Array:
  return jax.lax.dot_general(
    lhs,
    rhs,
    (((lhs_axis,), (rhs_axis,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
