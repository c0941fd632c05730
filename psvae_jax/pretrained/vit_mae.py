"""ViT-MAE's published layout: tensor names and `config.json`.

`facebook/vit-mae-*` (arXiv 2111.06377), from the pre-trained model's folder,
whose decoder is left out, or from the encoder's own. Nothing is masked here:
all patches, in order. Positions are fixed: a sin-cos code that the file holds
as a tensor. transformers' `ViTMAEModel` masks and shuffles whatever it is
given: features equal ours under `mask_ratio=0`, which a saved config.json has,
and `noise=torch.arange(patches)[None]`.
"""

import pathlib
from collections.abc import Collection
from typing import Any

import numpy as np

from psvae_jax.models import vit
from psvae_jax.pretrained import mapping, preprocessing, vit_rules
from psvae_jax.pretrained.fields import Fields

MODEL_TYPES = ("vit_mae",)
# The published file's, and MAE's own: not the defaults of transformers' class.
PROCESSOR = preprocessing.Processor(
  "ViTImageProcessor",
  preprocessing.IMAGENET_MEAN,
  preprocessing.IMAGENET_STD,
  resample=preprocessing.BILINEAR,
)
_PREFIX = "vit."
IGNORED = ("decoder.",)

# Width, depth, heads and patch size of the published models.
_SIZES = {
  "base": (768, 12, 12, 16),
  "large": (1024, 24, 16, 16),
  "huge": (1280, 32, 16, 14),
}

# What `parse_config` would give of the published config.json.
PUBLISHED = {
  f"facebook/vit-mae-{name}": vit.ViTConfig(
    width=width,
    depth=depth,
    num_heads=heads,
    patch_size=patch,
    image_size=224,
    layer_norm_eps=1e-12,
    layerscale_init=None,
    position_antialias=False,
    mlp_hidden=4 * width,
    positions="fixed",
  )
  for name, (width, depth, heads, patch) in _SIZES.items()
}


def rules(
  config: vit.ViTConfig,
  final_norm: vit.FinalNorm,
  keys: Collection[str] = (),
) -> list[mapping.Rule]:
  """Published tensor of every parameter of `vit.ViT(config, final_norm)`.

  Args:
    config, final_norm: of the network.
    keys: of the file that is read: "vit.…" beside a decoder, or without that
      prefix, which is also how the encoder alone is written.
  """
  prefix = vit_rules.find_prefix(_PREFIX, keys) if keys else ""
  layer = prefix + "encoder.layer.{}"
  block = {
    **{n: f"attention.attention.{n}" for n in ("query", "key", "value")},
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "out": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
  }
  names = {name: f"{layer}.{key}" for name, key in block.items()}
  names |= {
    "cls_token": f"{prefix}embeddings.cls_token",
    "pos_embed": f"{prefix}embeddings.position_embeddings",
    "patch_embed": f"{prefix}embeddings.patch_embeddings.projection",
    "norm": f"{prefix}layernorm",
  }
  return vit_rules.vit_rules(config, final_norm, names)


def parse_config(raw: dict[str, Any], path: pathlib.Path) -> vit.ViTConfig:
  """A published config.json → ours; errors name the file and the field."""
  fields = Fields(raw, path)
  fields.expect(num_channels=3)
  # Defaults are those of transformers' config class, for files that leave a
  # field out. Fields that say how big the model is have none.
  return fields.build(
    vit.ViTConfig,
    width=fields.get("hidden_size", int),
    depth=fields.get("num_hidden_layers", int),
    num_heads=fields.get("num_attention_heads", int),
    patch_size=fields.side("patch_size", 16),
    image_size=fields.side("image_size", 224),
    activation=fields.get("hidden_act", str, "gelu"),
    layer_norm_eps=fields.get("layer_norm_eps", float, 1e-12),
    qkv_bias=fields.get("qkv_bias", bool, True),
    layerscale_init=None,
    position_antialias=False,
    mlp_hidden=fields.get("intermediate_size", int),
    positions="fixed",
  )


def format_config(config: vit.ViTConfig) -> dict[str, Any]:
  """Ours → the config.json of an encoder that masks nothing.

  Raises:
    ValueError: no published architecture is like `config`.
  """
  wanted = {
    "num_registers": 0,
    "swiglu": False,
    "layerscale_init": None,
    "antialias": False,
    "cls_token": True,
    "positions": "fixed",
    "key_bias": True,
    "patch_bias": True,
    "pre_norm": False,
  }
  vit_rules.check_unlike(config, "ViT-MAE", wanted)
  return {
    "architectures": ["ViTMAEModel"],
    "attention_probs_dropout_prob": 0.0,
    "hidden_act": config.activation,
    "hidden_dropout_prob": 0.0,
    "hidden_size": config.width,
    "image_size": config.image_size,
    "initializer_range": 0.02,
    "intermediate_size": config.block.mlp_hidden,
    "layer_norm_eps": config.layer_norm_eps,
    "mask_ratio": 0.0,
    "model_type": MODEL_TYPES[0],
    "num_attention_heads": config.num_heads,
    "num_channels": 3,
    "num_hidden_layers": config.depth,
    "patch_size": config.patch_size,
    "qkv_bias": config.qkv_bias,
    "torch_dtype": "float32",
  }


def constant_tensors(
  config: vit.ViTConfig, final_norm: vit.FinalNorm
) -> dict[str, np.ndarray]:
  """Tensors that the published files hold and `rules` do not cover."""
  return vit_rules.identity_norm(config, final_norm, "layernorm")
