"""Representation encoders: published vision transformers, and our own.

DINOv2 with and without registers, DINOv3, SigLIP and SigLIP2 at a fixed
resolution, ViT-MAE and CLIP's vision half. Reads and writes the published
Hugging Face layouts, so that the embedded miniature encoder, a published one
and a tuned one are all one kind of folder, which `transformers.AutoModel` reads
too.

A name "random:ID", e.g. "random:facebook/dinov2-with-registers-base", is the
published architecture with seeded random parameters and no download: for
benchmarks, memory tables and tests, never for results.
"""

import dataclasses
import functools
import os
import pathlib
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax.config import nearest
from psvae_jax.models import vit
from psvae_jax.pretrained import architectures, files, mapping, preprocessing

IMAGENET_MEAN = preprocessing.IMAGENET_MEAN
IMAGENET_STD = preprocessing.IMAGENET_STD

RANDOM = "random:"

_FILES = (
  "config.json",
  "preprocessor_config.json",
  "model*.safetensors",
  "model.safetensors.index.json",
)


# eq=False: arrays have no plain equality; compare fingerprints.
@dataclasses.dataclass(frozen=True, eq=False)
class Encoder:
  """A representation encoder with its parameters and preprocessing.

  Attributes:
    module: the network.
    params: its parameters.
    mean: per-channel mean, of images in [0, 1].
    std: per-channel standard deviation, of images in [0, 1].
    name: where it came from, for messages and records.
    fingerprint: `files.fingerprint_params(params)`.
  """

  module: vit.ViT
  params: Any
  mean: tuple[float, float, float]
  std: tuple[float, float, float]
  name: str
  fingerprint: str

  @property
  def patch_size(self) -> int:
    """Side of a patch, pixels."""
    return self.module.config.patch_size

  @property
  def width(self) -> int:
    """Feature dimension D."""
    return self.module.config.width

  def normalize(self, images: jax.Array) -> jax.Array:
    """(..., 3) images in [-1, 1] → what `module` takes, in float32."""
    return _normalize(images, self.mean, self.std)

  def __call__(self, images: np.ndarray | jax.Array) -> jax.Array:
    """Computes patch features; compiled once for each image shape.

    Args:
      images: (B, H, W, 3) uint8, H and W multiples of the patch size or the
        network's own image size. They are never resized.

    Returns:
      (B, H/p, W/p, D) float32: patch tokens after the final norm, without CLS
      and registers. With output "cls" (B, D) float32, CLS after that norm.

    Raises:
      ValueError: wrong dtype, or a shape that the network does not take.
    """
    dtype = getattr(images, "dtype", type(images))
    if dtype != np.uint8:
      raise ValueError(
        f"images must be uint8 in [0, 255], got {dtype}; for floats "
        "use encoder.module with encoder.normalize"
      )
    # Explicit, so that a transfer guard sees no accidental copy.
    images = jax.device_put(images)
    return _features(self.module, self.mean, self.std, self.params, images)


def _normalize(images, mean, std):
  images = jnp.asarray(images, jnp.float32) * 0.5 + 0.5
  return (images - jnp.float32(mean)) / jnp.float32(std)


# Modules hash by their fields: encoders of one architecture share programs.
@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _features(module, mean, std, params, images):
  images = images.astype(jnp.float32) / 127.5 - 1.0
  return module.apply({"params": params}, _normalize(images, mean, std))


def load_encoder(
  name_or_path: str | os.PathLike,
  *,
  final_norm: vit.FinalNorm = "affine",
  remat: bool = False,
  unroll: int = 1,
  dtype: Any = jnp.float32,
  output: vit.Output = "patches",
) -> Encoder:
  """Loads an encoder from a folder or from the Hugging Face hub.

  config.json says which architecture it is; of a whole SigLIP or CLIP model
  the vision half is taken, of ViT-MAE's the encoder.

  Args:
    name_or_path: folder or hub id with config.json, safetensors and, unless
      pixels are normalised as usual in the family, preprocessor_config.json. Or
      "random:" and a key of `architectures.PUBLISHED`: that architecture,
      untrained.
    final_norm: "affine" as published, or "affine_free": features without the
      final norm's gain and bias.
    remat: recompute activations in the backward pass.
    unroll: blocks per iteration of the compiled loop.
    dtype: compute dtype; features are float32 whatever it is.
    output: "patches", or "cls" for the CLS token: what FD-DINOv2 is taken of,
      and CLIP's `pooler_output`.

  Returns:
    The encoder, parameters float32 on the default device.

  Raises:
    FileNotFoundError: the folder or one of its files does not exist.
    ValueError: an unsupported architecture, or a malformed or ill-fitting
      file, the message names it; or the CLS token of a network without.
  """
  name = os.fspath(name_or_path)
  options = dict(
    final_norm=final_norm,
    remat=remat,
    unroll=unroll,
    dtype=dtype,
    output=output,
  )
  if name.startswith(RANDOM):
    encoder = abstract_encoder(name, **options)
    params = _random_params(encoder.params, encoder.module.config)
    return dataclasses.replace(
      encoder,
      params=jax.device_put(params),
      fingerprint=files.fingerprint_params(params),
    )
  folder = _resolve_folder(name)
  config, mean, std = _read_architecture(folder, name)
  module = vit.ViT(config, **options)
  params = architectures.import_params(
    config,
    final_norm,
    files.read_safetensors(folder),
    _param_shapes(module),
    str(folder),
  )
  return Encoder(
    module=module,
    params=jax.device_put(params),
    mean=mean,
    std=std,
    name=name,
    fingerprint=files.fingerprint_params(params),
  )


def abstract_encoder(
  name_or_path: str | os.PathLike,
  *,
  final_norm: vit.FinalNorm = "affine",
  remat: bool = False,
  unroll: int = 1,
  dtype: Any = jnp.float32,
  output: vit.Output = "patches",
) -> Encoder:
  """An encoder of shapes: `load_encoder` without its weights.

  Nothing is downloaded or allocated. It serves `jax.eval_shape`, as in tables
  of parameters, FLOPs and memory.

  Args:
    name_or_path: folder with a config.json (tensors are not looked for), or a
      key of `architectures.PUBLISHED`, "random:" before it or not.
    final_norm, remat, unroll, dtype, output: as for `load_encoder`.

  Returns:
    The encoder; its parameters are `jax.ShapeDtypeStruct`s and its fingerprint
    is "".

  Raises:
    FileNotFoundError: the folder has no config.json.
    ValueError: an unknown id, or a malformed file.
  """
  name = os.fspath(name_or_path)
  folder = pathlib.Path(name).expanduser()
  published = name.removeprefix(RANDOM)
  if not name.startswith(RANDOM) and folder.is_dir():
    config, mean, std = _read_architecture(folder, name)
  elif published in architectures.PUBLISHED:
    config = architectures.PUBLISHED[published]
    processor = architectures.processor(config, published)
    mean, std = processor.mean, processor.std
  else:
    raise ValueError(
      f"encoder {name!r} is no folder and no published architecture; "
      f"{nearest(published, architectures.PUBLISHED)}"
    )
  module = vit.ViT(
    config,
    final_norm=final_norm,
    remat=remat,
    unroll=unroll,
    dtype=dtype,
    output=output,
  )
  return Encoder(
    module=module,
    params=_param_shapes(module),
    mean=mean,
    std=std,
    name=name,
    fingerprint="",
  )


def save_encoder(
  folder: str | os.PathLike,
  config: vit.ViTConfig,
  params: Any,
  mean: Sequence[float],
  std: Sequence[float],
) -> None:
  """Writes an encoder in the layout that `load_encoder` and transformers read.

  `transformers.AutoModel.from_pretrained(folder)` gives the same features. Of
  CLIP its `last_hidden_state` is before the final norm; ViT-MAE is told not to
  shuffle, see `vit_mae`.

  Args:
    folder: created if need be; files of the same names are replaced.
    config: the network's hyper-parameters.
    params: its parameters. Without a final norm's (affine-free), an identity
      norm is written: the published architecture always has one.
    mean: per-channel mean, of images in [0, 1].
    std: per-channel standard deviation, of images in [0, 1].

  Raises:
    ValueError: the published architecture cannot express `config`, or
      `params` do not fit it. Nothing is written then.
  """
  published = architectures.format_config(config)
  final_norm = "affine" if "norm" in params else "affine_free"
  shapes = _param_shapes(vit.ViT(config, final_norm=final_norm))
  mapping.check_params(params, shapes)
  tensors = architectures.export_params(config, final_norm, params)
  processor = architectures.processor(config)
  preprocessor = preprocessing.form(processor, config.image_size, mean, std)

  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  files.write_safetensors(folder / "model.safetensors", tensors)
  files.write_json(folder / "preprocessor_config.json", preprocessor)
  files.write_json(folder / "config.json", published)


def _resolve_folder(name: str) -> pathlib.Path:
  """`files.resolve_folder`; where weights are missing, says what else to do."""
  try:
    return files.resolve_folder(name, _FILES)
  except FileNotFoundError as error:
    owners = tuple({key.split("/")[0] + "/" for key in architectures.PUBLISHED})
    if name in architectures.PUBLISHED:
      hint = f'"{RANDOM}{name}" is the same network untrained, for a dry run'
    elif name.startswith(owners):
      hint = f"of the known ids, {nearest(name, architectures.PUBLISHED)}"
    else:
      raise
    raise FileNotFoundError(f"{error}; {hint}") from error


def _read_architecture(
  folder: pathlib.Path, name: str
) -> tuple[vit.ViTConfig, tuple[float, ...], tuple[float, ...]]:
  """(hyper-parameters, mean, std) of a model folder, which is called `name`."""
  config = architectures.parse_config(
    files.read_config(folder), folder / "config.json"
  )
  processor = architectures.processor(config, name)
  path = folder / "preprocessor_config.json"
  return config, *preprocessing.read(path, processor)


def _random_params(shapes: Any, config: vit.ViTConfig) -> Any:
  """Untrained parameters, the same on every machine and backend.

  Drawn on the host: a random function of a device may differ in the last bit
  from another's, and with it the fingerprint that checkpoints are known by.
  """

  def one(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith("bias"):
      return np.zeros(leaf.shape, np.float32)
    if name.endswith("norm/scale"):
      return np.ones(leaf.shape, np.float32)
    if name.endswith("scale"):
      return np.full(leaf.shape, config.layerscale_init, np.float32)
    if name == "pos_embed" and config.positions == "fixed":
      return vit.sincos_embedding(config, np)
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    scale = leaf.shape[-2] ** -0.5 if name.endswith("kernel") else 0.02
    return np.float32(scale) * rng.standard_normal(leaf.shape, np.float32)

  return jax.tree_util.tree_map_with_path(one, shapes)


def _param_shapes(module: vit.ViT) -> Any:
  """The module's parameters as shapes; nothing is allocated."""
  config = module.config
  # Rotary tables would be made, and no parameter depends on the size then.
  patches = 1 if config.positions == "rotary" else config.grid
  side = patches * config.patch_size
  images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  return jax.eval_shape(module.init, jax.random.key(0), images)["params"]
