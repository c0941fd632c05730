"""Import this before torchvision, or a package that imports it.

PyPI's torchvision is built for a CUDA torch. Beside a CPU build its compiled
operators do not load, and the import then fails for want of two of their
schemas. The networks that tests compare with call neither.
"""

import sys

import pytest

torch = pytest.importorskip("torch")

try:
  import torchvision  # noqa: F401
except RuntimeError:
  for _name in list(sys.modules):
    if _name.split(".")[0] == "torchvision":
      del sys.modules[_name]
  # Held for as long as the process lives: the schemas go with it.
  _LIBRARY = torch.library.Library("torchvision", "DEF")
  for _name in ("nms", "qnms"):
    _LIBRARY.define(
      f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
  import torchvision  # noqa: F401
except ImportError:
  pytest.skip("torchvision is not installed", allow_module_level=True)
