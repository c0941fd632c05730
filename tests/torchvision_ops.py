"""Import this before torchvision, or a package that imports it.

PyPI's torchvision is built for a CUDA torch. Beside a CPU build its compiled
operators do not load, and the import then fails for want of two of their
schemas. The networks that tests compare with call neither.
"""

import torch

# Held for as long as the process lives: the schemas go with it.
_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
for _name in ("nms", "qnms"):
  try:
    _LIBRARY.define(
      f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    )
  except RuntimeError:
    pass  # the compiled operators are there
