"""CLIP's published vision layout: tensor names and `config.json`.

The vision half of `openai/clip-vit-*`, from the whole model's folder or from
the vision model's own. The published `post_layernorm` stands after CLS alone;
here it is the final norm of the patch tokens too, so that features are normed
as any other encoder's are. `ViT.output="cls"` is transformers' `pooler_output`,
before the projection to the space that texts share.
"""

import pathlib
from collections.abc import Collection
from typing import Any

import numpy as np

from psvae_jax.models import vit
from psvae_jax.pretrained import mapping, preprocessing, vit_rules
from psvae_jax.pretrained.fields import Fields

_VISION = "clip_vision_model"
_WHOLE = "clip"
MODEL_TYPES = (_VISION, _WHOLE)
PROCESSOR = preprocessing.Processor(
  "CLIPImageProcessor",
  preprocessing.CLIP_MEAN,
  preprocessing.CLIP_STD,
  crop=True,
)
_PREFIX = "vision_model."
# The text half, both projections, and an index that older files hold.
IGNORED = (
  "text_model.",
  "text_projection.",
  "visual_projection.",
  "logit_scale",
  f"{_PREFIX}embeddings.position_ids",
  "embeddings.position_ids",
)

# Width, depth, heads, patch and image size of the published models.
_SIZES = {
  "base-patch32": (768, 12, 12, 32, 224),
  "base-patch16": (768, 12, 12, 16, 224),
  "large-patch14": (1024, 24, 16, 14, 224),
  "large-patch14-336": (1024, 24, 16, 14, 336),
}

# What `parse_config` would give of the published config.json.
PUBLISHED = {
  f"openai/clip-vit-{name}": vit.ViTConfig(
    width=width,
    depth=depth,
    num_heads=heads,
    patch_size=patch,
    image_size=side,
    activation="quick_gelu",
    layer_norm_eps=1e-5,
    layerscale_init=None,
    position_antialias=False,
    mlp_hidden=4 * width,
    patch_bias=False,
    pre_norm=True,
  )
  for name, (width, depth, heads, patch, side) in _SIZES.items()
}


def rules(
  config: vit.ViTConfig,
  final_norm: vit.FinalNorm,
  keys: Collection[str] = (),
) -> list[mapping.Rule]:
  """Published tensor of every parameter of `vit.ViT(config, final_norm)`.

  Args:
    config, final_norm: of the network.
    keys: of the file that is read: "vision_model.…", or without that prefix.
  """
  return vit_rules.vit_rules(
    config,
    final_norm,
    vit_rules.clip_names(vit_rules.find_prefix(_PREFIX, keys)),
    {"cls_token": vit_rules.VECTOR, "pos_embed": vit_rules.TABLE},
  )


def parse_config(raw: dict[str, Any], path: pathlib.Path) -> vit.ViTConfig:
  """A published config.json → ours; errors name the file and the field."""
  fields = Fields(raw, path)
  if raw["model_type"] == _WHOLE:
    # Older files say the sizes twice; as in transformers this one counts.
    older = fields.has("vision_config_dict")
    name = "vision_config_dict" if older else "vision_config"
    fields = fields.section(name)
  fields.expect(num_channels=3)
  # Published files leave out what equals the default of transformers' class.
  return fields.build(
    vit.ViTConfig,
    width=fields.get("hidden_size", int, 768),
    depth=fields.get("num_hidden_layers", int, 12),
    num_heads=fields.get("num_attention_heads", int, 12),
    patch_size=fields.side("patch_size", 32),
    image_size=fields.side("image_size", 224),
    activation=fields.get("hidden_act", str, "quick_gelu"),
    layer_norm_eps=fields.get("layer_norm_eps", float, 1e-5),
    layerscale_init=None,
    position_antialias=False,
    mlp_hidden=fields.get("intermediate_size", int, 3072),
    patch_bias=False,
    pre_norm=True,
  )


def format_config(config: vit.ViTConfig) -> dict[str, Any]:
  """Ours → the config.json of a vision model.

  Raises:
    ValueError: no published architecture is like `config`.
  """
  wanted = {
    "num_registers": 0,
    "swiglu": False,
    "qkv_bias": True,
    "layerscale_init": None,
    "antialias": False,
    "cls_token": True,
    "positions": "learned",
    "key_bias": True,
    "patch_bias": False,
    "pre_norm": True,
  }
  vit_rules.check_unlike(config, "CLIP", wanted)
  return {
    "architectures": ["CLIPVisionModel"],
    "attention_dropout": 0.0,
    "hidden_act": config.activation,
    "hidden_size": config.width,
    "image_size": config.image_size,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": config.block.mlp_hidden,
    "layer_norm_eps": config.layer_norm_eps,
    "model_type": _VISION,
    "num_attention_heads": config.num_heads,
    "num_channels": 3,
    "num_hidden_layers": config.depth,
    "patch_size": config.patch_size,
    "torch_dtype": "float32",
  }


def constant_tensors(
  config: vit.ViTConfig, final_norm: vit.FinalNorm
) -> dict[str, np.ndarray]:
  """Tensors that the published files hold and `rules` do not cover."""
  norm = f"{_PREFIX}post_layernorm"
  return vit_rules.identity_norm(config, final_norm, norm)
