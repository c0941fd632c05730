"""Convolutions as matrix products, for where those are fast.

XLA's compiler for CPUs has no fast path for most gradients of convolutions: it
emits plain loops. Written as shifted slices beside each other and one matrix
product, the same convolution has gradients that are matrix products too. On
accelerators the native operation is the better one, and needs less memory: the
slices are as large as the input times the taps of the window over the stride².
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

KINDS = ("native", "matmul")


def convolution(kind: str) -> Callable | None:
  """What `flax.linen.Conv(conv_general_dilated=…)` takes for a kind.

  Args:
    kind: "native", or "matmul" (`convolve`).

  Raises:
    ValueError: another kind.
  """
  if kind not in KINDS:
    raise ValueError(f"convolution is one of {KINDS}, not {kind!r}")
  return convolve if kind == "matmul" else None


def convolve(
  lhs: jax.Array,
  rhs: jax.Array,
  window_strides: Sequence[int],
  padding: str | Sequence[tuple[int, int]],
  lhs_dilation: Sequence[int] | None = None,
  rhs_dilation: Sequence[int] | None = None,
  dimension_numbers: Any = None,
  feature_group_count: int = 1,
  precision: Any = None,
) -> jax.Array:
  """`lax.conv_general_dilated` of images, as slices and a matrix product.

  Args:
    lhs: (B, H, W, C).
    rhs: (height, width, C, F) kernel.
    window_strides: rows, columns.
    padding: "SAME", "VALID" or pixels before and after, for both axes.
    lhs_dilation, rhs_dilation: 1.
    dimension_numbers: those of the shapes above.
    feature_group_count: 1.
    precision: of the product.

  Returns:
    (B, H′, W′, F).

  Raises:
    ValueError: dilation, groups or another layout.
  """
  numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
  wanted = ("NHWC", "HWIO", "NHWC")
  dilations = {*(lhs_dilation or (1,)), *(rhs_dilation or (1,))}
  if (
    numbers != lax.conv_dimension_numbers(lhs.shape, rhs.shape, wanted)
    or dilations != {1}
    or feature_group_count != 1
  ):
    raise ValueError(
      "a convolution as a matrix product has no dilation, no groups and the "
      f"layout {wanted}"
    )
  rows, columns, channels, features = rhs.shape
  if isinstance(padding, str):
    padding = lax.padtype_to_pads(
      lhs.shape[1:3], (rows, columns), window_strides, padding
    )
  x = jnp.pad(lhs, ((0, 0), *padding, (0, 0)))
  height, width = (
    (size - taps) // stride + 1
    for size, taps, stride in zip(
      x.shape[1:3], (rows, columns), window_strides, strict=True
    )
  )
  down, right = window_strides
  taps = [
    x[
      :,
      i : i + (height - 1) * down + 1 : down,
      j : j + (width - 1) * right + 1 : right,
    ]
    for i in range(rows)
    for j in range(columns)
  ]
  x = jnp.concatenate(taps, axis=-1)
  kernel = rhs.reshape(rows * columns * channels, features)
  return jnp.matmul(x, kernel, precision=precision)
