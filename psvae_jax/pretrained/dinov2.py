"""DINOv2's published layout: tensor names and `config.json`.

With and without registers (`facebook/dinov2-*`,
`facebook/dinov2-with-registers-*`), in the names of the published files, which
every version of transformers reads.
"""

import functools
import math
import pathlib
from typing import Any

import numpy as np

from psvae_jax.models import vit
from psvae_jax.pretrained import mapping

_PLAIN = "dinov2"
_REGISTERS = "dinov2_with_registers"
_ARCHITECTURES = {
  _PLAIN: "Dinov2Model",
  _REGISTERS: "Dinov2WithRegistersModel",
}

# Width, depth and heads of the published sizes.
_SIZES = {
  "small": (384, 12, 6),
  "base": (768, 12, 12),
  "large": (1024, 24, 16),
  "giant": (1536, 40, 24),
}


def _published() -> dict[str, vit.ViTConfig]:
  """Architecture of every id that Meta publishes on the Hugging Face hub."""
  configs = {}
  for family, registers in (("dinov2", 0), ("dinov2-with-registers", 4)):
    for size, (width, depth, num_heads) in _SIZES.items():
      configs[f"facebook/{family}-{size}"] = vit.ViTConfig(
        width=width,
        depth=depth,
        num_heads=num_heads,
        patch_size=14,
        image_size=518,
        mlp_ratio=4.0,
        num_registers=registers,
        swiglu=size == "giant",
        position_antialias=registers > 0,
      )
  return configs


# What `parse_config` would give of the published config.json.
PUBLISHED = _published()


def rules(
  config: vit.ViTConfig, final_norm: vit.FinalNorm
) -> list[mapping.Rule]:
  """Published tensor of every parameter of `vit.ViT(config, final_norm)`."""
  rule, linear = mapping.Rule, mapping.LINEAR
  layer, block = "encoder.layer.{}", "blocks/block"

  def affine(path, key, names=("scale", "bias"), **options):
    scale, bias = names
    layout = linear if scale == "kernel" else mapping.SAME
    yield rule(f"{path}/{scale}", f"{key}.weight", layout, **options)
    if bias is not None:
      yield rule(f"{path}/{bias}", f"{key}.bias", **options)

  dense = functools.partial(affine, names=("kernel", "bias"))
  projection = "embeddings.patch_embeddings.projection"
  table = [
    rule("cls_token", "embeddings.cls_token"),
    rule("pos_embed", "embeddings.position_embeddings"),
    rule("patch_embed/bias", f"{projection}.bias"),
    rule(
      "patch_embed/kernel",
      f"{projection}.weight",
      mapping.patch_layout(config.patch_size),
    ),
    *affine(f"{block}/norm1/norm", f"{layer}.norm1"),
    *affine(f"{block}/norm2/norm", f"{layer}.norm2"),
    *dense(f"{block}/attention/out", f"{layer}.attention.output.dense"),
  ]
  if config.num_registers:
    table.append(rule("register_tokens", "embeddings.register_tokens"))
  names = ("kernel", "bias" if config.qkv_bias else None)
  for name in ("query", "key", "value"):
    key = f"{layer}.attention.attention.{name}"
    table += affine(f"{block}/attention/{name}", key, names)
  if config.swiglu:
    # One published tensor keeps the gate first, then the gated values.
    key = f"{layer}.mlp.weights_in"
    table += dense(f"{block}/mlp/gate", key, part=(0, 2))
    table += dense(f"{block}/mlp/fc1", key, part=(1, 2))
    table += dense(f"{block}/mlp/fc2", f"{layer}.mlp.weights_out")
  else:
    table += dense(f"{block}/mlp/fc1", f"{layer}.mlp.fc1")
    table += dense(f"{block}/mlp/fc2", f"{layer}.mlp.fc2")
  if config.layerscale_init is not None:
    for n in (1, 2):
      key = f"{layer}.layer_scale{n}.lambda1"
      table.append(rule(f"{block}/scale{n}/scale", key))
  if final_norm == "affine":
    table += affine("norm/norm", "layernorm")
  return table


def parse_config(raw: dict[str, Any], path: pathlib.Path) -> vit.ViTConfig:
  """A published config.json → ours; errors name the file and the field."""
  model_type = raw.get("model_type")
  if model_type not in _ARCHITECTURES:
    raise ValueError(
      f"{path}: model_type {model_type!r} is not supported; supported: "
      f"{', '.join(_ARCHITECTURES)}"
    )

  def get(field, kind, default=None):
    value = raw.get(field, default)
    if kind is float and type(value) is int:
      value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
      raise ValueError(
        f"{path}: {field} is {value!r}, it must be one {kind.__name__}"
      )
    return value

  def side(field):
    value = raw.get(field)
    if isinstance(value, list) and value and value.count(value[0]) == 2:
      raw[field] = value[0]  # [14, 14] says no more than 14
    return get(field, int)

  raw = dict(raw)
  if get("num_channels", int, 3) != 3:
    raise ValueError(f"{path}: num_channels {raw['num_channels']} is not 3")
  registers = model_type == _REGISTERS
  # Defaults are those of transformers' config classes, for files that leave a
  # field out. Fields that say how big the model is have none.
  fields = {
    "width": get("hidden_size", int),
    "depth": get("num_hidden_layers", int),
    "num_heads": get("num_attention_heads", int),
    "patch_size": side("patch_size"),
    "image_size": side("image_size"),
    "mlp_ratio": get("mlp_ratio", float, 4.0),
    "num_registers": get("num_register_tokens", int, 4) if registers else 0,
    "swiglu": get("use_swiglu_ffn", bool, False),
    "activation": get("hidden_act", str, "gelu"),
    "layer_norm_eps": get("layer_norm_eps", float, 1e-6),
    "qkv_bias": get("qkv_bias", bool, True),
    "layerscale_init": get("layerscale_value", float, 1.0),
    "position_antialias": registers,
  }
  try:
    return vit.ViTConfig(**fields)
  except ValueError as error:
    raise ValueError(f"{path}: {error}") from error


def format_config(config: vit.ViTConfig) -> dict[str, Any]:
  """Ours → a published config.json.

  Raises:
    ValueError: no published architecture is like `config`.
  """
  if config.layerscale_init is None:
    raise ValueError(
      "DINOv2's published layout always has LayerScale: an encoder with "
      "layerscale_init=None cannot be saved in it"
    )
  if config.num_registers and not config.antialias:
    raise ValueError(
      "DINOv2 with registers antialiases position embeddings: an encoder "
      "with registers and position_antialias=False cannot be saved"
    )
  if config.mlp_ratio != int(config.mlp_ratio):
    raise ValueError(
      f"mlp_ratio {config.mlp_ratio} is not whole, as DINOv2's published "
      "layout wants it"
    )
  model_type = _REGISTERS if config.antialias else _PLAIN
  published = {
    "architectures": [_ARCHITECTURES[model_type]],
    "attention_probs_dropout_prob": 0.0,
    "drop_path_rate": 0.0,
    "hidden_act": config.activation,
    "hidden_dropout_prob": 0.0,
    "hidden_size": config.width,
    "image_size": config.image_size,
    "initializer_range": 0.02,
    "layer_norm_eps": config.layer_norm_eps,
    "layerscale_value": float(config.layerscale_init),
    "mlp_ratio": int(config.mlp_ratio),
    "model_type": model_type,
    "num_attention_heads": config.num_heads,
    "num_channels": 3,
    "num_hidden_layers": config.depth,
    "patch_size": config.patch_size,
    "qkv_bias": config.qkv_bias,
    "torch_dtype": "float32",
    "use_swiglu_ffn": config.swiglu,
  }
  if model_type == _REGISTERS:
    published["num_register_tokens"] = config.num_registers
  return published


def constant_tensors(
  config: vit.ViTConfig, final_norm: vit.FinalNorm
) -> dict[str, np.ndarray]:
  """Tensors that the published files hold and `rules` do not cover.

  Loading ignores them; saving writes these values, which change nothing.
  """
  tensors = {
    # Only masked pre-training reads it.
    "embeddings.mask_token": np.zeros((1, config.width), np.float32)
  }
  if config.antialias and not config.num_registers:
    empty = np.zeros((1, 0, config.width), np.float32)
    tensors["embeddings.register_tokens"] = empty
  if final_norm == "affine_free":
    tensors["layernorm.weight"] = np.ones(config.width, np.float32)
    tensors["layernorm.bias"] = np.zeros(config.width, np.float32)
  return tensors
