"""A trained generator with all that it stands on: load it, write it.

It is read from a workdir, finished or still in training, or from an exported
folder (`exported.py`). Either way the autoencoder and the text encoder must be
those it was trained with.
"""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from psvae_jax import checkpoint, exported
from psvae_jax.config import (
  ComputeConfig,
  Config,
  GeneratorModel,
  SampleConfig,
)
from psvae_jax.config import parser as config_parser
from psvae_jax.latent_stats import LatentStats
from psvae_jax.models import generator as generator_lib
from psvae_jax.pretrained import files
from psvae_jax.pretrained.text import TextEncoder, load_text_encoder
from psvae_jax.pretrained.tokenizer import TOKENIZER_FILES
from psvae_jax.psvae import PSVAE
from psvae_jax.tasks import generator as task_lib
from psvae_jax.tasks.latent_data import STATS_FILE

_TEXT_FILES = (
  "config.json",
  "model*.safetensors",
  "model.safetensors.index.json",
  *TOKENIZER_FILES,
)


# eq=False: arrays have no plain equality; compare fingerprints.
@dataclasses.dataclass(frozen=True, eq=False)
class SavedGenerator:
  """Everything that makes images.

  Attributes:
    generator: the modules.
    params: the DiT's.
    autoencoder: the one whose latents it makes.
    text_encoder: None for a class-conditional generator.
    stats: of the latents.
    sample: how it samples unless told otherwise.
    stage: "t2i" or "edit".
    fingerprint: of the generator, as its checkpoints carry it.
    description: the fingerprint's readable parts.
  """

  generator: generator_lib.Generator
  params: Any
  autoencoder: PSVAE
  text_encoder: TextEncoder | None
  stats: LatentStats
  sample: SampleConfig
  stage: str
  fingerprint: str
  description: dict[str, Any]

  @property
  def frozen(self) -> dict[str, Any]:
    """What the modules read beside the DiT's; see `models.generator`."""
    params = self.autoencoder.params
    frozen = {
      "autoencoder": {name: params[name] for name in generator_lib.MODULES},
      "text_encoder": {},
      "latent_stats": self.stats.arrays,
    }
    if self.text_encoder is None:
      label = np.array([self.generator.config.num_classes], np.int32)
      return {**frozen, "null": {"labels": label}}
    text, mask = jax.device_get(self.text_encoder([""]))
    text = np.where(mask[..., None], text, 0)
    return {
      **frozen,
      "text_encoder": self.text_encoder.params,
      "null": {"text": text, "text_mask": mask},
    }


def stages_with_checkpoints(workdir: str | os.PathLike) -> list[str]:
  """Generator stages of a workdir that `load` can load, in order."""
  return [
    stage
    for stage in task_lib.PARTS
    if checkpoint.has_checkpoint(Path(workdir) / stage / "checkpoints")
  ]


def load(
  path: str | os.PathLike,
  *,
  stage: str | None = None,
  autoencoder: str | os.PathLike | None = None,
) -> SavedGenerator:
  """Loads a workdir or an exported folder.

  Args:
    path: --workdir of a training job, --out of an export, or "embedded".
    stage: which one; by default the last one that has a checkpoint.
    autoencoder: where the autoencoder is now, if it has moved.

  Raises:
    FileNotFoundError: no such folder, or no generator in it yet.
    ValueError: another job's folder, a stage that it does not have, another
      autoencoder than the generator's own, or a damaged file.
    CheckpointError: the checkpoints do not belong to the workdir's config, its
      autoencoder or text encoder, or are damaged.
  """
  folder = exported.resolve(path, "generator")
  if exported.is_exported(folder):
    return _load_exported(folder, stage, autoencoder)
  return _load_workdir(folder, stage, autoencoder)


def _load_workdir(
  workdir: Path, stage: str | None, autoencoder: str | os.PathLike | None
) -> SavedGenerator:
  stage = _pick_stage(workdir, stage)
  config = _read_config(workdir, stage)
  if not autoencoder:
    autoencoder = config.autoencoder.path or workdir
  vae = PSVAE.from_pretrained(
    autoencoder, stage=config.autoencoder.stage or None
  )
  text_encoder, generator = _build(
    config.model, config.compute, vae, _text_folder(config.model)
  )
  # Before the checkpoint: it says more plainly what does not fit.
  stats = LatentStats.load(workdir / STATS_FILE, vae.latent_fingerprint)
  description = task_lib.describe(config, vae, text_encoder)
  fingerprint = task_lib.fingerprint(description)
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = checkpoint.restore_ema(
    workdir / stage / "checkpoints",
    {task_lib.DIT: _param_shapes(generator, device)},
    (task_lib.DIT,),
    fingerprint,
    description=description,
  )[task_lib.DIT]
  return SavedGenerator(
    generator,
    params,
    vae,
    text_encoder,
    stats,
    config.sample,
    stage,
    fingerprint,
    description,
  )


def _load_exported(
  folder: Path, stage: str | None, autoencoder: str | os.PathLike | None
) -> SavedGenerator:
  raw, path = exported.read_config(folder), folder / "config.json"
  if raw["kind"] != "generator":
    raise ValueError(
      f"{folder} is an exported {raw['kind']}, not a generator; load it with "
      "psvae_jax.PSVAE.from_pretrained"
    )
  if stage not in (None, raw.get("stage")):
    raise ValueError(
      f"{folder} was exported from stage {raw.get('stage')!r}; it has no stage "
      f"{stage!r}"
    )
  kinds = {
    "model": GeneratorModel,
    "compute": ComputeConfig,
    "sample": SampleConfig,
  }
  model, compute, sample = exported.parse_sections(raw, path, kinds).values()
  vae = PSVAE.from_pretrained(autoencoder or folder)
  text_folder = None
  if model.condition == "text":
    name = exported.field(raw, "text_encoder", str, path)
    local = folder / name
    text_folder = local if local.is_dir() else name
    if name == exported.EMBEDDED:
      text_folder = task_lib.EMBEDDED_TEXT_ENCODER
  text_encoder, generator = _build(model, compute, vae, text_folder)
  stats = LatentStats.load(folder / STATS_FILE, vae.latent_fingerprint)
  _check_parts(folder, raw["description"], vae, text_encoder)
  params = exported.read_part(folder, task_lib.DIT, _param_shapes(generator))
  return SavedGenerator(
    generator,
    params,
    vae,
    text_encoder,
    stats,
    sample,
    raw["stage"],
    raw["fingerprint"],
    raw["description"],
  )


def save(
  folder: Path,
  saved: SavedGenerator,
  *,
  autoencoder: str,
  dtype: str = "float32",
  provenance: Mapping[str, Any] | None = None,
) -> None:
  """Writes what `load` reads, all but the autoencoder.

  Args:
    folder: an existing folder; see `exported.new_folder`.
    saved: what to write.
    autoencoder: where the autoencoder will be: a folder inside `folder`, or
      "embedded".
    dtype: "float32" or "bfloat16" of the DiT's file.
    provenance: where it comes from, for people.
  """
  exported.write_part(folder, task_lib.DIT, saved.params, dtype)
  saved.stats.save(folder / STATS_FILE)
  section = dataclasses.asdict(saved.generator.config)
  section.pop("text_encoder")  # a path of another machine
  dit = saved.generator.dit
  compute = ComputeConfig(dtype=jnp.dtype(dit.dtype).name, unroll=dit.unroll)
  exported.write_config(
    folder,
    "generator",
    {
      "stage": saved.stage,
      "fingerprint": saved.fingerprint,
      "description": saved.description,
      "model": section,
      "compute": dataclasses.asdict(compute),
      "sample": dataclasses.asdict(saved.sample),
      "autoencoder": autoencoder,
      "text_encoder": _save_text_encoder(folder, saved.text_encoder),
      "dtype": dtype,
      "provenance": dict(provenance or {}),
    },
  )


def _save_text_encoder(folder: Path, encoder: TextEncoder | None) -> str | None:
  """Copies a local text encoder; the embedded and the Hub's keep their name."""
  if encoder is None:
    return None
  source = Path(encoder.name).expanduser()
  if source.resolve() == task_lib.EMBEDDED_TEXT_ENCODER.resolve():
    return exported.EMBEDDED
  if not source.is_dir():
    return encoder.name
  target = folder / "text_encoder"
  target.mkdir()
  for pattern in _TEXT_FILES:
    for path in source.glob(pattern):
      shutil.copyfile(path, target / path.name)
  return target.name


def _build(
  config: GeneratorModel,
  compute: ComputeConfig,
  vae: PSVAE,
  text_folder: str | os.PathLike | None,
) -> tuple[TextEncoder | None, generator_lib.Generator]:
  text_encoder = None
  if config.condition == "text":
    text_encoder = load_text_encoder(text_folder, max_length=config.text_length)
  generator = generator_lib.build(
    config, compute, vae.model, text_encoder and text_encoder.module
  )
  return text_encoder, generator


def _text_folder(config: GeneratorModel) -> str | os.PathLike:
  return config.text_encoder or task_lib.EMBEDDED_TEXT_ENCODER


def _param_shapes(generator: generator_lib.Generator, place: Any = None) -> Any:
  """The DiT's parameters as shapes; nothing is allocated."""
  shapes = jax.eval_shape(generator.init, jax.random.key(0))
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes
  )


def _check_parts(
  folder: Path,
  description: Mapping[str, Any],
  vae: PSVAE,
  text_encoder: TextEncoder | None,
) -> None:
  """Refuses an autoencoder or text encoder that the DiT was not trained on."""
  found = {
    "autoencoder": vae.latent_fingerprint,
    "text_encoder": text_encoder.fingerprint if text_encoder else "",
  }
  for name, value in found.items():
    if description.get(name) != value:
      what = name.replace("_", " ")
      raise ValueError(
        f"{folder} was trained with the {what} {description.get(name)}, and "
        f"this is {value}: give the {what} that it was trained with"
      )


def _read_config(workdir: Path, stage: str) -> Config:
  """The config a stage was trained with, or else the last job's."""
  paths = [workdir / stage / "config.json", workdir / "config.json"]
  path = next((path for path in paths if path.is_file()), None)
  if path is None:
    raise FileNotFoundError(
      f"{workdir} has checkpoints of {stage} but no config.json, which says "
      "what they are; copy it from the job's workdir"
    )
  config = config_parser.parse(files.read_json(path))
  if not isinstance(config.model, GeneratorModel):
    raise ValueError(
      f"{path} is the config of {', '.join(config.stages)}, not of {stage}"
    )
  return config


def _pick_stage(workdir: Path, stage: str | None) -> str:
  if not workdir.is_dir():
    raise FileNotFoundError(
      f"{workdir} is not a folder; give the --workdir of a training job, an "
      'exported folder, or "embedded"'
    )
  found = stages_with_checkpoints(workdir)
  if not found:
    looked = ", ".join(f"{name}/checkpoints" for name in task_lib.PARTS)
    raise FileNotFoundError(
      f"{workdir} has no checkpoint of a generator; looked for {looked} in it. "
      "Train one with --config=configs/t2i.py"
    )
  if stage is None:
    return found[-1]
  if stage not in found:
    raise ValueError(
      f"{workdir} has no checkpoint of stage {stage!r}; it has "
      + ", ".join(found)
    )
  return stage
