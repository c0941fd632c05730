"""One way to load any autoencoder: ours, and others' to measure against.

    vae = load_autoencoder("stabilityai/sd-vae-ft-ema")
    z = vae.encode(images)       # uint8 (B, H, W, 3) → float32 (B, h, w, C)
    x = vae.decode(z)            # → uint8 (B, H, W, 3)

Others' are diffusers' `AutoencoderKL` (Stable Diffusion, FLUX, and MAR's and
VA-VAE's once `python -m psvae_jax.convert` made folders of their checkpoints)
and `AutoencoderRAE`.
"""

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from psvae_jax import exported
from psvae_jax.config import nearest
from psvae_jax.evaluators.image_metrics import to_uint8
from psvae_jax.image_codec import ImageCodec, Program
from psvae_jax.models.kl_autoencoder import KLAutoencoder, KLConfig
from psvae_jax.models.rae_autoencoder import RAE, LatentNorm, RAEConfig
from psvae_jax.pretrained import (
  autoencoder_kl,
  autoencoder_rae,
  files,
  untrained,
)
from psvae_jax.psvae import PSVAE

_CLASSES = (autoencoder_kl.CLASS_NAME, autoencoder_rae.CLASS_NAME)
# A pipeline's repository has its autoencoder in this folder.
_PART = "vae"
_STEM = autoencoder_kl.STEM
_FILES = tuple(
  f"{place}{name}"
  for place in ("", f"{_PART}/")
  for name in (
    "config.json",
    f"{_STEM}.safetensors",
    f"{_STEM}-*.safetensors",
    f"{_STEM}.safetensors.index.json",
  )
)
# What makes a latent; the rest makes images of it.
_MAKERS = ("encoder", "quant_conv", "latents_mean", "latents_std")


class ImportedAutoencoder(ImageCodec):
  """Another project's autoencoder, with the surface of `PSVAE`.

  Latents are as the networks give and take them. Generators trained on a KL
  autoencoder's take (z − `shift_factor`) · `scaling_factor` in place of z; on
  RAE's z · `scaling_factor`, where z is standardised already.

  Args:
    config: hyper-parameters of a KL autoencoder or of an RAE.
    params: parameters of its module.
    name: where it came from, for messages and records.
    batch_size: longest batch that is computed at once; changes memory and
      speed, not results beyond rounding.
    dtype: compute dtype.
    image_size: what `image_size` says, of a KL autoencoder: its networks take
      any size that is a multiple of their factor. By default that it was
      trained for.

  Attributes:
    name, batch_size: see above.
    fingerprint: of architecture and parameters.
    scaling_factor: what generators multiply latents with.
    shift_factor: what they subtract before.
    description: the architecture, as JSON takes it.
  """

  def __init__(
    self,
    config: KLConfig | RAEConfig,
    params: dict[str, Any],
    *,
    name: str,
    batch_size: int = 32,
    dtype: Any = jnp.float32,
    image_size: int | None = None,
  ) -> None:
    dtype = jnp.dtype(dtype)
    self._config = config
    if isinstance(config, KLConfig):
      kind, self.shift_factor = _CLASSES[0], config.shift_factor
      self._model = KLAutoencoder(config, dtype)
      self._factor = config.factor
      size = config.sample_size // self._factor * self._factor
      self._image_size = max(size, self._factor)
    else:
      kind, self.shift_factor = _CLASSES[1], 0.0
      statistics = params["latents_mean"].shape
      self._model = RAE(config, statistics, dtype)
      self._factor = None
      self._image_size = config.input_size
    self.scaling_factor = config.scaling_factor
    self.description = {"class": kind, **_jsonable(dataclasses.asdict(config))}
    super().__init__(
      params,
      name=name,
      fingerprint=_digest(self.description, params),
      batch_size=batch_size,
    )
    if image_size is not None:
      self._check_size(image_size, image_size)
      if self._factor is not None:
        self._image_size = image_size

  @property
  def model(self) -> KLAutoencoder | RAE:
    """The module: `posterior` or `encode`, and `decode`."""
    return self._model

  @functools.cached_property
  def latent_fingerprint(self) -> str:
    """Names the latent space: decoders of one encoder share it."""
    makers = {
      name: self._params[name] for name in _MAKERS if name in self._params
    }
    return _digest(self.description, makers)

  @property
  def image_size(self) -> int:
    """Side of the images it was made for, pixels; see the class."""
    return self._image_size

  @property
  def output_size(self) -> int:
    """Side of the images that it makes of those, pixels."""
    if self._factor is None:
      return self._config.output_size
    return self._image_size

  @property
  def channels(self) -> int:
    """Latent channels C."""
    if self._factor is None:
      return self._config.encoder.width
    return self._config.latent_channels

  @property
  def grid(self) -> int:
    """Side h = w of the latent grid of images of `image_size`."""
    if self._factor is None:
      return self._config.grid
    return self._image_size // self._factor

  def __repr__(self) -> str:
    return (
      f"ImportedAutoencoder({self.name}, {self.output_size}×"
      f"{self.output_size} pixels ↔ {self.grid}×{self.grid}×{self.channels}, "
      f"{self.fingerprint})"
    )

  def _programs(self) -> tuple[Program, Program]:
    model = self._model
    return functools.partial(_encode, model), functools.partial(_decode, model)

  def _check_size(self, height: int, width: int) -> None:
    factor = self._factor
    if factor is None:
      super()._check_size(height, width)
    elif height < factor or width < factor or height % factor or width % factor:
      raise ValueError(
        f"images are {height}×{width}; this autoencoder takes sides that are "
        f"multiples of {factor}"
      )

  def _latent_grid(self) -> int | None:
    return super()._latent_grid() if self._factor is None else None


# Modules hash by their fields: autoencoders of one architecture share programs.
@functools.partial(jax.jit, static_argnums=0)
def _encode(module, params, images):
  x = images.astype(jnp.float32) / 127.5 - 1.0
  z = module.apply({"params": params}, x, method="encode")
  return z.astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def _decode(module, params, z):
  pixels = module.apply({"params": params}, z, method="decode")
  return to_uint8(pixels.astype(jnp.float32))


def load_autoencoder(
  path_or_name: str | os.PathLike,
  *,
  batch_size: int = 32,
  dtype: Any = None,
  image_size: int | None = None,
  stage: str | None = None,
  latent_norm: LatentNorm = "diffusers",
) -> PSVAE | ImportedAutoencoder:
  """Loads an autoencoder, ours or another's.

  Args:
    path_or_name: a workdir or exported folder of ours, or "embedded"; a folder
      of diffusers' `AutoencoderKL` or `AutoencoderRAE`, or of a pipeline that
      has one in "vae"; a hub id of those, which is downloaded; or "random:ID"
      with one of `published()`: that architecture with random parameters, for
      benchmarks and tests, never for results.
    batch_size: longest batch that is computed at once.
    dtype: compute dtype of another's, float32 by default. Ours compute as they
      were trained.
    image_size: side of the images it is to be used with, where it takes more
      than one.
    stage: which one of a workdir of ours; by default the last.
    latent_norm: how an RAE's latents are standardised: by diffusers'
      deviation + 1e-5, or with "rae" by the deviation alone, which RAE's own
      code does.

  Raises:
    FileNotFoundError: a folder or one of its files does not exist.
    ValueError: no such published autoencoder, an unsupported architecture, a
      malformed or ill-fitting file, or an option that it does not have; the
      message names it.
    CheckpointError: of ours, see `PSVAE.from_pretrained`.
  """
  name = os.fspath(path_or_name)
  folder = None
  if not name.startswith(untrained.RANDOM):
    folder = find_folder(name)
    if folder is None:
      return _load_ours(name, batch_size, dtype, image_size, stage)
  if stage is not None:
    raise ValueError(f"{name} is no workdir: it has no stage {stage!r}")
  config, params = _random(name) if folder is None else _read(folder)
  if isinstance(config, RAEConfig):
    config = dataclasses.replace(config, latent_norm=latent_norm)
  return ImportedAutoencoder(
    config,
    params,
    name=name,
    batch_size=batch_size,
    dtype=jnp.float32 if dtype is None else dtype,
    image_size=image_size,
  )


def published() -> tuple[str, ...]:
  """Every ID of "random:ID"."""
  return (*autoencoder_kl.PUBLISHED, *autoencoder_rae.PUBLISHED)


def find_folder(name: str) -> Path | None:
  """The folder of another's autoencoder.

  Args:
    name: a folder with an autoencoder of diffusers', or of a pipeline that has
      one in "vae"; a hub id of those, of which nothing else is downloaded; or
      a name of ours.

  Returns:
    The folder whose config.json has diffusers' "_class_name", "vae" in a
    pipeline's; None if `name` is ours.

  Raises:
    FileNotFoundError: there is no such folder, and the hub does not give it.
    ValueError: a file; or an id of the hub without an autoencoder.
  """
  path = Path(name).expanduser()
  if name == exported.EMBEDDED:
    return None
  if path.is_file():
    raise ValueError(
      f"{path} is a file; give a folder. `python -m psvae_jax.convert "
      "autoencoder-kl` makes one of a checkpoint in LDM's layout"
    )
  local = path.is_dir()
  folder = path if local else files.resolve_folder(name, _FILES)
  for place in (folder, folder / _PART):
    if (place / "config.json").is_file() and "_class_name" in (
      files.read_config(place)
    ):
      return place
  if local:
    return None
  raise ValueError(
    f"{name} of the Hugging Face hub is no autoencoder of diffusers': neither "
    f'its config.json nor {_PART}/config.json has a "_class_name"'
  )


def _read(folder: Path) -> tuple[KLConfig | RAEConfig, dict[str, Any]]:
  """Hyper-parameters and host parameters of another's folder."""
  kind = files.read_config(folder)["_class_name"]
  if kind not in _CLASSES:
    raise ValueError(
      f"{folder / 'config.json'}: _class_name {kind!r} is not supported; "
      f"supported: {', '.join(_CLASSES)}"
    )
  if kind == autoencoder_kl.CLASS_NAME:
    return autoencoder_kl.read_folder(folder)
  return autoencoder_rae.read_folder(folder)


def _random(name: str) -> tuple[KLConfig | RAEConfig, dict[str, Any]]:
  """A published architecture with random parameters."""
  key = name.removeprefix(untrained.RANDOM)
  if key in autoencoder_rae.PUBLISHED:
    config = autoencoder_rae.PUBLISHED[key]
    return config, autoencoder_rae.random_params(config)
  if key not in autoencoder_kl.PUBLISHED:
    raise ValueError(
      f"{name!r}: no such autoencoder; {nearest(key, published())}"
    )
  config = autoencoder_kl.PUBLISHED[key]
  shapes = autoencoder_kl.param_shapes(config)
  return config, untrained.random_params(shapes)


def _load_ours(
  name: str,
  batch_size: int,
  dtype: Any,
  image_size: int | None,
  stage: str | None,
) -> PSVAE:
  vae = PSVAE.from_pretrained(name, stage=stage, batch_size=batch_size)
  own = vae.model.encoder.dtype
  if dtype is not None and jnp.dtype(dtype) != jnp.dtype(own):
    raise ValueError(
      f"{name} computes in {jnp.dtype(own).name}, as its config says, not in "
      f"{jnp.dtype(dtype).name}"
    )
  if image_size not in (None, vae.image_size, vae.output_size):
    raise ValueError(
      f"{name} takes images of {vae.image_size} or {vae.output_size} pixels a "
      f"side, not {image_size}"
    )
  return vae


def _jsonable(value: Any) -> Any:
  """Tuples as lists, as a JSON file gives them back."""
  return json.loads(json.dumps(value))


def _digest(description: dict[str, Any], params: Any) -> str:
  """16 hex digits of a SHA-256 over architecture and parameters."""
  content = json.dumps(description, sort_keys=True)
  content += "\n" + files.fingerprint_params(params)
  return hashlib.sha256(content.encode()).hexdigest()[:16]
