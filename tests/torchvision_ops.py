"""Import this before torchvision, or a package that imports it."""

import pytest

from psvae_jax import torchvision_import

pytest.importorskip("torch")
torchvision_import.repair()
pytest.importorskip("torchvision")
