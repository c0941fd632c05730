"""A trained autoencoder as one object: images ↔ latents, and features.

    vae = psvae_jax.PSVAE.from_pretrained("runs/psvae")
    z = vae.encode(images)       # uint8 (B, H, W, 3) → float32 (B, h, w, C)
    x = vae.decode(z)            # → uint8 (B, H, W, 3)

How inputs are cut into batches: see `image_codec`.
"""

import functools
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax import checkpoint, exported
from psvae_jax.config import AutoencoderModel, Config
from psvae_jax.config import parser as config_parser
from psvae_jax.evaluators.image_metrics import to_uint8
from psvae_jax.image_codec import ImageCodec, Program
from psvae_jax.models import autoencoder as model_lib
from psvae_jax.pretrained import files
from psvae_jax.pretrained.encoder import Encoder, load_encoder
from psvae_jax.tasks import autoencoder as task_lib

_E = "encoder"


class PSVAE(ImageCodec):
  """Encodes and decodes with the moving averages of a trained stage.

  Args:
    model: the modules.
    params: module → parameters, E included.
    stage: which stage they are from.
    fingerprint: of the model, as its checkpoints carry it.
    batch_size: longest batch that is computed at once; changes memory and
      speed, not results beyond rounding.
    description: the fingerprint's readable parts.
    latent_fingerprint: of what `params` were rounded from; by default that of
      `params`.
    name: where it came from, for messages and records; by default the stage.

  Attributes:
    stage: "svae", "psvae", …
    fingerprint: identifies the model, its preprocessing and the original E.
    batch_size: see above.
    description: see above; {} if unknown.
    name: see above.
  """

  def __init__(
    self,
    model: model_lib.Autoencoder,
    params: dict[str, Any],
    *,
    stage: str,
    fingerprint: str,
    batch_size: int = 32,
    description: Mapping[str, Any] | None = None,
    latent_fingerprint: str | None = None,
    name: str | None = None,
  ) -> None:
    super().__init__(
      params,
      name=stage if name is None else name,
      fingerprint=fingerprint,
      batch_size=batch_size,
    )
    self.stage = stage
    self.description = dict(description or {})
    self._latent_fingerprint = latent_fingerprint
    self._model = model
    self._features_fn = jax.jit(self._trace_features)

  @classmethod
  def from_pretrained(
    cls,
    path: str | os.PathLike,
    *,
    stage: str | None = None,
    batch_size: int = 32,
  ) -> "PSVAE":
    """Loads a workdir, finished or still in training, or an exported folder.

    Args:
      path: the folder that `python -m psvae_jax.main --workdir` or
        `python -m psvae_jax.export --out` wrote; or "embedded", the miniature
        that comes with the package.
      stage: which one; by default the last one that has a checkpoint. An
        exported folder has one only.
      batch_size: see the class.

    Raises:
      FileNotFoundError: no such folder, or nothing of a job in it.
      ValueError: the job is not an autoencoder's, or has no such stage; or an
        exported folder is damaged.
      CheckpointError: the checkpoints do not belong to the workdir's config
        or to any encoder that is at hand, or are damaged.
    """
    folder = exported.resolve(path, "autoencoder")
    load = _load_workdir
    if exported.is_exported(folder):
      load = exported.load_autoencoder
    model, params, identity = load(folder, stage)
    name = os.fspath(path)
    return cls(model, params, batch_size=batch_size, name=name, **identity)

  @property
  def model(self) -> model_lib.Autoencoder:
    """The modules."""
    return self._model

  @functools.cached_property
  def latent_fingerprint(self) -> str:
    """Names the latent space: a generator fits this autoencoder, or not.

    See the function of this name. A rounded export has that of the parameters
    it was made from.
    """
    if self._latent_fingerprint is not None:
      return self._latent_fingerprint
    return latent_fingerprint(self.fingerprint, self._params)

  @property
  def image_size(self) -> int:
    """Side of the images that the encoder sees, pixels."""
    return self._model.config.image_size

  @property
  def output_size(self) -> int:
    """Side of the product's images, pixels."""
    return self._model.config.output_size

  @property
  def channels(self) -> int:
    """Latent channels C."""
    return self._model.config.channels

  @property
  def grid(self) -> int:
    """Side h = w of the latent grid."""
    return self._model.grid

  def features(self, images: np.ndarray | jax.Array) -> np.ndarray:
    """Images as for `encode` → float32 (B, h, w, D) of this stage's encoder."""
    return self._in_batches(self._features_fn, self._check_images(images))

  def __repr__(self) -> str:
    return (
      f"PSVAE({self.stage}, {self.output_size}×{self.output_size} pixels ↔ "
      f"{self.grid}×{self.grid}×{self.channels}, {self.fingerprint})"
    )

  def _programs(self) -> tuple[Program, Program]:
    return jax.jit(self._trace_encode), jax.jit(self._trace_decode)

  def _trace_features(self, params: Any, images: jax.Array) -> jax.Array:
    x = images.astype(jnp.float32) / 127.5 - 1.0
    features = self._model.features(params[_E], x)
    return features.astype(jnp.float32)

  def _trace_encode(self, params: Any, images: jax.Array) -> jax.Array:
    features = self._trace_features(params, images)
    posterior = self._model.posterior(params["semantic_encoder"], features)
    return posterior.mode().astype(jnp.float32)

  def _trace_decode(self, params: Any, z: jax.Array) -> jax.Array:
    pixels = self._model.decode_pixels(params["pixel_decoder"], z)
    return to_uint8(pixels.astype(jnp.float32))


def latent_fingerprint(fingerprint: str, params: dict[str, Any]) -> str:
  """Names the latent space of an autoencoder.

  Args:
    fingerprint: of the model, as its checkpoints carry it.
    params: module → parameters. E and the semantic encoder count; pixel and
      semantic decoder do not matter.

  Returns:
    16 hex digits of a SHA-256.
  """
  makers = {name: params[name] for name in (_E, "semantic_encoder")}
  content = f"{fingerprint}\n{files.fingerprint_params(makers)}"
  return hashlib.sha256(content.encode()).hexdigest()[:16]


def stages_with_checkpoints(workdir: str | os.PathLike) -> list[str]:
  """Stages of a workdir that `from_pretrained` can load, in order."""
  return [
    stage
    for stage in task_lib.ROUTES
    if checkpoint.has_checkpoint(Path(workdir) / stage / "checkpoints")
  ]


def _load_workdir(
  workdir: Path, stage: str | None
) -> tuple[model_lib.Autoencoder, dict[str, Any], dict[str, Any]]:
  """Modules, parameters, and the identity that `PSVAE` is built with."""
  config = _read_config(workdir, stage)
  stage = _pick_stage(workdir, stage)
  encoder, description = _find_encoder(workdir, stage, config)
  model = model_lib.build(
    config.model, config.compute, encoder.module, encoder.mean, encoder.std
  )
  fingerprint = task_lib.fingerprint(description)
  restored = checkpoint.restore_ema(
    workdir / stage / "checkpoints",
    _abstract(model, encoder.params),
    task_lib.ROUTES[stage].trains,
    fingerprint,
    description=description,
  )
  identity = dict(stage=stage, fingerprint=fingerprint, description=description)
  return model, {_E: encoder.params, **restored}, identity


def _read_config(workdir: Path, stage: str | None) -> Config:
  """The config a stage was trained with, or else the last job's."""
  if not workdir.is_dir():
    raise FileNotFoundError(
      f"{workdir} is not a folder; give the --workdir of a training job"
    )
  names = [stage] if stage else stages_with_checkpoints(workdir)[-1:]
  paths = [workdir / name / "config.json" for name in (*names, "")]
  path = next((path for path in paths if path.is_file()), None)
  if path is None:
    raise FileNotFoundError(
      f"{workdir} is not a workdir: it has no config.json; give the --workdir "
      "of a training job"
    )
  raw = files.read_json(path)
  if "stages" not in raw:
    raise ValueError(
      f"{path} is not the config of a job (it has no stages); give the "
      "--workdir of a training job"
    )
  config = config_parser.parse(raw)
  if not isinstance(config.model, AutoencoderModel):
    raise ValueError(
      f"{workdir} trains {', '.join(config.stages)}, not an autoencoder; its "
      "encoders load with psvae_jax.load_encoder"
    )
  return config


def _pick_stage(workdir: Path, stage: str | None) -> str:
  found = stages_with_checkpoints(workdir)
  if not found:
    looked = ", ".join(f"{name}/checkpoints" for name in task_lib.ROUTES)
    raise FileNotFoundError(
      f"{workdir} has no checkpoint yet; looked for {looked} in it"
    )
  if stage is None:
    return found[-1]
  if stage not in found:
    raise ValueError(
      f"{workdir} has no checkpoint of stage {stage!r}; it has "
      + ", ".join(found)
    )
  return stage


def _find_encoder(
  workdir: Path, stage: str, config: Config
) -> tuple[Encoder, dict[str, Any]]:
  """The original E that the checkpoints belong to, and the model's description.

  A finished stage leaves a copy in the workdir. Until then E is where the
  config says.
  """
  names = [str(p.parent) for p in sorted(workdir.glob("frozen/*/config.json"))]
  names.append(config.model.encoder or str(task_lib.EMBEDDED_ENCODER))
  folder = workdir / stage / "checkpoints"
  error = None
  for name in names:
    encoder = load_encoder(
      name,
      final_norm=config.model.final_norm,
      unroll=config.compute.unroll,
      dtype=jnp.dtype(config.compute.dtype),
    )
    description = task_lib.describe(config, encoder)
    try:
      checkpoint.checked_latest_step(
        folder, task_lib.fingerprint(description), description
      )
      return encoder, description
    except checkpoint.CheckpointError as mismatch:
      error = mismatch
  raise error


def _abstract(model: model_lib.Autoencoder, encoder_params: Any) -> Any:
  """Shapes and places of all modules' parameters: one device holds them."""
  shapes = jax.eval_shape(model.init, jax.random.key(0), encoder_params)
  shapes = {_E: encoder_params, **shapes}
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes
  )
