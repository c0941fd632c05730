"""Representation encoders: DINOv2, with and without registers.

Reads and writes the published Hugging Face layout, so that the embedded
miniature encoder, `facebook/dinov2-*` and a tuned encoder are all one kind of
folder, which `transformers.AutoModel` reads too.

A name "random:ID", e.g. "random:facebook/dinov2-with-registers-base", is the
published architecture with seeded random parameters and no download: for
benchmarks, memory tables and tests, never for results.
"""

import dataclasses
import functools
import math
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
from psvae_jax.pretrained import dinov2, files, mapping

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

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
      images: (B, H, W, 3) uint8, H and W multiples of the patch size. They
        are never resized.

    Returns:
      (B, H/p, W/p, D) float32: patch tokens after the final norm, without CLS
      and registers.

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
) -> Encoder:
  """Loads a DINOv2 encoder from a folder or from the Hugging Face hub.

  Args:
    name_or_path: folder or hub id with config.json, safetensors and, unless
      the encoder takes ImageNet's mean and std, preprocessor_config.json. Or
      "random:" and a key of `dinov2.PUBLISHED`: that architecture, untrained.
    final_norm: "affine" as published, or "affine_free": features without the
      final norm's gain and bias.
    remat: recompute activations in the backward pass.
    unroll: blocks per iteration of the compiled loop.
    dtype: compute dtype; features are float32 whatever it is.

  Returns:
    The encoder, parameters float32 on the default device.

  Raises:
    FileNotFoundError: the folder or one of its files does not exist.
    ValueError: an unsupported architecture, or a malformed or ill-fitting
      file; the message names it.
  """
  name = os.fspath(name_or_path)
  options = dict(final_norm=final_norm, remat=remat, unroll=unroll, dtype=dtype)
  if name.startswith(RANDOM):
    encoder = abstract_encoder(name, **options)
    params = _random_params(encoder.params, encoder.module.config)
    return dataclasses.replace(
      encoder,
      params=jax.device_put(params),
      fingerprint=files.fingerprint_params(params),
    )
  folder = _resolve_folder(name)
  config, mean, std = _read_architecture(folder)
  module = vit.ViT(config, **options)
  unused = dinov2.constant_tensors(config, final_norm)
  params = mapping.import_params(
    dinov2.rules(config, final_norm),
    files.read_safetensors(folder),
    _param_shapes(module),
    source=str(folder),
    ignored={key: value.shape for key, value in unused.items()},
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
) -> Encoder:
  """An encoder of shapes: `load_encoder` without its weights.

  Nothing is downloaded or allocated. It serves `jax.eval_shape`, as in tables
  of parameters, FLOPs and memory.

  Args:
    name_or_path: folder with a config.json (tensors are not looked for), or a
      key of `dinov2.PUBLISHED`, "random:" before it or not.
    final_norm, remat, unroll, dtype: as for `load_encoder`.

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
    config, mean, std = _read_architecture(folder)
  elif published in dinov2.PUBLISHED:
    config, mean, std = dinov2.PUBLISHED[published], IMAGENET_MEAN, IMAGENET_STD
  else:
    raise ValueError(
      f"encoder {name!r} is no folder and no published architecture; "
      f"{nearest(published, dinov2.PUBLISHED)}"
    )
  module = vit.ViT(
    config, final_norm=final_norm, remat=remat, unroll=unroll, dtype=dtype
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
  published = dinov2.format_config(config)
  final_norm = "affine" if "norm" in params else "affine_free"
  shapes = _param_shapes(vit.ViT(config, final_norm=final_norm))
  mapping.check_params(params, shapes)
  tensors = mapping.export_params(dinov2.rules(config, final_norm), params)
  tensors.update(dinov2.constant_tensors(config, final_norm))
  preprocessor = _format_preprocessor(config.image_size, mean, std)

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
    if name in dinov2.PUBLISHED:
      hint = f'"{RANDOM}{name}" is the same network untrained, for a dry run'
    elif name.startswith("facebook/"):
      hint = f"of DINOv2's ids, {nearest(name, dinov2.PUBLISHED)}"
    else:
      raise
    raise FileNotFoundError(f"{error}; {hint}") from error


def _read_architecture(
  folder: pathlib.Path,
) -> tuple[vit.ViTConfig, tuple[float, ...], tuple[float, ...]]:
  """(hyper-parameters, mean, std) of a model folder."""
  config = dinov2.parse_config(
    files.read_config(folder), folder / "config.json"
  )
  return config, *_read_preprocessor(folder / "preprocessor_config.json")


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
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    scale = leaf.shape[-2] ** -0.5 if name.endswith("kernel") else 0.02
    return np.float32(scale) * rng.standard_normal(leaf.shape, np.float32)

  return jax.tree_util.tree_map_with_path(one, shapes)


def _param_shapes(module: vit.ViT) -> Any:
  """The module's parameters as shapes; nothing is allocated."""
  side = module.config.grid * module.config.patch_size
  images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
  return jax.eval_shape(module.init, jax.random.key(0), images)["params"]


def _statistics(values: Any, name: str, where: str) -> tuple[float, ...]:
  try:
    out = tuple(float(value) for value in values)
  except (TypeError, ValueError) as error:
    raise ValueError(f"{where}: {name} {values!r} is not 3 numbers") from error
  if len(out) != 3 or not all(math.isfinite(value) for value in out):
    raise ValueError(f"{where}: {name} {values!r} is not 3 finite numbers")
  if "std" in name and min(out) <= 0:
    raise ValueError(f"{where}: {name} {values!r} is not positive")
  return out


def _read_preprocessor(
  path: pathlib.Path,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
  """(mean, std) of a preprocessor file; ImageNet's where there is none."""
  if not path.exists():
    return IMAGENET_MEAN, IMAGENET_STD
  raw = files.read_json(path)
  rescale = raw.get("rescale_factor", 1 / 255)
  if not raw.get("do_rescale", True) or not math.isclose(
    rescale, 1 / 255, rel_tol=1e-4
  ):
    raise ValueError(f"{path}: only images rescaled by 1/255 are supported")
  if not raw.get("do_normalize", True):
    return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
  mean = raw.get("image_mean", IMAGENET_MEAN)
  std = raw.get("image_std", IMAGENET_STD)
  return (
    _statistics(mean, "image_mean", str(path)),
    _statistics(std, "image_std", str(path)),
  )


def _format_preprocessor(
  image_size: int, mean: Sequence[float], std: Sequence[float]
) -> dict[str, Any]:
  """preprocessor_config.json of transformers' BitImageProcessor."""
  return {
    "crop_size": {"height": image_size, "width": image_size},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": list(_statistics(mean, "mean", "save_encoder")),
    "image_processor_type": "BitImageProcessor",
    "image_std": list(_statistics(std, "std", "save_encoder")),
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": image_size},
  }
