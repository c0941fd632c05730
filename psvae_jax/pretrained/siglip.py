"""SigLIP's and SigLIP2's published layout: tensor names and `config.json`.

The vision half of `google/siglip-*` and of `google/siglip2-*` at a fixed
resolution, from the whole model's folder or from the vision model's own. There
is no CLS; its attention-pooling head is not read. SigLIP2's NaFlex models take
images of any shape in another way and are refused.
"""

import pathlib
from collections.abc import Collection
from typing import Any

import numpy as np

from psvae_jax.models import vit
from psvae_jax.pretrained import mapping, preprocessing, vit_rules
from psvae_jax.pretrained.fields import Fields

_VISION = "siglip_vision_model"
_WHOLE = "siglip"
_NAFLEX = ("siglip2", "siglip2_vision_model")
MODEL_TYPES = (_VISION, _WHOLE, *_NAFLEX)
PROCESSOR = preprocessing.Processor(
  "SiglipImageProcessor", preprocessing.HALF, preprocessing.HALF
)
_PREFIX = "vision_model."
# The text half, the pooling head, and an index that older files hold.
IGNORED = (
  "text_model.",
  "logit_scale",
  "logit_bias",
  *(
    prefix + name
    for prefix in (_PREFIX, "")
    for name in ("head.", "embeddings.position_ids")
  ),
)

# Width, depth, heads and MLP width of the published sizes.
_SIZES = {
  "base": (768, 12, 12, 3072),
  "large": (1024, 24, 16, 4096),
  "so400m": (1152, 27, 16, 4304),
  "giant-opt": (1536, 40, 16, 6144),
}
# Ids after "google/", without the resolutions that end them.
_IDS = {
  "siglip-base-patch16": (224, 256, 384, 512),
  "siglip-large-patch16": (256, 384),
  "siglip-so400m-patch14": (224, 384),
  "siglip2-base-patch16": (224, 256, 384, 512),
  "siglip2-base-patch32": (256,),
  "siglip2-large-patch16": (256, 384, 512),
  "siglip2-so400m-patch14": (224, 384),
  "siglip2-so400m-patch16": (256, 384, 512),
  "siglip2-giant-opt-patch16": (256, 384),
}
_MULTILINGUAL = {
  "siglip-base-patch16-256": "siglip-base-patch16-256-multilingual",
  "siglip2-so400m-patch16-256": "siglip-so400m-patch16-256-i18n",
}


def _published() -> dict[str, vit.ViTConfig]:
  """Architecture of every fixed-resolution id on the Hugging Face hub."""
  configs = {}
  for stem, sides in _IDS.items():
    family, _, patch = stem.rpartition("-patch")
    width, depth, heads, hidden = _SIZES[family.partition("-")[2]]
    for side in sides:
      configs[f"google/{stem}-{side}"] = vit.ViTConfig(
        width=width,
        depth=depth,
        num_heads=heads,
        patch_size=int(patch),
        image_size=side,
        activation="gelu_pytorch_tanh",
        layerscale_init=None,
        position_antialias=False,
        mlp_hidden=hidden,
        cls_token=False,
      )
  for alike, name in _MULTILINGUAL.items():
    configs[f"google/{name}"] = configs[f"google/{alike}"]
  return configs


# What `parse_config` would give of the published config.json.
PUBLISHED = _published()


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
    {"pos_embed": vit_rules.TABLE},
  )


def parse_config(raw: dict[str, Any], path: pathlib.Path) -> vit.ViTConfig:
  """A published config.json → ours; errors name the file and the field."""
  if raw["model_type"] in _NAFLEX:
    ids = sorted(name for name in PUBLISHED if "siglip2" in name)
    raise ValueError(
      f"{path}: model_type {raw['model_type']!r} is SigLIP2 NaFlex, which is "
      "not supported; SigLIP2 at a fixed resolution is: "
      f"{', '.join(ids)}"
    )
  fields = Fields(raw, path)
  if raw["model_type"] == _WHOLE:
    fields = fields.section("vision_config")
  fields.expect(num_channels=3)
  # Published files leave out what equals the default of transformers' class.
  return fields.build(
    vit.ViTConfig,
    width=fields.get("hidden_size", int, 768),
    depth=fields.get("num_hidden_layers", int, 12),
    num_heads=fields.get("num_attention_heads", int, 12),
    patch_size=fields.side("patch_size", 16),
    image_size=fields.side("image_size", 224),
    activation=fields.get("hidden_act", str, "gelu_pytorch_tanh"),
    layer_norm_eps=fields.get("layer_norm_eps", float, 1e-6),
    layerscale_init=None,
    position_antialias=False,
    mlp_hidden=fields.get("intermediate_size", int, 3072),
    cls_token=False,
  )


def format_config(config: vit.ViTConfig) -> dict[str, Any]:
  """Ours → the config.json of a vision model without the pooling head.

  Raises:
    ValueError: no published architecture is like `config`.
  """
  wanted = {
    "num_registers": 0,
    "swiglu": False,
    "qkv_bias": True,
    "layerscale_init": None,
    "antialias": False,
    "cls_token": False,
    "positions": "learned",
    "key_bias": True,
    "patch_bias": True,
    "pre_norm": False,
  }
  vit_rules.check_unlike(config, "SigLIP", wanted)
  return {
    "architectures": ["SiglipVisionModel"],
    "attention_dropout": 0.0,
    "hidden_act": config.activation,
    "hidden_size": config.width,
    "image_size": config.image_size,
    "intermediate_size": config.block.mlp_hidden,
    "layer_norm_eps": config.layer_norm_eps,
    "model_type": _VISION,
    "num_attention_heads": config.num_heads,
    "num_channels": 3,
    "num_hidden_layers": config.depth,
    "patch_size": config.patch_size,
    "torch_dtype": "float32",
    "vision_use_head": False,
  }


def constant_tensors(
  config: vit.ViTConfig, final_norm: vit.FinalNorm
) -> dict[str, np.ndarray]:
  """Tensors that the published files hold and `rules` do not cover."""
  norm = f"{_PREFIX}post_layernorm"
  return vit_rules.identity_norm(config, final_norm, norm)
