"""Random parameters for published architectures without their weights."""

import math
import zlib
from typing import Any

import jax
import numpy as np

# Before a published id: that architecture, untrained, without a download.
RANDOM = "random:"


def random_params(shapes: Any) -> Any:
  """Untrained parameters, the same on every machine and backend.

  Biases are 0, norm scales 1; kernels keep the variance of what they multiply,
  everything else has a standard deviation of 0.02. Drawn on the host: a random
  function of a device may differ in the last bit from another's, and with it
  the fingerprint.

  Args:
    shapes: tree of `jax.ShapeDtypeStruct`s.

  Returns:
    The same tree of float32 host arrays.
  """

  def one(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith(("scale", "bias")):
      return np.full(leaf.shape, name.endswith("scale"), np.float32)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    stddev = 0.02
    if name.endswith("kernel"):
      # (h, w, in, out) of a convolution; in, out of a Dense, stacked or not.
      inputs = leaf.shape[:3] if len(leaf.shape) == 4 else leaf.shape[-2:-1]
      stddev = math.prod(inputs) ** -0.5
    return np.float32(stddev) * rng.standard_normal(leaf.shape, np.float32)

  return jax.tree_util.tree_map_with_path(one, shapes)
