"""Published families of vision encoders, behind one interface.

A family is a module: `MODEL_TYPES` of its config.json, `PUBLISHED` (Hugging
Face id → config), `PROCESSOR`, `IGNORED` (beginnings of the names of tensors
that are knowingly left unused), `parse_config`, `format_config`, `rules` and
`constant_tensors`. All are the one `vit.ViT`; its config says which family can
save it.
"""

import pathlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np

from psvae_jax.models import vit
from psvae_jax.pretrained import (
  clip_vision,
  dinov2,
  dinov3,
  mapping,
  preprocessing,
  siglip,
  vit_mae,
)

FAMILIES = (dinov2, dinov3, siglip, vit_mae, clip_vision)
_BY_TYPE = {kind: family for family in FAMILIES for kind in family.MODEL_TYPES}
_BY_ID = {name: family for family in FAMILIES for name in family.PUBLISHED}

# Every published id and its architecture.
PUBLISHED: dict[str, vit.ViTConfig] = {
  name: family.PUBLISHED[name] for name, family in _BY_ID.items()
}


def find(config: vit.ViTConfig) -> ModuleType:
  """The family whose layout a network is saved in."""
  if config.positions == "rotary":
    return dinov3
  if config.positions == "fixed":
    return vit_mae
  if not config.cls_token:
    return siglip
  return clip_vision if config.pre_norm else dinov2


def parse_config(raw: Mapping[str, Any], path: pathlib.Path) -> vit.ViTConfig:
  """A published config.json → ours.

  Raises:
    ValueError: another architecture, or a bad field; names the file.
  """
  model_type = raw.get("model_type")
  if model_type not in list(_BY_TYPE):  # a list takes any JSON value
    raise ValueError(
      f"{path}: model_type {model_type!r} is not supported; supported: "
      f"{', '.join(_BY_TYPE)}"
    )
  return _BY_TYPE[model_type].parse_config(dict(raw), path)


def format_config(config: vit.ViTConfig) -> dict[str, Any]:
  """Ours → a published config.json, which `parse_config` reads.

  Raises:
    ValueError: no published architecture is like `config`.
  """
  return find(config).format_config(config)


def processor(config: vit.ViTConfig, name: str = "") -> preprocessing.Processor:
  """The image processor of a network, which was published as `name`."""
  return dinov3.PROCESSORS.get(name, find(config).PROCESSOR)


def import_params(
  config: vit.ViTConfig,
  final_norm: vit.FinalNorm,
  tensors: Mapping[str, np.ndarray],
  expected: Any,
  source: str,
) -> dict[str, Any]:
  """Published tensors → parameters of `vit.ViT(config, final_norm)`.

  Args:
    config, final_norm: of the network.
    tensors: all of a model folder, by key.
    expected: shapes of the parameters.
    source: the folder, for errors.

  Raises:
    ValueError: naming every missing, unexpected and mis-shaped tensor.
  """
  family = find(config)
  ignored = {key: None for key in tensors if key.startswith(family.IGNORED)}
  constants = family.constant_tensors(config, final_norm)
  ignored |= {key: value.shape for key, value in constants.items()}
  return mapping.import_params(
    family.rules(config, final_norm, tensors.keys()),
    tensors,
    expected,
    source=source,
    ignored=ignored,
  )


def export_params(
  config: vit.ViTConfig, final_norm: vit.FinalNorm, params: Any
) -> dict[str, np.ndarray]:
  """Parameters of `vit.ViT(config, final_norm)` → published tensors by key."""
  family = find(config)
  tensors = mapping.export_params(family.rules(config, final_norm), params)
  return tensors | family.constant_tensors(config, final_norm)
