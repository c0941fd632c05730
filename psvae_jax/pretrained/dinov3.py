"""DINOv3 ViT's published layout: tensor names and `config.json`.

`facebook/dinov3-vit*` (arXiv 2508.10104). Positions are rotary and have no
parameters; keys have no bias; the MLP of the plus sizes and of the 7B model is
gated.
"""

import pathlib
from collections.abc import Collection
from typing import Any

import numpy as np

from psvae_jax.models import vit
from psvae_jax.pretrained import mapping, preprocessing, vit_rules
from psvae_jax.pretrained.fields import Fields

MODEL_TYPES = ("dinov3_vit",)
PROCESSOR = preprocessing.Processor(
  "DINOv3ViTImageProcessorFast",
  preprocessing.IMAGENET_MEAN,
  preprocessing.IMAGENET_STD,
  resample=preprocessing.BILINEAR,
)
IGNORED = ()

_GATED = "silu"

# Width, depth, heads, MLP width, whether it is gated, and whether queries and
# values have a bias.
_SIZES = {
  "s16": (384, 12, 6, 1536, False, True),
  "s16plus": (384, 12, 6, 1536, True, True),
  "b16": (768, 12, 12, 3072, False, True),
  "l16": (1024, 24, 16, 4096, False, True),
  "h16plus": (1280, 32, 20, 5120, True, True),
  "7b16": (4096, 40, 32, 8192, True, False),
}
_WEB, _SATELLITE = "pretrain-lvd1689m", "pretrain-sat493m"
_SATELLITE_SIZES = ("l16", "7b16")


def _published() -> dict[str, vit.ViTConfig]:
  """Architecture of every id that Meta publishes on the Hugging Face hub."""
  configs = {}
  for size, (width, depth, heads, hidden, gated, bias) in _SIZES.items():
    config = vit.ViTConfig(
      width=width,
      depth=depth,
      num_heads=heads,
      patch_size=16,
      image_size=224,
      num_registers=4,
      swiglu=gated,
      activation=_GATED if gated else "gelu",
      layer_norm_eps=1e-5,
      qkv_bias=bias,
      position_antialias=False,
      mlp_hidden=hidden,
      positions="rotary",
      key_bias=False,
    )
    configs[f"facebook/dinov3-vit{size}-{_WEB}"] = config
    if size in _SATELLITE_SIZES:
      configs[f"facebook/dinov3-vit{size}-{_SATELLITE}"] = config
  return configs


# What `parse_config` would give of the published config.json.
PUBLISHED = _published()

# Trained on satellite pictures, whose colours are others.
_SATELLITE_PROCESSOR = preprocessing.Processor(
  PROCESSOR.kind,
  mean=(0.430, 0.411, 0.296),
  std=(0.213, 0.156, 0.143),
  resample=PROCESSOR.resample,
)
PROCESSORS = {
  name: _SATELLITE_PROCESSOR for name in PUBLISHED if name.endswith(_SATELLITE)
}


def rules(
  config: vit.ViTConfig,
  final_norm: vit.FinalNorm,
  keys: Collection[str] = (),
) -> list[mapping.Rule]:
  """Published tensor of every parameter of `vit.ViT(config, final_norm)`.

  Args:
    config, final_norm: of the network.
    keys: of the file that is read. Layers are "layer.0" as published, and
      "model.layer.0" where a later transformers wrote them.
  """
  layer = "layer.{}"
  if any(key.startswith("model.layer.") for key in keys):
    layer = "model.layer.{}"
  block = {
    **{name: name for name in ("norm1", "norm2")},
    **{f"scale{n}": f"layer_scale{n}.lambda1" for n in (1, 2)},
    "query": "attention.q_proj",
    "key": "attention.k_proj",
    "value": "attention.v_proj",
    "out": "attention.o_proj",
    "gate": "mlp.gate_proj",
    "fc1": "mlp.up_proj",
    "fc2": "mlp.down_proj",
  }
  names = {name: f"{layer}.{key}" for name, key in block.items()}
  names |= {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "patch_embed": "embeddings.patch_embeddings",
    "norm": "norm",
  }
  return vit_rules.vit_rules(config, final_norm, names)


def parse_config(raw: dict[str, Any], path: pathlib.Path) -> vit.ViTConfig:
  """A published config.json → ours; errors name the file and the field."""
  fields = Fields(raw, path)
  fields.expect(num_channels=3, proj_bias=True, mlp_bias=True)
  bias = fields.get("query_bias", bool, True)
  key_bias = fields.get("key_bias", bool, False)
  gated = fields.get("use_gated_mlp", bool, False)
  activation = fields.get("hidden_act", str, "gelu")
  wanted = {
    "value_bias": (fields.get("value_bias", bool, True), bias),
    "key_bias": (key_bias, key_bias and bias),
    "hidden_act": (activation, _GATED if gated else activation),
  }
  for name, (found, value) in wanted.items():
    if found != value:
      raise ValueError(
        f"{path}: {name} {found!r} is not {value!r}, which alone is supported "
        f"beside query_bias {bias} and use_gated_mlp {gated}"
      )
  # Defaults are those of transformers' config class, for files that leave a
  # field out. Fields that say how big the model is have none.
  return fields.build(
    vit.ViTConfig,
    width=fields.get("hidden_size", int),
    depth=fields.get("num_hidden_layers", int),
    num_heads=fields.get("num_attention_heads", int),
    patch_size=fields.side("patch_size", 16),
    image_size=fields.side("image_size", 224),
    num_registers=fields.get("num_register_tokens", int, 0),
    swiglu=gated,
    activation=activation,
    layer_norm_eps=fields.get("layer_norm_eps", float, 1e-5),
    qkv_bias=bias,
    layerscale_init=fields.get("layerscale_value", float, 1.0),
    position_antialias=False,
    mlp_hidden=fields.get("intermediate_size", int),
    positions="rotary",
    rotary_base=fields.get("rope_theta", float, 100.0),
    key_bias=key_bias,
  )


def format_config(config: vit.ViTConfig) -> dict[str, Any]:
  """Ours → a published config.json.

  Raises:
    ValueError: no published architecture is like `config`.
  """
  wanted = {
    "cls_token": True,
    "positions": "rotary",
    "patch_bias": True,
    "pre_norm": False,
  }
  vit_rules.check_unlike(config, "DINOv3", wanted)
  if config.layerscale_init is None:
    raise ValueError(
      "DINOv3's published layout always has LayerScale: an encoder with "
      "layerscale_init=None cannot be saved in it"
    )
  return {
    "architectures": ["DINOv3ViTModel"],
    "attention_dropout": 0.0,
    "drop_path_rate": 0.0,
    "hidden_act": _GATED if config.swiglu else config.activation,
    "hidden_size": config.width,
    "image_size": config.image_size,
    "initializer_range": 0.02,
    "intermediate_size": config.block.mlp_hidden,
    "key_bias": config.qkv_bias and config.key_bias,
    "layer_norm_eps": config.layer_norm_eps,
    "layerscale_value": float(config.layerscale_init),
    "mlp_bias": True,
    "model_type": MODEL_TYPES[0],
    "num_attention_heads": config.num_heads,
    "num_channels": 3,
    "num_hidden_layers": config.depth,
    "num_register_tokens": config.num_registers,
    "patch_size": config.patch_size,
    "proj_bias": True,
    "query_bias": config.qkv_bias,
    "rope_theta": config.rotary_base,
    "torch_dtype": "float32",
    "use_gated_mlp": config.swiglu,
    "value_bias": config.qkv_bias,
  }


def constant_tensors(
  config: vit.ViTConfig, final_norm: vit.FinalNorm
) -> dict[str, np.ndarray]:
  """Tensors that the published files hold and `rules` do not cover.

  Loading ignores them; saving writes these values, which change nothing.
  """
  tensors = {
    # Only masked pre-training reads it.
    "embeddings.mask_token": np.zeros((1, 1, config.width), np.float32)
  }
  if not config.num_registers:
    empty = np.zeros((1, 0, config.width), np.float32)
    tensors["embeddings.register_tokens"] = empty
  return tensors | vit_rules.identity_norm(config, final_norm, "norm")
