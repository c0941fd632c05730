"""Lets torchvision be imported beside a torch that it was not built for.

PyPI's torchvision is built for a CUDA torch. Beside a CPU build its compiled
operators do not load, and the import then fails for want of two of their
schemas: of torchvision, and with it of transformers' and diffusers' models,
which call none of the operators. Comparisons with those packages call
`repair` before they import them.
"""

import importlib.util
import sys
from typing import Any

_held: list[Any] = []  # schemas go when the library that defines them does


def repair() -> None:
  """Imports torchvision, with the schemas it lacks; does nothing without it.

  Raises:
    ImportError: torchvision is installed and torch is not.
  """
  if importlib.util.find_spec("torchvision") is None:
    return
  try:
    import torchvision  # noqa: F401
  except RuntimeError:
    import torch

    for name in list(sys.modules):
      if name.split(".")[0] == "torchvision":
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
      library.define(
        f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
      )
    _held.append(library)
    import torchvision  # noqa: F401
