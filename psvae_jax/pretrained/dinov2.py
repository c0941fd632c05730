"""DINOv2's published layout: tensor names and `config.json`.

With and without registers (`facebook/dinov2-*`,
`facebook/dinov2-with-registers-*`), in the names of the published files, which
every version of transformers reads.
"""

import pathlib
from collections.abc import Collection
from typing import Any

import numpy as np

from psvae_jax.models import vit
from psvae_jax.pretrained import mapping, preprocessing, vit_rules
from psvae_jax.pretrained.fields import Fields

_PLAIN = "dinov2"
_REGISTERS = "dinov2_with_registers"
_ARCHITECTURES = {
  _PLAIN: "Dinov2Model",
  _REGISTERS: "Dinov2WithRegistersModel",
}
MODEL_TYPES = tuple(_ARCHITECTURES)
PROCESSOR = preprocessing.Processor(
  "BitImageProcessor",
  preprocessing.IMAGENET_MEAN,
  preprocessing.IMAGENET_STD,
  crop=True,
)
IGNORED = ()

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
  config: vit.ViTConfig,
  final_norm: vit.FinalNorm,
  keys: Collection[str] = (),
) -> list[mapping.Rule]:
  """Published tensor of every parameter of `vit.ViT(config, final_norm)`."""
  del keys  # one layout
  layer = "encoder.layer.{}"
  mlp = {"fc1": "mlp.fc1", "fc2": "mlp.fc2"}
  if config.swiglu:
    # One published tensor keeps the gate first, then the gated values.
    mlp = {"fc1": "mlp.weights_in", "fc2": "mlp.weights_out"}
    mlp["gate"] = mlp["fc1"]
  block = {
    **{name: name for name in ("norm1", "norm2")},
    **{n: f"attention.attention.{n}" for n in ("query", "key", "value")},
    **{f"scale{n}": f"layer_scale{n}.lambda1" for n in (1, 2)},
    "out": "attention.output.dense",
    **mlp,
  }
  names = {name: f"{layer}.{key}" for name, key in block.items()}
  names |= {
    "cls_token": "embeddings.cls_token",
    "register_tokens": "embeddings.register_tokens",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
  }
  return vit_rules.vit_rules(config, final_norm, names)


def parse_config(raw: dict[str, Any], path: pathlib.Path) -> vit.ViTConfig:
  """A published config.json → ours; errors name the file and the field."""
  fields = Fields(raw, path)
  fields.expect(num_channels=3)
  registers = raw["model_type"] == _REGISTERS
  # Defaults are those of transformers' config classes, for files that leave a
  # field out. Fields that say how big the model is have none.
  return fields.build(
    vit.ViTConfig,
    width=fields.get("hidden_size", int),
    depth=fields.get("num_hidden_layers", int),
    num_heads=fields.get("num_attention_heads", int),
    patch_size=fields.side("patch_size"),
    image_size=fields.side("image_size"),
    mlp_ratio=fields.get("mlp_ratio", float, 4.0),
    num_registers=fields.get("num_register_tokens", int, 4) if registers else 0,
    swiglu=fields.get("use_swiglu_ffn", bool, False),
    activation=fields.get("hidden_act", str, "gelu"),
    layer_norm_eps=fields.get("layer_norm_eps", float, 1e-6),
    qkv_bias=fields.get("qkv_bias", bool, True),
    layerscale_init=fields.get("layerscale_value", float, 1.0),
    position_antialias=registers,
  )


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
  wanted = {
    "mlp_hidden": None,
    "cls_token": True,
    "positions": "learned",
    "key_bias": True,
    "patch_bias": True,
    "pre_norm": False,
  }
  vit_rules.check_unlike(config, "DINOv2", wanted)
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
  return tensors | vit_rules.identity_norm(config, final_norm, "layernorm")
