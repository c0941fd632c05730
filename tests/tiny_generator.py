"""A tiny generator with random parameters, without training."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tiny
import tiny_autoencoder

from psvae_jax import checkpoint, exported
from psvae_jax.config import (
  CheckpointConfig,
  Config,
  DiTConfig,
  GeneratorModel,
  SampleConfig,
)
from psvae_jax.config import parser as config_parser
from psvae_jax.latent_stats import LatentStats
from psvae_jax.models import generator as generator_lib
from psvae_jax.pretrained.encoder import load_encoder
from psvae_jax.pretrained.text import TextEncoder, load_text_encoder
from psvae_jax.psvae import PSVAE
from psvae_jax.saved_generator import SavedGenerator
from psvae_jax.tasks import autoencoder as autoencoder_lib
from psvae_jax.tasks import generator as task_lib
from psvae_jax.tasks.generator import EMBEDDED_TEXT_ENCODER
from psvae_jax.tasks.latent_data import STATS_FILE
from psvae_jax.writers import write_json_atomic

DIT = DiTConfig(
  width=16, depth=2, num_heads=2, head_width=16, head_depth=1, head_num_heads=2
)
LENGTH = 12


@dataclasses.dataclass(frozen=True)
class TinyGenerator:
  """What a sampler takes.

  Attributes:
    generator: the modules.
    params: the DiT's, randomised.
    frozen: see `models.generator`.
    text_encoder: None with classes.
  """

  generator: generator_lib.Generator
  params: Any
  frozen: dict[str, Any]
  text_encoder: TextEncoder | None

  @property
  def tokenizer(self):
    return self.text_encoder and self.text_encoder.tokenizer


def build(encoder_folder: Path, num_classes: int = 0) -> TinyGenerator:
  """Builds it around a saved encoder; with classes instead of text if any."""
  base = _base(encoder_folder)
  text_encoder = None
  if not num_classes:
    text_encoder = load_text_encoder(EMBEDDED_TEXT_ENCODER, max_length=LENGTH)
  config = GeneratorModel(
    condition="class" if num_classes else "text",
    dit=DIT,
    text_length=LENGTH,
    num_classes=num_classes,
  )
  generator = generator_lib.build(
    config,
    base.config.compute,
    base.model,
    text_encoder and text_encoder.module,
  )
  rng = np.random.default_rng(0)
  channels = base.config.model.channels
  frozen = {
    "autoencoder": {name: base.params[name] for name in generator_lib.MODULES},
    "text_encoder": {},
    "latent_stats": {
      "mean": rng.normal(size=channels).astype(np.float32),
      "std": rng.uniform(0.5, 2, channels).astype(np.float32),
    },
    "null": {"labels": np.array([num_classes], np.int32)},
  }
  if text_encoder is not None:
    frozen["text_encoder"] = jax.device_get(text_encoder.params)
    text, mask = jax.device_get(text_encoder([""]))
    text = np.where(mask[..., None], text, 0)
    frozen["null"] = {"text": text, "text_mask": mask}
  shapes = jax.eval_shape(generator.init, jax.random.key(0))
  params = tiny.randomise(jax.tree_util.tree_map_with_path(_start, shapes))
  return TinyGenerator(generator, params, frozen, text_encoder)


# One compilation and one load of the encoder for all that is built around it.
_base = functools.cache(tiny_autoencoder.build)


def _start(path: Any, leaf: Any) -> np.ndarray:
  """Ones for gains, else zeros: on the host, where it costs nothing."""
  fill = np.ones if path[-1].key == "scale" else np.zeros
  return fill(leaf.shape, leaf.dtype)


SAMPLE = SampleConfig(steps=3, guidance=2.0, image_guidance=1.5, shift=2.0)


def autoencoder(encoder_folder: Path, seed: int = 0) -> PSVAE:
  """A `PSVAE` of random parameters; the seed changes the tuned encoder."""
  base = _base(encoder_folder)
  described = autoencoder_lib.describe(
    base.config, load_encoder(encoder_folder)
  )
  described = json.loads(json.dumps(described))
  return PSVAE(
    base.model,
    tiny.randomise(base.params, seed, scale=0.05),
    stage="psvae",
    fingerprint=autoencoder_lib.fingerprint(described),
    description=described,
  )


def export_autoencoder(
  vae: PSVAE, folder: Path, dtype: str = "float32"
) -> Path:
  """Writes it as an exported folder."""
  identity = {
    name: getattr(vae, name)
    for name in ("stage", "fingerprint", "description", "latent_fingerprint")
  }
  with exported.new_folder(folder) as partial:
    exported.save_autoencoder(
      partial, vae.model, vae.params, identity, dtype=dtype
    )
  return folder


def saved(
  encoder_folder: Path, stage: str = "edit", num_classes: int = 0
) -> SavedGenerator:
  """What a finished stage leaves, in memory."""
  made, vae = build(encoder_folder, num_classes), autoencoder(encoder_folder)
  stats = made.frozen["latent_stats"]
  config = Config(stages=(stage,), sections={}, model=made.generator.config)
  description = task_lib.describe(config, vae, made.text_encoder)
  return SavedGenerator(
    made.generator,
    made.params,
    vae,
    made.text_encoder,
    LatentStats(stats["mean"], stats["std"], 10, vae.latent_fingerprint),
    SAMPLE,
    stage,
    task_lib.fingerprint(description),
    json.loads(json.dumps(description)),
  )


def job_config(made: Any, stage: str, autoencoder: str = "") -> dict[str, Any]:
  """The raw config of a job that would have made it."""
  model = dataclasses.asdict(made.generator.config)
  return dict(
    stages=(stage,),
    model=model,
    sample=dataclasses.asdict(SAMPLE),
    autoencoder=dict(path=autoencoder),
  )


def write_stage(
  workdir: Path, generator: SavedGenerator, autoencoder: Path
) -> None:
  """What its training job leaves in a workdir: checkpoint, config, stats."""
  raw = job_config(generator, generator.stage, str(autoencoder))
  raw = config_parser.with_defaults(raw)
  folder = workdir / generator.stage
  folder.mkdir(parents=True)
  write_json_atomic(folder / "config.json", raw)
  write_json_atomic(workdir / "config.json", raw)
  generator.stats.save(workdir / STATS_FILE)
  state = {
    "params": {task_lib.DIT: jax.tree.map(np.zeros_like, generator.params)},
    "ema_params": {task_lib.DIT: generator.params},
  }
  checkpointer = checkpoint.Checkpointer(
    folder / "checkpoints",
    CheckpointConfig(),
    generator.fingerprint,
    generator.description,
  )
  checkpointer.save(7, jax.device_put(state), _NoData(), {})
  checkpointer.close()


class _NoData:
  """A data iterator without a position."""

  def get_state(self):
    return {}
