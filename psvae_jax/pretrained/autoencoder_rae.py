"""RAE on disk: diffusers' `AutoencoderRAE` folders.

A folder has `config.json` (`"_class_name": "AutoencoderRAE"`) and
`diffusion_pytorch_model.safetensors`, whole or sharded: encoder, decoder and
the statistics that latents are standardised by.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.models import layers, vit
from psvae_jax.models.rae_autoencoder import RAE, LatentNorm, RAEConfig
from psvae_jax.pretrained import (
  architectures,
  files,
  mapping,
  preprocessing,
  untrained,
)
from psvae_jax.pretrained.fields import Fields
from psvae_jax.pretrained.preprocessing import IMAGENET_MEAN, IMAGENET_STD

CLASS_NAME = "AutoencoderRAE"
STEM = "diffusion_pytorch_model"

# diffusers builds every encoder with heads of this width, and all but DINOv2
# with an MLP of that one.
_HEAD_WIDTH = 64
_MLP_WIDTH = 3072
_DEFAULT_ENCODER = "dinov2"

_ENCODER, _DECODER = "encoder.", "decoder."
_STATISTICS = ("latents_mean", "latents_std")
_PIXELS = {"mean": "encoder_mean", "std": "encoder_std"}

# What config.json does not say is what diffusers builds them with.
_ENCODERS: dict[str, Callable[..., vit.ViTConfig]] = {
  "dinov2": functools.partial(vit.ViTConfig, image_size=518, num_registers=4),
  "siglip2": functools.partial(
    vit.ViTConfig,
    image_size=256,
    mlp_hidden=_MLP_WIDTH,
    activation="gelu_pytorch_tanh",
    layerscale_init=None,
    position_antialias=False,
    cls_token=False,
  ),
  "mae": functools.partial(
    vit.ViTConfig,
    image_size=224,
    mlp_hidden=_MLP_WIDTH,
    layer_norm_eps=1e-12,
    layerscale_init=None,
    position_antialias=False,
    positions="fixed",
  ),
}

# transformers 5 names these parts of an encoder so in memory, and diffusers
# writes them as they are; older versions wrote the published names.
_ATTENTION = {
  ".attention.q_proj.": ".attention.attention.query.",
  ".attention.k_proj.": ".attention.attention.key.",
  ".attention.v_proj.": ".attention.attention.value.",
  ".attention.o_proj.": ".attention.output.dense.",
}
_RENAMED = {
  "dinov2": _ATTENTION,
  "siglip2": {},
  "mae": {
    **_ATTENTION,
    "layers.": "encoder.layer.",
    ".mlp.fc1.": ".intermediate.dense.",
    ".mlp.fc2.": ".output.dense.",
  },
}


def _encoder_config(
  kind: str, width: int, depth: int, patch: int
) -> vit.ViTConfig:
  return _ENCODERS[kind](
    width=width,
    depth=depth,
    num_heads=width // _HEAD_WIDTH,
    patch_size=patch,
  )


def _decoder_config(width: int, heads: int, hidden: int) -> layers.BlockConfig:
  return layers.BlockConfig(
    width=width,
    num_heads=heads,
    mlp_hidden=hidden,
    layerscale_init=None,
    layer_norm_eps=1e-12,  # MAE's
  )


def _published(
  kind: str, width: int, depth: int, patch: int, input_size: int
) -> RAEConfig:
  """All of them have RAE's ViT-XL for a decoder."""
  half = kind == "siglip2"
  return RAEConfig(
    encoder=_encoder_config(kind, width, depth, patch),
    input_size=input_size,
    decoder=_decoder_config(1152, 16, 4096),
    decoder_depth=28,
    decoder_patch_size=16,
    mean=preprocessing.HALF if half else IMAGENET_MEAN,
    std=preprocessing.HALF if half else IMAGENET_STD,
  )


# What "random:ID" builds.
PUBLISHED = {
  f"nyu-visionx/RAE-{name}": _published(*sizes)
  for name, sizes in {
    "dinov2-wReg-small-ViTXL-n08": ("dinov2", 384, 12, 14, 224),
    "dinov2-wReg-base-ViTXL-n08": ("dinov2", 768, 12, 14, 224),
    "dinov2-wReg-base-ViTXL-n08-i512": ("dinov2", 768, 12, 14, 448),
    "dinov2-wReg-large-ViTXL-n08": ("dinov2", 1024, 24, 14, 224),
    "siglip2-base-p16-i256-ViTXL-n08": ("siglip2", 768, 12, 16, 256),
    "mae-base-p16-ViTXL-n08": ("mae", 768, 12, 16, 256),
  }.items()
}


def decoder_rules() -> list[mapping.Rule]:
  """Published tensor of every parameter of `RAEDecoder`."""

  def pair(path, key, name="kernel", layout=mapping.LINEAR):
    yield mapping.Rule(f"{path}/{name}", f"{_DECODER}{key}.weight", layout)
    yield mapping.Rule(f"{path}/bias", f"{_DECODER}{key}.bias")

  def norm(path, key):
    return pair(f"{path}/norm", key, "scale", mapping.SAME)

  layer, block = "decoder_layers.{}", "blocks/block"
  table = [
    mapping.Rule("cls_token", f"{_DECODER}trainable_cls_token"),
    *pair("embed", "decoder_embed"),
    *norm("norm", "decoder_norm"),
    *pair("head", "decoder_pred"),
    *norm(f"{block}/norm1", f"{layer}.layernorm_before"),
    *norm(f"{block}/norm2", f"{layer}.layernorm_after"),
  ]
  dense = {
    "attention/query": "attention.to_q",
    "attention/key": "attention.to_k",
    "attention/value": "attention.to_v",
    "attention/out": "attention.to_out.0",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
  }
  for path, key in dense.items():
    table += pair(f"{block}/{path}", f"{layer}.{key}")
  return table


def parse_config(raw: Mapping[str, Any], path: pathlib.Path) -> RAEConfig:
  """A published config.json → ours; errors name the file and the field."""
  fields = Fields(raw, path)
  fields.expect(_class_name=CLASS_NAME, num_channels=3, reshape_to_2d=True)
  # Defaults are those of diffusers' class, which files may leave out.
  kind = fields.get("encoder_type", str, _DEFAULT_ENCODER)
  if kind not in _ENCODERS:
    raise ValueError(
      f"{path}: encoder_type {kind!r} is not supported; supported: "
      f"{', '.join(_ENCODERS)}"
    )
  width = fields.get("encoder_hidden_size", int, 768)
  if width < 1 or width % _HEAD_WIDTH:
    raise ValueError(
      f"{path}: encoder_hidden_size {width} is not a multiple of {_HEAD_WIDTH}"
    )
  encoder = fields.build(
    functools.partial(_encoder_config, kind),
    width=width,
    depth=fields.get("encoder_num_hidden_layers", int, 12),
    patch=fields.get("encoder_patch_size", int, 14),
  )
  decoder = _decoder_config(
    fields.get("decoder_hidden_size", int, 512),
    fields.get("decoder_num_attention_heads", int, 16),
    fields.get("decoder_intermediate_size", int, 2048),
  )
  config = fields.build(
    RAEConfig,
    encoder=encoder,
    input_size=fields.get("encoder_input_size", int, 224),
    decoder=decoder,
    decoder_depth=fields.get("decoder_num_hidden_layers", int, 8),
    decoder_patch_size=fields.get("patch_size", int, 16),
    mean=_pixels(raw, path, "mean", IMAGENET_MEAN),
    std=_pixels(raw, path, "std", IMAGENET_STD),
    scaling_factor=fields.get("scaling_factor", float, 1.0),
  )
  if fields.has("image_size"):
    fields.expect(image_size=config.output_size)
  return config


def _pixels(
  raw: Mapping[str, Any],
  path: pathlib.Path,
  name: str,
  default: tuple[float, ...],
) -> tuple[float, ...]:
  name = f"encoder_norm_{name}"
  values = default if raw.get(name) is None else raw[name]
  return preprocessing.statistics(values, name, str(path))


def read_folder(
  folder: pathlib.Path, latent_norm: LatentNorm = "diffusers"
) -> tuple[RAEConfig, dict[str, Any]]:
  """Reads a folder: hyper-parameters and float32 host parameters.

  Args:
    folder: the model folder.
    latent_norm: how latents are standardised; see `models.rae_autoencoder`.

  Raises:
    FileNotFoundError: a file is missing.
    ValueError: an unsupported architecture, or a malformed or ill-fitting
      file; the message names it.
  """
  raw = files.read_config(folder)
  config = parse_config(raw, folder / "config.json")
  tensors = files.read_safetensors(folder, STEM)
  statistics = _latent_statistics(tensors, config, folder)
  # The file's come after config.json's, as in diffusers.
  pixels = {
    name: preprocessing.statistics(tensors[key].ravel(), key, str(folder))
    for name, key in _PIXELS.items()
    if key in tensors
  }
  config = dataclasses.replace(config, latent_norm=latent_norm, **pixels)
  shapes = param_shapes(config)
  encoder = architectures.import_params(
    config.encoder,
    "affine_free",
    _encoder_tensors(tensors, raw.get("encoder_type", _DEFAULT_ENCODER)),
    shapes["encoder"],
    f"the encoder of {folder}",
  )
  read = (*_PIXELS.values(), *(f"_{name}" for name in _STATISTICS))
  decoder = mapping.import_params(
    decoder_rules(),
    {
      key: tensor
      for key, tensor in tensors.items()
      if not key.startswith(_ENCODER) and key not in read
    },
    shapes["decoder"],
    source=str(folder),
    # A function of its size, which older files hold all the same.
    ignored={f"{_DECODER}decoder_pos_embed": None},
  )
  return config, {"encoder": encoder, "decoder": decoder, **statistics}


def random_params(config: RAEConfig) -> dict[str, Any]:
  """Untrained parameters, the same on every machine; latents as they come."""
  one = np.ones((1, 1, 1), np.float32)
  params = untrained.random_params(param_shapes(config))
  return {**params, "latents_mean": 0 * one, "latents_std": one}


def param_shapes(config: RAEConfig) -> Any:
  """The module's parameters as shapes, statistics apart."""
  # Of one token: positions of all would be made, and no parameter has them.
  side = config.encoder.patch_size
  images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  module = RAE(dataclasses.replace(config, input_size=side))
  shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
  return {name: shapes[name] for name in ("encoder", "decoder")}


def _encoder_tensors(
  tensors: Mapping[str, np.ndarray], kind: str
) -> dict[str, np.ndarray]:
  """The encoder's tensors among all, by the names it is published with."""
  out = {}
  for key, tensor in tensors.items():
    if not key.startswith(_ENCODER):
      continue
    key = key.removeprefix(_ENCODER)
    for new, old in _RENAMED[kind].items():
      if key.startswith(new) or (new.startswith(".") and new in key):
        key = key.replace(new, old, 1)
    out[key] = tensor
  return out


def _latent_statistics(
  tensors: Mapping[str, np.ndarray], config: RAEConfig, folder: pathlib.Path
) -> dict[str, np.ndarray]:
  """Mean and deviation, as they broadcast against latents (h, w, D)."""
  full = (1, config.encoder.width, config.grid, config.grid)
  out = {}
  for name in _STATISTICS:
    tensor = tensors.get(f"_{name}")
    if tensor is None:
      raise ValueError(f"{folder} has no tensor _{name}; download it again")
    shape = (1,) * (4 - tensor.ndim) + tensor.shape
    if len(shape) > 4 or any(
      size not in (1, want) for size, want in zip(shape, full, strict=True)
    ):
      raise ValueError(
        f"{folder}: _{name} has the shape {tensor.shape}, which does not "
        f"broadcast against {full[1:]}"
      )
    out[name] = tensor.reshape(shape)[0].transpose(1, 2, 0)
  if not out["latents_std"].min() > 0:
    raise ValueError(f"{folder}: _latents_std is not positive")
  shape = np.broadcast_shapes(*(value.shape for value in out.values()))
  return {
    name: np.array(np.broadcast_to(value, shape), np.float32)
    for name, value in out.items()
  }
