"""Floating-point operations of a function, counted from its jaxpr.

XLA's own cost analysis counts the body of a scan once, however often it runs.
Here the body of a scan counts `length` times. Matrix products and convolutions
are counted, two operations a multiply-add; norms, softmax, activations and
additions are not, as is usual for model FLOPs. Work whose result nobody reads
is left out, as a compiler leaves it out.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core
from jax.interpreters import partial_eval

# Their bodies run once per device or per grid cell, which no rule here knows.
_UNKNOWN = ("pallas_call", "shard_map", "xla_pmap")


def count_flops(fn: Callable, *args: Any) -> int:
  """FLOPs of one call `fn(*args)`, without running or compiling it.

  Args:
    fn: a function that JAX can trace.
    *args: arrays or `jax.ShapeDtypeStruct`s; nothing is allocated for the
      latter.

  Returns:
    Two for each multiply-add of matrix products and convolutions.

  Raises:
    ValueError: a matrix product or convolution runs an unknown number of
      times, in a while loop whose end depends on data.
  """
  closed = jax.make_jaxpr(fn)(*args)
  live, _ = partial_eval.dce_jaxpr(
    closed.jaxpr, [True] * len(closed.jaxpr.outvars)
  )
  return jaxpr_flops(live)


def jaxpr_flops(jaxpr: core.Jaxpr) -> int:
  """FLOPs of a jaxpr as it stands, see `count_flops`; dead code counts."""
  return sum(_equation_flops(equation) for equation in jaxpr.eqns)


def _equation_flops(equation: core.JaxprEqn) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    return _dot_flops(equation)
  if name == "conv_general_dilated":
    return _conv_flops(equation)
  bodies = [
    getattr(body, "jaxpr", body) for body in core.jaxprs_in_params(params)
  ]
  if not bodies:
    return 0
  counts = [jaxpr_flops(body) for body in bodies]
  if name == "scan":
    return params["length"] * sum(counts)
  if name == "cond":
    return max(counts)
  if (name == "while" or name in _UNKNOWN) and sum(counts):
    raise ValueError(
      f"{name}: how often its body of {sum(counts):,} FLOPs runs cannot be "
      "read from the program; count the body by itself"
    )
  return sum(counts)  # jit, checkpoint, custom derivatives: once


def _dot_flops(equation: core.JaxprEqn) -> int:
  (contracted, _), _ = equation.params["dimension_numbers"]
  left = equation.invars[0].aval.shape
  depth = math.prod(left[axis] for axis in contracted)
  return 2 * depth * math.prod(equation.outvars[0].aval.shape)


def _conv_flops(equation: core.JaxprEqn) -> int:
  """Multiply-adds on padding or between dilated pixels are not counted.

  A convolution and both of its gradients then count the same.
  """
  params = equation.params
  numbers = params["dimension_numbers"]
  left, right = (var.aval.shape for var in equation.invars)
  out = equation.outvars[0].aval.shape
  taps = 1
  for i, (lhs, rhs, axis) in enumerate(
    zip(
      numbers.lhs_spec[2:],
      numbers.rhs_spec[2:],
      numbers.out_spec[2:],
      strict=True,
    )
  ):
    taps *= _valid_taps(
      size=left[lhs],
      window=right[rhs],
      positions=out[axis],
      stride=params["window_strides"][i],
      before=params["padding"][i][0],
      dilation=params["lhs_dilation"][i],
      window_dilation=params["rhs_dilation"][i],
    )
  batch = out[numbers.out_spec[0]]
  # The kernel's input channels are those of one group already.
  channels = right[numbers.rhs_spec[0]] * right[numbers.rhs_spec[1]]
  return 2 * batch * channels * taps


def _valid_taps(
  size: int,
  window: int,
  positions: int,
  stride: int,
  before: int,
  dilation: int,
  window_dilation: int,
) -> int:
  """(output position, window tap) pairs of one axis that read a real pixel."""
  start = stride * np.arange(positions) - before
  read = start[:, None] + window_dilation * np.arange(window)
  inside = (read >= 0) & (read <= dilation * (size - 1))
  return int(np.sum(inside & (read % dilation == 0)))
