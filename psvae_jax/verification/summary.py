"""A network and its outputs as a few plain values."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from psvae_jax.pretrained import files
from psvae_jax.verification.subjects import Subject

_LEADING = 8


def report(
  subject: Subject, outputs: Mapping[str, np.ndarray]
) -> dict[str, Any]:
  """Everything about a network, in plain values.

  Args:
    subject: the network.
    outputs: what `subject.run()` returned.
  """
  modules = {
    name: {
      "parameters": sum(int(x.size) for x in jax.tree.leaves(tree)),
      "sha256": files.fingerprint_params(tree)[:16],
    }
    for name, tree in sorted(subject.params.items())
  }
  return {
    "name": subject.name,
    "kind": subject.kind,
    "architecture": subject.architecture,
    "fingerprint": subject.fingerprint,
    "parameters": sum(m["parameters"] for m in modules.values()),
    "modules": modules,
    "inputs": subject.inputs.describe(),
    "outputs": {name: summarize(x) for name, x in outputs.items()},
    "versions": {"jax": jax.__version__, "numpy": np.__version__},
    "device": jax.devices()[0].device_kind,
    "precision": jax.config.jax_default_matmul_precision or "default",
  }


def summarize(array: np.ndarray) -> dict[str, Any]:
  """Figures of one output, computed in float64.

  Returns:
    `shape`; `levels`, whether it is rounded to whole numbers; `norm` and
    `norm_std`, mean and standard deviation of the vectors' lengths along the
    last axis; `mean`, `std`, `least` and `most` of all numbers; `leading`, the
    first ones; `spread`, as many at equal distances, in C order.
  """
  x = np.asarray(array, np.float64)
  norms = np.sqrt(np.sum(np.square(x), axis=-1))
  figures = {
    "norm": norms.mean(),
    "norm_std": norms.std(),
    "mean": x.mean(),
    "std": x.std(),
    "least": x.min(),
    "most": x.max(),
  }
  return {
    "shape": list(array.shape),
    "levels": bool(np.issubdtype(array.dtype, np.integer)),
    **{name: float(value) for name, value in figures.items()},
    "leading": x.ravel()[:_LEADING].tolist(),
    "spread": x.ravel()[:: max(x.size // _LEADING, 1)][:_LEADING].tolist(),
  }
