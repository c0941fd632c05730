"""DINO ViT-S/8, the frozen eyes of RAE's discriminator.

Reads the published Hugging Face layout (`facebook/dino-vits8`: model type
"vit"). The network is a plain ViT of 12 blocks without LayerScale; heads look
at the patch tokens of four of them and at the last one's again.
"""

import dataclasses
import functools
import math
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.config import nearest
from psvae_jax.models import layers, resize, vit
from psvae_jax.pretrained import files, mapping
from psvae_jax.pretrained.encoder import IMAGENET_MEAN, IMAGENET_STD, RANDOM
from psvae_jax.pretrained.fields import Fields

# What "random:NAME" builds: the published hyper-parameters.
PUBLISHED = {
  "facebook/dino-vits8": vit.ViTConfig(
    width=384,
    depth=12,
    num_heads=6,
    patch_size=8,
    image_size=224,
    mlp_ratio=4.0,
    layer_norm_eps=1e-12,
    layerscale_init=None,
  )
}
# RAE's and StyleGAN-T's choice of blocks, counted from 0.
BLOCKS = (2, 5, 8, 11)

_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json")
_HELP = (
  "config.discriminator.weights is a folder with DINO ViT-S/8: `hf download "
  "facebook/dino-vits8 --local-dir FOLDER` (huggingface-cli in older "
  "versions), then config.discriminator.weights=FOLDER. Where that has no "
  'model.safetensors, let transformers write it: python -c "import '
  "transformers as t; t.ViTModel.from_pretrained('facebook/dino-vits8')"
  ".save_pretrained('FOLDER')\". "
  '"random:facebook/dino-vits8" runs without weights, as a test'
)


# eq=False: arrays have no plain equality; compare fingerprints.
@dataclasses.dataclass(frozen=True, eq=False)
class Dino:
  """A frozen feature network and its parameters.

  Attributes:
    module: the network.
    params: its parameters, float32 host arrays.
    name: where it came from, for messages and records.
    fingerprint: `files.fingerprint_params(params)`.
  """

  module: vit.ViT
  params: Any
  name: str
  fingerprint: str

  def features(self, params: Any, images: jax.Array) -> tuple[jax.Array, ...]:
    """Computes feature maps; pure, differentiable in the images.

    As RAE: images are resized to the network's own size by bilinear
    interpolation without antialiasing and normalised by ImageNet's mean and
    standard deviation. Features are the residual stream after a block, before
    any norm. RAE's copy of the network has tanh-approximated GELUs; here they
    are what the weights were trained with, config.json's.

    Args:
      params: as `self.params`, on the device; an argument so that a compiled
        step does not hold them as a constant.
      images: (B, H, W, 3) in [−1, 1].

    Returns:
      Maps (B, N, D), float32 or wider, without CLS: of the last block, then
      of those among `BLOCKS` that the network has, in order.
    """
    side = self.module.config.image_size
    images = images.astype(layers.wide(self.module.dtype))
    images = resize.resize_bilinear(images, (side, side))
    mean = jnp.asarray(IMAGENET_MEAN, images.dtype)
    std = jnp.asarray(IMAGENET_STD, images.dtype)
    images = (images * 0.5 + 0.5 - mean) / std
    maps = self.module.apply({"params": params}, images)
    wanted = [maps[self.module.taps.index(i)] for i in _blocks(self.module)]
    return (maps[-1], *wanted)


def load_dino(
  name_or_path: str | os.PathLike,
  dtype: Any = jnp.float32,
  remat: bool = False,
  unroll: int = 1,
) -> Dino:
  """Loads DINO from a folder or the Hugging Face hub.

  Args:
    name_or_path: folder or hub id with config.json and safetensors; or
      "random:facebook/dino-vits8", random weights that are always the same.
    dtype: compute dtype.
    remat: recompute each block's activations in the backward pass.
    unroll: blocks per iteration of the compiled loops.

  Raises:
    FileNotFoundError: the folder or one of its files does not exist.
    ValueError: no name, an unsupported architecture, or a malformed or
      ill-fitting file; the message names it.
  """
  name = os.fspath(name_or_path)
  if not name:
    raise ValueError(f"config.discriminator.weights is empty. {_HELP}")
  if name.startswith(RANDOM):
    published = name.removeprefix(RANDOM)
    if published not in PUBLISHED:
      raise ValueError(
        f"config.discriminator.weights={name!r}: no such network; "
        f"{nearest(name, [RANDOM + key for key in PUBLISHED])}"
      )
    return random_dino(PUBLISHED[published], dtype, remat, unroll, name=name)
  try:
    folder = files.resolve_folder(name_or_path, _FILES)
    raw = files.read_config(folder)
    module = _build(
      parse_config(raw, folder / "config.json"), dtype, remat, unroll
    )
    tensors = files.read_safetensors(folder)
  except FileNotFoundError as error:
    raise FileNotFoundError(f"{error}. {_HELP}") from error
  params = mapping.import_params(
    rules(module.config),
    tensors,
    _param_shapes(module),
    source=str(folder),
    ignored=_unused(module.config),
  )
  return Dino(module, params, name, files.fingerprint_params(params))


def random_dino(
  config: vit.ViTConfig,
  dtype: Any = jnp.float32,
  remat: bool = False,
  unroll: int = 1,
  *,
  seed: int = 0,
  name: str = "random",
) -> Dino:
  """The same network with random weights, a function of `config` and `seed`.

  Args:
    config: hyper-parameters.
    dtype: compute dtype.
    remat: recompute each block's activations in the backward pass.
    unroll: blocks per iteration of the compiled loops.
    seed: of the weights, which numpy draws: they do not depend on the device.
    name: for messages and records.
  """
  module = _build(config, dtype, remat, unroll)
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    kind = path[-1].key
    if kind in ("scale", "bias"):
      return np.full(leaf.shape, float(kind == "scale"), np.float32)
    stddev = leaf.shape[-2] ** -0.5 if kind == "kernel" else 0.02
    return stddev * rng.standard_normal(leaf.shape, np.float32)

  params = jax.tree_util.tree_map_with_path(draw, _param_shapes(module))
  return Dino(module, params, name, files.fingerprint_params(params))


def rules(config: vit.ViTConfig) -> list[mapping.Rule]:
  """Published tensor of every parameter of the network."""
  layer, block = "encoder.layer.{}", "blocks/block"

  def pair(path, key, name, layout, bias=True):
    yield mapping.Rule(f"{path}/{name}", f"{key}.weight", layout)
    if bias:
      yield mapping.Rule(f"{path}/bias", f"{key}.bias")

  norm = functools.partial(pair, name="scale", layout=mapping.SAME)
  dense = functools.partial(pair, name="kernel", layout=mapping.LINEAR)
  table = [
    mapping.Rule("cls_token", "embeddings.cls_token"),
    mapping.Rule("pos_embed", "embeddings.position_embeddings"),
    *pair(
      "patch_embed",
      "embeddings.patch_embeddings.projection",
      "kernel",
      mapping.patch_layout(config.patch_size),
    ),
    *norm(f"{block}/norm1/norm", f"{layer}.layernorm_before"),
    *norm(f"{block}/norm2/norm", f"{layer}.layernorm_after"),
    *dense(f"{block}/attention/out", f"{layer}.attention.output.dense"),
    *dense(f"{block}/mlp/fc1", f"{layer}.intermediate.dense"),
    *dense(f"{block}/mlp/fc2", f"{layer}.output.dense"),
  ]
  for name in ("query", "key", "value"):
    key = f"{layer}.attention.attention.{name}"
    path = f"{block}/attention/{name}"
    table += dense(path, key, bias=config.qkv_bias)
  return table


def parse_config(raw: dict[str, Any], path: pathlib.Path) -> vit.ViTConfig:
  """A published config.json → ours; errors name the file and the field."""
  if raw.get("model_type") != "vit":
    raise ValueError(
      f"{path}: model_type {raw.get('model_type')!r} is not supported here; "
      'DINO is a "vit"'
    )
  read = Fields(raw, path)
  read.expect(num_channels=3)
  hidden = read.get("intermediate_size", int)
  # Defaults are those of transformers' ViTConfig, which files may leave out.
  config = read.build(
    vit.ViTConfig,
    width=read.get("hidden_size", int),
    depth=read.get("num_hidden_layers", int),
    num_heads=read.get("num_attention_heads", int),
    patch_size=read.get("patch_size", int, 16),
    image_size=read.get("image_size", int, 224),
    activation=read.get("hidden_act", str, "gelu"),
    layer_norm_eps=read.get("layer_norm_eps", float, 1e-12),
    qkv_bias=read.get("qkv_bias", bool, True),
    layerscale_init=None,
    mlp_hidden=hidden,
  )
  if config.image_size % config.patch_size:
    raise ValueError(
      f"{path}: image_size {config.image_size} is not a multiple of patch_size "
      f"{config.patch_size}"
    )
  ratio = hidden / config.width
  # The hidden width is the product, rounded down: keep it from falling one
  # short.
  if int(config.width * ratio) != hidden:
    ratio = math.nextafter(ratio, math.inf)
  return dataclasses.replace(config, mlp_hidden=None, mlp_ratio=ratio)


def _unused(config: vit.ViTConfig) -> dict[str, tuple[int, ...]]:
  """Published tensors that features before the final norm do not use."""
  width = config.width
  return {
    "layernorm.weight": (width,),
    "layernorm.bias": (width,),
    "pooler.dense.weight": (width, width),
    "pooler.dense.bias": (width,),
  }


def _build(
  config: vit.ViTConfig, dtype: Any, remat: bool, unroll: int
) -> vit.ViT:
  taps = {block for block in BLOCKS if block < config.depth}
  return vit.ViT(
    config,
    remat=remat,
    unroll=unroll,
    dtype=jnp.dtype(dtype),
    taps=tuple(sorted(taps | {config.depth - 1})),
  )


def _blocks(module: vit.ViT) -> list[int]:
  return [block for block in BLOCKS if block < module.config.depth]


def _param_shapes(module: vit.ViT) -> Any:
  """The module's parameters as shapes; nothing is allocated."""
  side = module.config.image_size
  images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  return jax.eval_shape(module.init, jax.random.key(0), images)["params"]
